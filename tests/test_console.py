"The memory behind the picture: bytes that change are followed, carried on by rule, read from tokens, and said again in rows and columns."
import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lwm_course.console import DOUBT, UNKNOWN, Console, Facts, console_loss, draw_loss, lose

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
SMALL = dict(width=32, hidden=64, depth=2)


def facts_of(count=6): return Facts.of([[ram for ram, _ in PLAYS], [little(0), little(3)]], count)


def console_of(seed=0, spread=0.0, **shape):
    "A small console for both games; with a spread, one that has something to say."
    torch.manual_seed(seed)
    console = Console(facts_of(), KEYS, code=6, grid=GRID, told=(4, 8), look=12, draw=12, **{**SMALL, **shape})
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
    each = [facts.read(torch.from_numpy(ram)[None], torch.zeros(1, dtype=torch.long))[0] for ram, _ in plays]
    return torch.cat([f[:-1] for f in each]), torch.cat([torch.from_numpy(keys) for _, keys in plays]), torch.cat([f[1:] for f in each])


def states(n=12, seed=0):
    "Facts of both games, some unknown, and the rest of what a step needs."
    chance, facts = torch.Generator().manual_seed(seed), facts_of()
    game = torch.arange(n) % 2
    ram = torch.from_numpy(np.stack([PLAYS[i][0][40 + i] if g == 0 else little(i)[50] for i, g in enumerate(game.tolist())]))
    now = facts.read(ram, game)
    gaps = torch.where(torch.rand(now.shape, generator=chance) < 0.3, UNKNOWN, now)
    return gaps, torch.randint(KEYS + 1, (n,), generator=chance), game, now


# Facts

@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 127), min_size=1, max_size=10, unique=True), st.integers(0, 1000))
def test_bytes_that_change_are_followed_the_busiest_first(planted, seed):
    rng, ram = np.random.default_rng(seed), np.full((240, 128), 9, np.uint8)
    for order, byte in enumerate(planted): ram[:, byte] = rng.integers(200) + np.arange(240) // (order + 1) % 3     # each changes more seldom
    facts = Facts.of([[ram]], 8)
    assert facts.address[0, :len(planted[:8])].tolist() == planted[:8] and facts.of_game(0).n == len(planted[:8])
    read = facts.read(torch.from_numpy(ram)[None], torch.zeros(1, dtype=torch.long))
    assert read.shape == (1, 240, 8)
    for i, byte in enumerate(planted[:8]):
        assert torch.equal(read[0, :, i], torch.from_numpy(ram[:, byte]).long())
        assert facts.values[0, i].nonzero()[:, 0].tolist() == sorted(set(ram[:, byte].tolist()))
        assert facts.strides[0, i].nonzero()[:, 0].tolist() == sorted(set((np.diff(ram[:, byte].astype(int)) % 256).tolist()))


def test_facts_are_read_whatever_stands_between():
    facts, ram = facts_of(), torch.from_numpy(np.stack([play(seed, 6)[0] for seed in range(4)]))
    game = torch.tensor([0, 1, 0, 1])
    read = facts.read(ram, game)                                    # (B, T, facts)
    assert torch.equal(read[:, 2], facts.read(ram[:, 2], game)) and torch.equal(read[1:2], facts.read(ram[1:2], game[1:2]))
    assert torch.equal(facts.read(ram[:, :, None], game)[:, :, 0], read)
    assert torch.equal(read[0, :, :4].sort(-1).values, ram[0][:, [COUNT, PLACE, SPEED, BAT]].long().sort(-1).values)


