"The memory behind the picture: bytes that change are followed, carried on by rule, read from tokens, and drawn."
import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lwm_course.console import CERTAIN, DOUBT, HELD, UNKNOWN, Console, Consoles, Facts, Program, Screen, Silence, console_loss, lose, remembered, screen_loss, write_program

pytestmark = pytest.mark.usefixtures("one_thread")
COUNT, PLACE, SPEED, BAT = 3, 10, 11, 40    # bytes of a game that is played here
KEYS, GRID = 3, 8                           # nothing, up, down; tokens per side


def play(seed, frames=200):
    "Memories (T, 128) and keys (T - 1,): a clock counts to 12, a ball bounces between two walls, a key moves a bat."
    rng = np.random.default_rng(seed)
    clock, place, speed, bat = rng.integers(12), 20 + rng.integers(40), (3, -3)[rng.integers(2)], 2 * rng.integers(16)
    ram, keys = np.full((frames, 128), 77, np.uint8), rng.integers(KEYS, size=frames - 1)
    for t in range(frames):
        ram[t, [COUNT, PLACE, SPEED, BAT]] = clock, place, speed % 256, bat
        if t == frames - 1: break
        clock = (clock + 1) % 12
        if not 20 <= place + speed < 60: speed = -speed
        place, bat = place + speed, min(30, max(0, bat + (0, 2, -2)[keys[t]]))
    return ram, keys


def little(seed, frames=100):
    "A game of one byte, which counts to 5."
    ram = np.zeros((frames, 128), np.uint8)
    ram[:, 7] = (np.arange(frames) + seed) % 5
    return ram


PLAYS = [play(seed) for seed in range(40)]
SMALL = dict(width=8, hidden=64, depth=2)


def facts_of(count=6): return Facts.of([ram for ram, _ in PLAYS], count)


def few_facts(count=6): return Facts.of([little(0), little(3)], count)


def at(facts, ram):
    "Facts of moments of which the keys before are not known."
    return torch.nn.functional.pad(facts.read(ram), (0, HELD), value=UNKNOWN)


def console_of(seed=0, spread=0.0, facts=None, **shape):
    "A small console; with a spread, one that has something to say."
    torch.manual_seed(seed)
    console = Console(facts or facts_of(), KEYS, code=6, grid=GRID, shown=4, look=12, **{**SMALL, **shape})
    with torch.no_grad():
        for weight in console.parameters(): weight.add_(spread * torch.randn_like(weight))
    return console


