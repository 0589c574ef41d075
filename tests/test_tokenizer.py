"The tokenizer: every code comes back, gradients pass, tokens stay where nothing moves, and wrong input is named."
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lwm_course import course
from lwm_course import tokenizer as chapter
from lwm_course import training
from lwm_course.data import episodes, read_episode
from lwm_course.tokenizer import (FSQ, LOSSES, LSQ, PLACED, QUANTIZERS, THOUSAND, VQ, Companded, Continuous, Critic, Dictionary,
                                  Encoder, FrameWindows, Hybrid, Judged, Mosaic, OpenDictionary, Patches, Probe, RVQ, Scalar, Tokenizer, TokenizerConfig,
                                  changed_mask, data_hash, distinct, examine, patch_counts, patches_changed, perplexity,
                                  place_dictionary, reconstruction_loss, to_float, to_uint8, token_flicker, train_tokenizer, two_colours)
from lwm_course.training import TrainConfig, fit

some = settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
SMALL = dict(frame_size=32, levels=(4, 3, 3), codes=24, code_dim=5, encoder_width=24, encoder_depth=1, width=16, depth=1)
every = pytest.mark.parametrize("quantizer", list(QUANTIZERS))
learning = pytest.mark.parametrize("quantizer", [name for name in QUANTIZERS if name not in PLACED])
quantizers = pytest.mark.parametrize("quantizer", [name for name in QUANTIZERS if name != "none"])   # those with codes
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


def any_quantizer(name, levels, codes, dim, seed):
    "A quantizer of the registry with these sizes, at play; what it learns has moved."
    torch.manual_seed(seed)
    quantizer = QUANTIZERS[name](TokenizerConfig(quantizer=name, levels=levels, codes=codes, code_dim=dim)).eval()
    for part in quantizer.modules():   # in one dimension a new codebook has two different codes only
        if isinstance(part, chapter.Codebook): part.codebook.copy_(torch.randn_like(part.codebook))
    if name == "lsq": quantizer.step.data *= 0.5 + torch.rand(quantizer.dim)
    return quantizer


sizes = dict(levels=st.lists(st.integers(2, 7), min_size=1, max_size=4).map(tuple), codes=st.integers(2, 30), dim=st.integers(1, 8),
             seed=st.integers(0, 99))


@pytest.mark.parametrize("quantizer", [name for name in QUANTIZERS if name not in ("none", "open")])    # spelled, a patch has many names
@some
@given(**sizes)
def test_every_code_of_every_quantizer_comes_back(quantizer, levels, codes, dim, seed):
    quantizer = any_quantizer(quantizer, levels, codes, dim, seed)
    tokens = torch.arange(quantizer.size)
    code = quantizer.code(tokens)
    assert code.shape == (quantizer.size, quantizer.dim)
    # Sums of residual codes: the first stage may prefer another code for the sum, so only its own inputs come back.
    if isinstance(quantizer, RVQ): tokens = quantizer(torch.randn(50, quantizer.dim))[1]
    else:
        z = code.clone()   # what FSQ bounds is the inverse of tanh away
        if isinstance(quantizer, Hybrid): z[:, :quantizer.fsq.dim] = code[:, :quantizer.fsq.dim].atanh()
        elif type(quantizer) is FSQ: z = code.atanh()
        again, back, _ = quantizer(z)
        assert torch.equal(back, tokens) and torch.allclose(again, code, atol=1e-5)
    packing = getattr(quantizer, "packing", quantizer)
    if hasattr(packing, "unpack"): assert torch.equal(packing.pack(packing.unpack(tokens)), tokens)


@quantizers
@some
@given(scale=st.sampled_from([0.01, 1, 100]), **sizes)
def test_tokens_of_every_quantizer_are_in_range_and_stand_for_its_code(quantizer, levels, codes, dim, seed, scale):
    quantizer = any_quantizer(quantizer, levels, codes, dim, seed)
    z = scale * torch.randn(3, 4, 5, quantizer.dim)
    code, tokens, loss = quantizer(z)
    assert tokens.dtype == torch.int64 and tokens.shape == (3, 4, 5) and ((0 <= tokens) & (tokens < quantizer.size)).all()
    assert torch.allclose(code, quantizer.code(tokens), atol=1e-5 * max(1, scale)) and loss.ndim == 0
    assert torch.equal(quantizer(z)[1], tokens), "at play nothing moves"


