"What moves: shifts are found wherever they are, kept beside the tokens, and clips of them are whole."
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lwm_course import data
from lwm_course.motion import (ANY, DRAWN, FEW, MOVED, NEW, REACH, STAYED, Onward, Shifts, TokenClips, batch_of, clip_of, corrupt, explain, matches_of,
                               ranks, read_tokens, shifts, tokenize, unspoilt, vanish)
from lwm_course.tokenizer import Tokenizer

PONG, FREEWAY = "ALE/Pong-v5", "ALE/Freeway-v5"
pytestmark = pytest.mark.usefixtures("one_thread")


def noise(frames=1, side=256, seed=0):
    "Pictures of which no two patches are alike, as a console would enlarge them."
    drawn = np.random.default_rng(seed).integers(0, 256, (frames, min(side, 210), min(side, 160), 3), np.uint8)
    return torch.from_numpy(data.resize(drawn, side))


def film_of(frames=6, share=0.3, seed=0):
    "Tokens of a still picture in which now and then a few change."
    chance = torch.Generator().manual_seed(seed)
    tokens = torch.randint(40, (8, 1, 8, 8), generator=chance).repeat(1, frames, 1, 1)
    hit = torch.rand(tokens.shape, generator=chance) < share * (torch.rand(8, frames, 1, 1, generator=chance) < 0.5)
    return torch.where(hit, torch.randint(40, tokens.shape, generator=chance), tokens)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([64, 128, 256]), st.sampled_from([8, 16]), st.integers(0, 824), st.integers(0, 1000))
def test_any_shift_of_any_size_is_found(side, patch, number, seed):
    motion, frame, grid = Shifts(side, patch), noise(side=side), side // patch
    inner = torch.zeros(1, grid, grid, dtype=torch.bool)
    margin = -(-32 // patch)                                        # beside the border it is repeated: there two shifts are alike
    inner[:, margin:-margin, margin:-margin] = torch.rand((1, *inner[0, margin:-margin, margin:-margin].shape), generator=torch.Generator().manual_seed(seed)) < 0.3
    by = torch.where(inner, number, -1)
    shown = motion.paste(frame, motion.patches(frame, by), inner)
    found = motion.matches(shown, frame, inner)
    assert (found[:, 0] == number).all() and (found[:, 1:] == -1).all()
    assert torch.equal(motion.came(found, inner), torch.where(inner, MOVED + number, STAYED))


def test_a_moving_object_is_a_shift_and_its_trace_bare_ground():
    motion, before = Shifts(256, 8), np.zeros((210, 160, 3), np.uint8)
    after = before.copy()
    before[100:104, 80:82], after[97:101, 85:87] = 200, 200
    before, after = (torch.from_numpy(data.resize(x, 256))[None] for x in (before, after))
    tile = lambda x: x.unflatten(2, (32, 8)).unflatten(1, (32, 8))
    changed = (tile(before) != tile(after)).any(-1).any(4).any(2)
    moved = motion.came(motion.matches(after, before, changed), changed)
    number = (shifts(REACH) == torch.tensor([3, -5])).all(1).nonzero().item()      # it has come from 3 rows below and 5 columns to the left
    lit = (tile(after) > 0).any(-1).any(4).any(2)
    assert lit.any() and (moved[lit] == MOVED + number).all() and (moved[changed & ~lit] == ANY).all() and (moved[~changed] == STAYED).all()


def test_no_change_and_nothing_like_it():
    motion, frame = Shifts(64, 8), noise(side=64)
    nothing = torch.zeros(1, 8, 8, dtype=torch.bool)
    assert motion.matches(frame, frame, nothing).shape == (0, FEW + 1)
    assert (motion.came(motion.matches(noise(side=64, seed=1), frame, ~nothing), ~nothing) == NEW).all()


@pytest.mark.parametrize("players", [1, 5])
def test_frames_of_a_batch_do_not_touch_one_another(players):
    motion, before, now = Shifts(64, 8), noise(players, 64), noise(players, 64, seed=1)
    chance = torch.Generator().manual_seed(3)
    by = torch.where(torch.rand(players, 8, 8, generator=chance) < 0.2, torch.randint(825, (players, 8, 8), generator=chance), -1)
    now = motion.paste(now, motion.patches(before, by), by >= 0)
    changed = torch.ones(players, 8, 8, dtype=torch.bool)
    together = motion.came(motion.matches(now, before, changed), changed)
    for i in range(players):
        one = slice(i, i + 1)
        assert torch.equal(together[one], motion.came(motion.matches(now[one], before[one], changed[one]), changed[one]))


@given(st.lists(st.integers(0, 9), max_size=30))
def test_ranks_count_within_a_number(values):
    values = sorted(values)
    assert ranks(torch.tensor(values, dtype=torch.long), 10).tolist() == [i - values.index(v) for i, v in enumerate(values)]


def test_several_processes_write_the_same_tokens(tmp_path, repository):
    tokenizer, samples = Tokenizer.from_pretrained("nano", "cpu", "float32"), repository / "data_samples"
    for path in data.episodes(samples, [PONG, FREEWAY])[:3]:
        episode = data.read_episode(path)
        cut = {name: getattr(episode, name)[:11] for name in ("actions", "rewards", "ends")}
        data.write_episode(tmp_path / "play" / path.parent.name / path.name, replace(episode, indices=episode.indices[:12], ram=episode.ram[:12], **cut))
    folders = [tokenize(tokenizer, tmp_path / "play", tmp_path / str(workers), workers=workers) for workers in (1, 2)]
    files = [sorted(path.relative_to(folder) for path in folder.rglob("*.npz")) for folder in folders]
    assert len(files[0]) == 3 and files[0] == files[1]
    (folders[1] / files[1][0]).unlink()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    tokenize(tokenizer, tmp_path / "play", folders[1], workers=2)       # the last one is made here, and leaves this process as it was
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)
    for one, two in ([read_tokens(folder / name) for folder in folders] for name in files[0]):
        assert one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