def film_of(ram):
    "Pictures (T, 8, 8) of memories: a ball in its column, a bat in its row."
    film = torch.zeros(len(ram), GRID, GRID, dtype=torch.long)
    frame = torch.arange(len(ram))
    film[frame, 4, torch.from_numpy((ram[:, PLACE].astype(int) - 20) // 5)] = 1
    film[frame, torch.from_numpy(ram[:, BAT].astype(int) // 4), 0] = 2
    return film


CODES = torch.randn(4, 6, generator=torch.Generator().manual_seed(5))


def moves(plays, facts):
    "Facts, keys, and facts one frame later."
    each = [facts.recorded(torch.from_numpy(ram), torch.from_numpy(keys)) for ram, keys in plays]
    return torch.cat([f[:-1] for f in each]), torch.cat([torch.from_numpy(keys) for _, keys in plays]), torch.cat([f[1:] for f in each])


def states(n=12, seed=0):
    "Facts, some unknown, a key, and all facts."
    chance, facts = torch.Generator().manual_seed(seed), facts_of()
    now = at(facts, torch.from_numpy(np.stack([PLAYS[i][0][40 + i] for i in range(n)])))
    gaps = torch.where(torch.rand(now.shape, generator=chance) < 0.3, UNKNOWN, now)
    return gaps, torch.randint(KEYS + 1, (n,), generator=chance), now


# Facts

@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 127), min_size=1, max_size=10, unique=True), st.integers(0, 1000))
def test_bytes_that_change_are_followed_the_busiest_first(planted, seed):
    rng, ram = np.random.default_rng(seed), np.full((240, 128), 9, np.uint8)
    for order, byte in enumerate(planted): ram[:, byte] = rng.integers(200) + np.arange(240) // (order + 1) % 3     # each changes more seldom
    facts = Facts.of([ram], 8)
    assert facts.address[:len(planted[:8])].tolist() == planted[:8] and facts.table().n == len(planted[:8])
    read = facts.read(torch.from_numpy(ram))
    assert read.shape == (240, 8)
    for i, byte in enumerate(planted[:8]):
        assert torch.equal(read[:, i], torch.from_numpy(ram[:, byte]).long())
        assert facts.values[i].nonzero()[:, 0].tolist() == sorted(set(ram[:, byte].tolist()))
        assert facts.strides[i].nonzero()[:, 0].tolist() == sorted(set((np.diff(ram[:, byte].astype(int)) % 256).tolist()))


def test_facts_are_read_whatever_stands_between():
    facts, ram = facts_of(), torch.from_numpy(np.stack([play(seed, 6)[0] for seed in range(4)]))
    read = facts.read(ram)                                          # (B, T, facts)
    assert torch.equal(read[:, 2], facts.read(ram[:, 2])) and torch.equal(read[1], facts.read(ram[1]))
    assert torch.equal(read[0, :, :4].sort(-1).values, ram[0][:, [COUNT, PLACE, SPEED, BAT]].long().sort(-1).values)


def test_the_keys_of_the_last_frames_are_facts_too():
    facts, ram, keys = facts_of(), torch.from_numpy(np.stack([play(seed, 6)[0] for seed in range(4)])), torch.randint(KEYS, (4, 5))
    found = facts.recorded(ram, keys)
    assert torch.equal(found[..., :6], facts.read(ram)) and torch.equal(found[:, 1:, 6], keys) and torch.equal(found[:, 2:, 7], keys[:, :-1])
    assert (found[:, 0, 6:] == UNKNOWN).all() and (found[:, 1, 7] == UNKNOWN).all()
    assert torch.equal(facts.recorded(ram[2], keys[2]), found[2]) and facts.recorded(ram[:, :1], keys[:, :0]).shape == (4, 1, 8)
    console = console_of()
    carried = console.step(found[:, 2], keys[:, 2])
    assert torch.equal(carried[:, 6:], found[:, 3, 6:])             # carried on by whoever carries facts on
    assert torch.equal(console.step(found[:, 2], torch.full((4,), console.any_key))[:, 6:], torch.stack([torch.full((4,), UNKNOWN), keys[:, 1]], 1))


def test_what_is_rarely_seen_has_no_row_and_counts_as_the_nearest():
    ram = np.zeros((3000, 128), np.uint8)
    ram[:, 5] = np.arange(3000) % 2 * 10
    ram[100, 5], ram[201, 5] = 14, 3
    facts = Facts.of([ram], 2)
    table = facts.table()
    assert facts.values[0].nonzero()[:, 0].tolist() == [0, 10] and facts.strides[0].nonzero()[:, 0].tolist() == [10, 246]
    assert table.number[table.row[0, [0, 3, 4, 6, 10, 14, 255]]].tolist() == [0, 0, 0, 10, 10, 10, 10]
    assert table.exact[0, [0, 10]].tolist() == [0, 1] and (table.exact[0] == 2).sum() == 254
    assert table.count == facts.sizes == (2, 2)


def test_a_fact_that_never_settles_has_a_row_nevertheless():
    ram = np.zeros((40, 128), np.uint8)
    ram[:, 5] = np.arange(40)                                       # each value once: fewer than `few`
    facts = Facts.of([ram])
    assert facts.values[0].sum() == 1 and facts.table().n == 1


def test_sizes_are_those_of_all_facts():
    facts, few = facts_of(), few_facts()
    assert facts.sizes == facts.table().count and (facts.table().n, few.table().n) == (4, 1)
    assert few.sizes == (5, 2)                                      # 0 to 4; on by one, back by four
    assert facts.values[facts.address.tolist().index(SPEED)].sum() == 2


def test_tables_are_kept_with_the_weights_and_made_anew():
    console, other = console_of(1, 0.1), Console(Facts(6), KEYS, 6, GRID, 4, look=12, sizes=facts_of().sizes, **SMALL)
    now, act, _ = states()
    assert other.facts.table().n == 0                               # an empty table, and void as soon as others are loaded
    other.load_state_dict(console.state_dict())
    assert other.facts.table().n == 4 and torch.equal(other.step(now, act), console.step(now, act))


def test_tables_go_along_to_another_device():
    facts = facts_of()
    table = facts.table()
    assert facts.table() is table and facts.cpu().table() is not table     # moved: what was made on the first device is void


def test_a_game_in_which_nothing_changes_has_no_facts():
    still = np.full((50, 128), 3, np.uint8)
    console, act = console_of(facts=(facts := Facts.of([still], 6))), torch.zeros(2, dtype=torch.long)
    now = at(facts, torch.from_numpy(still[:2]))
    assert facts.table().n == 0 and facts.sizes == (0, 0)
    assert not console.nats(now, act, now).any() and not console.step(now, act)[:, :6].any()
    assert console.draw(now, now)[0].shape == (2, GRID, GRID)
    assert (write_program(facts, [(still, np.zeros(49, int))], KEYS).foresee(now, act)[0] == UNKNOWN).all()


# The program

@pytest.fixture(scope="module")
def program():
    facts = facts_of()
    return facts, write_program(facts, PLAYS, KEYS)


def test_a_program_foresees_new_plays_to_the_end(program):
    facts, program = program
    plays = [play(seed, 41) for seed in range(1000, 1060)]
    ram, keys = (torch.from_numpy(np.stack(part)) for part in zip(*plays))
    true = at(facts, ram)
    known = true[:, 0]
    for t in range(40):
        known, odds = program.foresee(known, keys[:, t])
        assert (odds[:, :4] > 0).all() and (known[:, 4:6] == UNKNOWN).all() and torch.equal(known[:, 6], keys[:, t])     # a game has no more facts than that
    assert (known[:, :4] == true[:, 40, :4]).all(1).float().mean() > 0.9       # a way that few examples went is sometimes wrong


def test_what_hangs_on_something_unknown_is_foreseen_with_doubt(program):
    "Who asks for something unknown goes the way of most, and is less sure."
    facts, program = program
    now, key, then = moves([play(2000)], facts)
    count, place, speed, bat = (facts.address.tolist().index(byte) for byte in (COUNT, PLACE, SPEED, BAT))
    hidden = now.index_fill(1, torch.tensor(speed), UNKNOWN)
    (_, sure), (after, odds) = program.foresee(now, key), program.foresee(hidden, key)
    assert torch.equal(after[:, [count, bat]], then[:, [count, bat]]) and torch.equal(odds[:, [count, bat]], sure[:, [count, bat]])
    assert (odds[:, [place, speed]] < sure[:, [place, speed]]).any(1).all() and ((after[:, speed] == UNKNOWN) | (program.adds[speed] != speed).all()).all()
    nobody, _ = program.foresee(torch.full_like(now, UNKNOWN), key)
    assert (nobody[:, (program.adds >= 0).any(1)] == UNKNOWN).all()            # a step leads on from something
    (any_key, odds), edge = program.foresee(now, torch.full_like(key, KEYS)), (now[:, bat] == 0) | (now[:, bat] == 30)
    assert torch.equal(any_key[:, [count, place, speed]], then[:, [count, place, speed]])
    assert (odds[~edge, bat] <= sure[~edge, bat] / 2).all()         # where a bat goes, the key decides


def test_the_way_of_most_is_that_of_most_examples():
    rng, ram = np.random.default_rng(0), np.zeros((4000, 128), np.uint8)
    ram[:, 3] = rng.random(4000) < 0.8                              # of five frames four are odd, ...
    ram[1:, 5] = np.where(ram[:-1, 3] == 1, 7, 9)                   # ... and say what comes
    facts = Facts.of([ram], 2)
    program, i = write_program(facts, [(ram, np.zeros(3999, int))], 1), facts.address.tolist().index(5)
    found, odds = program.foresee(torch.full((1, 2 + HELD), UNKNOWN), torch.zeros(1, dtype=torch.long))
    known, sure = program.foresee(at(facts, torch.from_numpy(ram[:50])), torch.zeros(50, dtype=torch.long))
    assert found[0, i] == 7 and known[:, i].unique().tolist() == [7, 9] and torch.allclose(odds[0, i], sure[known[:, i] == 7, i][0] / 2)


def test_a_program_takes_as_many_steps_for_a_frame_as_its_memories_have(program):
    "Grown from every moment, asked for every fourth: as if it had been asked four times."
    facts, _ = program
    paced = write_program(facts, PLAYS, KEYS, pace=4)
    ram, keys = (torch.from_numpy(part) for part in play(2000))
    now, held = at(facts, ram[:20]), keys[:20]
    after, odds = paced.foresee(now, held)
    steps, least = now.numpy(), np.full(odds.shape, np.inf)
    for phase in range(4):
        steps, sure, _ = paced.step(steps, paced.held(held.numpy(), phase))
        assert np.array_equal(steps[:, 6:], now[:, 6:])             # within a frame, the keys before it are the same
        least = np.minimum(least, sure)
    assert paced.pace == 4 and np.array_equal(after[:, :6], steps[:, :6]) and torch.equal(after[:, 6], held) and torch.equal(after[:, 7], now[:, 6])
    assert np.array_equal(odds[:, :4], least[:, :4])
    again = Program(6 + HELD, KEYS, len(paced.asks))
    again.load_state_dict(paced.state_dict())
    assert torch.equal(again.foresee(now, held)[0], after)


def test_what_was_held_before_and_the_step_of_a_frame_may_be_asked():
    "A knob that turns one frame after its key, and only in the last step of a frame."
    rng, frames = np.random.default_rng(0), 1500
    pressed = rng.integers(2, size=frames)
    ram, keys = np.zeros((1 + 4 * frames, 128), np.uint8), pressed.repeat(4)
    for t in range(1, len(ram)): ram[t, 3] = (int(ram[t - 1, 3]) + (t % 4 == 0 and t > 4 and pressed[(t - 1) // 4 - 1])) % 16
    facts = Facts.of([ram], 2)
    program = write_program(facts, [(ram, keys)], 2, pace=4)
    true = facts.recorded(torch.from_numpy(ram[::4]), torch.from_numpy(pressed))
    after, odds = program.foresee(true[2:-1], torch.from_numpy(pressed[2:]))
    assert torch.equal(after, torch.where(torch.arange(after.shape[1]) == 1, after, true[3:])) and (odds[:, 0] > 3).all()
    blind = true[2:-1].clone()
    blind[:, 2:] = UNKNOWN
    assert (program.foresee(blind, torch.from_numpy(pressed[2:]))[1][:, 0] < odds[:, 0]).all()


def test_how_far_facts_are_from_one_another_may_be_asked():
    "A key that opens where one thing is beside another: few leaves will do for all places."
    rng, ram = np.random.default_rng(0), np.zeros((6000, 128), np.uint8)
    ram[:, 3], ram[:, 4] = (np.abs(np.cumsum(rng.integers(-4, 5, 6000)) % 200 - 100) for _ in range(2))
    near = lambda one, other: np.abs(one.astype(int) - other) <= 6
    ram[1:, 5] = near(ram[:-1, 3], ram[:-1, 4])
    facts = Facts.of([ram], 3)
    program, i = write_program(facts, [(ram, np.zeros(5999, int))], 1, leaves=16), facts.address.tolist().index(5)
    places = torch.from_numpy(rng.integers(0, 100, (500, 128), dtype=np.uint8))
    places[:, 5] %= 2
    found, _ = program.foresee(now := at(facts, places), torch.zeros(500, dtype=torch.long))
    assert torch.equal(found[:, i], torch.from_numpy(near(places[:, 3].numpy(), places[:, 4].numpy())).long())
    hidden, nothing = now.index_fill(1, torch.tensor(facts.address.tolist().index(4)), UNKNOWN), torch.zeros(500, dtype=torch.long)
    assert (program.foresee(hidden, nothing)[1][:, i] < program.foresee(now, nothing)[1][:, i]).all()      # of two, one is enough to doubt


def test_a_leaf_is_trusted_as_far_as_it_was_right():
    rng, ram = np.random.default_rng(0), np.zeros((4000, 128), np.uint8)
    ram[:, 3] = np.arange(4000) % 2
    ram[1:, 5] = np.where(ram[:-1, 3] == 1, rng.random(3999) < 0.9, 0)      # after an odd frame 1 in nine of ten; after an even one 0
    facts = Facts.of([ram], 2)
    program = write_program(facts, [(ram, np.zeros(3999, int))], 1, leaves=4)
    i = facts.address.tolist().index(5)
    found, odds = program.foresee(at(facts, torch.from_numpy(ram[:2])), torch.zeros(2, dtype=torch.long))
    assert found[:, i].tolist() == [0, 1] and 1.9 < odds[1, i] < 2.5 and odds[0, i] > 4


def test_a_program_is_kept_and_votes_as_far_as_it_is_trusted(program):
    facts, program = program
    again = Program(6 + HELD, KEYS, len(program.asks))
    again.load_state_dict(program.state_dict())
    now, key, then = moves([play(3000)], facts)
    for one, two in zip(again.foresee(now, key), program.foresee(now, key)): assert torch.equal(one, two)
    assert program.asks.dtype == torch.int16 and program.right.dtype == torch.int32     # seven bytes for a node
    console = console_of(program=program)
    with torch.no_grad():
        for weight in console.parameters(): weight.zero_()
        assert torch.equal(console.step(now, key)[:, :4], then[:, :4])                   # who knows nothing else believes it
        console.leave[1].bias[::8], console.trust[..., 0] = 1.0, -2.0
        dark = torch.zeros(len(now), console.enter.out_features)
        assert (console.step(now, key, dark)[:, :4] != then[:, :4]).any()          # and may learn not to, for who sees
        assert torch.equal(console.step(now, key)[:, :4], then[:, :4])              # in the dark, what it is sure of holds


def test_without_nodes_nothing_is_foreseen():
    now, key, _ = moves([play(3000)], facts_of())
    assert (Program(6 + HELD, KEYS).foresee(now, key)[0] == UNKNOWN).all()


# Rules

@pytest.fixture(scope="module")
def ruled():
    "A console that has learned the rules of the game."
    console = console_of()
    now, key, then = moves(PLAYS, console.facts)
    optimizer = torch.optim.AdamW(console.parameters(), 5e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, 500)
    for _ in range(500):
        i = torch.randint(len(now), (192,))
        known = torch.where(torch.rand(192, 8) < torch.rand(192, 1) * (torch.rand(192, 1) < 0.2), UNKNOWN, now[i])
        optimizer.zero_grad()
        console.nats(known, key[i], then[i]).mean().backward()
        optimizer.step()
        schedule.step()
    return console.eval()


def test_learned_rules_carry_the_memory_through_new_plays(ruled):
    plays = [play(seed, 21) for seed in range(1000, 1060)]
    ram, keys = (torch.from_numpy(np.stack(part)) for part in zip(*plays))
    true = at(ruled.facts, ram)
    known = true[:, 0]
    assert (true[:, 0] != true[:, 20])[:, :4].any(1).all()
    for t in range(20): known = ruled.step(known, keys[:, t])
    assert torch.equal(known[:, :4], true[:, 20, :4])


def test_what_hangs_on_the_unknown_is_doubted_and_the_rest_is_not(ruled):
    now, key, then = moves([play(2000)], ruled.facts)
    count, place, speed, bat = (ruled.facts.address.tolist().index(byte) for byte in (COUNT, PLACE, SPEED, BAT))
    now[:, [bat, count]] = UNKNOWN
    after = ruled.step(now, key)
    assert (after[:, [place, speed]] == then[:, [place, speed]]).float().mean() > 0.95
    assert (after[:, count] == UNKNOWN).float().mean() > 0.9        # one of twelve
    assert (ruled.step(torch.full_like(now, UNKNOWN), key)[:, place] == UNKNOWN).float().mean() > 0.9


def test_a_step_leads_on_from_everywhere_but_from_nowhere():
    console = console_of()
    with torch.no_grad():
        for weight in console.parameters(): weight.zero_()
    table = console.facts.table()
    place = console.facts.address.tolist().index(PLACE)
    [by] = ((table.comes_from == place) & (table.comes_by == 3)).nonzero().tolist()
    with torch.no_grad(): console.stride_bias[by[0]] = 9.0
    now, key, _ = moves(PLAYS[:3], console.facts)
    after = console.step(now, key)[:, place]
    inside = now[:, place] + 3 < 60
    assert torch.equal(after[inside], now[inside, place] + 3) and (after[~inside] < 60).all()     # there is no row beyond the wall
    now[:, place] = UNKNOWN
    assert (console.step(now, key)[:, place] == UNKNOWN).all()


def test_what_is_unknown_stays_so_until_a_value_is_likely_enough():
    "Without any weights all values of a fact are alike: of two, one is taken; of three or more, none is likely enough."
    assert 1 / 3 < DOUBT < 1 / 2
    (_, act, now), facts = states(), few_facts()
    for console in (console_of(), console_of(facts=facts)):
        with torch.no_grad():
            for weight in console.parameters(): weight.zero_()
        for known in (True, False):
            after = console.step(now % 5 if known else torch.full_like(now, UNKNOWN), act)
            for i in range(console.facts.table().n): assert ((after[:, i] != UNKNOWN) == (known or console.facts.values[i].sum() < 3)).all()
    for bias, likely in ((0.8, False), (1.2, True)):                # of the third value of five: a chance of 0.36, of 0.45
        with torch.no_grad(): console.value_bias[2] = bias
        assert (console.step(torch.full_like(now, UNKNOWN), act)[:, 0] == (2 if likely else UNKNOWN)).all()


def slowly(console, facts, act, target):
    "`nats`, row by row and value by value, in float64."
    d, nats = copy.deepcopy(console).double(), []
    values, strides = ([f.nonzero()[:, 0].tolist() for f in table if f.any()] for table in (d.facts.values, d.facts.strides))
    nearest = lambda i, v: min(values[i], key=lambda known: (abs(known - v), known))
    value_row = lambda i, v: sum(map(len, values[:i])) + values[i].index(v)
    stride_row = lambda i, by: sum(map(len, strides[:i])) + strides[i].index(by)
    for n, (row, a, goal) in enumerate(zip(facts.tolist(), act, target.tolist())):
        h, (foreseen, odds) = d.act.weight[a], (part[0] for part in d.program.foresee(facts[n:n + 1], act[n:n + 1]))
        for i in range(len(values)):
            if row[i] >= 0: h = h + d.enter.weight[:, 8 * i:8 * i + 8] @ d.value.weight[value_row(i, nearest(i, row[i]))]
        h = h + d.enter.bias
        for block in d.blocks: h = h + block(h)
        of_facts, loss = d.leave[1](d.leave[0](h)).split(8), 0
        for i in range(len(values)):
            h, logits = of_facts[i], []
            for v in values[i]:
                k = value_row(i, v)
                logit = h @ d.value.weight[k] + d.value_bias[k]
                if row[i] >= 0 and (by := (v - row[i]) % 256) in strides[i]: logit = logit + h @ d.stride.weight[(s := stride_row(i, by))] + d.stride_bias[s]
                if foreseen[i] >= 0 and nearest(i, int(foreseen[i])) == v: logit = logit + odds[i] * (1 + h @ d.trust[i])
                logits.append(logit)
            loss = loss - torch.stack(logits).log_softmax(0)[values[i].index(nearest(i, goal[i]))]
        nats.append(loss)
    return torch.stack(nats)


def test_nats_are_those_of_a_softmax_over_the_values_of_each_fact(program):
    console, (facts, act, now) = console_of(3, 0.1, program=program[1]), states()
    facts[0, 0], now[2, 1] = 200, 99                                # never seen: as the nearest
    target = now.roll(2, 0)
    assert (program[1].foresee(facts, act)[0] >= 0).any()
    found = console.nats(facts, act, target)
    assert found.shape == (12,) and found.min() > 0 and (found - slowly(console, facts, act, target)).abs().max() < 1e-4


def test_the_gradient_of_nats_is_that_of_finite_differences(program):
    console, (facts, act, now) = console_of(3, 0.1, program=program[1]), states(6)
    target, h = now.roll(2, 0), 1e-5
    console.nats(facts, act, target).sum().backward()
    double = copy.deepcopy(console).double()
    for name in ("value.weight", "stride.weight", "value_bias", "stride_bias", "act.weight", "enter.weight", "trust", "blocks.1.1.weight", "leave.1.weight"):
        grad = dict(console.named_parameters())[name].grad
        weight, at = dict(double.named_parameters())[name].data.view(-1), int(grad.abs().argmax())
        ends, before = [], float(weight[at])
        for side in (h, -h):
            weight[at] = before + side
            with torch.no_grad(): ends.append(float(slowly(double, facts, act, target).sum()))
        weight[at] = before
        assert abs((ends[0] - ends[1]) / (2 * h) - float(grad.view(-1)[at])) < 1e-3 * max(1, abs(float(grad.view(-1)[at]))), name


def test_large_logits_are_told_apart_in_half_precision():
    console = console_of(facts=few_facts())
    with torch.no_grad():
        for weight in console.parameters(): weight.zero_()
        console.value_bias[1], console.value_bias[4] = 30.0, 20.0              # exp(20) is more than float16 holds
    for kind in (torch.float32, torch.bfloat16, torch.float16):
        assert console.to(kind).step(torch.full((1, 6 + HELD), UNKNOWN), torch.zeros(1, dtype=torch.long))[0, 0] == 1, kind


# Several games

def test_players_do_not_touch_one_another():
    console, (facts, act, now) = console_of(2, 0.1), states()
    film = torch.randint(4, (2, 12, GRID, GRID), generator=torch.Generator().manual_seed(0))
    def all_of(rows):
        sight = console.glance(film[0, rows], film[1, rows], console.reading(CODES))
        return sight, console.nats(facts[rows], act[rows], now[rows], sight), *console.draw(facts[rows], now[rows]), console.step(facts[rows], act[rows], sight)
    together = all_of(torch.arange(12))
    for i in range(12):
        for alone, one in zip(all_of(torch.tensor([i])), together): assert torch.allclose(alone[0].float(), one[i].float(), atol=1e-5)


def test_each_is_answered_by_the_console_of_their_game():
    two, game = Consoles([console_of(1, 0.1), console_of(2, 0.1, facts=few_facts())]), torch.tensor([1, 0, 0, 1, 0])
    ram = torch.from_numpy(np.stack([little(3)[50], PLAYS[0][0][9], PLAYS[1][0][9], little(4)[50], PLAYS[2][0][9]]))
    now, act = two.ask(game, lambda g, rows: at(two[g].facts, ram[rows])), torch.tensor([0, 1, 2, 1, 0])
    step = lambda which: two.ask(game[which], lambda g, rows: two[g].step(now[which][rows], act[which][rows]))
    together = step(torch.arange(5))
    for i, g in enumerate(game.tolist()):
        assert torch.equal(now[i], at(two[g].facts, ram[i])) and torch.equal(step(torch.tensor([i]))[0], together[i])
        assert torch.equal(together[i:i + 1], two[g].step(now[i:i + 1], act[i:i + 1]))
    drawn = two.ask(game, lambda g, rows: two[g].draw(now[rows], now[rows]))
    assert [part.shape for part in drawn] == [(5, GRID, GRID)] * 2
    for i, g in enumerate(game.tolist()): assert torch.equal(drawn[0][i], two[g].draw(now[i:i + 1], now[i:i + 1])[0][0])
    nobody = two.ask(game[:0], lambda g, rows: (now[rows], act[rows]))
    assert [part.shape for part in nobody] == [(0, 8), (0,)]


def test_places_that_a_game_does_not_fill_mean_nothing():
    console, (facts, act, now) = console_of(2, 0.1), states()
    noisy, goal, n = facts.clone(), now.clone(), console.facts.table().n
    for part in (noisy, goal): part[:, n:6] = torch.randint(-1, 256, part[:, n:6].shape)
    assert not torch.equal(noisy, facts)
    assert torch.equal(console.step(noisy, act), console.step(facts, act))
    assert torch.equal(console.nats(noisy, act, goal), console.nats(facts, act, now))
    assert torch.equal(console.scene(noisy, goal), console.scene(facts, now))


# Sight and screen

def test_a_glance_sees_where_a_token_is_and_that_it_has_come():
    console = console_of()
    look = console.reading(CODES)
    def at(y, x):
        film = torch.zeros(1, GRID, GRID, dtype=torch.long)
        film[0, y, x] = 1
        return film
    seen = torch.cat([console.glance(at(y, x), at(y, x), look) for y in range(GRID) for x in range(GRID)])
    assert torch.pdist(seen).min() > 1e-3                           # each place is unlike every other
    assert (console.glance(at(2, 3), at(2, 2), look) - console.glance(at(2, 3), at(2, 4), look)).abs().max() > 1e-3


def test_what_is_as_usual_says_nothing():
    console = console_of()
    console.usual[:] = torch.randint(4, (GRID, GRID), generator=torch.Generator().manual_seed(0))
    look, usual = console.reading(CODES), console.usual[None]
    assert torch.allclose(console.glance(usual, usual, look)[0], console.read.bias, atol=1e-5)
    assert not torch.allclose(console.glance(usual, usual.roll(1, 2), look)[0], console.read.bias, atol=1e-3)


def test_a_glance_is_the_sum_of_all_tokens_less_that_of_the_usual_ones():
    console, chance = console_of(3, 0.1), torch.Generator().manual_seed(1)
    console.usual.copy_(torch.randint(4, console.usual.shape, generator=chance))
    usual = console.usual.expand(6, -1, -1)
    now, before = (torch.where(torch.rand(usual.shape, generator=chance) < 0.2, torch.randint(4, usual.shape, generator=chance), usual) for _ in range(2))
    look, x = console.reading(CODES), 0
    for sign, pair in ((1, (now, before)), (-1, (usual, usual))):
        wide = torch.nn.functional.pad(pair[0][:, None].float(), (1, 1, 1, 1), mode="replicate")[:, 0].long().unfold(1, 3, 1).unfold(2, 3, 1).flatten(3)
        x = x + sign * torch.nn.functional.silu(console.beside(torch.cat([look[wide].flatten(3), look[pair[1]]], -1)))
    x = x * ((now != usual) | (before != usual))[..., None]         # what is as usual says nothing, whatever is beside it
    blocks = x.unflatten(1, (-1, 4)).sum(2).unflatten(2, (-1, 4)).sum(3).flatten(1, 2)
    expected = console.read(torch.cat([x.sum(1), x.sum(2), blocks], 1).flatten(1))      # of each column, of each row, of each block
    assert torch.allclose(console.glance(now, before, look), expected, atol=1e-4)



def test_a_screen_speaks_of_each_frame_and_each_place_alone():
    torch.manual_seed(0)
    screen, code, some = Screen(10, GRID, shown=5), torch.randn(3, 10), torch.rand(3, GRID, GRID) < 0.5
    every, other = screen(code, torch.ones_like(some)), torch.randn(3, 10)
    assert every.shape == (3 * GRID * GRID, 32) and torch.allclose(screen(code, some), every[some.flatten()], atol=1e-5)
    other[1] = code[1]
    same = (screen(other, torch.ones_like(some)) == every).view(3, -1)
    assert same[1].all() and not same[[0, 2]].all(1).any()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 99), min_size=1, max_size=9, unique=True), st.lists(st.integers(0, 120), min_size=1, max_size=20))
def test_what_is_shown_is_numbered_and_the_rest_is_not(shown, asked):
    screen = Screen(2, GRID, len(shown))
    screen.shown[:] = torch.tensor(sorted(shown))
    for token, number in zip(asked, screen.numbers(torch.tensor(asked)).tolist()):
        assert number == (sorted(shown).index(token) if token in shown else -100)


def test_a_picture_is_drawn_of_tokens_that_are_shown_and_it_is_said_how_surely():
    console, (facts, _, now) = console_of(4), states(4)
    console.screen.shown[:], console.usual[:] = torch.tensor([2, 5, 11, 40]), 7
    draw = torch.no_grad()(lambda: console.draw(facts, now))
    tokens, certain = draw()
    assert tokens.shape == certain.shape == (4, GRID, GRID) and torch.isin(tokens, console.screen.shown).all() and not certain.any()
    sure = math.log(CERTAIN / (1 - CERTAIN))
    with torch.no_grad():
        for part in console.screen.odd, console.screen.name: part.weight.zero_(), part.bias.zero_()
    for odd, name, shows, is_certain in ((-1.1, 0, 7, True), (-0.9, 9, 11, False), (9, 9, 11, True), (9, 0.9, 11, False), (1.1, 1.3, 11, False)):
        with torch.no_grad(): console.screen.odd.bias[0], console.screen.name.bias[2] = odd * sure, name * sure
        tokens, certain = draw()
        assert (tokens == shows).all() and (certain == is_certain).all(), (odd, name)


def test_the_screen_is_learned_alone_and_the_rules_without_it():
    console, facts = console_of(1, 0.2), facts_of()
    torch.manual_seed(0)
    batch = windows(facts, 8)
    for screen, loss in ((True, lambda: screen_loss(console, batch)), (False, lambda: console_loss(console, batch, CODES))):
        console.learn(screen)
        before = copy.deepcopy(console.state_dict())
        optimizer = torch.optim.SGD([w for w in console.parameters() if w.requires_grad], 0.1)
        loss()[0].backward()
        optimizer.step()
        changed = {name.split(".")[0] for name, weight in console.state_dict().items() if not torch.equal(weight, before[name])}
        assert (changed == {"looks", "screen"}) if screen else changed and not changed & {"looks", "screen"}
        console.zero_grad()


def test_a_picture_is_learned_from_memory_and_of_nothing_it_is_not_certain():
    console, torch_facts = console_of(), facts_of()
    console.screen.shown[:] = torch.arange(4)
    console.learn(screen=True)
    optimizer = torch.optim.AdamW([w for w in console.parameters() if w.requires_grad], 1e-2, weight_decay=0.0)
    torch.manual_seed(0)
    for step in range(250):
        loss, parts = screen_loss(console, windows(torch_facts, 32, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert loss.isfinite() and not parts["right"].requires_grad
    ram, _ = play(99)
    facts, film = at(torch_facts, torch.from_numpy(ram)), film_of(ram)
    with torch.no_grad(): (tokens, certain), (_, of_nothing) = console.draw(facts[:-1], facts[1:]), console.draw(*torch.full((2, 1, 6 + HELD), UNKNOWN))
    right = tokens == film[1:]
    assert right.float().mean() > 0.97 and right[certain].float().mean() > 0.985 and certain.float().mean() > 0.9
    assert not of_nothing[0, 4].all()                               # somewhere in this row there is a ball


def test_nothing_is_drawn_where_a_memory_is_not_followed():
    tokens, certain = Silence(GRID).draw(torch.zeros(3, 6), torch.zeros(3, 6))
    assert tokens.shape == certain.shape == (3, GRID, GRID) and not certain.any()
    both = Consoles([Silence(GRID), console_of(1, 0.1)])
    assert both.follow(torch.tensor([0, 1])) and not both.follow(torch.tensor([0, 0])) and both.taught().keys() == {1}


# Learning

def windows(facts, count, length=5):
    "As `recipe.Windows`, of the game that is played here."
    rows = []
    for _ in range(count):
        (ram, keys), t = PLAYS[int(torch.randint(len(PLAYS), ()))], int(torch.randint(200 - length, ()))
        rows.append((torch.from_numpy(ram[t:t + length + 1]), torch.from_numpy(keys[t:t + length]), film_of(ram[t:t + length + 1])))
    ram, acts, film = map(torch.stack, zip(*rows))
    return {"facts": at(facts, ram), "acts": acts, "film": film}


def test_reading_and_foreseeing_are_learned_at_once():
    console, history = console_of(), []
    optimizer = torch.optim.AdamW(console.parameters(), 5e-3, weight_decay=0.0)
    torch.manual_seed(0)
    for step in range(160):
        loss, parts = console_loss(console, windows(console.facts, 32), CODES, step)
        optimizer.zero_grad()
        loss.backward()
        assert loss.isfinite() and all(part.isfinite() and not part.requires_grad for part in parts.values())
        optimizer.step()
        history.append({name: float(part) for name, part in parts.items()})
    early, late = ({name: np.mean([part[name] for part in some]) for name in ("read", "foreseen")} for some in (history[:8], history[-8:]))
    assert all(late[name] < 0.6 * early[name] for name in early), (early, late)
    assert late["read"] < late["foreseen"]                          # who sees knows more



def test_own_guesses_are_carried_on_in_every_second_step(monkeypatch):
    console, steps = console_of(), []
    batch, real = windows(console.facts, 32), console.step
    monkeypatch.setattr(console, "step", lambda *args: steps.append(args) or real(*args))
    for step, own in ((0, 0), (1, 0), (2, 0), (3, 1), (5, 2), (7, 3), (9, 4), (10, 0), (11, 0), (13, 1)):
        steps.clear()
        console_loss(console, batch, CODES, step, hide=0.0, wrong=0.0)
        assert len(steps) == own
        if own:
            assert torch.equal(steps[0][0], batch["facts"][:, 4 - own]) and torch.equal(steps[0][1], batch["acts"][:, 4 - own])
            seen = [row.any() for row in steps[0][2]]               # some see all frames on the way, the others none
            assert any(seen) and not all(seen)


def test_who_reads_from_nothing_reads_on_from_what_was_read(monkeypatch):
    console, steps = console_of(2, 0.1), []
    batch, real = windows(console.facts, 8), console.step
    def step(*args):
        steps.append((args[0], after := real(*args)))
        return after
    monkeypatch.setattr(console, "step", step)
    console_loss(console, batch, CODES, 7, hide=1.0, wrong=0.0)                # three frames of one's own
    assert (steps[0][0] == UNKNOWN).all() and torch.equal(steps[1][0], steps[0][1]) and torch.equal(steps[2][0], steps[1][1])


def test_who_sees_may_remember_another_moment_or_what_was_read():
    torch.manual_seed(0)
    true = windows(facts_of(), 400)["facts"][:, 0, :4]
    read, other, sees, blank = true + 100, true.roll(1, 0), torch.arange(400)[:, None] < 200, torch.arange(400)[:, None] % 200 < 40
    for wrong, mistaken in ((1.0, 0.0), (0.0, 1.0), (0.5, 0.5)):
        known = remembered(true, read if mistaken else None, sees, blank, hide=0.3, wrong=wrong, mistaken=mistaken)
        assert (known[blank[:, 0]] == UNKNOWN).all()
        unseeing = (~sees & ~blank)[:, 0]
        assert ((known == true) | (known == UNKNOWN))[unseeing].all() and 0 < (known[unseeing] == UNKNOWN).float().mean() < 0.3
        seeing, unlike = (sees & ~blank)[:, 0], other != true
        as_read, as_other = (known == read).all(1)[seeing], ((known == other) & unlike).any(1)[seeing]
        assert abs(as_read.float().mean() - mistaken) < 0.15 and (as_other.float().mean() > 0.3) == (wrong == 1.0) and as_other.any() == (wrong > 0)
        assert wrong < 1 or ((known == true) & unlike)[seeing].any()      # in part


def test_a_console_goes_on_from_what_was_read(monkeypatch):
    console, known = console_of(2, 0.1), []
    batch, real = windows(console.facts, 64), console.step
    monkeypatch.setattr(console, "step", lambda *args: known.append(args) or real(*args))
    monkeypatch.setattr(console, "nats", lambda *args: known.append(args) or args[0].sum(1) * console.value_bias[0])
    batch["read"] = torch.arange(6)[:, None].expand_as(batch["facts"])      # its frame's number
    for step, own in ((0, 0), (7, 3)):
        known.clear()
        console_loss(console, batch, CODES, step, hide=0.0, wrong=0.0, mistaken=1.0)
        first, sees = known[0][0], known[0][-1].any(1)
        assert sees.any() and not sees.all() and (first[sees] == 4 - own).all() and torch.equal(first[~sees], batch["facts"][:, 4 - own][~sees])


def test_what_is_lost_was_moving_and_another_picture_of_the_game_is_there():
    torch.manual_seed(0)
    film = torch.stack([film_of(ram[60:62]) for ram, _ in PLAYS[:16]])
    before = film.clone()
    spoilt = lose(film, 1.0)
    near = torch.nn.functional.max_pool2d((film[:, 0] != film[:, 1]).float()[:, None], 5, 1, 2) > 0
    assert torch.equal(film, before) and torch.equal(lose(film, 0.0), film)
    assert torch.equal(spoilt, torch.where(near, film.roll(1, 0), film)) and not torch.equal(spoilt, film)
    some = (lose(film, 0.5) != film).flatten(1).any(1).float().mean()
    assert 0 < some < (spoilt != film).flatten(1).any(1).float().mean()