@learning
@some
@given(**sizes)
def test_gradient_of_every_quantizer_reaches_its_input(quantizer, levels, codes, dim, seed):
    name, quantizer = quantizer, any_quantizer(quantizer, levels, codes, dim, seed)
    # Within the grid, where clipping and the bound leave something: LSQ's may end at half of its first range.
    z = (0.4 * (2 * torch.rand(6, quantizer.dim) - 1)).requires_grad_()
    weight = torch.randn(6, quantizer.dim)
    (quantizer(z)[0] * weight).sum().backward()
    slope = torch.ones_like(z)
    if name in ("fsq", "none"): slope = 1 - z.detach().tanh() ** 2
    if name == "hybrid": slope[:, :quantizer.fsq.dim] = 1 - z.detach()[:, :quantizer.fsq.dim].tanh() ** 2
    assert torch.allclose(z.grad, weight * slope, atol=1e-4)


@quantizers
@some
@given(**sizes)
def test_every_quantizer_is_deterministic_under_a_seed(quantizer, levels, codes, dim, seed):
    def run():
        made = any_quantizer(quantizer, levels, codes, dim, seed).train()
        for _ in range(3): code, tokens, loss = made(torch.randn(40, made.dim))
        return code.detach(), tokens, loss.detach(), *made.state_dict().values()
    assert all(torch.equal(one, other) for one, other in zip(run(), run(), strict=True))


@pytest.mark.parametrize("quantizer", [Scalar((5, 4)), Companded((5, 4)), LSQ((5, 4))])
def test_what_lies_outside_the_range_goes_to_its_edge(quantizer):
    edge = quantizer.code(quantizer(torch.tensor([[9.0, -9.0]]))[1])
    assert torch.allclose(edge, torch.tensor([[1.0, -1.0]]))


def test_companded_steps_are_finer_near_zero():
    code = Companded((9,)).code(torch.arange(9)).flatten()
    steps = code.diff()
    assert (steps[4:].diff() > 0).all() and torch.allclose(steps, steps.flip(0)) and (steps > 0).all()


def test_learned_step_follows_the_size_of_its_input():
    torch.manual_seed(0)
    lsq = LSQ((8, 8))
    optimizer, scale = torch.optim.Adam(lsq.parameters(), 0.01), torch.tensor([0.1, 3.0])
    error = lambda z: (lsq(z)[0] - z).square().mean(0)
    z = scale * torch.randn(4000, 2)
    first = error(z).detach()
    for _ in range(400):
        optimizer.zero_grad()
        error(scale * torch.randn(500, 2)).div(scale ** 2).sum().backward()
        optimizer.step()
    assert (error(z) < first / 2).all() and lsq.step[1] > 5 * lsq.step[0]


def test_second_stage_makes_the_residual_smaller():
    torch.manual_seed(0)
    one, two = VQ(8, 4, decay=0.9), RVQ((8, 8), 4)
    for stage in two.stages: stage.decay = 0.9
    for _ in range(200):
        z = torch.randn(256, 4)
        one(z), two(z)
    z = torch.randn(2000, 4)
    assert (two.eval()(z)[0] - z).square().mean() < 0.8 * (one.eval()(z)[0] - z).square().mean()


def test_a_thousand_codes_each():
    made = {name: QUANTIZERS[name](TokenizerConfig(quantizer=name, **THOUSAND[name])) for name in QUANTIZERS}
    assert all(made[name].size == 1000 for name in made if name not in ("none", "open")) and made["none"].size == 0
    assert made["open"].codes == 1000 < made["open"].size, "what it spells comes on top"
    assert made["none"].dim == made["vq"].dim, "the ceiling of VQ has a code as long"


