"The state-space layer: its forms agree on random shapes, with the paper's formulas written out in NumPy, and in their gradients."
import ast
import math
import sys
import tarfile
import types
from pathlib import Path

import einops
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lwm_course import ssm
from lwm_course.ssm import Mamba2, scan_chunk, scan_chunked, scan_sequential, scan_step

some = settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
sizes = dict(N=st.integers(1, 3), T=st.integers(1, 70), H=st.integers(1, 3), P=st.integers(1, 4), S=st.integers(1, 5),
             seed=st.integers(0, 999))


pytestmark = pytest.mark.usefixtures("one_thread")


def scan_inputs(N=2, T=20, H=2, P=3, S=4, seed=0, dtype=torch.float64):
    "x, dt, A, B, C, and a state before the first step."
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=dtype)
    x, dt, A = normal(N, T, H, P), F.softplus(normal(N, T, H)), -torch.exp(normal(H))
    return x, dt, A, normal(N, T, S), normal(N, T, S), normal(N, H, P, S)


def apart(a, b):
    "Largest difference, as a share of the largest value."
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()


def layer_and_input(width=32, T=40, N=2, seed=0, **options):
    torch.manual_seed(seed)
    layer = Mamba2(width, **{"head": 8, "state": 4, **options})
    for weight in (layer.dt_bias, layer.A_log, layer.D): torch.nn.init.normal_(weight)
    return layer, torch.randn(N, T, width)


def stepped(layer, u, state=None):
    state, outputs = layer.start(len(u)) if state is None else state, []
    for t in range(u.shape[1]):
        y, state = layer.step(u[:, t], state)
        outputs.append(y)
    return torch.stack(outputs, 1), state


# The scan

def explicit_sum(x, dt, A, B, C, h0):
    "The matrix form of the paper (Dao & Gu 2024, section 3.1), term by term, with products instead of logs."
    N, T, H, P = x.shape
    y = np.zeros((N, T, H, P))
    for n, t, head in np.ndindex(N, T, H):
        keeps = np.exp(dt[n, :t + 1, head] * A[head])
        y[n, t, head] = h0[n, head] @ C[n, t] * np.prod(keeps)
        for s in range(t + 1):
            y[n, t, head] += C[n, t] @ B[n, s] * np.prod(keeps[s + 1:]) * dt[n, s, head] * x[n, s, head]
    return y


@some
@given(**{**sizes, "T": st.integers(1, 12)})
def test_scan_is_the_sum_of_the_paper(N, T, H, P, S, seed):
    inputs = scan_inputs(N, T, H, P, S, seed)
    expected = torch.tensor(explicit_sum(*(v.numpy() for v in inputs)))
    assert apart(scan_sequential(*inputs)[0], expected) < 1e-10
    assert apart(scan_chunked(*inputs, chunk=5)[0], expected) < 1e-10


@some
@given(**sizes, chunk=st.integers(1, 80))
def test_chunked_equals_sequential(N, T, H, P, S, seed, chunk):
    inputs = scan_inputs(N, T, H, P, S, seed)
    for start in (inputs[5], None):
        (y, h), (y_chunked, h_chunked) = scan_sequential(*inputs[:5], start), scan_chunked(*inputs[:5], start, chunk=chunk)
        assert apart(y_chunked, y) < 1e-10 and apart(h_chunked, h) < 1e-10


@some
@given(**sizes)
def test_float32_agrees_to_1e_5(N, T, H, P, S, seed):
    inputs = scan_inputs(N, T, H, P, S, seed, torch.float32)
    terms = scan_sequential(inputs[0].abs(), *inputs[1:3], *(v.abs() for v in inputs[3:]))     # the sums, with nothing cancelling
    for a, b, size in zip(scan_chunked(*inputs), scan_sequential(*inputs), terms):
        assert (a - b).abs().max() <= 1e-5 * size.abs().max().clamp_min(1)


@some
@given(**sizes, cut=st.floats(0, 1))
def test_state_carries_over(N, T, H, P, S, seed, cut):
    x, dt, A, B, C, h0 = scan_inputs(N, T + 1, H, P, S, seed)
    k = 1 + int(cut * (T - 1))
    whole, last = scan_chunked(x, dt, A, B, C, h0, chunk=8)
    y1, h = scan_chunked(x[:, :k], dt[:, :k], A, B[:, :k], C[:, :k], h0, chunk=8)
    y2, h = scan_sequential(x[:, k:], dt[:, k:], A, B[:, k:], C[:, k:], h)
    assert apart(torch.cat([y1, y2], 1), whole) < 1e-10 and apart(h, last) < 1e-10


