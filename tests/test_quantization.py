"Quantization: bounds that theory gives, bytes that are really stored, and models that come back from their files."
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from lwm_course import course, motion
from lwm_course.dynamics import WorldModel
from lwm_course.network import Dynamics
from lwm_course.quantization import (SCHEMES, Context, Grid, Packed, RoundedLinear, Scheme, affine, balance, busy_layers, choose_wide,
                                     divergence, drift, file_bytes, finetune, grouped_rows, half, least_squares, load_quantized,
                                     minmax, observe, pack_bits, percentile, quantize, rounded_state, save_quantized, scheme_table,
                                     sensitivity, stored, symmetric, unpack_bits)
from lwm_course.tokenizer import Tokenizer, TokenizerConfig

pytestmark = pytest.mark.usefixtures("one_thread")
GAMES = {"Left": ("NOOP", "FIRE", "RIGHT", "LEFT"), "Right": ("NOOP", "UP")}
FRAMES = np.random.default_rng(0).integers(0, 256, (2, 6, 64, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def wm():
    "A small world model with random weights; its games look as different as noise can."
    torch.manual_seed(0)
    tokenizer = Tokenizer(TokenizerConfig(64, quantizer="dictionary", codes=64))
    model = Dynamics.of(tokenizer, GAMES, width=64, depth=2, head_depth=1, least=0.0)
    nn.init.constant_(model.gate.bias, 0.0)     # else nothing ever changes
    return WorldModel(tokenizer, model).ready("cpu", "float32")


@pytest.fixture(scope="module")
def context(wm):
    "What it reads."
    return Context(*wm.read(torch.as_tensor(FRAMES)), torch.ones(2, 5, dtype=torch.long), torch.tensor([0, 1]))


# Grids

numbers = st.lists(st.floats(-6e4, 6e4, width=32), min_size=1, max_size=40)


@settings(max_examples=200, deadline=None)
@given(numbers, st.sampled_from([2, 4, 8]), st.sampled_from([symmetric, affine]), st.booleans())
def test_error_is_at_most_half_a_step(values, bits, make, stored_):
    x = torch.tensor(values)[None]
    grid = make(*minmax(x), bits)
    if stored_: grid = half(grid)
    k = grid.index(x)
    assert torch.equal(k, k.round()) and 0 <= k.min() and k.max() <= 2 ** bits - 1
    assert ((grid.value(k) - x).abs() <= grid.step / 2 + 1e-6 * x.abs().max()).all()     # float32 rounds, too


@settings(max_examples=100, deadline=None)
@given(numbers, st.sampled_from([symmetric, affine]))
def test_a_stored_grid_fits_in_two_bytes(values, make):
    grid = half(make(*minmax(torch.tensor(values)[None]), 4))
    assert torch.equal(grid.step, grid.step.half().float())
    assert grid.low is None or torch.equal(grid.low, grid.low.half().float())


def test_values_of_a_grid_stay_where_they_are():
    for grid in (Grid(torch.tensor([[0.25]]), None, 4), Grid(torch.tensor([[0.25]]), torch.tensor([[-1.5]]), 4)):
        values = grid.value(torch.arange(16.0)[None])
        assert torch.equal(grid.nearest(values), values)
    assert Grid(torch.tensor([[0.25]])).nearest(torch.zeros(1, 1)) == 0


@pytest.mark.parametrize("bits", [4, 8])
def test_agrees_with_pytorch_where_the_definitions_do(bits):
    x = torch.randn(6, 50, generator=torch.Generator().manual_seed(1))
    grid, top = symmetric(*minmax(x), bits), 2 ** (bits - 1)
    grid.step = 2 ** grid.step.log2().ceil()        # 1 / step, by which PyTorch multiplies, is exact
    theirs = torch.fake_quantize_per_channel_affine(x, grid.step[:, 0], torch.zeros(6, dtype=torch.int32), 0, -top, top - 1)
    assert torch.equal(grid.nearest(x), theirs)


def test_agrees_with_onnx_runtime_where_the_definitions_do():
    "Symmetric 8 bits, and unsigned ones whose range begins at zero: the same step but for its last bit, and on it the same integers."
    pytest.importorskip("onnxruntime")
    from onnx import TensorProto
    from onnxruntime.quantization.quant_utils import quantize_data
    for seed in range(20):
        x = torch.randn(1, 500, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed - 10)
        signed = TensorProto.INT8, x, symmetric(*minmax(x)), 128
        unsigned = TensorProto.UINT8, x.relu(), affine(0 * x[:, :1], minmax(x.relu())[1]), 0
        for kind, data, own, middle in (signed, unsigned):
            point, step, k = quantize_data(data[0].numpy(), kind, symmetric=kind == TensorProto.INT8)
            assert point == 0 and math.isclose(step, own.step.item(), rel_tol=1e-6)
            own.step = torch.tensor([[float(step)]])
            assert torch.equal(own.index(data)[0] - middle, torch.from_numpy(k).float())


@pytest.mark.parametrize("bits,size", [(8, 0), (4, 32)])
def test_agrees_with_torchao_where_the_definitions_do(bits, size):
    "Symmetric weights by channel and by group: the same steps, bit for bit, and on steps that are powers of two (it multiplies by 1 / step) the same integers."
    tool = pytest.importorskip("torchao.quantization.quant_primitives")
    weight, top = torch.randn(24, 96, generator=torch.Generator().manual_seed(bits)), 2 ** (bits - 1)
    rows = grouped_rows(weight, size)
    grid, limits = symmetric(*minmax(rows), bits), (torch.int8, 1 - top, top - 1)
    step, zero = tool.choose_qparams_affine(weight, tool.MappingType.SYMMETRIC, (1, rows.shape[1]), *limits)
    assert torch.equal(step.flatten(), grid.step.flatten())
    grid.step = 2 ** grid.step.log2().ceil()
    theirs = tool.quantize_affine(weight, (1, rows.shape[1]), grid.step.view_as(step), zero, *limits)
    assert torch.equal(grid.index(rows) - top, theirs.view_as(rows).float())


def test_gradient_passes_through_rounding():
    x = torch.randn(3, 5, requires_grad=True)
    symmetric(*minmax(x.detach()), 4).nearest(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(3, 5))


def test_per_channel_beats_per_tensor_with_an_outlier():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(2))
    weight[0, 0] = 100
    off = lambda size: (Packed.of(weight, 8, size).value() - weight)[1:].square().mean()
    tensor = (symmetric(*minmax(weight.reshape(1, -1))).nearest(weight) - weight)[1:].square().mean()
    assert off(0) < tensor / 100 and off(32) <= off(0) * 1.01


# Calibration

def test_the_best_range_is_never_worse_than_the_whole_one():
    x = torch.randn(3, 400, generator=torch.Generator().manual_seed(3)) ** 3
    for bits in (2, 4, 8):
        for make in (symmetric, affine):
            off = lambda ends: (make(*ends, bits).nearest(x) - x).square().mean(1)
            assert (off(least_squares(x, make, bits)) <= off(minmax(x))).all()
    low, high = least_squares(x, symmetric, 4)
    assert (high < minmax(x)[1]).all()      # heavy tails are cut off


def test_percentile_leaves_out_the_rarest():
    x = torch.arange(-1000.0, 1001)[None]
    low, high = percentile(x, 0.9)
    assert (low.item(), high.item()) == (-900, 900)
    assert [end.item() for end in percentile(x, 1.0)] == [-1000, 1000]


def test_balance_keeps_the_product_and_evens_the_input():
    x, weight = torch.randn(50, 8), torch.randn(5, 8)
    x[:, 3] *= 100
    s = balance(x, weight)
    assert torch.allclose((x / s) @ (weight * s).T, x @ weight.T, rtol=1e-4, atol=1e-3)
    spread = lambda v: v.abs().amax(0).max() / v.abs().amax(0).median()
    assert spread(x / s) < spread(x) / 3


# Bytes

@settings(max_examples=100, deadline=None)
@given(st.sampled_from([1, 2, 4, 8]), st.integers(0, 70), st.integers(0, 2 ** 31))
def test_packing_round_trip(bits, count, seed):
    k = torch.randint(2 ** bits, (count,), generator=torch.Generator().manual_seed(seed))
    packed = pack_bits(k, bits)
    assert packed.dtype == torch.uint8 and len(packed) == math.ceil(count * bits / 8)
    assert torch.equal(unpack_bits(packed, bits, count), k.to(torch.uint8))


def test_packing_refuses_what_it_cannot_hold():
    with pytest.raises(ValueError, match="3"): pack_bits(torch.zeros(4), 3)
    with pytest.raises(ValueError, match="7 numbers of 4 bits do not fill 5 bytes"): unpack_bits(torch.zeros(5, dtype=torch.uint8), 4, 7)
    for bad in (math.inf, math.nan, 1e9):
        with pytest.raises(ValueError, match="finite"): Packed.of(torch.full((2, 4), bad), 8)
    with pytest.raises(ValueError, match="-1"): grouped_rows(torch.zeros(2, 4), -1)


@pytest.mark.parametrize("shape, size, row", [((4, 64), 32, 32), ((4, 64), 0, 64), ((2, 35, 3, 3), 32, 21), ((3, 67), 32, 67), ((5, 8), 32, 8)])
def test_groups_divide_a_channel(shape, size, row):
    assert grouped_rows(torch.zeros(shape), size).shape[1] == row


def test_packed_counts_its_bytes():
    packed = Packed.of(torch.randn(16, 64), 4, 32, affine)
    assert packed.nbytes == 16 * 64 // 2 + 2 * 2 * 32


# Layers

def test_rounded_linear_is_near_and_has_zero_on_its_grid(wm):
    layer, x = nn.Linear(32, 16), torch.randn(100, 32).abs() + 3
    for rounded in (RoundedLinear(layer), RoundedLinear(layer, torch.tensor([0.0, float(x.max())]))):
        assert rounded.weight is layer.weight
        step = x.max() / 255
        assert ((rounded(x) - layer(x)).abs() <= step * layer.weight.abs().sum(1) + 1e-4).all()
        assert torch.allclose(rounded(torch.zeros(1, 32)), layer.bias)
        assert rounded(x.view(10, 10, 32)).shape == (10, 10, 16)


def test_observation_leaves_no_trace(wm, context):
    seen = observe(wm.dynamics, context, most=10)
    assert seen.keys() == busy_layers(wm.dynamics).keys() and max(len(x) for x in seen.values()) <= 10
    assert not any(m._forward_pre_hooks for m in wm.dynamics.modules())


# Whole models

TRIED = {**{name: s for name, s in SCHEMES.items()}, "balanced": Scheme(8, inputs="static", smooth=0.5, calibrate="mse"),
         "cut": Scheme(8, inputs="static", calibrate="percentile")}


@pytest.mark.parametrize("name", TRIED)
def test_a_model_comes_back_from_its_file(wm, context, name, tmp_path):
    before = {n: x.clone() for n, x in wm.state_dict().items()}
    other = quantize(wm, TRIED[name], context)
    assert all(torch.equal(before[n], x) for n, x in wm.state_dict().items())      # a copy
    save_quantized(other, tmp_path)
    again = WorldModel.from_pretrained(str(tmp_path), "cpu", TRIED[name].dtype)
    for a, b in ((other.dynamics, again.dynamics), (other.tokenizer, again.tokenizer)):
        a, b = a.state_dict(), b.state_dict()
        assert a.keys() == b.keys() and all(torch.equal(a[n].to(b[n]), b[n]) for n in a)
    plays = [model.start(FRAMES, np.ones((2, 5), int), ["Left", "Right"], 0) for model in (other, again)]
    if TRIED[name].bits: assert torch.equal(*(model.step(state, [1, 1])[0] for model, state in zip((other, again), plays)))


def test_norms_scan_and_state_stay_floats(wm, context):
    other = quantize(wm, "int4", context)
    kept = set(wm.dynamics.state_dict()) - set(other.dynamics.packed)
    assert {"trunk.0.time.A_log", "trunk.0.time.dt_bias", "trunk.0.time.D", "trunk.0.time.norm.weight"} <= kept
    assert all(torch.equal(wm.dynamics.state_dict()[n], other.dynamics.state_dict()[n]) for n in kept)
    state = other.start(FRAMES, np.ones((2, 5), int), ["Left", "Right"], 0)
    assert all(block[1].dtype == torch.float32 for block in state.memory.blocks if block)


def test_saving_what_was_loaded_changes_no_byte(wm, context, tmp_path):
    save_quantized(quantize(wm, "int4", context), tmp_path / "a")
    save_quantized(load_quantized(tmp_path / "a", "cpu"), tmp_path / "b")
    for name in ("model.safetensors", "config.json", "tokenizer/model.safetensors", "tokenizer/config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_sizes_of_the_shipped_model(tmp_path):
    shipped = WorldModel.from_pretrained("nano", "cpu", "float32")
    size = {name: file_bytes(save_quantized(quantize(shipped, name), tmp_path / name)) for name in ("float32", "bfloat16", "int8", "int4")}
    assert size["bfloat16"] < 0.51 * size["float32"]
    assert size["int8"] <= 0.27 * size["float32"] and size["int4"] <= 0.16 * size["float32"]
    assert load_quantized(tmp_path / "int4", "cpu").clip_names(shipped.games[0]) == shipped.clip_names(shipped.games[0])


def damage_config(folder): (folder / "config.json").write_text("{")
def drop_quantization(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["quantization"]
    (folder / "config.json").write_text(json.dumps(config))
def other_scheme(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization"]["bits"] = 3
    (folder / "config.json").write_text(json.dumps(config))
def cut_file(folder): (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-50])
def edit(change):
    def damage(folder):
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")
    return damage


DAMAGE = {"config": damage_config, "no quantization": drop_quantization, "bits": other_scheme, "cut": cut_file,
          "missing": edit(lambda w: w.pop("enter.weight")), "unknown": edit(lambda w: w.update(strange=torch.zeros(2))),
          "short": edit(lambda w: w.update({"enter.weight": w["enter.weight"][:-1].clone()})),
          "steps": edit(lambda w: w.update({"enter.weight:step": w["enter.weight:step"][:-1].clone()})),
          "no bytes": edit(lambda w: w.update({"enter.weight": w["enter.weight"][:0].clone()}))}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_a_clear_error(wm, context, name, tmp_path):
    save_quantized(quantize(wm, "int4", context), tmp_path / "model")
    DAMAGE[name](tmp_path / "model")
    with pytest.raises((ValueError, OSError), match="model"): load_quantized(tmp_path / "model", "cpu")


def test_wrong_schemes_are_refused(wm):
    for wrong in (dict(bits=3), dict(bits=8, table=0), dict(inputs="statik"), dict(calibrate="mean"), dict(bits=8, smooth=0.5)):
        with pytest.raises(ValueError): Scheme(**wrong)
    with pytest.raises(ValueError, match="int8"): quantize(wm, "int9")
    with pytest.raises(ValueError, match="start clips"): quantize(wm, "int8")      # static, and nothing to calibrate on


# What is lost

def test_divergence_grows_with_coarser_weights(wm, context):
    away = [divergence(wm.dynamics, quantize(wm, Scheme(bits, 32)).dynamics, context) if bits else
            divergence(wm.dynamics, wm.dynamics, context) for bits in (0, 8, 4, 2)]
    assert away[0] == 0 and away[1] < away[2] < away[3]


def test_sensitivity_restores_and_mixed_is_between(wm, context):
    mind = sensitivity(wm, context, Scheme(2, 32))
    assert mind.keys() == set(stored(wm.dynamics)) and min(mind.values()) >= -1e-4 and max(mind.values()) > 0
    mixed = choose_wide(wm, context, Scheme(2, 32), budget=0.12, mind=mind)
    assert 0 < len(mixed.wide) < len(mind)
    off = [divergence(wm.dynamics, quantize(wm, s).dynamics, context) for s in (Scheme(2, 32), mixed)]
    assert off[1] < off[0]


def test_state_rounded_to_the_nearest_forgets_small_steps():
    h, exact, grid = torch.zeros(1, 1), 0.0, Grid(torch.tensor([[1 / 127]]))
    for _ in range(500): h, exact = grid.nearest(h * (1 - 1 / 256) + 1 / 256), exact * (1 - 1 / 256) + 1 / 256
    assert h == 0 and exact > 0.8


def test_rounded_state_is_within_a_step_of_each_head(wm):
    state = wm.start(FRAMES, np.ones((2, 5), int), ["Left", "Right"], 0)
    for chance, most in ((None, 0.5), (torch.Generator().manual_seed(0), 1.0)):
        near = rounded_state(state, 8, chance)
        for a, b in zip(state.memory.blocks, near.memory.blocks):
            if not a: continue
            step = a[1].abs().amax((2, 3), keepdim=True) / 127
            assert torch.equal(a[0], b[0]) and ((a[1] - b[1]).abs() <= most * step + 1e-6).all()


def test_drift_from_itself_is_nothing(monkeypatch):
    shipped = WorldModel.from_pretrained("nano", "cpu", "float32")
    apart = drift(shipped, shipped, shipped.games[0], [0, 1], same=False)
    assert all(len(v) == 2 and (v == 0).all() for v in apart.values())
    apart = drift(shipped, quantize(shipped, "int4"), shipped.games[0], [0, 1])
    assert (apart["state"] > 0).all() and (apart["features"] > 0).all()


@pytest.mark.parametrize("name", ["int8-qat", "int4-qat"])
def test_finetuning_leaves_a_plain_model(wm, context, name):
    episodes = [{"tokens": tokens.numpy(), "actions": np.ones(6, np.int64), **motion.explain(wm.motion, torch.as_tensor(frames), tokens)}
                for tokens, frames in zip(context.tokens, FRAMES)]
    batch = motion.batch_of([motion.clip_of(e, 0, 5) | {"game": np.array(i), "weight": np.float32(1)} for i, e in enumerate(episodes)])
    trained = finetune(wm, SCHEMES[name], lambda step: batch, steps=3)
    a, b = wm.dynamics.state_dict(), trained.dynamics.state_dict()
    assert a.keys() == b.keys() and any(not torch.equal(a[n], b[n]) for n in a)
    assert type(trained.dynamics) is Dynamics and not any(p.requires_grad for p in trained.parameters())
    quantize(trained, SCHEMES[name], context)


# The command

def test_the_command_measures_what_it_writes(tmp_path, capsys, repository):
    out, file = tmp_path / "out", tmp_path / "quantization.json"
    line = ["quantize", "--scheme", "int4", "--quick", "--games", "ALE/Pong-v5", "--out", str(out), "--json", str(file),
            "--play", str(repository / "data_samples")]
    assert course.main(line) == 0
    found = json.loads(file.read_text())
    ratio = {f["source"]: f["value"] for f in found["figures"] if f["name"] == "file_ratio"}
    assert ratio == {"float32": 1, "int4": (file_bytes(out / "int4") / 1e6) / (file_bytes(out / "float32") / 1e6)}
    assert {"skill", "changed_psnr", "action_response", "divergence", "frames_to_collapse_mean", "horizon_change"} <= {f["name"] for f in found["figures"] if f["source"] == "int4"}
    assert [row["scheme"] for row in scheme_table(found["figures"]).rows] == ["float32", "int4"]
    assert "int4" in capsys.readouterr().out


def test_the_command_refuses_an_unknown_scheme(capsys, tmp_path):
    assert course.main(["quantize", "--scheme", "int5", "--out", str(tmp_path)]) == 1
    assert "int5" in (said := capsys.readouterr().err) and "int4" in said and not list(tmp_path.iterdir())