@some
@given(dim=st.integers(1, 16), seed=st.integers(0, 99), scale=st.sampled_from([0.01, 1, 100]))
def test_without_a_quantizer_nothing_is_rounded_and_everything_is_bounded(dim, seed, scale):
    z = scale * torch.randn(3, 4, 5, dim, generator=torch.Generator().manual_seed(seed))
    code, tokens, loss = Continuous(dim)(z)
    assert tokens is None and loss == 0 and code.shape == z.shape and torch.equal(code, z.tanh())


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
@both_patches
@some
@given(count=st.integers(1, 4), seed=st.integers(0, 99))
def test_reconstruct_is_there_and_back(quantizer, patch, count, seed):
    model, batch = small(quantizer, seed, patch=patch), frames(count, seed=seed)
    whole = model.reconstruct(batch)
    assert whole.dtype == torch.uint8 and whole.shape == (count, 32, 32, 3)
    assert torch.equal(whole, model.decode(model.encode(batch))) and torch.equal(whole, model.reconstruct(torch.from_numpy(batch)))


def test_a_plain_autoencoder_draws_and_says_that_it_has_no_tokens():
    model, batch = small("none"), frames(3)
    out = model.reconstruct(batch)
    with torch.no_grad(): expected = to_uint8(model(to_float(torch.from_numpy(batch)))[0])
    assert torch.equal(out, expected) and out.shape == (3, 32, 32, 3) and model.codebook_size == 0
    for way in (lambda: model.encode(batch), lambda: model.decode(torch.zeros(1, 4, 4, dtype=torch.long))):
        with pytest.raises(ValueError, match="no tokens: use reconstruct"): way()


@pytest.mark.parametrize("quantizer", [name for name in QUANTIZERS if name not in ("none", "open")])
def test_table_of_codes_is_what_the_decoder_gets(quantizer):
    model = small(quantizer)
    table, tokens = model.code_table(), model.encode(frames())
    assert table.shape == (model.codebook_size, model.quantizer.dim) and table.dtype == torch.float32 and not table.requires_grad
    with torch.no_grad(): assert torch.equal(to_uint8(model.decoder(table[tokens])), model.decode(tokens))