def test_an_episode_and_its_clips_agree(tmp_path, repository):
    tokenizer, samples = Tokenizer.from_pretrained("nano", "cpu", "float32"), repository / "data_samples"
    path = data.episodes(samples, [PONG])[0]
    short = tmp_path / "play" / path.parent.name / path.name
    episode = data.read_episode(path)
    cut = {name: getattr(episode, name)[:39] for name in ("actions", "rewards", "ends")}
    data.write_episode(short, replace(episode, indices=episode.indices[:40], ram=None, **cut))
    tokenize(tokenizer, tmp_path / "play", tmp_path / "tokens")
    written = read_tokens(tmp_path / "tokens" / path.parent.name / path.name)
    assert written["ram"].shape == (40, 0)              # none was kept
    data.write_episode(short, replace(episode, indices=episode.indices[:40], ram=episode.ram[:40], **cut))
    tokenize(tokenizer, tmp_path / "play", tmp_path / "with")
    assert np.array_equal(read_tokens(tmp_path / "with" / path.parent.name / path.name)["ram"], episode.ram[:40])
    frames = torch.from_numpy(data.resize(data.read_episode(short).frames, 256))
    motion = Shifts(256, 8)
    for start, length in ((0, 5), (7, 12), (20, 1)):
        clip = clip_of(written, start, length)
        film = frames[start:start + length + 1]
        tokens = tokenizer.encode(film)
        changed = tokens[1:] != tokens[:-1]
        matches = motion.matches(film[1:], film[:-1], changed)
        assert "facts" not in clip and np.array_equal(clip["tokens"], tokens) and np.array_equal(clip["moved"][1:], motion.came(matches, changed))
        assert np.array_equal(clip["matches"], matches[:, :FEW]) and np.array_equal(clip["where"], changed.flatten().nonzero()[:, 0])
        batch = batch_of([{**clip, "game": np.array(i)} for i in (0, 1)])
        assert torch.equal(matches_of(batch, torch.stack([changed] * 2)), torch.cat([matches[:, :FEW]] * 2))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 824), st.integers(0, 31), st.integers(0, 31))