def test_what_is_rarely_seen_has_no_row_and_counts_as_the_nearest():
    ram = np.zeros((3000, 128), np.uint8)
    ram[:, 5] = np.arange(3000) % 2 * 10
    ram[100, 5], ram[201, 5] = 14, 3
    facts = Facts.of([[ram]], 2)
    table = facts.of_game(0)
    assert facts.values[0, 0].nonzero()[:, 0].tolist() == [0, 10] and facts.strides[0, 0].nonzero()[:, 0].tolist() == [10, 246]
    assert table.number[table.row[0, [0, 3, 4, 6, 10, 14, 255]]].tolist() == [0, 0, 0, 10, 10, 10, 10]
    assert table.exact[0, [0, 10]].tolist() == [0, 1] and (table.exact[0] == 2).sum() == 254
    assert table.count == facts.sizes == (2, 2)


def test_a_fact_that_never_settles_has_a_row_nevertheless():
    ram = np.zeros((40, 128), np.uint8)
    ram[:, 5] = np.arange(40)                                       # each value once: fewer than `few`
    facts = Facts.of([[ram]])
    assert facts.values[0, 0].sum() == 1 and facts.of_game(0).n == 1


def test_sizes_are_those_of_all_games():
    facts = facts_of()
    each = [facts.of_game(g).count for g in (0, 1)]
    assert facts.sizes == tuple(map(sum, zip(*each))) and [facts.of_game(g).n for g in (0, 1)] == [4, 1]
    assert each[1] == (5, 2)                                        # 0 to 4; on by one, back by four
    assert facts.values[0, facts.address[0].tolist().index(SPEED)].sum() == 2


def test_tables_are_kept_with_the_weights_and_made_anew():
    console, other = console_of(1, 0.1), Console(Facts(2, 6), KEYS, 6, GRID, (4, 8), look=12, draw=12, sizes=facts_of().sizes, **SMALL)
    now, act, game, _ = states()
    assert other.facts.of_game(0).n == 0                            # an empty table, and void as soon as others are loaded
    other.load_state_dict(console.state_dict())
    assert other.facts.of_game(0).n == 4 and torch.equal(other.step(now, act, game), console.step(now, act, game))


def test_tables_go_along_to_another_device():
    facts = facts_of()
    table = facts.of_game(0)
    assert facts.of_game(0) is table and facts.cpu().of_game(0) is not table     # moved: what was made on the first device is void


def test_a_game_in_which_nothing_changes_has_no_facts():
    still = np.full((50, 128), 3, np.uint8)
    torch.manual_seed(0)
    console = Console(facts := Facts.of([[still], [little(0)]], 6), KEYS, 6, GRID, (4, 8), look=12, draw=12, **SMALL)
    game, act = torch.tensor([0, 1]), torch.zeros(2, dtype=torch.long)
    now = facts.read(torch.from_numpy(np.stack([still[0], little(0)[0]])), game)
    assert facts.of_game(0).n == 0 and facts.sizes == (5, 2)
    nats = console.nats(now, act, game, now)
    assert nats[0] == 0 < nats[1] and not console.step(now, act, game)[0].any()
    assert console.draw(console.lines(now, now, game))[0].shape == (2, GRID, GRID)


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
        known = torch.where(torch.rand(192, 6) < torch.rand(192, 1) * (torch.rand(192, 1) < 0.2), UNKNOWN, now[i])
        optimizer.zero_grad()
        console.nats(known, key[i], torch.zeros(192, dtype=torch.long), then[i]).mean().backward()
        optimizer.step()
        schedule.step()
    return console.eval()


def test_learned_rules_carry_the_memory_through_new_plays(ruled):
    plays = [play(seed, 21) for seed in range(1000, 1060)]
    ram, keys = (torch.from_numpy(np.stack(part)) for part in zip(*plays))
    game = torch.zeros(len(plays), dtype=torch.long)
    true = ruled.facts.read(ram, game)
    known = true[:, 0]
    assert (true[:, 0] != true[:, 20])[:, :4].any(1).all()
    for t in range(20): known = ruled.step(known, keys[:, t], game)
    assert torch.equal(known[:, :4], true[:, 20, :4])