def test_step_is_the_first_of_a_scan():
    x, dt, A, B, C, h0 = scan_inputs(T=1)
    y, h = scan_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], h0)
    assert apart(y[:, None], scan_chunk(x, dt, A, B, C, h0)[0]) < 1e-12 and apart(h, scan_chunk(x, dt, A, B, C, h0)[1]) < 1e-12


@pytest.mark.parametrize("length, chunk", [(1, 4), (5, 2), (6, 3), (4, 9)])
def test_gradients_against_finite_differences(length, chunk):
    inputs = [v.requires_grad_() for v in scan_inputs(N=2, T=length, H=2, P=2, S=2)]
    assert torch.autograd.gradcheck(lambda *v: scan_chunked(*v, chunk=chunk), inputs)


def test_gradients_stay_finite_where_decay_is_extreme():
    # 200 steps that each keep e^-50: the future's exp would overflow, the past's product underflows
    x, dt, _, B, C, h0 = scan_inputs(T=200, H=1, dtype=torch.float32)
    dt, A = torch.full_like(dt, 5.0), torch.tensor([-10.0], requires_grad=True)
    y, h = scan_chunked(x, dt, A, B, C, h0, chunk=200)
    (y.square().sum() + h.square().sum()).backward()
    assert y.isfinite().all() and A.grad.isfinite().all()


def test_bfloat16_inputs_stay_within_the_rounding_bound():
    # Every term is a product of one x, one B and one C, each rounded by a share of 2^-8 at most.
    x, dt, A, B, C, _ = scan_inputs(T=150)
    rounded = [v.bfloat16().double() for v in (x, B, C)]
    y = scan_chunked(x, dt, A, B, C)[0]
    error = (scan_chunked(rounded[0], dt, A, *rounded[1:])[0] - y).abs()
    bound = ((1 + 2**-8)**3 - 1) * scan_chunked(x.abs(), dt, A, B.abs(), C.abs())[0]
    assert (error <= bound + 1e-9).all() and error.max() > 0


# The layer

def paper_layer(layer, u):
    "The layer's formulas (Dao & Gu 2024, section 7.1) in NumPy, float64, one sequence, one step after another."
    w = {name: value.detach().double().numpy() for name, value in layer.state_dict().items()}
    silu = lambda v: v / (1 + np.exp(-v))
    inner, S, H, P = layer.inner, layer.state, layer.heads, layer.head
    zxbcdt = u.double().numpy() @ w["project.weight"].T
    z, xbc, dt = np.split(zxbcdt, [inner, 2 * inner + 2 * S], -1)
    dt = np.log1p(np.exp(dt + w["dt_bias"]))
    k, h, out = w["conv.weight"].shape[-1], np.zeros((H, P, S)), []
    padded = np.concatenate([np.zeros((k - 1, xbc.shape[-1])), xbc])
    for t in range(len(u)):
        mixed = silu((padded[t:t + k] * w["conv.weight"][:, 0].T).sum(0) + w.get("conv.bias", 0))
        x, B, C = mixed[:inner].reshape(H, P), mixed[inner:inner + S], mixed[inner + S:]
        keep = np.exp(-np.exp(w["A_log"]) * dt[t])
        h = keep[:, None, None] * h + np.einsum("h,hp,s->hps", dt[t], x, B)
        y = (np.einsum("hps,s->hp", h, C) + w["D"][:, None] * x).reshape(-1) * silu(z[t])
        out.append(w["out.weight"] @ (w["norm.weight"] * y / np.sqrt((y * y).mean() + 1e-5)))
    return torch.tensor(np.array(out))


@some
@given(T=st.integers(1, 40), heads=st.integers(1, 3), expand=st.integers(1, 2), conv=st.integers(2, 5), state=st.integers(1, 6),
       bias=st.booleans(), seed=st.integers(0, 99))
def test_layer_is_the_layer_of_the_paper(T, heads, expand, conv, state, bias, seed):
    layer, u = layer_and_input(8 * heads, T, 1, seed, expand=expand, conv=conv, state=state, bias=bias)
    with torch.no_grad(): y = layer(u)[0]
    assert apart(y[0].double(), paper_layer(layer, u[0])) < 1e-4       # float32 against float64


@some
@given(T=st.integers(1, 70), N=st.integers(1, 3), chunk=st.integers(1, 40), conv=st.integers(1, 5), bias=st.booleans(),
       seed=st.integers(0, 99))
