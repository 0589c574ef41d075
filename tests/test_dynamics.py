"The world model: shapes, seeds, players that do not touch one another, a state that holds, files, commands, and the shipped model."
import argparse
import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from lwm_course import course, data, dynamics, recipe, speed
from lwm_course.console import HELD, UNKNOWN, Facts
from lwm_course.dynamics import (MUCH, WRONG, Moment, Recipe, WorldModel, action_response, dynamics_loss, log_probs, next_frame,
                                 own_prediction)
from lwm_course.motion import FEW, LONG, MOVED, NEW, STAYED, shifts
from lwm_course.network import SURE, Dynamics, DynamicsConfig
from lwm_course.tokenizer import Tokenizer, TokenizerConfig
from lwm_course.training import MODELS, mse

PONG, FREEWAY = "ALE/Pong-v5", "ALE/Freeway-v5"
GAMES = {PONG: ("NOOP", "FIRE", "RIGHT", "LEFT"), FREEWAY: ("NOOP", "UP", "DOWN")}


pytestmark = pytest.mark.usefixtures("one_thread")


def small(**options):
    "A configuration of a few thousand weights, for frames of 64 pixels."
    return DynamicsConfig(**{**dict(games=GAMES, grid=8, codebook=40, code=2, group=2, token_width=8, closer=32, width=64, depth=2, head_depth=1,
                                    attention_heads=2, guidance=1.0),
                             **options})


def small_world(seed=0, **options):
    torch.manual_seed(seed)
    tokenizer = Tokenizer(TokenizerConfig(frame_size=64, levels=(8, 5), encoder_width=32, encoder_depth=1, width=32, depth=1))
    return WorldModel(tokenizer, Dynamics(small(**options))).ready("cpu", "float32")


@pytest.fixture(scope="module")
def world():
    return small_world()


RAM = torch.randint(5, (2, 60, 128), generator=torch.Generator().manual_seed(0)).byte()      # a memory of each game, and ...
KEPT = [Facts.of([own.numpy()], facts=6) for own in RAM]                                     # ... what is followed of it


def wise_world(seed=0, **options):
    "A world that follows six bytes of a memory, is sure of most of them, and of a part of what they look like."
    values, strides = zip(*(facts.sizes for facts in KEPT))
    world = small_world(seed, facts=6, values=values, strides=strides, shown=(9, 11), **options)
    for console, facts in zip(world.dynamics.consoles, KEPT):
        console.facts.load_state_dict(facts.state_dict())
        torch.nn.init.normal_(console.leave[1].weight, std=2.0)
        for part in (console.screen.name, console.screen.odd): torch.nn.init.normal_(part.weight, std=8.0)
    return world


@pytest.fixture(scope="module")
def wise():
    return wise_world()


def film_of(players=2, frames=7, share=0.1, seed=0):
    "Tokens of a still picture in which now and then a few change."
    chance = torch.Generator().manual_seed(seed)
    tokens = torch.randint(40, (players, 1, 8, 8), generator=chance).repeat(1, frames, 1, 1)
    hit = torch.rand(tokens.shape, generator=chance) < share * (torch.rand(players, frames, 1, 1, generator=chance) < 0.5)
    return torch.where(hit, torch.randint(40, tokens.shape, generator=chance), tokens)


def batch_of(tokens, seed=0):
    "A batch like those of `motion.TokenClips`: every other change has come by a shift, the rest is new."
    (B, T), chance = tokens.shape[:2], torch.Generator().manual_seed(seed)
    changed = tokens[:, 1:] != tokens[:, :-1]
    matches = torch.randint(40, (int(changed.sum()), FEW), generator=chance)
    matches[::2] = -1
    moved = torch.full_like(tokens, STAYED)
    moved[:, 1:][changed] = torch.where(matches[:, 0] < 0, NEW, MOVED + matches[:, 0])
    return {"tokens": tokens, "actions": torch.randint(3, (B, T), generator=chance), "game": torch.arange(B) % 2, "weight": torch.ones(B),
            "moved": moved, "age": torch.full_like(tokens[:, 0], LONG), "where": changed.flatten().nonzero()[:, 0], "matches": matches}


def play_of(players=3, frames=5, seed=0):
    "Random pictures, and keys that every game has."
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (players, frames, 64, 64, 3), np.uint8), rng.integers(0, 3, (players, frames - 1))


def look(net, tokens, moved, *args, **named):
    "`Dynamics.look`, what moves going on."
    return net.look(tokens, moved, net.onward(moved, tokens), *args, **named)


def close(a, b):
    "Frames that agree but for rounding to uint8."
    return a.shape == b.shape and (a.int() - b.int()).abs().max() <= 1


# Network

def test_every_weight_learns_and_config_survives_json():
    torch.manual_seed(0)
    net = Dynamics(small())
    for part in (net.closeup.answer.weight, net.router.recall[-1].weight, *net.enter_age.parameters()): torch.nn.init.normal_(part)         # at zero, what is behind it does not learn in the first step
    loss, parts = dynamics_loss(net, batch_of(film_of(2, 9)), 401, Recipe(masked=0.5))        # a step with the model's own predictions in the context
    loss.backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []
    assert {"gate", "naming", "right", "shifted", "found", "reached", "active", "changed"} <= set(parts) and all(math.isfinite(v) for v in parts.values())
    again = DynamicsConfig(**json.loads(json.dumps(dynamics.asdict(net.config))))
    assert again == net.config


def test_rows_play_in_float32_where_bfloat16_would_be_native(monkeypatch):
    monkeypatch.setattr(dynamics.training, "_cpu_has_bfloat16", lambda: True)
    assert small_world().ready("cpu").dynamics.masked.dtype == torch.float32              # a new shape in every frame
    assert small_world(least=0.0).ready("cpu").dynamics.masked.dtype == torch.bfloat16    # always the same


def test_a_frame_comes_before_it_is_remembered(world):
    frames, keys = play_of()
    begin = world.start(frames, keys, [PONG, FREEWAY, PONG], 5)
    (shown, after), (frame, state) = world.frame(begin, [1, 2, 0], 1.0), world.step(begin, [1, 2, 0], 1.0)
    assert torch.equal(shown, frame)
    for one, other in zip((later := after()).memory.blocks, state.memory.blocks): assert all(map(torch.equal, one, other))
    assert torch.equal(world.step(later, [2, 1, 3])[0], world.step(state, [2, 1, 3])[0])


def test_a_place_where_nothing_happens_knows_for_how_long():
    torch.manual_seed(0)
    net, tokens, keys, game = Dynamics(small()).eval(), film_of(1, 1).repeat(1, 30, 1, 1), torch.zeros(1, 30, dtype=torch.long), torch.tensor([0])
    tokens[:, 10:, 0, 0] += 1                                                             # once a token changes, far from the last position
    for part in (net.router.past, net.enter_ages): torch.nn.init.normal_(part.weight)
    with torch.no_grad(): features, active, route, memory = look(net, tokens, torch.zeros_like(tokens), keys, game)
    assert (route[0, 12:, 0].diff().abs() > 1e-6).all() and memory.age[0, 0] == 19 and memory.age[0, -1] == LONG + 30
    assert active[0, 10, 0] and (features[0, 12:, -1, :64].diff(dim=0).abs().amax(1) > 1e-4).all()     # so does the frame as a whole