def test_what_goes_on_reaches_the_tokens_it_overlaps(number, row, column):
    "A rectangle as large as a token, moved on once more, in drawn pixels: it reaches the tokens of which it covers a tenth of both sides."
    moved = torch.zeros(2, 32, 32, dtype=torch.long)
    moved[1, row, column] = MOVED + number
    reached, sides, by = Onward(32, REACH, DRAWN)(moved, moved), [side / 32 for side in DRAWN], shifts(REACH)[number].tolist()
    there = [at * side - shift for at, side, shift in zip((row, column), sides, by)]          # it goes against the shift that looked back
    covered = [[min(t + side, (n + 1) * side) - max(t, n * side) for n in range(32)] for t, side in zip(there, sides)]
    expected = [[min(a / sides[0], b / sides[1]) > 0.1 + 1e-6 for b in covered[1]] for a in covered[0]]
    assert torch.equal(reached[1] == MOVED + number, torch.tensor(expected)) and not reached[0].any()
    assert ((reached == STAYED) | (reached == MOVED + number)).all()


def test_of_two_that_reach_a_token_the_farther_counts():
    onward, number = Onward(8, REACH, (64, 64)), {tuple(by): MOVED + i for i, by in enumerate(shifts(REACH).tolist())}
    moved = torch.zeros(8, 8, dtype=torch.long)
    moved[4, 2], moved[3, 3], moved[0, 0] = number[0, -8], number[-8, 1], number[8, 8]      # the last one leaves the frame
    reached = onward(moved, moved)
    assert reached[4, 3] == max(number[0, -8], number[-8, 1]) and reached[0, 0] == STAYED
    assert torch.equal(onward(*[moved.expand(2, 3, 8, 8)] * 2), reached.expand(2, 3, 8, 8))


def test_what_would_change_nothing_is_not_reached():
    "Against the pixels themselves, token by token; and what is new beside something that moves goes along."
    torch.manual_seed(0)
    pictures = torch.randint(2, (6, 8, 8, 3)).byte() * 200
    pictures[:4] = 0
    pictures[1, 3, 4], tokens = 17, torch.randint(6, (3, 8, 8))                 # a pixel that differs by 17 levels of 255
    motion, blind, seeing = Shifts(64, 8, drawn=(64, 64)), Onward(8, REACH, (64, 64)), Onward(8, REACH, (64, 64), pictures)
    moved = torch.where(torch.rand(3, 8, 8) < 0.2, MOVED + torch.randint(len(shifts(REACH)), (3, 8, 8)), STAYED)
    film = pictures[tokens].transpose(2, 3).reshape(3, 64, 64, 3)
    expected = torch.full_like(moved, STAYED)
    for frame, y, x in (moved >= MOVED).nonzero().tolist():
        one = torch.zeros_like(moved)
        one[frame, y, x] = way = int(moved[frame, y, x])
        for _, r, c in blind(one, tokens).nonzero().tolist():
            brought = motion.brought(film, torch.tensor([frame]), torch.tensor([r * 8 + c]), torch.tensor([[way - MOVED]]))[0, 0]
            if (brought.int() - pictures[tokens[frame, r, c]]).abs().max() > 16: expected[frame, r, c] = max(expected[frame, r, c], way)
    assert torch.equal(seeing(moved, tokens), expected) and (blind(moved, tokens) != expected).any() and expected.any()
    ball = MOVED + shifts(REACH).tolist().index([0, -8])                        # a token to the right
    pair, shown = torch.zeros(1, 8, 8, dtype=torch.long), torch.zeros(1, 8, 8, dtype=torch.long)
    pair[0, 2, 2], pair[0, 3, 2], pair[0, 6, 6], shown[0, 2:4, 2] = ball, NEW, NEW, 5
    assert seeing(pair, shown).nonzero().tolist() == [[0, 2, 3], [0, 3, 3]] and blind(pair, shown).nonzero().tolist() == [[0, 2, 3]]


def test_shifts_of_what_is_spoilt_are_struck_out():
    step = Onward(8, REACH, (64, 64)).step                          # a token is 8 drawn pixels
    wrong, chosen = torch.zeros(1, 2, 8, 8, dtype=torch.bool), torch.zeros(1, 2, 8, 8, dtype=torch.bool)
    wrong[0, 1, 2, 3], chosen[0, 1, 2, 5], chosen[0, 0, 2, 5] = True, True, True
    number = {tuple(by): i for i, by in enumerate(shifts(REACH).tolist())}
    matches = torch.tensor([[number[0, -16], number[0, -8], number[8, -16], -1]] * 2)
    assert unspoilt(matches, chosen, wrong, step).tolist() == [matches[0].tolist(), [-1, *matches[1, 1:].tolist()]]