def test_three_forms_of_the_layer_agree(T, N, chunk, conv, bias, seed):
    layer, u = layer_and_input(16, T, N, seed, chunk=chunk, conv=conv, bias=bias)
    with torch.no_grad(): (y, state), others = layer(u), (layer(u, scan=scan_sequential), stepped(layer, u))
    for other, other_state in others:
        assert (other - y).abs().max() < 1e-5
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(state, other_state))


@some
@given(cuts=st.lists(st.tuples(st.integers(1, 20), st.booleans()), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_reading_and_playing_in_turns(cuts, seed):
    layer, u = layer_and_input(16, sum(n for n, _ in cuts), 2, seed)
    state, t, outputs = layer.start(2), 0, []
    with torch.no_grad():
        for n, play in cuts:
            y, state = stepped(layer, u[:, t:t + n], state) if play else layer(u[:, t:t + n], state)
            outputs.append(y)
            t += n
        assert (torch.cat(outputs, 1) - layer(u)[0]).abs().max() < 1e-5


def test_gradients_of_both_scans_agree():
    layer, u = layer_and_input()
    gradients = []
    for scan in (scan_chunked, scan_sequential):
        layer.zero_grad()
        layer(u, scan=scan)[0].square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in layer.named_parameters()})
    for name, gradient in gradients[0].items(): assert apart(gradient, gradients[1][name]) < 1e-4, name


def test_no_step_sees_the_future():
    layer, u = layer_and_input(T=50)
    changed = u.clone()
    changed[:, 20] += 1
    with torch.no_grad(): difference = (layer(u)[0] - layer(changed)[0]).abs().amax((0, 2))
    assert (difference[:20] == 0).all() and difference[20] > 0


def test_sequences_of_a_batch_do_not_mix():
    layer, u = layer_and_input(N=3)
    with torch.no_grad(): assert (layer(u)[0][1] - layer(u[1:2])[0][0]).abs().max() < 1e-6


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_bfloat16_forms_agree():
    # Seven roundings of a share 2^-8 on the way through either form (x, B, C, dt, gate; normed value; output), relative to the
    # largest output.
    layer, u = layer_and_input(64, seed=3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y, other = layer(u)[0].float(), stepped(layer, u)[0].float()
        state = layer(u)[1]
    assert (y - other).abs().max() <= 14 * 2**-8 * y.abs().max()
    assert state[1].dtype == torch.float32, "the scan's state accumulates: it stays float32"


def test_state_size_does_not_depend_on_history():
    layer, u = layer_and_input(T=300)
    with torch.no_grad(): states = [layer(u[:, :n])[1] for n in (1, 10, 300)]
    assert len({tuple(part.shape for part in state) for state in states}) == 1


@some
@given(T=st.integers(1, 40), N=st.integers(1, 3), share=st.floats(0, 1), remembered=st.booleans(), seed=st.integers(0, 99))
def test_rows_in_which_something_happens_are_enough(T, N, share, remembered, seed):
    layer, u = layer_and_input(16, T, N, seed, bias=False)
    happens = torch.rand(N, T) < share
    xBC, dt = torch.zeros(N, T, layer.channels), F.softplus(layer.dt_bias.detach()).repeat(N, T, 1)
    with torch.no_grad():
        before = layer(torch.randn(N, 9, 16))[1] if remembered else None
        gate, xBC[happens], dt[happens] = layer.split(u[happens])
        y, x, state = layer.mix(xBC, dt, before)
        dense, dense_state = layer(u * happens[..., None], before)
        rows = layer.finish(y[happens], x[happens], gate)
        rest = layer(torch.zeros(N, T, 16))[1]
    assert torch.allclose(rows, dense[happens], atol=1e-5) and all(torch.allclose(a, b, atol=1e-5) for a, b in zip(state, dense_state))
    assert not any(part.any() for part in rest), "zeros leave no trace"


def test_without_a_bias_only_dt_moves_a_state():
    layer, u = layer_and_input(bias=False)
    assert "conv.bias" not in layer.state_dict() and "conv.bias" in layer_and_input()[0].state_dict()
    with torch.no_grad():
        h = layer(u)[1][1]
        empty = torch.zeros(2, layer.conv.kernel_size[0] - 1, layer.channels)
        dt = torch.rand(2, 5, layer.heads)
        later = layer.mix(torch.zeros(2, 5, layer.channels), dt, (empty, h))[2]
    assert not later[0].any()
    assert torch.allclose(later[1], torch.exp(-dt.sum(1) * layer.A_log.exp())[..., None, None] * h, rtol=1e-4, atol=1e-7)


def test_mix_is_pytorchs_convolution_and_the_scan():
    layer, u = layer_and_input(conv=3)
    with torch.no_grad():
        _, xBC, dt = layer.split(u)
        y, x, (past, h) = layer.mix(xBC, dt)
        expected = layer.selected(layer.conv(F.pad(xBC.transpose(1, 2), (2, 0))).transpose(1, 2))
        y_scan, h_scan = scan_sequential(expected[0], dt, -layer.A_log.exp(), *expected[1:])
    assert torch.allclose(x, expected[0], atol=1e-6) and torch.equal(past, xBC[:, -2:])
    assert apart(y, y_scan) < 1e-5 and apart(h, h_scan) < 1e-5


def test_memories_are_spread_on_a_log_scale():
    layer = Mamba2(160, head=32)
    layer.reset_decay(2, 512)
    memory = 1 / (F.softplus(layer.dt_bias) * layer.A_log.exp())
    assert torch.allclose(memory, torch.tensor([2.0, 8, 32, 128, 512]), rtol=1e-4)


def test_exporters_may_vary_the_batch():
    layer = Mamba2(32).eval()

    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, u, past, h): return self.layer.step(u, (past, h))

    n = torch.export.Dim("n", min=2, max=64)
    program = torch.export.export(Step(), (torch.randn(3, 32), *layer.start(3)), dynamic_shapes=({0: n},) * 3)
    u = torch.randn(5, 32)
    with torch.no_grad(): exported, direct = program.module()(u, *layer.start(5))[0], layer.step(u, layer.start(5))[0]
    assert torch.allclose(exported, direct, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 9, 31), (2, 32), (2, 9, 9, 32)])