@pytest.mark.parametrize("every, most", [(1, 32), (2, 32), (1, 5)])
def test_reading_at_once_equals_reading_frame_by_frame(every, most):
    torch.manual_seed(0)
    net = Dynamics(small(temporal_every=every, most=most)).eval()
    for p in net.parameters(): torch.nn.init.normal_(p, std=0.2) if p.ndim > 1 else None
    tokens, keys, game, state = film_of(2, 40), torch.randint(3, (2, 40)), torch.tensor([1, 0]), None
    moved = torch.randint(MOVED + 40, tokens.shape)
    with torch.no_grad():
        features, active, _, last = look(net, tokens, moved, keys, game)
        for t in range(40):
            one, _, _, state = look(net, tokens[:, t:t + 1], moved[:, t:t + 1], keys[:, t:t + 1], game, state)
            assert torch.allclose(one[:, 0], features[:, t], atol=1e-4, rtol=1e-4)
        half, _, _, middle = look(net, tokens[:, :17], moved[:, :17], keys[:, :17], game)
        rest, _, _, _ = look(net, tokens[:, 17:], moved[:, 17:], keys[:, 17:], game, middle)
        packed, _, _, none = look(net, tokens, moved, keys, game, remember=False)
    assert torch.allclose(rest, features[:, 17:], atol=1e-4, rtol=1e-4)
    assert torch.allclose(packed, features[active], atol=1e-5) and none is None
    assert (features[~active] == 0).all() and active[..., -1].all()
    remembered = [(a, b) for s, m in zip(state.blocks, last.blocks) if s for a, b in zip(s, m)]
    assert remembered and all(torch.allclose(a, b, atol=1e-4, rtol=1e-4) for a, b in remembered)
    assert torch.equal(state.recent, tokens[:, -3:])


def test_rows_are_where_something_changed_and_where_it_may():
    net, tokens = Dynamics(small(least=0.5)).eval(), film_of(2, 12)
    torch.nn.init.constant_(net.router.leave.bias, -20.0)           # nothing is expected anywhere
    keys, game, moved = torch.zeros(2, 12, dtype=torch.long), torch.tensor([0, 1]), torch.zeros_like(tokens)
    changed = dynamics.grouped(tokens[:, 1:] != tokens[:, :-1], 2).any(-1)
    with torch.no_grad():
        assert torch.equal(look(net, tokens, moved, keys, game)[1][:, 1:, :-1], changed)
        net.router.place[1, 2, 3] = 40.0                            # but at one position, in one game
        active = look(net, tokens, moved, keys, game)[1][..., :-1]
    assert active[1, :, 11].all() and torch.equal(active[0, 1:], changed[0])
    with torch.no_grad(): everywhere = look(Dynamics(small(least=0.0)), tokens, moved, keys, game)[1]
    assert everywhere.all()


def test_at_most_so_many_rows_and_the_liveliest_first():
    net = Dynamics(small(most=4)).eval()
    share = torch.zeros(1, 1, 16)
    share[0, 0, [2, 5, 7, 9, 11, 13]] = torch.tensor([0.25, 1.0, 0.5, 0.75, 0.5, 1.0])
    active = net.active(torch.zeros(1, 1, 16), share)[0, 0]
    assert {5, 9, 13} <= set(active.nonzero()[:, 0].tolist()) and active[2] == 0


def test_a_row_computes_what_it_would_compute_alone():
    "Nothing of one clip reaches another, and empty seats count for nothing."
    torch.manual_seed(0)
    net, tokens = Dynamics(small()).eval(), torch.cat([film_of(1, 9, 0.02), film_of(1, 9, 0.5, seed=3)])
    keys, game, moved = torch.randint(3, (2, 9)), torch.tensor([0, 1]), torch.randint(MOVED + 40, tokens.shape)
    with torch.no_grad():
        both, alone = look(net, tokens, moved, keys, game)[0], look(net, tokens[:1], moved[:1], keys[:1], game[:1])[0]
    assert torch.allclose(both[:1], alone, atol=1e-5)


def test_only_codes_of_the_game_are_named():
    net = Dynamics(small())
    net.owned[0, 30:] = False
    close, gate = torch.nn.functional.pad(torch.randn(2, 8, 8, net.named), (0, 827)), torch.full((2, 8, 8), -60.0)     # all origins alike
    p = log_probs(net, close, gate, torch.zeros(2, 8, 8, dtype=torch.long), torch.tensor([0, 1])).exp()
    assert p[0, ..., 30:].max() < 1e-6 and p[1, ..., 30:].max() > 1e-6 and torch.allclose(p.sum(-1), torch.ones(2, 8, 8), atol=1e-5)
    target, none, still, origin = torch.tensor([3, 35]), torch.full((2, FEW), -1), torch.tensor([0, 0]), math.log(826)
    loss, _, _ = dynamics.name_loss(net, close[0, 0, :2], target, none, still, still, torch.ones(2))
    known, _, _ = dynamics.name_loss(net, close[0, 0, :1], target[:1], none[:1], still[:1], still[:1], torch.ones(1))
    assert torch.isclose(loss, known + origin)                      # what has no code in the game cannot be named
    brought = none.clone()
    brought[1, :3] = torch.tensor([0, 7, 9])
    either, _, _ = dynamics.name_loss(net, close[0, 0, :2], target, brought, still, still, torch.ones(2))
    assert torch.isclose(either, known + origin - math.log(3))      # any of three shifts will do, and its name is not asked for


def test_every_key_and_every_game_counts():
    torch.manual_seed(0)
    net, tokens = Dynamics(small()).eval(), torch.randint(40, (1, 1, 8, 8))
    game, mask = torch.tensor([0]), torch.full((1, 1, 8, 8), 40)
    features, active, _, _ = look(net, tokens, torch.zeros_like(tokens), torch.zeros(1, 1, dtype=torch.long), game)
    ask = lambda key, game: net.predict(features, active, tokens, torch.zeros_like(tokens), mask, torch.tensor([[key]]), game)[1]
    gates = [*(ask(key, game) for key in (-1, 0, 1, 2, 3)), ask(0, torch.tensor([1]))]
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(gates) for b in gates[:i])


def test_log_probs_is_the_mixture():
    net, close, gate, tokens = Dynamics(small()), torch.randn(2, 8, 8, 8 + 827), torch.randn(2, 8, 8), torch.randint(40, (2, 8, 8))
    game, stays = torch.tensor([0, 1]), gate.sigmoid()[..., None]
    [(_, _, fit)] = net.names(close.flatten(0, -2), torch.zeros(128, dtype=torch.long))
    expected = stays * torch.nn.functional.one_hot(tokens, 40) + (1 - stays) * fit.softmax(-1).view(2, 8, 8, 40)
    assert torch.allclose(log_probs(net, close, gate, tokens, game).exp(), expected, atol=1e-6)
    assert torch.isfinite(log_probs(net, close, gate + 80, tokens, game)).all()
    brought = torch.randint(40, (2, 8, 8, len(shifts(net.config.shifts))))
    onward = torch.where(torch.rand(2, 8, 8) < 0.5, STAYED, torch.randint(MOVED, MOVED + brought.shape[-1], (2, 8, 8)))
    origins = net.origins(close.flatten(0, -2), onward.flatten()).exp().view(2, 8, 8, -1)
    change = origins[..., -1:] * fit.softmax(-1).view(2, 8, 8, 40)
    change = change + torch.stack([(origins[..., :-1] * (brought == code)).sum(-1) for code in range(40)], -1)
    expected = stays * torch.nn.functional.one_hot(tokens, 40) + (1 - stays) * change
    assert torch.allclose(log_probs(net, close, gate, tokens, game, brought, onward).exp(), expected, atol=1e-5)