@pytest.fixture
def flight():
    "Ground, and a ball that flies over it, one token per frame."
    film = torch.arange(400).view(1, 1, 20, 20).repeat(1, 12, 1, 1)
    for t in range(12): film[0, t, 10, 4 + t] = 999
    return film


def test_what_vanishes_is_gone_for_a_while_wherever_it_flies(flight):
    torch.manual_seed(0)
    before, ground, lengths = flight.clone(), torch.arange(400).view(20, 20), set()
    for _ in range(60):
        for clip in vanish(flight.expand(2, -1, -1, -1), 0.5):
            gone = [t for t in range(12) if clip[t, 10, 4 + t] != 999]
            lengths.add(len(gone))
            assert gone == list(range(12))[min(gone, default=12):][:len(gone)] and 0 not in gone     # one spell
            assert all(torch.equal(clip[t], ground if t in gone else flight[0, t]) for t in range(12))
    assert {0, 1, 2} < lengths and max(lengths) > 8 and torch.equal(flight, before)                 # the film itself is as it was


def test_what_lingers_stays_and_goes_on_as_well(flight):
    torch.manual_seed(0)
    spells = set()
    for _ in range(60):
        clip = vanish(flight, 0.0, 1.0)[0]
        extra = (clip != flight[0]).flatten(1)
        assert all(clip[t, 10, 4 + t] == 999 for t in range(12)) and extra.sum(1).max() <= 1         # at most one ball too many
        assert (clip[extra.view_as(clip)] == 999).all() and len(extra.nonzero()[:, 1].unique()) <= 1    # it does not move
        spells.add(int(extra.sum()))
    assert {0, 1} < spells and max(spells) > 8


def test_corruption_keeps_to_its_level_and_to_the_tokens_of_the_batch():
    torch.manual_seed(0)
    tokens = film_of()
    before = tokens.clone()
    seen = corrupt(tokens, 0.8)
    assert torch.equal(tokens, before) and torch.equal(corrupt(tokens, 0.0), tokens) and torch.isin(seen, tokens).all()
    moved = torch.nn.functional.pad((tokens[:, 1:] != tokens[:, :-1]).float(), (1, 1, 1, 1, 1, 0))
    near = torch.nn.functional.max_pool2d(moved, 3, 1) > 0
    hit = seen != tokens
    assert hit.any() and not hit[~near].any() and hit[near].float().mean() < 0.6     # only where something moves, at a mean level of 0.4


def recorded(folder, forgetful=()):
    "Four episodes of Pong as `tokenize` writes them, some without the console's memory; of which split the last one is."
    tokens = np.arange(30, dtype=np.uint16)[:, None, None] + np.zeros((30, 8, 8), np.uint16)
    found = explain(Shifts(64, 8), noise(1, 64).expand(30, -1, -1, -1), torch.from_numpy(tokens.astype(np.int64)))
    for seed in range(4):
        path = data.episode_path(folder, PONG, seed, "mixed")
        path.parent.mkdir(parents=True, exist_ok=True)
        ram = np.arange(30, dtype=np.uint8)[:, None] + np.zeros((30, 0 if seed in forgetful else 128), np.uint8)
        with open(path, "wb") as file: np.savez(file, tokens=tokens, actions=np.arange(30), ram=ram, **found)
    return data.split_of(3)


def test_facts_go_along_where_they_were_read(tmp_path):
    split = recorded(tmp_path / "all")
    clips = TokenClips(tmp_path / "all", [PONG], lengths=(4, 8), batch=2, split=split)
    assert clips.remembers and "facts" not in clips(2)
    for episode in clips.episodes[0]: episode["facts"] = episode["ram"][:, :6].astype(np.int16)
    batch = clips(2)
    assert batch["facts"].shape == (2, 5, 6) and batch["facts"].dtype == torch.int64
    assert torch.equal(batch["facts"][..., 5], batch["tokens"][..., 0, 0])          # each frame beside its own