def test_forward_names_a_wrong_shape(shape):
    message = r"\(N, T, D\) with D = 32, not \(" + ", ".join(map(str, shape))
    with pytest.raises(ValueError, match=message): Mamba2(32)(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(2, 31), (2, 1, 32), (32,)])
def test_step_names_a_wrong_shape(shape):
    layer = Mamba2(32)
    with pytest.raises(ValueError, match=r"\(N, D\) with D = 32"): layer.step(torch.zeros(shape), layer.start(2))


def test_state_of_other_sequences_is_refused():
    layer = Mamba2(32)
    with pytest.raises(ValueError, match=r"state of 3 sequences with an input of 2: begin with start\(2\)"):
        layer(torch.zeros(2, 4, 32), layer.start(3))


def test_width_must_fill_the_heads():
    with pytest.raises(ValueError, match="48 is not a multiple of head = 32"): Mamba2(48)


# mamba-ssm: its reference functions (any machine) and its kernels (CUDA)

REFERENCE = {"ops/selective_scan_interface.py": ["selective_scan_ref"],
             "ops/triton/layernorm_gated.py": ["rms_norm_ref"],
             "ops/triton/ssd_chunk_state.py": ["chunk_state_ref"],
             "ops/triton/ssd_state_passing.py": ["state_passing_ref"],
             "ops/triton/ssd_chunk_scan.py": ["chunk_scan_ref"],
             "ops/triton/ssd_combined.py": ["ssd_chunk_scan_combined_ref", "ssd_selective_scan", "mamba_split_conv1d_scan_ref"],
             "ops/triton/selective_state_update.py": ["selective_state_update_ref"],
             "modules/ssd_minimal.py": ["segsum", "ssd_minimal_discrete"]}


@pytest.fixture(scope="module")
def published():
    "The reference functions alone, cut from the package's source: the rest of it cannot be imported without CUDA."
    archive = next(Path(sys.prefix).glob("mamba_ssm-*.tar.gz"), None)
    assert archive, f"the source of mamba-ssm is not in {sys.prefix}: `make .venv/.complete` fetches it"
    space = {"torch": torch, "F": F, "rearrange": einops.rearrange, "repeat": einops.repeat, "math": math}
    with tarfile.open(archive) as tar:
        for file, names in REFERENCE.items():
            tree = ast.parse(tar.extractfile(f"{archive.name.removesuffix('.tar.gz')}/mamba_ssm/{file}").read())
            tree.body = [part for part in tree.body if isinstance(part, ast.FunctionDef) and part.name in names]
            assert [part.name for part in tree.body] == names, f"{archive.name}: {file} has no longer {names}"
            exec(compile(tree, file, "exec"), space)
    # what its layer takes from kernels: a causal convolution, a gated norm, a scan
    space["causal_conv1d_fn"] = lambda x, w, b, activation: F.silu(F.conv1d(F.pad(x, (w.shape[1] - 1, 0)), w[:, None], b, groups=len(w)))
    space["rmsnorm_fn"] = space["rms_norm_ref"]
    interface = types.ModuleType("mamba_ssm.ops.selective_scan_interface")
    interface.selective_scan_fn = space["selective_scan_ref"]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("mamba_ssm", "mamba_ssm.ops"): patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setitem(sys.modules, interface.__name__, interface)
        yield types.SimpleNamespace(**space)