def test_own_prediction_is_what_play_would_show(world):
    frames, keys = play_of(2, 7)
    tokens, moved = world.read(torch.as_tensor(frames))
    batch = batch_of(tokens) | {"moved": moved}
    batch["actions"] = torch.cat([torch.zeros(2, 1, dtype=torch.long), torch.as_tensor(keys)], 1)
    own, by = own_prediction(world.dynamics, tokens[:, :-1], moved[:, :-1], batch)
    state = world.start(frames[:, :5], keys[:, :4], [PONG, FREEWAY])
    played, shift, _ = world.next_tokens(state, torch.as_tensor(keys[:, 4]))
    named = shift < 0                                   # where a shift is wrong, training does not know what it would bring
    assert torch.equal(own[:, 0], tokens[:, 0]) and (own[:, 5] == played)[named].float().mean() > 0.99
    assert torch.equal(by[:, 5] >= MOVED, ~named) or (own[:, 5] == tokens[:, 5]).any()


# The console's memory

def test_a_network_learns_from_pictures_and_its_console_does_not():
    net = wise_world().dynamics.train().requires_grad_(True)
    net.consoles.requires_grad_(False)
    for part in (net.closeup.answer.weight, net.router.recall[-1].weight, *net.enter_age.parameters()): torch.nn.init.normal_(part)
    batch = batch_of(film_of(2, 9))
    loss, parts = dynamics_loss(net, batch, 401, Recipe(masked=0.5))
    loss.backward()
    silent = {name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum()}
    assert silent == {name for name, _ in net.named_parameters() if name.startswith("consoles.")}
    assert all(math.isfinite(v) for v in parts.values())
    with torch.autocast("cpu", torch.bfloat16): half, _ = dynamics_loss(net, batch, 401, Recipe(masked=0.5))
    net.zero_grad()
    half.backward()
    assert half.isfinite()


def test_facts_go_on_from_frame_to_frame(wise):
    frames, keys = play_of()
    state, found = wise.start(frames, keys, [PONG, FREEWAY, PONG]), []
    for t in range(4):
        _, state = wise.step(state, [t % 3, 1, 0])
        found.append(state.facts)
        assert state.facts.shape == (3, 8) and ((state.facts == UNKNOWN) | (state.facts >= 0) & (state.facts[:, :6].amax() < 5)).all()
    assert (torch.stack(found) != UNKNOWN).float().mean() > 0.3 and not torch.equal(found[0], found[-1])
    tokens, came_by = wise.read(torch.from_numpy(frames))[0], torch.nn.functional.pad(torch.from_numpy(keys), (1, 0))
    with torch.inference_mode():
        games, nothing = torch.tensor([0, 1, 0]), wise.dynamics.nothing(tokens)
        read = wise.dynamics.watch(tokens, came_by, games, nothing)
        half = wise.dynamics.watch(tokens[:, :3], came_by[:, :3], games, nothing)
        rest = wise.dynamics.watch(tokens[:, 2:], came_by[:, 2:], games, half[:, -1])[:, 1:]
        begun = wise.dynamics.recall(tokens, came_by, games)
    start = wise.start(frames, keys, [PONG, FREEWAY, PONG])
    assert torch.equal(torch.cat([half, rest], 1), read) and torch.equal(begun[:, -1], start.facts) and not torch.equal(begun[:, -1], read[:, -1])
    assert torch.equal(start.drawn, wise.dynamics.drawn(*begun.unbind(1), games))


def test_a_frame_is_read_only_where_it_tells_something(wise):
    "A memory goes on by rule where a frame looks as was foreseen, and is read where it does not, or where something is not known."
    frames, keys = play_of()
    state, key = wise.start(frames, keys, [PONG, FREEWAY, PONG]), torch.tensor([1, 2, 0])
    state = replace(state, facts=state.facts.clamp_min(0))
    carried = wise.dynamics.carry(state.facts, key, state.game)
    assert (carried[:, :-HELD] >= 0).all()
    drawn = wise.dynamics.drawn(state.facts, carried, state.game)
    said = drawn != wise.dynamics.mask
    foreseen = torch.where(said, drawn, state.tokens)
    other = foreseen.clone()
    other[1][said[1]] = (other[1][said[1]] + 1) % wise.dynamics.config.codebook      # the second player sees something else
    read = wise.dynamics.watch(torch.stack([state.tokens, other], 1), key[:, None].expand(-1, 2), state.game, state.facts)[:, 1]
    facts, pictures = wise.heed(state, foreseen, key)
    assert torch.equal(facts, carried) and torch.equal(pictures, drawn)
    facts, pictures = wise.heed(state, other, key)
    assert torch.equal(facts[::2], carried[::2]) and torch.equal(facts[1], read[1]) and not torch.equal(read[1], carried[1])
    assert torch.equal(pictures[1], wise.dynamics.drawn(state.facts, facts, state.game)[1])
    blank = replace(state, facts=torch.full_like(state.facts, UNKNOWN))
    assert torch.equal(wise.heed(blank, foreseen, key)[0], wise.dynamics.watch(torch.stack([state.tokens, foreseen], 1), key[:, None].expand(-1, 2), state.game, blank.facts)[:, 1])


def test_facts_count_and_nobody_elses(wise):
    "What is played depends on the facts of a player, in one pass and in several, with guidance, and on nobody else's."
    frames, keys = play_of()
    together, alone = wise.start(frames, keys, [PONG, FREEWAY, PONG], seed=[7, 8, 9]), wise.start(frames[1:2], keys[1:2], FREEWAY, seed=[8])
    key = torch.tensor([1, 2, 0])
    other = replace(together, facts=torch.where(torch.tensor([[True], [False], [False]]), (together.facts + 1) % 5, together.facts))
    for guidance in (1.0, 1.5):
        tokens, tokens_ = (wise.next_tokens(state, key, guidance=guidance)[0] for state in (together, other))
        assert not torch.equal(tokens[0], tokens_[0]) and torch.equal(tokens[1:], tokens_[1:])
    for t in range(4):
        how = dict(temperature=t % 2, refine=1 + t % 3, guidance=1 + t / 4)
        many, together = wise.step(together, [3, t % 3, 1], **how)
        one, alone = wise.step(alone, [t % 3], **how)
        assert torch.equal(together.tokens[1], alone.tokens[0]) and torch.equal(together.facts[1], alone.facts[0]) and close(many[1], one[0])


def test_what_the_memory_is_certain_of_is_shown_and_the_rest_is_the_networks(wise, monkeypatch):
    frames, keys = play_of()
    state, key = wise.start(frames, keys, [PONG, FREEWAY, PONG]), torch.tensor([1, 2, 0])
    known = wise.foreseen(state, key)
    told, asked, head = known != wise.dynamics.mask, [], wise.head
    assert told.any() and not told.all()
    monkeypatch.setattr(wise, "head", lambda state, key, known, guidance: asked.append(known) or head(state, key, known, guidance))
    for how in (dict(), dict(refine=3), dict(guidance=1.5), dict(temperature=1.0)):
        tokens, by, due = wise.next_tokens(state, key, **how)
        assert torch.equal(tokens[told], known[told]) and (by[told] == -1).all()
        assert torch.equal(asked[0], known)                         # it is asked with a picture that has gaps
        asked.clear()
    late = replace(state, due=torch.where(told, 9.0, state.due))    # what is known is not overdue
    assert torch.equal(wise.next_tokens(late, key)[0], wise.next_tokens(state, key)[0])
    asked.clear()
    full = torch.full_like(known, 3)
    monkeypatch.setattr(wise, "foreseen", lambda *how: full)
    tokens, by, due = wise.next_tokens(state, key)
    assert torch.equal(tokens, full) and (by == -1).all() and not due.any() and not asked            # nothing is left to ask for