def test_a_memory_is_remembered_where_all_have_one(tmp_path):
    split = data.split_of(3)
    mine = [seed for seed in range(4) if data.split_of(seed) == split]
    for name, forgetful in (("one", mine[:1]), ("none", mine)):
        recorded(tmp_path / name, forgetful)
        clips = TokenClips(tmp_path / name, [PONG], lengths=(4, 8), batch=8, split=split)
        batch = clips(2)
        assert not clips.remembers and batch["tokens"].shape == (8, 5, 8, 8)


def test_a_share_of_the_clips_is_where_a_key_decides(tmp_path):
    split = recorded(tmp_path)
    for path in data.episodes(tmp_path, [PONG], split):         # the key turns a walk round once, in frame 20
        with np.load(path) as file: episode = dict(file)
        episode["ram"][:, 7], episode["actions"] = np.concatenate([[0], np.where(np.arange(1, 30) < 20, 3, 253).cumsum() % 256]), np.arange(30) >= 20
        with open(path, "wb") as file: np.savez(file, **episode | {"actions": episode["actions"].astype(np.int64)})
    turned = lambda share: np.mean([(clip[:-1] <= 19).any() and (clip[1:] >= 20).any()
                                    for clip in TokenClips(tmp_path, [PONG], (4,), 256, split, decisive=share)(0)["tokens"][..., 0, 0].numpy()])
    by_chance = 4 / 26          # of 26 places for a clip of five frames
    assert turned(1.0) > 0.95 and abs(turned(0.5) - (1 + by_chance) / 2) < 0.1 and abs(turned(0.0) - by_chance) < 0.1


def test_a_game_gets_more_clips(tmp_path):
    for game in (PONG, FREEWAY):
        split = recorded(tmp_path / game)
        if game == FREEWAY: data.episode_path(tmp_path / PONG, FREEWAY, 0, "mixed").parent.symlink_to(data.episode_path(tmp_path / game, PONG, 0, "mixed").parent)
    clips = lambda more: TokenClips(tmp_path / PONG, [PONG, FREEWAY], (4,), 12, split, more=more)(0)["game"].bincount().tolist()
    assert clips(()) == [6, 6] and clips([FREEWAY]) == [4, 8] and clips([PONG, PONG]) == [9, 3]


def test_token_clips_are_the_same_for_the_same_step(tmp_path):
    split = recorded(tmp_path)
    clips = TokenClips(tmp_path, [PONG], lengths=(4, 8), batch=2, split=split)
    one, two = clips(1), clips(1)
    assert one["tokens"].shape == (1, 9, 8, 8) and clips(2)["tokens"].shape == (2, 5, 8, 8)     # as many frames in every step
    assert all(torch.equal(one[k], two[k]) for k in one) and any(not torch.equal(one["tokens"], clips(step)["tokens"]) for step in (3, 5, 7))
    assert torch.equal(one["tokens"][:, :, 0, 0], one["actions"])          # the key that led to a frame stands beside it
    with pytest.raises(ValueError, match=f"{PONG}.*40"): TokenClips(tmp_path, [PONG], lengths=(40,), split=split)
    with pytest.raises(ValueError, match=FREEWAY): TokenClips(tmp_path, [FREEWAY], split=split)


def test_damaged_and_old_tokens_are_named(tmp_path):
    film = torch.randint(40, (5, 8, 8))
    path = tmp_path / "00000000-mixed.npz"
    whole = {"tokens": film.numpy().astype(np.uint16), "actions": np.zeros(5), "ram": np.zeros((5, 128), np.uint8), **explain(Shifts(64, 8), noise(5, 64), film)}
    np.savez(path, **whole)
    assert np.array_equal(read_tokens(path)["tokens"], film)
    content = path.read_bytes()
    for kept in (0, 3, 100, len(content) // 2, len(content) - 5):
        path.write_bytes(content[:kept])
        with pytest.raises(ValueError, match="00000000-mixed.npz is damaged.*delete"): read_tokens(path)
    for missing in ("ram", "moved", "matches"):
        np.savez(path, **{name: part for name, part in whole.items() if name != missing})
        with pytest.raises(ValueError, match="00000000-mixed.npz.*older version.*delete"): read_tokens(path)
    with pytest.raises(ValueError, match="nothing.npz"): read_tokens(tmp_path / "nothing.npz")