def test_what_hangs_on_the_unknown_is_doubted_and_the_rest_is_not(ruled):
    now, key, then = moves([play(2000)], ruled.facts)
    game, (count, place, speed, bat) = torch.zeros(len(now), dtype=torch.long), [ruled.facts.address[0].tolist().index(byte) for byte in (COUNT, PLACE, SPEED, BAT)]
    now[:, [bat, count]] = UNKNOWN
    after = ruled.step(now, key, game)
    assert (after[:, [place, speed]] == then[:, [place, speed]]).float().mean() > 0.95
    assert (after[:, count] == UNKNOWN).float().mean() > 0.9        # one of twelve
    assert (ruled.step(torch.full_like(now, UNKNOWN), key, game)[:, place] == UNKNOWN).float().mean() > 0.9


def test_a_step_leads_on_from_everywhere_but_from_nowhere():
    console, place = console_of(), 0
    with torch.no_grad():
        for weight in console.parameters(): weight.zero_()
    table = console.facts.of_game(0)
    place = console.facts.address[0].tolist().index(PLACE)
    [by] = ((table.comes_from == place) & (table.comes_by == 3)).nonzero().tolist()
    with torch.no_grad(): console.stride_bias[by[0]] = 9.0
    now, key, _ = moves(PLAYS[:3], console.facts)
    after = console.step(now, key, torch.zeros_like(key))[:, place]
    inside = now[:, place] + 3 < 60
    assert torch.equal(after[inside], now[inside, place] + 3) and (after[~inside] < 60).all()     # there is no row beyond the wall
    now[:, place] = UNKNOWN
    assert (console.step(now, key, torch.zeros_like(key))[:, place] == UNKNOWN).all()


def test_what_is_unknown_stays_so_until_a_value_is_likely_enough():
    "Without any weights all values of a fact are alike: of two, one is taken; of three or more, none is likely enough."
    assert 1 / 3 < DOUBT < 1 / 2
    console, (_, act, game, now) = console_of(), states()
    with torch.no_grad():
        for weight in console.parameters(): weight.zero_()
    for known in (True, False):
        after = console.step(now if known else torch.full_like(now, UNKNOWN), act, game)
        for g in (0, 1):
            for i in range(console.facts.of_game(g).n):
                few = console.facts.values[g, i].sum() < 3
                assert ((after[game == g, i] != UNKNOWN) == (known or few)).all()
    first = console.facts.of_game(0).count[0]
    for bias, likely in ((0.8, False), (1.2, True)):                # of the third value of five: a chance of 0.36, of 0.45
        with torch.no_grad(): console.value_bias[first + 2] = bias
        assert (console.step(torch.full_like(now, UNKNOWN), act, game)[game == 1, 0] == (2 if likely else UNKNOWN)).all()


def slowly(console, facts, act, game, target):
    "`nats`, row by row and value by value, in float64."
    d, nats = copy.deepcopy(console).double(), []
    for row, a, g, goal in zip(facts.tolist(), act, game.tolist(), target.tolist()):
        values, strides = ([f.nonzero()[:, 0].tolist() for f in table[g] if f.any()] for table in (d.facts.values, d.facts.strides))
        first_value, first_stride = (sum(int(table[:g].sum()) for _ in (0,)) for table in (d.facts.values, d.facts.strides))
        nearest = lambda i, v: min(values[i], key=lambda known: (abs(known - v), known))
        value_row = lambda i, v: first_value + sum(map(len, values[:i])) + values[i].index(v)
        stride_row = lambda i, by: first_stride + sum(map(len, strides[:i])) + strides[i].index(by)
        h = d.act.weight[a]
        for i in range(len(values)):
            if row[i] >= 0: h = h + d.value.weight[value_row(i, nearest(i, row[i]))]
        h = d.enter(h) + d.game.weight[g]
        for block in d.blocks: h = h + block(h)
        h, loss = d.leave(h), 0
        for i in range(len(values)):
            logits = []
            for v in values[i]:
                k = value_row(i, v)
                logit = h @ d.value.weight[k] + d.value_bias[k]
                if row[i] >= 0 and (by := (v - row[i]) % 256) in strides[i]: logit = logit + h @ d.stride.weight[(s := stride_row(i, by))] + d.stride_bias[s]
                logits.append(logit)
            loss = loss - torch.stack(logits).log_softmax(0)[values[i].index(nearest(i, goal[i]))]
        nats.append(loss)
    return torch.stack(nats)