def test_a_memory_that_is_mistaken_is_not_believed_where_it_says_the_same_again(wise):
    frames, keys = play_of()
    state, key = wise.start(frames, keys, [PONG, FREEWAY, PONG]), torch.tensor([1, 2, 0])
    known, mask = wise.dynamics.drawn(state.facts, wise.dynamics.carry(state.facts, key, state.game), state.game), wise.dynamics.mask
    same = (state.drawn == known) & (known != mask)
    assert same.any() and ((state.drawn != known) & (known != mask)).any() and state.drawn.shape == state.tokens.shape
    for seen in (state.drawn, (state.drawn + 1) % 9):               # it was right everywhere, and nowhere
        found = wise.foreseen(replace(state, tokens=seen), key)
        wrong = same & (seen != state.drawn)
        many = ((seen != state.drawn) & (state.drawn != mask)).sum((1, 2)) > WRONG
        many &= ((known != seen) & (known != mask)).sum((1, 2)) > MUCH          # astray: not believed at all
        assert torch.equal(found, torch.where(wrong | many[:, None, None], mask, known))
    _, after = wise.step(state, key)
    assert torch.equal(after.drawn, wise.dynamics.drawn(state.facts, after.facts, state.game))


def test_an_old_state_and_the_other_players_keep_their_facts(wise):
    frames, keys = play_of()
    state = wise.start(frames, keys, [PONG, FREEWAY, PONG], seed=[1, 2, 3])
    for _ in range(2): _, state = wise.step(state, [1, 1, 1])
    before = state.facts.clone()
    first, _ = wise.step(state, [2, 2, 2])
    new_frames, new_keys = play_of(1, 5, seed=9)
    reset, fresh = wise.reset_players(state, torch.tensor([False, True, False]), new_frames, new_keys), wise.start(new_frames, new_keys, FREEWAY, seed=[2])
    assert torch.equal(reset.facts[1], fresh.facts[0]) and torch.equal(reset.facts[[0, 2]], before[[0, 2]]) and torch.equal(state.facts, before)
    for _ in range(2):
        _, reset = wise.step(reset, [2, 2, 2])
        _, fresh = wise.step(fresh, [2])
    assert torch.equal(reset.facts[1], fresh.facts[0]) and torch.equal(reset.tokens[1], fresh.tokens[0]) and torch.equal(wise.step(state, [2, 2, 2])[0], first)




def test_by_sight_a_world_plays_as_one_that_never_had_a_memory():
    wise, frames, keys = wise_world(), play_of()[0], play_of()[1]
    plain = WorldModel(wise.tokenizer, dynamics.Dynamics(replace(wise.dynamics.config, facts=0), wise.dynamics.codes))
    plain.dynamics.load_state_dict(wise.dynamics.state_dict(), strict=False)
    plain.ready("cpu", "float32")
    def play(world):
        state, shown = world.start(frames, keys, [PONG, FREEWAY, PONG]), []
        for t in range(4):
            frame, state = world.step(state, [t % 3, 1, 0])
            shown.append(frame)
        return torch.stack(shown), state
    (before, _), (sight, state), (never, _) = play(wise), play(wise.by_sight()), play(plain)
    assert torch.equal(sight, never) and not torch.equal(before, sight) and state.facts.shape == (3, 0)


def test_a_memory_survives_a_file_a_copy_and_other_precision(wise, tmp_path):
    frames, keys = play_of()
    play = lambda world: world.step(world.start(frames, keys, [PONG, FREEWAY, PONG]), [1, 2, 0])
    (shown, state), loaded = play(wise), WorldModel.from_pretrained(wise.save_pretrained(tmp_path), "cpu", "float32")
    assert loaded.dynamics.config == wise.dynamics.config and all(torch.equal(console.facts.values, facts.values) for console, facts in zip(loaded.dynamics.consoles, KEPT))
    for other in (loaded, copy.deepcopy(wise)):
        again, after = play(other)
        assert torch.equal(again, shown) and torch.equal(after.facts, state.facts)
    low, _ = play(copy.deepcopy(wise).ready("cpu", "bfloat16"))
    assert (low == shown).float().mean() > 0.8
    json.dumps(dynamics.asdict(wise.dynamics.config))


def test_what_was_read_is_read_anew_by_other_weights():
    "Tables are kept in play: after training, or where tokens mean something else, they are made again."
    world, (frames, keys) = wise_world(), play_of()
    reading = lambda: world.dynamics.table("console 0", lambda: world.dynamics.consoles[0].reading(world.dynamics.codes))
    start = lambda: world.start(frames, keys, PONG)
    first = start().facts
    with torch.inference_mode(): before = reading().clone()
    world.dynamics.train()
    with torch.no_grad(): world.dynamics.consoles[0].token[2].weight.mul_(-3)
    world.ready("cpu", "float32")
    second = start().facts
    with torch.inference_mode(): assert not torch.allclose(reading(), before)
    assert not torch.equal(first, second)
    world.dynamics.requires_grad_(True)
    loss, _ = dynamics_loss(world.dynamics.train(), batch_of(film_of(2, 5)))     # after play, in the same process
    loss.backward()


# Play

def test_shapes_and_surface(world):
    frames, keys = play_of()
    state = world.start(frames, keys, PONG, seed=1)
    assert state.players == 3 and state.seeds.tolist() == [1, 2, 3] and state.frame.tolist() == [0, 0, 0]
    frame, after = world.step(state, [0, 1, 3])
    assert frame.shape == (3, 64, 64, 3) and frame.dtype == torch.uint8 and after.frame.tolist() == [1, 1, 1]
    assert world.games == [PONG, FREEWAY] and world.actions(FREEWAY) == ["NOOP", "UP", "DOWN"] and world.frame_size == (64, 64)
    log = world.logits(state, [0, 1, 3])
    assert log.shape == (3, 8, 8, 40) and torch.allclose(log.exp().sum(-1), torch.ones(3, 8, 8), atol=1e-4)


def test_a_shift_brings_pixels_and_their_token(world):
    frames, keys = play_of()
    state, by = world.start(frames, keys, PONG), torch.full((3, 8, 8), -1)
    by[0, 3, 4], by[2, 5, 5] = (torch.tensor(shifts(world.dynamics.config.shifts).tolist()) == torch.tensor([0, 8])).all(1).nonzero().item(), 0
    tokens = world.bring(state, state.tokens, by)
    assert tokens[0, 3, 4] == state.tokens[0, 3, 5] and (tokens != state.tokens).sum() <= 1       # 8 pixels to the right is the next token
    shown = world.show(state, tokens, by)
    assert torch.equal(shown[0, 24:32, 32:40], state.pixels[0, 24:32, 40:48]) and torch.equal(shown[1:], state.pixels[1:])
    moved = world.came(shown, state.pixels, (by >= 0) & (tokens != state.tokens))
    assert (moved[0, 3, 4] == MOVED + by[0, 3, 4]) and (moved[1:] == STAYED).all()


def test_one_picture_is_enough(world):
    frames, _ = play_of(1, 1)
    state = world.start(frames, np.zeros((1, 0), np.int64), FREEWAY)
    for _ in range(3): frame, state = world.step(state, 1)
    assert frame.shape == (1, 64, 64, 3)