@both_patches
def test_rows_of_a_dictionarys_table_are_its_patches(patch):
    batch = mosaic(patch, 16)
    model = place_dictionary(small("dictionary", frame_size=64, patch=patch, codes=16), np.stack([batch[::-1], batch], 1))
    painted = to_uint8(model.code_table().unflatten(1, (3, patch, patch))).numpy()         # (codes, patch, patch, 3)
    tiles = batch.reshape(2, 64 // patch, patch, 64 // patch, patch, 3).swapaxes(2, 3)
    assert np.array_equal(painted[model.encode(batch)], tiles)


def test_table_without_codes_or_with_too_many_is_refused():
    for model, size in ((small("none"), "0"), (small("open", codes=2, masks=2), "4,294,967,298"), (small(levels=(512, 513)), "262,656")):
        with pytest.raises(ValueError, match=f"a table lists 1 to 262,144 tokens, not {size}:"): model.code_table()
    assert len(small(levels=(512, 512)).code_table()) == 2 ** 18


@every
def test_reconstruct_names_what_is_wrong(quantizer):
    with pytest.raises(ValueError, match="uint8 in 0..255"): small(quantizer).reconstruct(frames() / 255)
    with pytest.raises(ValueError, match=r"got \(2, 16, 16, 3\): use data.resize"): small(quantizer).reconstruct(frames(2, 16))


@learning
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
@both_patches
def test_a_film_has_the_tokens_of_its_frames_one_by_one(quantizer, patch):
    "Whatever is as in the frame before is not encoded again: in a film, in frames out of order, in one that returns, and where there are none."
    model, film = small(quantizer, patch=patch), frames(1).repeat(9, 0)
    rng = np.random.default_rng(1)
    for t in range(1, 9):
        film[t] = film[t - 1]
        for row, column in rng.integers(0, 32, (t % 4, 2)): film[t, row, column] = rng.integers(0, 256, 3)      # now and then nothing, or a pixel or two
        if t % 4 == 3: film[t, 16:, :16] = frames(1, 16, seed=t)[0]
    film[7] = film[2]
    alone = torch.cat([model.encode(frame[None]) for frame in film])
    assert torch.equal(model.encode(film), alone) and (alone[1:] != alone[:-1]).any()
    for order in (np.arange(9)[::-1].copy(), rng.permutation(9), np.zeros(5, int), np.array([3]), np.array([], int)):
        found = model.encode(film[order])
        assert torch.equal(found, alone[order]) and found.dtype == torch.int64 and found.shape == (len(order), *model.grid)


def test_what_stays_is_not_encoded_again(monkeypatch):
    model, film, asked = small(), frames(1).repeat(6, 0), []
    film[3:, 9, 20] ^= 255
    encode = model.encode_patches
    monkeypatch.setattr(model, "encode_patches", lambda tiles: asked.append(len(tiles)) or encode(tiles))
    model.encode(film)
    assert asked == [model.grid[0] * model.grid[1] + 1]


@learning
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


# The dictionary

def mosaic(patch, tiles, count=2, side=64, seed=0):
    "Frames (count, side, side, 3) made of at most so many different patches."
    rng, grid = np.random.default_rng(seed), side // patch
    drawn = rng.integers(0, 256, (tiles, patch, patch, 3), dtype=np.uint8)
    return drawn[rng.integers(tiles, size=(count, grid, grid))].swapaxes(2, 3).reshape(count, side, side, 3)


@both_patches
@some
@given(tiles=st.integers(1, 16), seed=st.integers(0, 99))
def test_what_has_a_code_for_each_patch_comes_back_exactly(patch, tiles, seed):
    batch = mosaic(patch, tiles, seed=seed)
    model = place_dictionary(small("dictionary", frame_size=64, patch=patch, codes=16), np.stack([batch[::-1], batch], 1), seed)
    assert not model.training and np.array_equal(model.reconstruct(batch), batch)
    assert np.array_equal(model.reconstruct(np.roll(batch, patch, 2)), np.roll(batch, patch, 2)), "in any place"


@some
@given(codes=st.integers(2, 20), count=st.integers(3, 200), seed=st.integers(0, 99))
def test_more_rounds_never_place_worse(codes, count, seed):
    chance = torch.Generator().manual_seed(seed)
    z, weight = torch.randn(count, 3, generator=chance), 10 * torch.rand(count, generator=chance)
    def error(rounds):
        codebook = Dictionary(codes, 3).place(z, weight, rounds, seed)
        return (weight * (z - codebook(z)[0]).square().sum(-1)).sum().item()
    errors = [error(rounds) for rounds in (0, 1, 2, 3, 8)]
    assert all(more <= less * (1 + 1e-5) + 1e-5 for less, more in zip(errors, errors[1:]))
    if count <= codes: assert max(errors) < 1e-9, "a code for each"


def test_an_open_dictionary_spells_what_it_has_not_seen():
    "Two colours and a mask for each half: exact up to the steps of the colours, for any two colours and any masks that it knows."
    torch.manual_seed(0)
    known, masks = torch.rand(40, 192) * 2 - 1, (torch.rand(8, 32) < 0.5).float()
    masks = torch.cat([masks, 1 - masks])       # which of the two colours comes first is not the test's to say
    quantizer = OpenDictionary(40, 16, 8).place(known, torch.ones(40))
    quantizer.spelled.masks.codebook.copy_(masks)
    levels = torch.randint(0, 32, (100, 2, 3, 1)) / 31 * 2 - 1
    mixed = masks[torch.randint(0, 16, (100, 2))].flatten(1)[:, None]                     # (100, 1, 64)
    strange = (levels[:, 0] + mixed * (levels[:, 1] - levels[:, 0])).flatten(1)
    code, tokens, _ = quantizer(strange)
    assert (tokens >= 40).all() and (tokens < quantizer.size).all() and (code - strange).abs().max() < 1e-5
    code, tokens, _ = quantizer(known)
    assert (tokens < 40).all() and torch.equal(code, known), "what it knows it does not spell"
    assert torch.equal(quantizer.code(quantizer(strange)[1].view(10, 10)), quantizer(strange)[0].view(10, 10, 192))


@given(seed=st.integers(0, 99))
@some
def test_two_colours_are_found_wherever_there_are_two(seed):
    generator = torch.Generator().manual_seed(seed)
    pair = torch.rand(5, 3, 2, generator=generator)
    pixels = pair.gather(2, torch.randint(0, 2, (5, 1, 64), generator=generator).expand(-1, 3, -1))
    one, other = two_colours(pixels)
    for i in range(5):
        found = torch.cat([one[i], other[i]], 1)
        assert all((found - colour[:, None]).abs().amax(0).min() < 1e-5 for colour in pixels[i].unique(dim=1).T)


def test_a_dictionary_of_many_codes_is_placed_in_several_draws():
    z = torch.randn(3000, 4, generator=torch.Generator().manual_seed(0))
    error = lambda codes: (z - Dictionary(codes, 4).place(z, torch.ones(3000))(z)[0]).square().sum(-1).mean()
    assert error(1500) < error(700) < error(100) / 2


def test_what_has_just_moved_is_drawn_better_for_it(monkeypatch):
    now, before = mosaic(8, 60, 4), mosaic(8, 60, 4)
    before[:, :8] = 255 - before[:, :8]       # the upper row of patches has changed, the others have not
    def error(weight):
        monkeypatch.setattr(chapter, "MOVES", weight)
        drawn = place_dictionary(small("dictionary", frame_size=64), np.stack([before, now], 1)).reconstruct(now).numpy()
        return np.square(drawn[:, :8].astype(float) - now[:, :8]).mean()
    assert error(20) < error(0)


@some
@given(count=st.integers(0, 60), most=st.integers(0, 2), seed=st.integers(0, 99))
def test_distinct_finds_what_unique_finds(count, most, seed):
    tiles = torch.randint(0, most + 1, (count, 2, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    different, which = distinct(tiles)
    assert torch.equal(different[which], tiles)
    assert torch.equal(different.flatten(1).unique(dim=0), tiles.flatten(1).unique(dim=0))
    assert len(different) == len(tiles.flatten(1).unique(dim=0))


def test_distinct_sees_every_single_bit():
    tiles = torch.zeros(8 * 192 + 1, 192, dtype=torch.uint8)
    for bit in range(8 * 192): tiles[bit, bit // 8] = 1 << bit % 8
    assert len(distinct(tiles.view(-1, 8, 8, 3))[0]) == len(tiles)


def test_patches_and_mosaic_are_each_others_inverse_and_hold_nothing():
    config = TokenizerConfig(**SMALL)
    x = to_float(torch.from_numpy(frames()))
    z = Patches(config)(x)
    assert z.shape == (2, 4, 4, 192) and torch.equal(Mosaic(config)(z), x)
    assert torch.equal(z[1, 2, 3], F.pixel_unshuffle(x[1:, :, 16:24, 24:32], 8).flatten())
    assert not [*small("dictionary").parameters()] and not small("dictionary").encoder.state_dict()


def test_counts_are_of_the_second_frames_and_of_what_changed_in_them():
    now = np.zeros((130, 16, 16, 3), np.uint8)           # more than are counted at a time
    now[:70, :8, :8], now[70:, :8, :8] = 10, 20
    now[100, 8:, 8:, 1] = 30                             # one that comes once, and goes
    before = np.concatenate([now[:1], now[:-1]])
    tiles, often, moved = patch_counts(np.stack([before, now], 1), 8)
    found = {int(tile.max()): (int(n), int(m)) for tile, n, m in zip(tiles, often, moved)}
    assert found == {0: (389, 1), 10: (70, 0), 20: (60, 1), 30: (1, 1)} and tiles.dtype == torch.uint8
    assert patch_counts(np.stack([before, now], 1), 16)[1].sum() == 130


@both_patches
@quantizers
def test_each_different_patch_is_encoded_once_and_as_in_its_frame(quantizer, patch):
    model, batch = small(quantizer, patch=patch, frame_size=64), mosaic(patch, 5, 3)
    runs = []
    with model.encoder.register_forward_hook(lambda part, args, z: runs.append(z[..., 0].numel())): tokens = model.encode(batch)
    assert sum(runs) == 5 and tokens.shape == (3, *model.grid)
    assert torch.equal(tokens, torch.cat([model.encode(frame[None]) for frame in batch]))
    with torch.no_grad(): assert torch.equal(tokens, model.codes(to_float(torch.from_numpy(batch)))[1])
    assert model.encode(batch[:0]).shape == (0, *model.grid)


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


def loss_batch(seed=0):
    return {"frames": torch.from_numpy(np.stack([frames(2, seed=seed), frames(2, seed=seed + 1)], 1))}


def test_default_loss_is_the_weighting_of_motion():
    model, batch = small(), loss_batch()
    before, true = (to_float(batch["frames"][:, i]) for i in (0, 1))
    error = model(true)[0] - true
    error = (10 * error.square() + error.abs()).mean(1, keepdim=True)
    mask = changed_mask(true, before)
    expected = error.mean() + 0.1 * (error * mask).sum() / mask.sum()
    assert torch.equal(reconstruction_loss(model, batch)[0], expected)
    assert torch.equal(reconstruction_loss(model, batch, losses={"motion": 1.0})[0], expected)


@pytest.mark.parametrize("loss", [name for name in LOSSES if name not in ("lpips", "adversarial")])
def test_every_loss_is_zero_at_the_truth_and_grows_with_the_error(loss):
    true, mask = to_float(torch.from_numpy(frames())), torch.ones(2, 1, 32, 32)
    noise = torch.randn(true.shape, generator=torch.Generator().manual_seed(0))
    none, little, much = (LOSSES[loss](true + size * noise, true, mask).item() for size in (0, 0.1, 0.3))
    assert none == 0 < little < much


def test_multiscale_sees_a_shift_less_than_a_gap():
    line, shifted, empty = (torch.zeros(1, 3, 32, 32) for _ in range(3))
    line[..., 8], shifted[..., 9] = 1, 1
    assert LOSSES["l1"](line, shifted) > LOSSES["l1"](line, empty)
    assert LOSSES["multiscale"](line, shifted) < LOSSES["multiscale"](line, empty)


def test_weights_may_depend_on_the_step_and_losses_add():
    model, batch = small(), loss_batch()
    value = lambda step=0, **losses: reconstruction_loss(model, batch, step, losses=losses)[0].item()
    assert value(l1=2.0, mse=3.0) == pytest.approx(2 * value(l1=1.0) + 3 * value(mse=1.0))
    late = chapter.from_step(5, 2.0)
    assert value(4, l1=1.0, mse=late) == value(l1=1.0) and value(5, l1=1.0, mse=late) == pytest.approx(value(l1=1.0, mse=2.0))


def test_unknown_loss_gets_the_nearest():
    with pytest.raises(ValueError, match="Unknown loss 'moton'. Did you mean motion"):
        reconstruction_loss(small(), loss_batch(), losses={"moton": 1.0})


def test_critic_learns_to_tell_and_leaves_the_tokenizer_alone():
    with pytest.raises(ValueError, match="train Judged"): reconstruction_loss(small(), loss_batch(), losses={"adversarial": 1.0})
    model = Judged(small().train())
    true = loss_batch()["frames"][:, 1]
    loss = lambda: reconstruction_loss(model, loss_batch(), losses={"adversarial": 1.0})[0]
    optimizer = torch.optim.Adam(model.critic.parameters(), 1e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    with torch.no_grad(): assert model.critic(to_float(true)).mean() > model.critic(model(to_float(true))[0]).mean() + 1


def test_tokenizer_and_critic_train_together():
    torch.manual_seed(0)
    model = Judged(small().train())
    pairs = np.stack([frames(6, seed=1), frames(6, seed=2)], 1)
    first = {name: value.clone() for name, value in model.named_parameters()}
    loss = lambda m, batch, step: reconstruction_loss(m, batch, step, losses={"motion": 1.0, "adversarial": chapter.from_step(2, 0.1)})
    fit(model, FrameWindows(pairs, batch=4), loss, TrainConfig(steps=4, weight_decay=0.0, device="cpu", dtype="float32"), quiet=True)
    # The zeros at the end of each block hold the gradient of its first layer back; biases of the critic may balance.
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, first[name])}
    assert not [name for name, value in first.items() if value.ndim > 1 and "near" not in name and name not in moved]
    assert isinstance(model.critic, Critic) and not [name for name in model.tokenizer.state_dict() if "critic" in name]


def test_lpips_without_its_package_says_so(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lpips", None)
    chapter.perceptual.cache_clear()
    with pytest.raises(course.MissingExtra, match=r"lwm-course\[perceptual\]"):
        reconstruction_loss(small(), loss_batch(), losses={"motion": 1.0, "lpips": 1.0})


def test_lpips_without_its_weights_names_the_file(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "lpips", type("lpips", (), {}))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    chapter.perceptual.cache_clear()
    with pytest.raises(FileNotFoundError, match="alexnet-owt-7be5be79.pth.*does not fetch"): chapter.perceptual()


# What is measured

GAME = "ALE/Breakout-v5"


@pytest.mark.parametrize("game", list(chapter.BALLS))
def test_balls_are_where_the_memory_says(repository, game):
    probe = Probe.of(read_episode(episodes(repository / "data_samples", [game], "val")[0]), 30)
    assert all(probe.balls_kept(probe.true)) and min(chapter.contrast(f[spot]) for f, spot in zip(probe.true, probe.spots)) > 40
    assert not any(probe.balls_kept(np.full_like(probe.true, 90))) and np.mean(probe.balls_kept(probe.before)) < 0.3


def test_a_perfect_tokenizer_scores_as_one(repository):
    probe = Probe.of(read_episode(episodes(repository / "data_samples", [GAME], "val")[0]), 4, 32)
    class Perfect:
        config, codebook_size = TokenizerConfig(**SMALL), 36
        encode = staticmethod(lambda frames: torch.from_numpy(frames.reshape(len(frames), 4, 8, 4, -1).sum((2, 4)).astype(int) % 36))
        reconstruct = staticmethod(lambda frames: torch.from_numpy(np.where(np.arange(32)[None, :, None, None] > 0, frames, 1)))
    found = examine(Perfect, [probe])
    assert found["balls"] == 1 and found["flicker"] == 0 and found["psnr"] > 25 and 1 <= found["perplexity"] <= found["used"]


def test_without_tokens_the_picture_is_judged_alone(repository):
    probe = Probe.of(read_episode(episodes(repository / "data_samples", [GAME], "val")[0]), 3, 32)
    found, coded = examine(small("none"), [probe]), examine(small("vq"), [probe])
    assert found.keys() == coded.keys() and all(math.isfinite(found[key]) for key in ("psnr", "moving_psnr", "balls"))
    assert math.isnan(found["perplexity"]) and math.isnan(found["flicker"]) and found["used"] == 0
    assert coded["flicker"] == 0 and 1 <= coded["perplexity"] <= coded["used"]


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


# Training at length

TINY = TokenizerConfig(**{**SMALL, "quantizer": "vq"})


def at_length(repository, out, model=TINY, games=(GAME,), steps=3, **more):
    settings = TrainConfig(steps=steps, lr=0.05, device="cpu", dtype="float32", valid_every=2)
    return train_tokenizer(repository / "data_samples", list(games), out, settings, model, pairs=6, quiet=True, **more)


def state(model): return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("quantizer", ["vq", "fsq", "none", *PLACED])
def test_trained_at_length_is_saved_with_its_ledger(repository, tmp_path, quantizer):
    model = at_length(repository, tmp_path, TokenizerConfig(**{**SMALL, "quantizer": quantizer}))
    assert not model.training, "a codebook in training moves when it is asked"
    loaded = Tokenizer.from_pretrained(tmp_path, "cpu", "float32")
    assert torch.equal(loaded.reconstruct(frames()), model.reconstruct(frames()))
    ledger = json.loads((tmp_path / "ledger.json").read_text())
    assert ledger["status"] == "finished" and ledger["data_hash"] == data_hash(repository / "data_samples", [GAME])
    assert math.isfinite(ledger["metrics"]["psnr" if quantizer in PLACED else "valid_psnr"])
    assert model.config.games == loaded.config.games == (GAME,)
    before = state(model)
    again = at_length(repository, tmp_path, TokenizerConfig(**{**SMALL, "quantizer": quantizer}))
    assert all(torch.equal(value, before[name]) for name, value in again.state_dict().items()), "what is finished is not trained again"


@pytest.mark.parametrize("quantizer", ["vq", "fsq", "none"])
def test_from_a_start_only_the_decoder_goes_on(repository, tmp_path, quantizer):
    small(quantizer).save_pretrained(tmp_path / "start")
    start = Tokenizer.from_pretrained(tmp_path / "start", "cpu", "float32")
    before = state(start)
    further = at_length(repository, tmp_path / "run", start=start)
    moved = {name.split(".")[0] for name, value in further.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"decoder"} and further.config == start.config


def test_a_dictionary_at_the_start_stays(repository, tmp_path):
    start = place_dictionary(small("dictionary"), np.stack([frames(), frames(seed=1)], 1))
    codebook = start.quantizer.codebook.half().float()       # as it is saved
    further = at_length(repository, tmp_path, start=start)
    assert torch.equal(further.quantizer.codebook, codebook) and (tmp_path / "ledger.json").exists()


def test_hash_of_the_data_knows_names_and_sizes(tmp_path):
    def write(name, size):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
        return data_hash(tmp_path, ["ALE/Pong-v5"])
    first = write("ALE-Pong-v5/000001.npz", 10)
    assert len(first) == 16 and write("ALE-Pong-v5/000001.npz", 10) == first
    more = write("ALE-Pong-v5/000002.npz", 10)
    longer = write("ALE-Pong-v5/000002.npz", 11)
    assert len({first, more, longer}) == 3 and write("ALE-Breakout-v5/000001.npz", 10) == longer, "other games do not count"


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
@pytest.mark.parametrize("quantizer", ["vq", "dictionary"])
def test_codes_stay_exact_in_any_precision(quantizer, kind):
    model = small(quantizer)
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
    assert set(load_file(small("dictionary").save_pretrained(tmp_path / "codes") / "model.safetensors")) == {"quantizer.codebook"}


def test_games_are_remembered_and_an_old_file_names_none(tmp_path):
    model = small(games=["ALE/Pong-v5", GAME])
    file = model.save_pretrained(tmp_path) / "config.json"
    assert Tokenizer.from_pretrained(tmp_path, "cpu").config.games == ("ALE/Pong-v5", GAME) == model.config.games
    config = json.loads(file.read_text())
    del config["games"]
    file.write_text(json.dumps(config))
    old = Tokenizer.from_pretrained(tmp_path, "cpu", "float32")
    assert old.config.games == () and torch.equal(old.encode(frames()), model.encode(frames()))


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    "A folder of shipped models with one, `nano`, which is a world model with a tokenizer in it."
    (tmp_path / "models" / "nano").mkdir(parents=True)
    (tmp_path / "models" / "nano" / "config.json").write_text("{}")
    small().save_pretrained(tmp_path / "models" / "nano" / "tokenizer")
    monkeypatch.setattr(training, "MODELS", tmp_path / "models")
    return tmp_path


def test_shipped_name_gives_the_tokenizer_of_the_world_model(shelf):
    assert Tokenizer.from_pretrained("nano", "cpu").grid == (4, 4)


@pytest.mark.parametrize("name", ["nan", "nanno", "Nano"])
def test_unknown_name_gets_the_nearest(shelf, name):
    with pytest.raises(ValueError, match=f"Unknown model '{name}'. Did you mean nano"): Tokenizer.from_pretrained(name)


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
