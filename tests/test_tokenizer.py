"The tokenizer: every code comes back, gradients pass, tokens stay where nothing moves, and wrong input is named."
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lwm_course import tokenizer as chapter
from lwm_course.tokenizer import (FSQ, VQ, Encoder, FrameWindows, Tokenizer, TokenizerConfig, changed_mask, find_pretrained,
                                  patches_changed, perplexity, reconstruction_loss, to_float, to_uint8, token_flicker)
from lwm_course.training import TrainConfig, fit

some = settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
SMALL = dict(frame_size=32, levels=(4, 3, 3), codes=24, code_dim=5, encoder_width=24, encoder_depth=1, width=16, depth=1)
quantizers = pytest.mark.parametrize("quantizer", ["fsq", "vq"])
both_patches = pytest.mark.parametrize("patch", [8, 16])


pytestmark = pytest.mark.usefixtures("one_thread")


def small(quantizer="fsq", seed=0, **changes):
    torch.manual_seed(seed)
    return Tokenizer(TokenizerConfig(**{**SMALL, "quantizer": quantizer, **changes})).eval()


def frames(count=2, size=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


# Quantizers

@some
@given(levels=st.lists(st.integers(2, 9), min_size=1, max_size=5).filter(lambda levels: math.prod(levels) <= 20_000))
def test_fsq_codes_and_tokens_are_each_others_inverse(levels):
    fsq = FSQ(tuple(levels))
    tokens = torch.arange(fsq.size)
    code = fsq.code(tokens)
    assert code.shape == (fsq.size, fsq.dim) and len(code.unique(dim=0)) == fsq.size
    again, back, loss = fsq(code.atanh())   # the outermost codes are tanh(inf)
    assert torch.equal(back, tokens) and torch.allclose(again, code) and loss == 0


@some
@given(levels=st.lists(st.integers(2, 9), min_size=1, max_size=5), seed=st.integers(0, 99), scale=st.sampled_from([0.1, 1, 30]))
def test_fsq_rounds_to_the_nearest_code_within_range(levels, seed, scale):
    fsq, z = FSQ(tuple(levels)), scale * torch.randn(50, len(levels), generator=torch.Generator().manual_seed(seed))
    code, tokens, _ = fsq(z)
    assert ((0 <= tokens) & (tokens < fsq.size)).all()
    half_a_step = 1 / (torch.tensor(levels) - 1)
    assert ((code - z.tanh()).abs() <= half_a_step + 1e-5).all()


def test_fsq_packs_the_first_digit_fastest():
    fsq = FSQ((3, 4, 2))
    digits = fsq.code(torch.tensor([0, 1, 3, 12, 23])).add(1).div(2).mul(torch.tensor([2, 3, 1])).round().int().tolist()
    assert digits == [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [2, 3, 1]]


@some
@given(size=st.integers(2, 200), dim=st.integers(1, 16), seed=st.integers(0, 99))
def test_vq_codes_and_tokens_are_each_others_inverse(size, dim, seed):
    torch.manual_seed(seed)
    vq = VQ(size, dim).eval()
    vq.codebook.copy_(torch.randn(size, dim))
    code, tokens, loss = vq(vq.codebook)
    assert torch.equal(vq.code(tokens), vq.codebook) and torch.allclose(code, vq.codebook) and loss == 0


def test_vq_takes_the_nearest_code_and_leaves_the_codebook_alone_at_play():
    torch.manual_seed(0)
    vq, z = VQ(40, 3).eval(), torch.randn(5, 6, 3)
    before = vq.codebook.clone()
    code, tokens, loss = vq(z)
    assert torch.equal(tokens.flatten(), torch.cdist(z.view(-1, 3).double(), before.double()).argmin(1))
    assert torch.equal(vq.codebook, before) and torch.allclose(loss, 0.25 * (z - code).square().mean())


def test_vq_codes_move_to_the_mean_of_their_inputs():
    torch.manual_seed(0)
    vq = VQ(2, 1, decay=0.5, revive=0.0)
    vq.codebook.copy_(torch.tensor([[0.0], [10.0]]))
    vq.total.copy_(vq.codebook)
    for _ in range(60): vq(torch.tensor([[1.0], [3.0], [7.0]]))
    assert torch.allclose(vq.codebook, torch.tensor([[2.0], [7.0]]), atol=1e-4)


@pytest.mark.parametrize("revive, least, most", [(0.0, 1, 1), (0.02, 16, 16)])
def test_dead_codes_come_back_only_with_revival(revive, least, most):
    torch.manual_seed(0)
    vq = VQ(16, 2, decay=0.9, revive=revive)
    for index in range(16): vq.codebook[index] = torch.tensor([5.0 + index, 0.0])   # one is nearest to all inputs
    vq.total.copy_(vq.codebook)
    away = vq.codebook[15].clone()
    for _ in range(300): vq(0.5 * torch.randn(256, 2))
    used = len(vq.nearest(0.5 * torch.randn(4000, 2)).unique())
    assert least <= used <= most
    if not revive: assert torch.allclose(vq.codebook[15], away), "a code that nobody chooses stays where it is"


@pytest.mark.parametrize("quantizer", [FSQ((5, 4, 3)), VQ(20, 3)])
def test_gradient_is_straight_through(quantizer):
    z = torch.randn(7, 3, requires_grad=True)
    code, _, _ = quantizer.eval()(z)
    weight = torch.randn(7, 3)
    (code * weight).sum().backward()
    slope = 1 - z.detach().tanh() ** 2 if isinstance(quantizer, FSQ) else 1
    assert torch.allclose(z.grad, weight * slope, atol=1e-5)


@pytest.mark.parametrize("levels", [(), (1, 5), (5, 0)])
def test_fsq_refuses_levels_that_say_nothing(levels):
    with pytest.raises(ValueError, match="at least 2 levels"): FSQ(levels)


def test_vq_refuses_a_codebook_of_one():
    with pytest.raises(ValueError, match="got 1 of 8"): VQ(1, 8)


def test_perplexity_counts_evenly_used_codes():
    assert perplexity(torch.arange(64).view(4, 4, 4), 64) == pytest.approx(64)
    assert perplexity(torch.full((9,), 3), 64) == 1
    assert perplexity(torch.tensor([0] * 8 + [1] * 4 + [2] * 2 + [3] * 2), 64) == pytest.approx(2 ** 1.75)
    with pytest.raises(ValueError, match="at least one token"): perplexity(torch.zeros(0, dtype=torch.long), 4)


# The network

@both_patches
@quantizers
def test_shapes_and_ranges(quantizer, patch):
    model = small(quantizer, patch=patch)
    tokens = model.encode(frames())
    assert tokens.dtype == torch.int64 and tokens.shape == (2, *model.grid) == (2, 32 // patch, 32 // patch)
    assert 0 <= tokens.min() and tokens.max() < model.codebook_size
    out = model.decode(tokens)
    assert out.dtype == torch.uint8 and out.shape == (2, *model.frame_size, 3) == (2, 32, 32, 3)


@quantizers
def test_gradients_reach_every_weight(quantizer):
    model = small(quantizer).train()
    for block in model.modules():   # residual branches begin at 0
        if isinstance(block, chapter.ConvBlock): torch.nn.init.normal_(block.out.weight, std=0.1)
    pairs = torch.from_numpy(np.stack([frames(2, seed=1), frames(2, seed=2)], 1))
    reconstruction_loss(model, {"frames": pairs})[0].backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]


@both_patches
@quantizers
def test_a_changed_patch_changes_only_its_own_token(quantizer, patch):
    model, before = small(quantizer, patch=patch), frames(1)
    for row in range(model.grid[0]):
        for column in range(model.grid[1]):
            after = before.copy()
            after[0, row * patch:(row + 1) * patch, column * patch:(column + 1) * patch] = frames(1, patch, seed=9)[0]
            with torch.no_grad(): z = model.encoder(to_float(torch.from_numpy(np.concatenate([before, after]))))
            assert (z[0] != z[1]).any(-1).nonzero().tolist() == [[row, column]]
            changed = patches_changed(after, before, patch)
            assert changed[0].nonzero().tolist() == [[row, column]]
            assert token_flicker(model.encode(after), model.encode(before), changed) == 0


def test_encoder_does_not_depend_on_the_place_of_a_patch():
    encoder = Encoder(TokenizerConfig(**SMALL), 4).eval()
    x = to_float(torch.from_numpy(frames(1)))
    with torch.no_grad(): assert torch.allclose(encoder(x.roll((8, 16), (2, 3))), encoder(x).roll((1, 2), (1, 2)), atol=1e-5)


def test_frames_of_a_batch_do_not_mix():
    model, batch = small(), frames(3)
    assert torch.equal(model.encode(batch)[1], model.encode(batch[1:2])[0])


@quantizers
def test_training_is_deterministic_under_a_seed(quantizer):
    def run(seed):
        model = small(quantizer, seed)
        pairs = np.stack([frames(6, seed=1), frames(6, seed=2)], 1)
        windows = FrameWindows(pairs, window=16, batch=4, seed=seed)
        fit(model, windows, reconstruction_loss, TrainConfig(steps=4, seed=seed, device="cpu", dtype="float32"), quiet=True)
        return model.state_dict()
    first, second, other = run(0), run(0), run(1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_bytes_survive_the_way_into_the_network_and_back():
    x = torch.from_numpy(frames(2))
    assert torch.equal(to_uint8(to_float(x)), x)
    assert to_float(x).is_contiguous(memory_format=torch.channels_last)


# Loss and windows

def test_mask_is_what_moved_and_its_surroundings():
    x = torch.zeros(2, 3, 20, 20)
    y = x.clone()
    y[1, 2, 10, 0] = 1
    assert changed_mask(x, x).sum() == 0
    assert changed_mask(y, x)[1, 0].nonzero().tolist() == [[i, j] for i in range(8, 13) for j in range(3)]
    assert changed_mask(y, x)[0].sum() == 0


def test_motion_weight_counts_what_moves_once_more():
    before, after = np.zeros((1, 32, 32, 3), np.uint8), np.zeros((1, 32, 32, 3), np.uint8)
    after[0, 10, 10] = 200
    batch = {"frames": torch.from_numpy(np.stack([before, after], 1))}
    blind = lambda x: (torch.full_like(x, -1.0), torch.zeros(1, 4, 4), torch.zeros(()))   # draws black
    plain, weighted = (reconstruction_loss(blind, batch, motion=weight)[0].item() for weight in (0.0, 1.0))
    # The error is one pixel of 32 x 32, and the same pixel of the mask's 5 x 5, times 0.1.
    assert weighted / plain == pytest.approx(1 + 0.1 * 32 * 32 / 25)


def test_windows_are_a_function_of_the_step_and_keep_to_the_grid():
    y, x = np.mgrid[:64, :64]
    pairs = np.stack([np.stack([y, x, y], -1), np.stack([y, x, y], -1)]).astype(np.uint8)[None]
    windows = FrameWindows(pairs, window=32, batch=40, seed=3)
    assert torch.equal(windows(5)["frames"], windows(5)["frames"]) and not torch.equal(windows(5)["frames"], windows(6)["frames"])
    corners = windows(0)["frames"][:, 0, 0, 0, :2]
    assert (corners % 8 == 0).all() and corners.max() <= 32 and len(corners.unique(dim=0)) > 5
    assert FrameWindows(pairs, window=128, batch=2)(0)["frames"].shape == (2, 2, 64, 64, 3)


def test_half_of_the_windows_hold_something_that_moves():
    pairs = np.zeros((1, 2, 256, 256, 3), np.uint8)
    pairs[0, 1, 3, 250] = 255
    found = sum(FrameWindows(pairs, window=32, batch=100, seed=s)(0)["frames"].flatten(1).any(1).sum().item() for s in range(4))
    assert 150 <= found <= 250    # 400 draws of a coin, five standard deviations; by chance a window hits it in 1 of 800


@pytest.mark.parametrize("shape, kind", [((3, 64, 64, 3), np.uint8), ((3, 3, 64, 64, 3), np.uint8), ((3, 2, 64, 64, 3), np.float32)])
def test_windows_refuse_what_is_no_pair(shape, kind):
    with pytest.raises(ValueError, match=r"pairs must be uint8 \(N, 2, H, W, 3\)"): FrameWindows(np.zeros(shape, kind))


# Wrong input is named

@pytest.mark.parametrize("wrong, message", [
    (lambda f: f.astype(np.float32) / 255, "uint8 in 0..255, got torch.float32"),
    (lambda f: f.astype(np.int64), "uint8 in 0..255, got torch.int64"),
    (lambda f: f[0], r"\(B, 32, 32, 3\), got \(32, 32, 3\)"),
    (lambda f: f[:, :31], r"got \(2, 31, 32, 3\): use data.resize"),
    (lambda f: f.transpose(0, 3, 1, 2), r"got \(2, 3, 32, 32\)"),
    (lambda f: f[..., :1], r"got \(2, 32, 32, 1\)")])
def test_encode_names_what_is_wrong(wrong, message):
    with pytest.raises(ValueError, match=message): small().encode(np.ascontiguousarray(wrong(frames())))


@pytest.mark.parametrize("tokens, message", [
    (torch.zeros(1, 4, 4), "integers, got torch.float32"),
    (torch.zeros(1, 4, 4, dtype=torch.bool), "integers, got torch.bool"),
    (torch.zeros(4, 4, dtype=torch.long), r"\(B, 4, 4\), got \(4, 4\)"),
    (torch.zeros(1, 4, 5, dtype=torch.long), r"got \(1, 4, 5\)"),
    (torch.full((1, 4, 4), 36), r"0\.\.35, got 36\.\.36"),
    (torch.full((1, 4, 4), -1), r"0\.\.35, got -1\.\.-1")])
def test_decode_names_what_is_wrong(tokens, message):
    with pytest.raises(ValueError, match=message): small().decode(tokens)


@pytest.mark.parametrize("wrong, message", [
    ({"patch": 4}, "patch must be 8 or 16, got 4"), ({"frame_size": 100}, "100 is not a multiple of patch 8"),
    ({"frame_size": 0}, "not a multiple"), ({"quantizer": "vqq"}, "Did you mean vq"), ({"levels": (1,)}, "at least 2 levels")])
def test_configuration_names_what_is_wrong(wrong, message):
    with pytest.raises(ValueError, match=message): Tokenizer(TokenizerConfig(**wrong))


# To disk and back

@quantizers
def test_saved_and_loaded_is_the_same(quantizer, tmp_path):
    model = small(quantizer)
    assert model.save_pretrained(tmp_path / "model", card="# A card") == tmp_path / "model"
    loaded = Tokenizer.from_pretrained(tmp_path / "model", "cpu", "float32")
    assert loaded.config == model.config and not loaded.training
    tokens = model.encode(frames())
    assert torch.equal(loaded.encode(frames()), tokens) and torch.equal(loaded.decode(tokens), model.decode(tokens))
    assert (tmp_path / "model" / "README.md").read_text() == "# A card"


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_codes_stay_exact_in_any_precision(kind):
    model = small("vq")
    exact = model.quantizer.codebook.clone()
    assert torch.equal(model.ready("cpu", kind).quantizer.codebook, exact)
    tokens = model.encode(frames())
    assert model.decode(tokens).shape == (2, 32, 32, 3)


def test_half_precision_halves_the_file(tmp_path):
    model = small()
    full, half = model.save_pretrained(tmp_path / "a"), model.save_pretrained(tmp_path / "b", dtype=torch.bfloat16)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (full, half)]
    assert sizes[1] < 0.7 * sizes[0] and Tokenizer.from_pretrained(half, "cpu").codebook_size == 36


def test_names_in_the_file_are_settled(tmp_path):
    "Shipped weights are read by these names."
    file = small("vq").save_pretrained(tmp_path) / "model.safetensors"
    parts = {name.split(".")[0] for name in load_file(file)}
    assert parts == {"encoder", "decoder", "quantizer"}
    assert {"quantizer.codebook", "quantizer.count", "quantizer.total", "encoder.stem.weight"} <= set(load_file(file))


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    "A folder of shipped models with one, `nano`, which is a world model with a tokenizer in it."
    (tmp_path / "models" / "nano").mkdir(parents=True)
    (tmp_path / "models" / "nano" / "config.json").write_text("{}")
    small().save_pretrained(tmp_path / "models" / "nano" / "tokenizer")
    monkeypatch.setattr(chapter, "MODELS", tmp_path / "models")
    return tmp_path


def test_shipped_name_gives_the_tokenizer_of_the_world_model(shelf):
    assert Tokenizer.from_pretrained("nano", "cpu").grid == (4, 4)


@pytest.mark.parametrize("name", ["nan", "nanno", "Nano"])
def test_unknown_name_gets_the_nearest(shelf, name):
    with pytest.raises(ValueError, match=f"Unknown model '{name}'. Did you mean nano"): Tokenizer.from_pretrained(name)


def test_missing_folder_is_named_without_a_network(shelf, monkeypatch):
    import huggingface_hub

    def offline(name): raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ValueError, match="no folder runs/mine here.*Shipped models: nano"): find_pretrained("runs/mine")


@pytest.mark.parametrize("keep", [0, 100, -50])
def test_truncated_weights_are_named(tmp_path, keep):
    file = small().save_pretrained(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError) as error: Tokenizer.from_pretrained(tmp_path)
    assert str(file) in str(error.value) and "damaged" in str(error.value)


def test_missing_weights_are_named(tmp_path):
    file = small().save_pretrained(tmp_path) / "model.safetensors"
    file.unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors is missing"): Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("config", ['{"games": []}', '{"encoder_width": 48}'])
def test_another_models_files_are_named(tmp_path, config):
    small().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match="holds no tokenizer of this course") as error: Tokenizer.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)