def test_where_nothing_can_happen_nothing_does():
    "Not one row: a picture of which the router expects nothing."
    world = small_world(least=0.99)
    frames, _ = play_of(2, 1)
    state = world.start(frames, np.zeros((2, 0), np.int64), PONG)
    assert not state.active[:, :-1].any()
    frame, state = world.step(state, [1, 2], guidance=1.5)
    assert torch.equal(frame, torch.from_numpy(frames[:, 0]))


@pytest.mark.parametrize("temperature, refine", [(0.0, 1), (1.0, 1), (0.7, 4)])
def test_same_seed_same_frames(world, temperature, refine):
    frames, keys = play_of()
    def game(seed):
        state, shown = world.start(frames, keys, PONG, seed), []
        for t in range(4):
            frame, state = world.step(state, [t % 4, 0, 3], temperature, refine)
            shown.append(frame)
        return torch.stack(shown)
    assert torch.equal(game(5), game(5))
    assert torch.equal(game(5), game(6)) == (temperature == 0)


def test_guidance(world):
    frames, keys = play_of()
    state, known = world.start(frames, keys, PONG), torch.full((3, 8, 8), world.dynamics.mask)
    ask = lambda actions, guidance: world.head(state, torch.tensor(actions), known, guidance)
    for plain, ignored, other, twice in zip(ask([0, 1, 3], 1.0), ask([0, 1, 3], 0.0), ask([3, 2, 1], 0.0), ask([0, 1, 3], 2.0)):
        assert torch.equal(ignored, other) and torch.allclose(twice, 2 * plain - ignored, atol=1e-5)
    assert any(not torch.equal(a, b) for a, b in zip(ask([0, 1, 3], 1.0), ask([0, 1, 3], 0.0)))
    assert torch.equal(world.step(state, [0, 1, 3], guidance=1.0)[0], world.step(state, [0, 1, 3])[0])
    assert torch.equal(world.step(state, [0, 1, 3], guidance=0.0)[0], world.step(state, [3, 2, 1], guidance=0.0)[0])


def test_play_is_bolder_than_what_was_learned(monkeypatch):
    "Where something is computed a change gets likelier, by the same with any guidance; elsewhere a copy stays certain."
    world = small_world()
    state, known, answer = world.start(*play_of(), PONG), torch.full((3, 8, 8), world.dynamics.mask), world.answer
    def half(*asked):
        out, gate = answer(*asked)
        gate[:, :4] = SURE
        return out, gate
    monkeypatch.setattr(world, "answer", half)
    for guidance in (1.0, 1.5):
        heads = []
        for world.dynamics.config.bold in (0.0, 1.0): heads.append(world.head(state, torch.tensor([0, 1, 3]), known, guidance))
        (out, gate), (other, bolder) = heads
        assert torch.equal(out, other) and torch.allclose(bolder[:, 4:], gate[:, 4:] - 1, atol=1e-5) and (bolder[:, :4] == SURE).all()


def test_refinement_settles_changes_pass_by_pass(monkeypatch):
    "What stays is surest of all: if it were counted, no change would be settled before the last pass."
    world, asked = small_world(), []
    torch.nn.init.constant_(world.dynamics.gate.bias, -1.0)         # most tokens of a row change,
    torch.nn.init.normal_(world.dynamics.closeup.answer.weight)              # ... and come from somewhere
    head = world.head
    monkeypatch.setattr(world, "head", lambda state, action, known, *how: asked.append(known) or head(state, action, known, *how))
    frames, keys = play_of(2)
    state = world.start(frames, keys, PONG)
    tokens, *_ = world.next_tokens(state, torch.tensor([1, 2]), refine=3)
    changes, known = (tokens != state.tokens).flatten(1).sum(1), [known != world.dynamics.mask for known in asked]
    assert not known[0].any() and all((a <= b).all() for a, b in zip(known, known[1:])) and (changes > 6).all()
    settled = [(k & (tokens != state.tokens)).flatten(1).sum(1) / changes for k in known]
    assert (settled[1] > 0.15).all() and (settled[2] > settled[1]).all() and (settled[2] < 0.95).all()
    assert all(torch.equal(asked[2][k], tokens[k]) for k in known[1:])


def test_closer_looks_settle_the_surest_and_show_them_to_the_rest(monkeypatch):
    world, asked = small_world(), []
    torch.nn.init.constant_(world.dynamics.gate.bias, -1.0)
    torch.nn.init.normal_(world.dynamics.closeup.answer.weight)
    closer = world.dynamics.closer
    monkeypatch.setattr(world.dynamics, "closer", lambda out, chosen, *seen: asked.append((chosen.clone(), seen[-1])) or closer(out, chosen, *seen))
    frames, keys = play_of(2)
    state = world.start(frames, keys, PONG)
    world.dynamics.config.looks, looks = 1, asked
    once = world.next_tokens(state, torch.tensor([1, 2]))
    assert len(looks) == 1
    world.dynamics.config.looks = 3
    looks.clear()
    tokens, by, _ = world.next_tokens(state, torch.tensor([1, 2]))
    open_ = torch.stack([chosen.flatten(1).sum(1) for chosen, _ in looks])
    assert len(looks) == 3 and (open_[0] > 6).all() and (2 * open_[1:] <= open_[:-1]).all() and (open_[-1] > 0).all()     # of each player the surer half
    for chosen, known in looks:
        assert (known[chosen] == world.dynamics.mask).all() and (known == world.dynamics.mask).sum() >= chosen.sum()
        told = looks[0][0] & ~chosen
        assert torch.equal(known[told], tokens[told])                       # what is settled is what comes
    first = looks[0][0] & ~looks[1][0]
    assert torch.equal(tokens[first], once[0][first]) and torch.equal(by[first], once[1][first]) and not torch.equal(tokens, once[0])
    alone = world.start(frames[1:], keys[1:], PONG)
    assert torch.equal(world.next_tokens(alone, torch.tensor([2]))[0], tokens[1:])      # nobody else matters


def by_gates(world, monkeypatch, gates):
    "The world's head, but with other copy logits: `gates(known)`. Returns what was known in each pass."
    asked, head = [], world.head
    def answer(state, action, known, *how):
        asked.append(known)
        return head(state, action, known, *how)[0], gates(known)
    monkeypatch.setattr(world, "head", answer)
    return asked


def test_one_ball_in_several_passes_none_in_one(monkeypatch):
    "Four places share the odds of a ball, and each pass knows which are settled: the last one left is sure to have it."
    world, places = small_world(), torch.tensor([18, 19, 41, 54])      # of 64 tokens
    torch.nn.init.normal_(world.dynamics.closeup.answer.weight)
    def gates(known):
        gate = torch.full(known.shape, 20.0)
        for own, tokens in zip(gate.flatten(1), known.flatten(1)):
            left = places[tokens[places] == world.dynamics.mask]
            own[left] = math.log(len(left) - 1) + 0.01 * torch.arange(len(left)) if len(left) > 1 else -20.0
        return gate
    frames, keys = play_of(2)
    state = world.start(frames, keys, PONG)
    asked = by_gates(world, monkeypatch, gates)
    def changes(refine):
        asked.clear()
        tokens, by, _ = world.next_tokens(state, torch.tensor([1, 2]), refine=refine)
        return ((tokens != state.tokens) | (by >= 0)).flatten(1).nonzero()[:, 1].tolist()
    assert changes(1) == [] and len(asked) == 1
    assert changes(8) == [18, 18]                                       # the likeliest of four, for each of two players
    known = [(k != world.dynamics.mask).flatten(1).sum(1).tolist() for k in asked]
    assert known == [[0, 0], [62, 62], [63, 63]]                        # what is sure, and the surer half of the rest; then all is sure