def test_nats_are_those_of_a_softmax_over_the_values_of_each_fact():
    console, (facts, act, game, now) = console_of(3, 0.1), states()
    facts[0, 0], now[2, 1] = 200, 99                                # never seen: as the nearest
    target = now.roll(2, 0)
    found = console.nats(facts, act, game, target)
    assert found.shape == (12,) and found.min() > 0 and (found - slowly(console, facts, act, game, target)).abs().max() < 1e-4


def test_the_gradient_of_nats_is_that_of_finite_differences():
    console, (facts, act, game, now) = console_of(3, 0.1), states(6)
    target, h = now.roll(2, 0), 1e-5
    console.nats(facts, act, game, target).sum().backward()
    double = copy.deepcopy(console).double()
    for name in ("value.weight", "stride.weight", "value_bias", "stride_bias", "act.weight", "enter.weight", "game.weight", "blocks.1.1.weight", "leave.1.weight"):
        grad = dict(console.named_parameters())[name].grad
        weight, at = dict(double.named_parameters())[name].data.view(-1), int(grad.abs().argmax())
        ends, before = [], float(weight[at])
        for side in (h, -h):
            weight[at] = before + side
            with torch.no_grad(): ends.append(float(slowly(double, facts, act, game, target).sum()))
        weight[at] = before
        assert abs((ends[0] - ends[1]) / (2 * h) - float(grad.view(-1)[at])) < 1e-3 * max(1, abs(float(grad.view(-1)[at]))), name


def test_large_logits_are_told_apart_in_half_precision():
    console = console_of()
    with torch.no_grad():
        for weight in console.parameters(): weight.zero_()
        first = console.facts.of_game(0).count[0]
        console.value_bias[first + 1], console.value_bias[first + 4] = 30.0, 20.0      # exp(20) is more than float16 holds
    unknown, game = torch.full((1, 6), UNKNOWN), torch.ones(1, dtype=torch.long)
    for kind in (torch.float32, torch.bfloat16, torch.float16):
        assert console.to(kind).step(unknown, game * 0, game)[0, 0] == 1, kind


# Several games

def test_players_of_several_games_do_not_touch_one_another():
    console, (facts, act, game, now) = console_of(2, 0.1), states()
    film = torch.randint(4, (2, 12, GRID, GRID), generator=torch.Generator().manual_seed(0))
    def all_of(rows):
        sight = console.glance(film[0, rows], film[1, rows], game[rows], console.reading(CODES))
        lines = console.lines(facts[rows], now[rows], game[rows])
        stays, looks = console.draw(lines)
        return (sight, console.nats(facts[rows], act[rows], game[rows], now[rows], sight), *lines, stays, looks, console.stirs(lines),
                console.step(facts[rows], act[rows], game[rows], sight))
    together = all_of(torch.arange(12))
    for i in range(12):
        for alone, one in zip(all_of(torch.tensor([i])), together): assert torch.allclose(alone[0].float(), one[i].float(), atol=1e-5)


def test_places_that_a_game_does_not_fill_mean_nothing():
    console, (facts, act, game, now) = console_of(2, 0.1), states()
    noisy, goal = facts.clone(), now.clone()
    for g in (0, 1):
        n = console.facts.of_game(g).n
        for part in (noisy, goal): part[game == g, n:] = torch.randint(-1, 256, part[game == g, n:].shape)
    assert not torch.equal(noisy, facts)
    assert torch.equal(console.step(noisy, act, game), console.step(facts, act, game))
    assert torch.equal(console.nats(noisy, act, game, goal), console.nats(facts, act, game, now))
    for line, other in zip(console.lines(noisy, goal, game), console.lines(facts, now, game)): assert torch.equal(line, other)