@pytest.mark.parametrize("T, chunk", [(64, 16), (48, 48), (96, 32)])
def test_scans_agree_with_mamba_ssm(published, T, chunk):
    x, dt, A, B, C, _ = scan_inputs(T=T, H=3, P=4, S=5, dtype=torch.float32)
    combined = published.ssd_chunk_scan_combined_ref(x, dt, A, B[:, :, None], C[:, :, None], chunk)
    heads = lambda v: v[:, :, None].expand(-1, -1, 3, -1)
    minimal, last = published.ssd_minimal_discrete(x * dt[..., None], A * dt, heads(B), heads(C), chunk)
    for scan in (scan_sequential, scan_chunked):
        y, h = scan(x, dt, A, B, C)
        assert apart(y, combined) < 1e-5 and apart(y, minimal) < 1e-5 and apart(h, last) < 1e-5


def test_step_agrees_with_mamba_ssm(published):
    x, dt, A, B, C, h = scan_inputs(T=1, H=3, P=4, S=5, dtype=torch.float32)
    y, after = scan_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], h)
    state, wide = h.clone(), lambda v, *shape: v[..., None].expand(*shape)
    theirs = published.selective_state_update_ref(state, x[:, 0], wide(dt[:, 0], 2, 3, 4), A[:, None, None].expand(3, 4, 5),
                                                  B[:, 0, None], C[:, 0, None])
    assert apart(y, theirs) < 1e-5 and apart(after, state) < 1e-5


@pytest.mark.parametrize("heads, T", [(2, 64), (3, 50), (4, 1)])
def test_layer_agrees_with_mamba_ssm(published, heads, T):
    layer, u = layer_and_input(32 * heads, T, head=32, state=16)
    with torch.no_grad():
        theirs = published.mamba_split_conv1d_scan_ref(
            layer.project(u), layer.conv.weight[:, 0], layer.conv.bias, layer.dt_bias, -layer.A_log.exp(), layer.D, 32,
            rmsnorm_weight=layer.norm.weight, rmsnorm_eps=1e-5, outproj_weight=layer.out.weight, headdim=32, norm_before_gate=False)
        assert apart(layer(u)[0], theirs) < 1e-5


def test_kernels_are_the_default_where_they_are(published, monkeypatch):
    "Their interface stands in for them, so that what is handed over is tested without a GPU."
    called = []
    def stand_in(x, dt, A, B, C, chunk, initial_states, return_final_states):
        assert B.shape == C.shape == (*x.shape[:2], 1, 4) and not initial_states.any() and return_final_states
        called.append(chunk)
        return published.ssd_chunk_scan_combined_ref(x, dt, A, B, C, chunk), scan_chunked(x, dt, A, B[:, :, 0], C[:, :, 0])[1]
    layer, u = layer_and_input(T=64)
    with torch.no_grad():
        own = layer(u)
        monkeypatch.setattr(ssm, "kernels", lambda: stand_in)
        assert ssm.best_scan(2, torch.device("cuda")) is ssm.scan_fused and ssm.best_scan(2, torch.device("cpu")) is scan_chunked
        fused = layer(u, scan=ssm.scan_fused)
    assert called == [layer.chunk] and apart(fused[0], own[0]) < 1e-5 and apart(fused[1][1], own[1][1]) < 1e-5
    monkeypatch.setattr(ssm, "kernels", lambda: None)
    assert ssm.best_scan(2, torch.device("cuda")) is scan_chunked


@pytest.mark.skipif(not ssm.kernels(), reason="needs a CUDA device and mamba-ssm")
def test_kernels_forward_and_backward():
    values = [v.float().cuda().requires_grad_() for v in scan_inputs(T=100, H=4, P=32, S=16)]
    answers = []
    for scan in (scan_chunked, ssm.scan_fused):
        y, h = scan(*values)
        answers.append((y, h, *torch.autograd.grad(y.square().sum() + h.square().sum(), values)))
    for own, theirs in zip(*answers): assert apart(theirs, own) < 5e-3      # their products are TF32