def test_what_is_unlikely_in_every_frame_happens_once_the_chances_amount_to_one(monkeypatch):
    "A change of .2 a frame comes in the sixth, with what goes along with it; one of .005 is not waited for; the other player has only that."
    world, serve, along, rare = small_world(), 18, 54, 41
    torch.nn.init.normal_(world.dynamics.closeup.answer.weight)
    def gates(known):
        gate = torch.full(known.shape, 20.0).flatten(1)
        gate[:1, serve], gate[:, rare] = math.log(4), math.log(199)                   # for the first player alone
        gate[:, along] = torch.where(known.flatten(1)[:, serve] == world.dynamics.mask, 20.0, -20.0)
        return gate.view(known.shape)
    frames, keys = play_of(2)
    state, found = world.start(frames, keys, PONG), []
    asked = by_gates(world, monkeypatch, gates)
    for _ in range(7):
        tokens, by, due = world.next_tokens(state, torch.tensor([1, 2]))
        found.append(((tokens != state.tokens) | (by >= 0)).flatten(1).sum(0).nonzero()[:, 0].tolist())
        state = replace(state, due=due)
    assert [part for part in found if part] == [[serve, along]] and found[5] and [len(known) for known in asked] == [2, 2, 2, 2, 2, 2, 1, 2]
    assert (due.flatten(1)[:, serve] < 0.3).all() and due.flatten(1)[0, rare] < 0.011 and due.flatten(1)[1, rare] > 0.02    # that clock began anew, the other player's goes on
    assert torch.equal(world.start(frames, keys, PONG).due, torch.zeros(2, 8, 8))


def test_what_may_be_in_many_places_comes_to_the_likeliest():
    gate = torch.full((2, 8, 8), 20.0)
    gate[0, 3], gate[0, 3, 5] = math.log(30), math.log(20)       # eight places, one of them likelier
    gate[1, 0, 0] = math.log(4)
    due, late = torch.zeros_like(gate), []
    for _ in range(4):
        due = due + torch.nn.functional.softplus(-gate)
        late.append(WorldModel.overdue(gate, due))
    assert not torch.stack(late[:3]).any() and late[3].nonzero().tolist() == [[0, 3, 5]]        # 4 (7 / 31 + 1 / 21) > 1, and 4 / 5 is not
    assert not WorldModel.overdue(-gate, 9 * due).any()                                         # what changes anyway is not overdue
    assert WorldModel.overdue(gate.fill_(1.0), due.fill_(1.0)).sum() == 2                       # of equals, one


def test_a_lost_thing_that_may_be_in_many_places_comes_once_not_again_and_again(monkeypatch):
    world = small_world()
    frames, keys = play_of(1)
    state, found = world.start(frames, keys, PONG), []
    by_gates(world, monkeypatch, lambda known: torch.full(known.shape, math.log(79)))           # 64 places: .8 of a change per frame
    for _ in range(9):
        _, _, due = world.next_tokens(state, torch.tensor([1]))
        found.append(round(float(due.sum()), 1))
        state = replace(state, due=due)
    assert found == 3 * [0.8, 1.6, 0.0]


def test_where_nothing_is_in_doubt_one_pass_is_enough(monkeypatch):
    world = small_world()
    frames, keys = play_of(2)
    state = world.start(frames, keys, PONG)
    chance = torch.randn(state.tokens.shape, generator=torch.Generator().manual_seed(0))
    asked = by_gates(world, monkeypatch, lambda known: 10 * chance.sign())
    tokens, *_ = world.next_tokens(state, torch.tensor([1, 2]), refine=5)
    assert len(asked) == 1 and torch.equal(tokens, world.next_tokens(state, torch.tensor([1, 2]))[0])


def test_in_training_the_head_is_shown_what_it_is_sure_of():
    gate = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0]).repeat(3, 40, 20, 1)     # (B, T, h, w)
    target = torch.zeros(gate.shape, dtype=torch.long)
    answer = lambda known: (None, gate)
    torch.manual_seed(0)
    open_ = dynamics.hidden(target, answer, 7, 6, Recipe(doubt=3)).float()
    assert not open_[..., [0, 4]].any() and 0.5 < open_[..., 1:4].mean() < 0.8          # the root of a uniform number: two thirds
    assert dynamics.hidden(target, answer, 7, 5, Recipe(doubt=3, masked=1.0)).all()     # the other steps: nothing is shown
    assert dynamics.hidden(target, answer, 7, 6, Recipe(doubt=0, masked=1.0)).all()


@pytest.mark.parametrize("temperature, refine", [(0.0, 1), (1.0, 1), (1.0, 3)])
def test_players_do_not_touch_one_another(world, temperature, refine):
    frames, keys = play_of()
    together = world.start(frames, keys, [PONG, FREEWAY, PONG], seed=[7, 8, 9])
    alone = world.start(frames[1:2], keys[1:2], FREEWAY, seed=[8])
    for t in range(4):
        many, together = world.step(together, [3, t % 3, 1], temperature, refine)
        one, alone = world.step(alone, [t % 3], temperature, refine)
        assert torch.equal(together.tokens[1], alone.tokens[0]) and close(many[1], one[0])


def test_an_old_state_stays_valid(world):
    frames, keys = play_of()
    state = world.start(frames, keys, PONG, seed=3)
    first, after = world.step(state, [1, 2, 3], temperature=1.0)
    for _ in range(3): _, after = world.step(after, [0, 0, 0], temperature=1.0)
    assert torch.equal(world.step(state, [1, 2, 3], temperature=1.0)[0], first) and state.frame.tolist() == [0, 0, 0]


@pytest.mark.parametrize("every", [1, 2])
def test_reset_touches_the_masked_only(every):
    world = small_world(temporal_every=every)
    frames, keys = play_of()
    state = world.start(frames, keys, [PONG, FREEWAY, PONG], seed=[1, 2, 3])
    for _ in range(3): _, state = world.step(state, [1, 1, 1], temperature=1.0)
    new_frames, new_keys = play_of(1, 5, seed=9)
    reset = world.reset_players(state, torch.tensor([False, True, False]), new_frames, new_keys)
    fresh = world.start(new_frames, new_keys, FREEWAY, seed=[2])
    assert reset.frame.tolist() == [3, 0, 3] and state.frame.tolist() == [3, 3, 3]
    for _ in range(2):
        shown, reset = world.step(reset, [2, 2, 2], temperature=1.0)
        expected, state = world.step(state, [2, 2, 2], temperature=1.0)
        alone, fresh = world.step(fresh, [2], temperature=1.0)
        assert close(shown[[0, 2]], expected[[0, 2]]) and close(shown[1], alone[0])


def test_what_stays_keeps_its_pixels(world):
    frames, keys = play_of()
    state = world.start(frames, keys, PONG)
    assert torch.equal(world.show(state, state.tokens), state.pixels)
    tokens = state.tokens.clone()
    tokens[0, 2, 3] = (tokens[0, 2, 3] + 1) % 40
    differs = (world.show(state, tokens) != state.pixels).any(-1)
    assert not differs[1:].any() and not differs[0, :16].any() and not differs[0, 24:].any() and not differs[0, :, 32:].any()


def test_state_does_not_grow(world):
    frames, keys = play_of(1)
    state = world.start(frames, keys, PONG)
    before = state.nbytes
    for _ in range(5): _, state = world.step(state, [0])
    assert state.nbytes == before