# Sight and lines

def test_a_glance_sees_where_a_token_is_and_that_it_has_come():
    console, game = console_of(), torch.zeros(1, dtype=torch.long)
    look = console.reading(CODES)
    def at(y, x):
        film = torch.zeros(1, GRID, GRID, dtype=torch.long)
        film[0, y, x] = 1
        return film
    seen = torch.cat([console.glance(at(y, x), at(y, x), game, look) for y in range(GRID) for x in range(GRID)])
    assert torch.pdist(seen).min() > 1e-3                           # each place is unlike every other
    assert (console.glance(at(2, 3), at(2, 2), game, look) - console.glance(at(2, 3), at(2, 4), game, look)).abs().max() > 1e-3
    assert (console.glance(at(2, 3), at(2, 3), game + 1, look) - console.glance(at(2, 3), at(2, 3), game, look)).abs().max() > 1e-3


def test_what_is_as_usual_says_nothing():
    console, game = console_of(), torch.tensor([1])
    console.usual[1] = torch.randint(4, (GRID, GRID), generator=torch.Generator().manual_seed(0))
    look, usual = console.reading(CODES), console.usual[game]
    assert torch.allclose(console.glance(usual, usual, game, look)[0], console.read.bias, atol=1e-5)
    assert not torch.allclose(console.glance(usual, usual, game - 1, look)[0], console.read.bias, atol=1e-3)       # another game's is another
    assert not torch.allclose(console.glance(usual, usual.roll(1, 2), game, look)[0], console.read.bias, atol=1e-3)


def test_a_glance_is_the_sum_of_all_tokens_less_that_of_the_usual_ones():
    console, game = console_of(3, 0.1), torch.arange(6) % 2
    chance = torch.Generator().manual_seed(1)
    console.usual.copy_(torch.randint(4, console.usual.shape, generator=chance))
    usual = console.usual[game]
    now, before = (torch.where(torch.rand(usual.shape, generator=chance) < 0.2, torch.randint(4, usual.shape, generator=chance), usual) for _ in range(2))
    look, x = console.reading(CODES), 0
    for sign, pair in ((1, (now, before)), (-1, (usual, usual))):
        x = x + sign * torch.nn.functional.silu(console.pair(torch.cat([look[part] for part in pair], -1)) + console.pair_game(game)[:, None, None])
    expected = console.read(torch.cat([x.sum(1), x.sum(2)], 1).flatten(1))      # of each column, of each row
    assert torch.allclose(console.glance(now, before, game, look), expected, atol=1e-4)