# Refusals

def refused(call, *words):
    with pytest.raises(ValueError) as caught: call()
    assert all(word in str(caught.value) for word in words), caught.value


def test_messages_say_what_is_wrong(world):
    frames, keys = play_of()
    state = world.start(frames, keys, [PONG, FREEWAY, PONG])
    refused(lambda: world.start(frames, keys, "ALE/Pnog-v5"), "Pnog", "ALE/Pong-v5")
    refused(lambda: world.actions("ALE/Frreway-v5"), "ALE/Freeway-v5")
    refused(lambda: world.step(state, [0, 3, 0]), FREEWAY, "0..2")
    refused(lambda: world.step(state, [0, -1, 0]), "0..2")
    refused(lambda: world.step(state, [0, 0]), "3 players", "2")
    refused(lambda: world.start(frames, keys + 3, PONG), "0..3")
    refused(lambda: world.start(frames, keys[:, :2], PONG), "(3, 4)", "(3, 2)")
    refused(lambda: world.start(frames[:, :, :32], keys, PONG), "64")
    refused(lambda: world.start(frames.astype(np.float32), keys, PONG), "uint8")
    refused(lambda: world.start(frames[0], keys, PONG), "(B, T, H, W, 3)")
    refused(lambda: world.start(frames, keys, [PONG, PONG]), "3 players")
    refused(lambda: world.step(state, [0, 0, 0], temperature=-0.1), "temperature")
    refused(lambda: world.step(state, [0, 0, 0], refine=0), "refine")
    refused(lambda: world.clip(PONG), "no start clips")
    refused(lambda: small(grid=9), "multiple")
    for other in (dict(codebook=41), dict(code=3), dict(grid=16)):
        refused(lambda: WorldModel(world.tokenizer, Dynamics(small(**other))), "not trained together")


# Files

def test_float16_on_disk_changes_nearly_nothing(world, tmp_path):
    world.save_pretrained(tmp_path / "half", dtype=torch.float16)
    loaded = WorldModel.from_pretrained(tmp_path / "half", "cpu", "float32")
    frames, keys = play_of(8)
    tokens = [w.next_tokens(w.start(frames, keys, PONG), torch.zeros(8, dtype=torch.long))[0] for w in (world, loaded)]
    assert (tokens[0] == tokens[1]).float().mean() > 0.95
    assert loaded.games == world.games and loaded.dynamics.config == world.dynamics.config


def test_a_damaged_file_is_named(world, tmp_path):
    world.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="model.safetensors"): WorldModel.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors"): WorldModel.from_pretrained(tmp_path)


# Measures

class Copier:
    "Shows its last frame again."
    def start(self, frames, actions, game): return torch.from_numpy(frames[:, -1])
    def step(self, state, keys): return state, state


class Oracle:
    "Knows the futures of one moment."
    def __init__(self, moment): self.moment = moment
    def start(self, frames, actions, game): return 0
    def step(self, state, keys): return torch.from_numpy(self.moment.futures[keys, state]), state + 1


def moment_of(groups, horizon=3):
    "A moment whose futures are noise, the same for actions of one group."
    rng = np.random.default_rng(0)
    futures = rng.integers(0, 256, (len(groups), horizon, 8, 8, 3)).astype(np.uint8)
    return Moment(rng.integers(0, 256, (2, 8, 8, 3)).astype(np.uint8), np.zeros(1, np.int64), futures[groups], np.array(groups))


@pytest.mark.parametrize("groups", [[0, 0, 2], [0, 1, 2, 3], [0, 0, 0, 3, 3, 5]])
def test_action_response_of_an_oracle_and_of_a_copier(groups):
    moment = moment_of(groups)
    assert action_response(Oracle(moment), moment, PONG) == (1.0, 1 / len(set(groups)))
    share, chance = action_response(Copier(), moment, PONG)
    assert math.isclose(share, chance)


def test_next_frame_puts_copying_and_the_ceiling_beside_the_model(world):
    frames, keys = play_of(2, 6)
    frames[:, 1:] = frames[:, :1]
    frames[:, 3:, 20:30, 20:30] = 255
    rows = next_frame(world, {"frames": frames, "actions": keys}, PONG, context=3)
    copying = np.mean([mse(frames[:, t], frames[:, t - 1]) for t in (3, 4, 5)], 0)
    assert rows["model"].shape == (2,) and np.allclose(rows["copy"], copying) and (rows["copy"] > 0).all()
    assert set(rows) >= {"model", "copy", "ceiling", "tokenizer", "changed", "changed_copy"}


def test_recipe_switches_change_the_loss():
    torch.manual_seed(0)
    net = Dynamics(small())
    batch = batch_of(film_of(2, 5))
    def loss(recipe, keys):
        torch.manual_seed(1)
        return dynamics_loss(net, {**batch, "actions": keys}, 0, recipe)[0]
    other = (batch["actions"] + 1) % 3
    blind, seeing = Recipe(action_dropout=1.0), Recipe(action_dropout=0.0)
    assert torch.equal(loss(blind, batch["actions"]), loss(blind, other))          # the key is hidden
    assert not torch.equal(loss(seeing, batch["actions"]), loss(seeing, other))


# Commands

@pytest.mark.parametrize("arguments, code, words", [
    (["bench", "--model", "no/such/folder"], 1, ["no/such/folder"]),
    (["bench", "--players", "two"], 2, ["two"]),
    (["bench", "--size", "enormous"], 2, ["base"]),
    (["train", "--games", "ALE/Pnog-v5"], 1, ["ALE/Pong-v5"]),
    (["train", "--minutes", "soon"], 2, ["soon"]),
    (["train", "--episodes", "0"], 1, ["episodes"]),
    (["train", "--episodes", "5"], 1, ["--episodes 5", "held out"]),
    (["train", "--minutes", "0"], 1, ["minutes"]),
    (["train", "--dynamics-minutes", "0"], 1, ["--dynamics-minutes", "--start"]),
    (["train", "--start", "nano", "--games", PONG], 1, [PONG, FREEWAY]),
    (["train", "--start", "nanno"], 1, ["nano"]),
])
def test_commands_refuse_in_one_line(arguments, code, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert course.main(arguments) == code
    message = capsys.readouterr().err.strip()
    assert all(word in message for word in words) and "Traceback" not in message
    assert list(tmp_path.iterdir()) == []       # refused before anything is made


def test_commands_name_the_damaged_model(world, tmp_path, capsys):
    world.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"half")
    assert course.main(["bench", "--model", str(tmp_path)]) == 1
    assert "model.safetensors" in capsys.readouterr().err


def test_every_command_has_its_options():
    for command in (recipe.train_command, speed.bench_command):
        parser = argparse.ArgumentParser()
        command(parser)
        assert callable(parser.get_default("run")) and "--json" in parser.format_help()


def test_bench_of_a_size_needs_no_model(tmp_path):
    file = tmp_path / "bench_nano.json"
    assert course.main(["bench", "--size", "nano", "--frames", "2", "--players", "1", "--json", str(file)]) == 0
    figures = {f["name"]: f for f in json.loads(file.read_text())["figures"]}
    assert figures["fps"]["value"] > 0 and figures["fps"]["game"] == "untrained"
    assert figures["parameters"]["value"] == sum(p.numel() for p in dynamics.untrained("nano").parameters())


def test_train_from_nothing_then_on_from_there(tmp_path, capsys):
    common = ["--games", FREEWAY, "--play", str(tmp_path / "play"), "--episodes", "14", "--memories", "2", "--minutes", "0.02",
              "--dynamics-minutes", "0.1"]
    one, two, shape = tmp_path / "one", tmp_path / "two", ["--quantizer", "fsq", "--frame-size", "64"]
    assert course.main(["train", *common, *shape, "--out", str(one)]) == 0
    assert course.main(["train", *common, "--out", str(two), "--start", str(one / "model"), "--json", str(tmp_path / "train.json")]) == 0
    before, after = (WorldModel.from_pretrained(folder / "model", "cpu", "float32") for folder in (one, two))
    assert all(torch.equal(a, b) for a, b in zip(before.tokenizer.parameters(), after.tokenizer.parameters()))
    entered = before.dynamics.enter.weight
    moved = (after.dynamics.enter.weight - entered).norm() / entered.norm()
    assert 0 < moved < 0.7, "the second run did not learn, or began elsewhere: two random matrices are 1.4 apart"
    card = (two / "model" / "README.md").read_text()
    assert "dynamics, run 2" in card and json.loads((two / "model" / "ledger.json").read_text())["start"]["steps"] >= 1
    names = {figure["name"] for figure in json.loads((tmp_path / "train.json").read_text())["figures"]}
    assert {"reconstruction_psnr", "skill", "changed_psnr", "action_response"} <= names
    assert "lwm demo --model" in capsys.readouterr().out
    three = tmp_path / "three"      # the decoder alone: same tokens, other pictures
    own = ["--tokenizer-minutes", "0.05", "--dynamics-minutes", "0", "--out", str(three), "--start", str(two / "model")]
    assert course.main(["train", *common[:-2], *own]) == 0
    last, same = WorldModel.from_pretrained(three / "model", "cpu", "float32"), lambda a, b: all(map(torch.equal, a.parameters(), b.parameters()))
    assert same(last.tokenizer.encoder, after.tokenizer.encoder) and same(last.dynamics, after.dynamics)
    assert not same(last.tokenizer.decoder, after.tokenizer.decoder)
    card = (three / "model" / "README.md").read_text()
    assert "tokenizer, run 2" in card and "dynamics, run 2" in card and "dynamics, run 3" not in card


# The shipped model

@pytest.fixture(scope="module")
def nano():
    assert (MODELS / "nano" / "config.json").is_file(), f"the shipped model is missing: {MODELS / 'nano'}"
    return WorldModel.from_pretrained("nano")


def test_shipped_model_is_small_and_has_its_papers(nano):
    files = [path for path in nano.folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 28_000_000
    for place in (nano.folder, nano.folder / "tokenizer"):
        assert {"seconds", "parameters", "seed", "data_hash"} <= set(json.loads((place / "ledger.json").read_text()))
    card = (nano.folder / "README.md").read_text(encoding="utf-8")
    assert all(game in card for game in nano.games) and "skill" in card


def test_shipped_model_knows_four_games_or_more_and_their_actions(nano):
    assert len(nano.games) >= 4 and min(nano.frame_size) >= 128 and nano.fps == 15
    for game in nano.games:
        assert nano.actions(game) == data.Environment(game).actions and nano.actions(game)[0] == "NOOP"


def test_shipped_clips_load_and_belong_to_the_test_split(nano):
    for game in nano.games:
        assert len(nano.clip_names(game)) >= 4
        for i in range(len(nano.clip_names(game))):
            frames, keys = nano.clip(game, i)
            assert frames.shape[1:] == (*nano.frame_size, 3) and frames.dtype == np.uint8 and keys.shape == (len(frames) - 1,)
            assert data.split_of(nano.clip_episode(game, i).seed) == "test"


def test_shipped_model_plays_every_game_in_one_batch(nano):
    clips = [nano.clip(game) for game in nano.games]
    frames, keys = np.stack([f[-16:] for f, _ in clips]), np.stack([k[-15:] for _, k in clips])
    state = nano.start(frames, keys, nano.games)
    for t in range(6): shown, state = nano.step(state, [min(t, len(nano.actions(game)) - 1) for game in nano.games])
    assert shown.shape == (len(nano.games), *nano.frame_size, 3)
    for before, now in zip(frames[:, -1], shown.cpu().numpy()):     # the same game, still: most of the picture stands
        assert (before == now).all(-1).mean() > 0.6


@pytest.mark.parametrize("game, ball", [(PONG, (49, 54)), ("ALE/Breakout-v5", (99, 101))])
def test_shipped_model_stays_with_the_real_game_for_a_second(nano, game, ball):
    "Where a memory is followed: of the real game's ball it has seen eight frames of, it knows where that is after fifteen more, mostly."
    episodes = [nano.clip_episode(game, i) for i in range(len(nano.clip_names(game)))]
    starts = [(e, t) for e in episodes for t in range(0, len(e.frames) - 22, 16)]
    frames, keys = (np.stack([part(e)[t:t + n] for e, t in starts]) for part, n in ((lambda e: data.resize(e.frames, nano.frame_size[0]), 8), (lambda e: e.actions, 22)))
    state, place = nano.start(frames, keys[:, :7], game), [nano.dynamics.consoles[nano.game_index(game)].facts.address.tolist().index(byte) for byte in ball]
    for t in range(15): _, state = nano.step(state, keys[:, 7 + t])
    true = np.stack([e.ram[t + 22, list(ball)] for e, t in starts]).astype(int)
    near = (np.abs(state.facts[:, place].numpy() - true) <= 4).all(1)
    assert len(starts) >= 20 and near.mean() > 0.5, near.mean()


@pytest.mark.parametrize("quantizer", ["none", "open"])
def test_train_a_tokenizer_alone_then_measure_it(quantizer, tmp_path, monkeypatch, capsys):
    "The ways out that the plan names are switches: without a quantizer, without networks, smaller frames."
    samples = course.root() / "data_samples"
    monkeypatch.setattr(data, "collect", lambda *args, **more: None)        # the samples are play enough
    arguments = ["--tokenizer-only", "--quantizer", quantizer, "--codes", "300", "--frame-size", "64", "--tokenizer-minutes", "0.01"]
    assert course.main(["train", "--games", "ALE/Breakout-v5", "--play", str(samples), "--out", str(tmp_path), *arguments]) == 0
    assert f"lwm eval --model {tmp_path / 'tokenizer'}" in capsys.readouterr().out and not (tmp_path / "dynamics").exists()
    made = Tokenizer.from_pretrained(str(tmp_path / "tokenizer"))
    assert made.config.games == ("ALE/Breakout-v5",) and made.config.quantizer == quantizer and made.frame_size == (64, 64)
    assert json.loads((tmp_path / "tokenizer" / "ledger.json").read_text())["status"] == "finished"
    frames = data.clips(samples, ["ALE/Breakout-v5"], 1, 64, 2)["frames"][:, 0]
    assert made.reconstruct(frames).shape == (2, 64, 64, 3)


@pytest.mark.parametrize("arguments, words", [(["--quantizer", "none"], ["none", "--tokenizer-only"]),
                                              (["--start", "nano", "--codes", "12"], ["--start", "nano", "--codes"]),
                                              (["--start", "nano", "--frame-size", "64"], ["--start", "nano", "--frame-size"]),
                                              (["--start", "nano", "--tokenizer-minutes", "1"], ["nano", "dictionary"])])
def test_train_refuses_what_does_not_go_together(arguments, words, tmp_path, capsys):
    assert course.main(["train", "--out", str(tmp_path), *arguments]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(word in last for word in words) and not list(tmp_path.iterdir())