def test_tokens_hear_the_same_one_by_one_and_all_at_once():
    console, (facts, _, game, now) = console_of(4, 0.2), states(4)
    lines = console.lines(facts, now, game)
    cell = torch.stack([torch.randperm(GRID * GRID, generator=torch.Generator().manual_seed(i)) for i in range(4)])
    first, then, stays = console.at(lines, torch.arange(4), cell)
    assert first.shape == (4, 64, 4) and then.shape == (4, 64, 8)
    assert torch.allclose(stays, console.draw(lines)[0].flatten(1).gather(1, cell), atol=1e-5)
    one = [part[2:3, 5:6] for part in (first, then, stays)]
    for part, alone in zip(one, console.at(lines, torch.tensor([2]), cell[2:3, 5:6])): assert torch.allclose(part, alone, atol=1e-6)
    assert console.stirs(lines).shape == (4, (GRID // console.group) ** 2)


def test_a_new_console_says_nothing_and_learns_to():
    console, (facts, _, game, now) = console_of(), states(4)
    lines = console.lines(facts, now, game)
    parts = *console.at(lines, torch.arange(4), torch.arange(64).expand(4, -1)), console.stirs(lines)
    assert not any(part.any() for part in parts)
    sum(part.sum() for part in parts).backward()
    assert console.tell.weight.grad.any() and console.stir.weight.grad.any()
    assert console.value.weight.grad is None                        # a picture does not change the rules


def test_rules_are_kept_and_what_they_mean_is_learned():
    console, (facts, act, game, now) = console_of(1, 0.2), states(8)
    console.keep_rules()
    before, film = copy.deepcopy(console.state_dict()), torch.randint(4, (2, 8, GRID, GRID))
    optimizer = torch.optim.SGD([w for w in console.parameters() if w.requires_grad], 0.1)
    draw_loss(console, facts, now, game, *film, console.reading(CODES)).backward()
    optimizer.step()
    changed = {name.split(".")[0] for name, weight in console.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {"outline", "outline_game", "tell", "stir"}


# Learning

def windows(facts, count, length=5):
    "As `recipe.Windows`, of the game that is played here."
    rows = []
    for _ in range(count):
        (ram, keys), t = PLAYS[int(torch.randint(len(PLAYS), ()))], int(torch.randint(200 - length, ()))
        rows.append((torch.from_numpy(ram[t:t + length + 1]), torch.from_numpy(keys[t:t + length]), film_of(ram[t + length - 1:t + length + 1])))
    ram, acts, film = map(torch.stack, zip(*rows))
    game = torch.zeros(count, dtype=torch.long)
    return {"facts": facts.read(ram, game), "acts": acts, "game": game, "film": film}


def test_reading_foreseeing_and_drawing_are_learned_at_once():
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
    early, late = ({name: np.mean([part[name] for part in some]) for name in ("read", "foreseen", "drawn")} for some in (history[:8], history[-8:]))
    assert all(late[name] < 0.6 * early[name] for name in early), (early, late)
    assert late["read"] < late["foreseen"]                          # who sees knows more


def test_a_still_picture_of_which_nothing_is_said_costs_a_coin_per_token_and_place():
    console, (facts, _, game, now) = console_of(), states(4)
    film = torch.randint(4, (4, GRID, GRID))
    assert abs(float(draw_loss(console, facts, now, game, film, film, console.reading(CODES)).detach()) - (64 + 4) / 64 * np.log(2)) < 1e-4


def test_own_guesses_are_carried_on_in_every_second_step(monkeypatch):
    console, steps = console_of(), []
    batch, real = windows(console.facts, 8), console.step
    monkeypatch.setattr(console, "step", lambda *args: steps.append(args) or real(*args))
    for step, own in ((0, 0), (1, 0), (2, 0), (3, 1), (5, 2), (7, 3), (9, 4), (10, 0), (11, 0), (13, 1)):
        steps.clear()
        console_loss(console, batch, CODES, step)
        assert len(steps) == own + 1                                # the last one is of `draw_loss`
        if own: assert torch.equal(steps[0][0], batch["facts"][:, 4 - own]) and torch.equal(steps[0][1], batch["acts"][:, 4 - own])


def test_what_is_lost_was_moving_and_another_picture_of_the_game_is_there():
    torch.manual_seed(0)
    film, game = torch.stack([film_of(ram[60:62]) for ram, _ in PLAYS[:16]]), torch.zeros(16, dtype=torch.long)
    before = film.clone()
    spoilt = lose(film, game, 1.0)
    near = torch.nn.functional.max_pool2d((film[:, 0] != film[:, 1]).float()[:, None], 5, 1, 2) > 0
    assert torch.equal(film, before) and torch.equal(lose(film, game, 0.0), film)
    assert torch.equal(spoilt, torch.where(near, film.roll(1, 0), film)) and not torch.equal(spoilt, film)
    assert torch.equal(lose(film, torch.arange(16), 1.0), film)     # nothing of another game
    some = (lose(film, game, 0.5) != film).flatten(1).any(1).float().mean()
    assert 0 < some < (spoilt != film).flatten(1).any(1).float().mean()
