"Recording play: episodes that survive faults, collection that survives kill -9, and one's own games and videos."
import contextlib
import errno
import json
import os
import pty
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lwm_course import data
from lwm_course.course import main
from lwm_course.data import (Chance, Environment, Episode, Person, StickyRandom, check_episode, clips, collect, digest, diversity,
                             episode_path, episodes, games, import_videos, play, player_of, preprocess, read_episode, record, resize,
                             sample_card, samples, samples_of, slug, split_of, to_palette, validate, write_episode)

pytest.importorskip("ale_py", reason="needs the games extra")
ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT/"data_samples"
PONG, FREEWAY = "ALE/Pong-v5", "ALE/Freeway-v5"
LWM = Path(sys.executable).with_name("lwm")     # the environment may not be on the PATH
quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

OWN_GAME = '''
import gymnasium
import numpy as np

class Dot(gymnasium.Env):
    metadata = {"render_modes": ["rgb_array"]}
    action_space, observation_space = gymnasium.spaces.Discrete(3), gymnasium.spaces.Box(0, 255, (24, 32, 3), np.uint8)
    def __init__(self, render_mode=None): self.render_mode, self.x = render_mode, 16
    def get_action_meanings(self): return ["LEFT", "NOOP", "RIGHT"]
    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.x = int(self.np_random.integers(8, 24))
        return self.render(), {}
    def step(self, action):
        self.x += int(action) - 1
        return self.render(), 1.0, not 2 < self.x < 30, False, {}
    def render(self):
        frame = np.full((24, 32, 3), 30, np.uint8)
        frame[10:14, self.x - 2:self.x + 2] = 255, 200, 0
        return frame

class Steering(Dot):
    action_space = gymnasium.spaces.Box(-1, 1, (1,))

class Blind(Dot):
    def render(self): return np.zeros((24, 32), np.uint8)

for game in Dot, Steering, Blind:
    gymnasium.register(f"{game.__name__}-v0", game)
'''


def tiny(frames=6, seed=0, **changes):
    "A small episode of noise."
    chance = np.random.default_rng(seed)
    episode = Episode("Noise", ["NOOP", "FIRE"], chance.integers(0, 256, (frames, 5, 4), np.uint8),
                      chance.integers(0, 256, (256, 3), np.uint8), chance.integers(0, 2, frames - 1), np.zeros(frames - 1, np.float32),
                      np.zeros(frames - 1, bool), chance.integers(0, 256, (frames, 128), np.uint8), seed, "random")
    return replace(episode, **changes)


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    "Two games, four seeds, 64 frames. Tests do not change it."
    folder = tmp_path_factory.mktemp("collection")
    collect([PONG, FREEWAY], folder, episodes=4, workers=1, max_frames=64)
    return folder


@pytest.fixture
def own_game(tmp_path, monkeypatch):
    "A folder with a module of games; it is the current one."
    (tmp_path/"my_game.py").write_text(OWN_GAME)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("my_game", None)


def bytes_of(folder):
    "{name: content} of everything below a folder."
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


# Episodes

@quick
@given(st.integers(2, 9), st.integers(1, 8), st.integers(1, 8), st.booleans(), st.booleans(), st.integers(0, 2**31))
def test_an_episode_survives_a_round_trip(tmp_path, frames, height, width, rgb, ram, seed):
    chance = np.random.default_rng(seed)
    indices = chance.integers(0, 256, (frames, height, width, 3) if rgb else (frames, height, width), np.uint8)
    episode = tiny(frames, seed, indices=indices, rewards=chance.normal(size=frames - 1).astype(np.float32))
    episode = replace(episode, palette=None if rgb else episode.palette, ram=episode.ram if ram else None)
    write_episode(tmp_path/"e.npz", episode)
    found = read_episode(tmp_path/"e.npz")
    assert digest(found) == digest(episode) and (found.frames == episode.frames).all()
    assert found.actions.dtype == np.int64 and found.rewards.dtype == np.float32 and found.ends.dtype == bool


def test_an_episode_opens_with_numpy_alone(tmp_path):
    episode = tiny()
    write_episode(tmp_path/"e.npz", episode)
    with np.load(tmp_path/"e.npz", allow_pickle=False) as file:
        assert (np.bitwise_xor.accumulate(file["frames"]) == episode.indices).all()
        assert json.loads(str(file["meta"]))["game"] == "Noise"


@quick
@given(st.data())
def test_a_truncated_file_is_named(tmp_path, data):
    write_episode(tmp_path/"e.npz", tiny())
    content = (tmp_path/"e.npz").read_bytes()
    (tmp_path/"e.npz").write_bytes(content[:data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(ValueError, match="e.npz"): read_episode(tmp_path/"e.npz")


@settings(parent=quick, max_examples=150)
@given(st.data())
def test_a_flipped_bit_is_found_or_harmless(tmp_path, data):
    episode = tiny()
    write_episode(tmp_path/"e.npz", episode)
    content = bytearray((tmp_path/"e.npz").read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (tmp_path/"e.npz").write_bytes(content)
    try: found = read_episode(tmp_path/"e.npz")
    except ValueError as error: assert "e.npz" in str(error)
    else: assert digest(found) == digest(episode)


@pytest.mark.parametrize("change", [dict(actions=np.zeros(5, np.int64)), dict(seed=1), dict(player="x"), dict(game="Other"), dict(ram=None)])
def test_the_digest_covers(change):
    episode = tiny(actions=np.ones(5, np.int64))
    assert digest(replace(episode, **change)) != digest(episode)


def test_a_missing_episode_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.npz"): read_episode(tmp_path/"nothing.npz")


@quick
@given(st.integers(1, 300), st.integers(0, 2**31))
def test_palettes_are_lossless(colours, seed):
    chance = np.random.default_rng(seed)
    table = chance.integers(0, 256, (colours, 3), np.uint8)
    frames = table[chance.integers(0, colours, (3, 20, 20))]
    numbers, palette = to_palette(frames)
    few = len(np.unique(frames.reshape(-1, 3), axis=0)) <= 256
    assert (palette is not None) == few
    assert ((palette[numbers] if few else numbers) == frames).all()


# A full disk

@pytest.fixture
def full_disk(monkeypatch):
    "Whatever data.py opens for writing is a device without room."
    if not Path("/dev/full").exists(): pytest.skip("this system has no /dev/full")
    real = open
    monkeypatch.setattr(data, "open", lambda path, mode="r", **o: real("/dev/full" if "w" in mode else path, mode, **o), raising=False)


def test_a_full_disk_leaves_the_old_file(tmp_path, request):
    write_episode(tmp_path/"e.npz", tiny(seed=1))
    before = bytes_of(tmp_path)
    request.getfixturevalue("full_disk")
    with pytest.raises(OSError, match=r"e\.npz: the disk is full"): write_episode(tmp_path/"e.npz", tiny(seed=2))
    assert bytes_of(tmp_path) == before


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    def fail(*_): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="the disk is full"): write_episode(tmp_path/"new"/"e.npz", tiny())
    assert bytes_of(tmp_path) == {}


def test_collection_continues_after_a_full_disk(tmp_path, monkeypatch):
    real, left = os.fsync, [2]
    def limited(number):
        if not left[0]: raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= 1
        real(number)
    monkeypatch.setattr(os, "fsync", limited)
    with pytest.raises(OSError, match="the disk is full"): collect([PONG], tmp_path, episodes=4, workers=1, max_frames=20)
    kept = bytes_of(tmp_path)
    monkeypatch.setattr(os, "fsync", real)
    report = collect([PONG], tmp_path, episodes=4, workers=1, max_frames=20)
    assert len(kept) == 2 and report["kept"] == 2 and report["added"] == 2
    assert kept.items() <= bytes_of(tmp_path).items()


def test_a_folder_without_permission_is_named(tmp_path):
    (tmp_path/"file").write_text("not a folder")
    with pytest.raises(OSError, match="file"): write_episode(tmp_path/"file"/"e.npz", tiny())


# The environment

def test_frames_and_actions():
    env = Environment(PONG)
    frame = env.reset(seed=0)
    assert frame.shape == (256, 256, 3) == env.step(1).shape and frame.dtype == np.uint8
    assert env.actions[0] == "NOOP" and env.native.shape == (210, 160, 3) and env.ram.shape == (128,)
    with pytest.raises(ValueError, match="actions 0 to 5"): env.step(6)


def test_cloning_is_exact():
    env = Environment("ALE/Breakout-v5", (64, 64))
    env.reset(0)
    env.step(1)
    state, runs = env.clone(), []
    for _ in range(2):
        env.restore(state)
        runs.append([(env.step(2 + t % 2), env.reward, env.done, env.ram.tobytes()) for t in range(30)])
    for (a, *rest), (b, *other) in zip(*runs): assert (a == b).all() and rest == other


def test_the_middle_of_a_step_leaves_the_game_where_it_is():
    env, again = Environment("ALE/Pong-v5", (64, 64)), Environment("ALE/Pong-v5", (64, 64))
    for game in (env, again): game.reset(0)
    for t in range(60):
        before, middle = env.native.copy(), env.middle(2 + t % 2)
        assert (env.native == before).all() and middle.shape == (64, 64, 3)
        assert (env.step(2 + t % 2) == again.step(2 + t % 2)).all() and env.ram.tobytes() == again.ram.tobytes()


def test_a_new_game_follows_the_end():
    env = Environment("ALE/Breakout-v5", (32, 32))
    first, ends = env.reset(0), 0
    for t in range(3000):
        frame = env.step(1)
        if env.done:
            assert (env.step(1) == first).all() and not env.done
            break
    else: raise AssertionError("five balls were not lost in 200 seconds")


@pytest.mark.parametrize("name, message", [
    ("ALE/Pnog-v5", "Did you mean ALE/Pong-v5"), ("Pong-v4", "Unknown game"), ("no_such_module:Game-v0", "no_such_module"), ("", "Unknown game")])
def test_unknown_games(name, message):
    with pytest.raises(ValueError, match=message): Environment(name)


def test_the_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ale_py", None)
    with pytest.raises(ImportError, match="lwm-course\\[games\\]"): games()


def test_own_game(own_game):
    env = Environment("my_game:Dot-v0", (48, 48))
    assert env.actions == ["NOOP", "LEFT", "RIGHT"] and env.ram is None
    assert env.reset(seed=3).shape == (48, 48, 3)
    still, there = env.native, env.step(0)
    assert (env.native == still).all() and (env.step(2) != there).any()
    with pytest.raises(ValueError, match="cannot be cloned"): env.clone()


@pytest.mark.parametrize("name, message", [("Steering", "discrete action"), ("Blind", "does not render an RGB picture")])
def test_own_game_that_does_not_fit(own_game, name, message):
    with pytest.raises(ValueError, match=message): Environment(f"my_game:{name}-v0")


def test_own_game_is_recorded_by_workers(own_game):
    report = collect(["my_game:Dot-v0"], "data", episodes=3, workers=2, max_frames=30)
    found = [read_episode(path) for path in episodes("data", "my_game:Dot-v0")]
    assert report["added"] == 3 == len(found)
    assert all(e.palette is not None and e.ram is None and len(e.actions) == 29 for e in found)


@pytest.mark.slow
def test_every_game_starts_and_steps():
    names = games()
    assert len(names) >= 100
    assert [name for name in names if not data.step_once(name)] == []


def test_resize_averages_areas():
    frames = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 12, 3), np.uint8)
    small = resize(frames, (4, 4))
    expected = frames.reshape(2, 3, 4, 2, 4, 3, 3).mean((3, 5))
    assert small.shape == (2, 3, 4, 4, 3) and abs(small - expected).max() <= 1    # Pillow rounds twice: rows, then columns


# Players

def test_sticky_random_is_balanced_and_sticky():
    player = StickyRandom(["NOOP"]*18, Chance(0))
    held = np.array([player(None) for _ in range(36_000)])
    assert abs(np.bincount(held, minlength=18)/len(held) - 1/18).max() < 0.01
    runs = len(held)/(np.diff(held) != 0).sum()
    assert 5 < runs < 8     # mean hold 6; sometimes the same action comes twice in a row


@pytest.mark.parametrize("player", data.PLAYERS)
@pytest.mark.parametrize("game", sorted(data.SCRIPTS))
def test_players_press_real_buttons_and_repeat_themselves(game, player):
    env = Environment(game)
    runs = [play(env, player_of(player, game, env.actions, 5), 60, 5, player) for _ in range(2)]
    assert digest(runs[0]) == digest(runs[1])
    assert runs[0].actions.min() >= 0 and runs[0].actions.max() < len(env.actions)


@pytest.mark.parametrize("game, frames", [(FREEWAY, 300), ("ALE/Kangaroo-v5", 250), ("ALE/Breakout-v5", 250)])
def test_scripts_get_further_than_chance(game, frames):
    env = Environment(game)
    points = {player: play(env, player_of(player, game, env.actions, 0), frames, 0).rewards.clip(0).sum() for player in ("scripted", "random")}
    assert points["scripted"] > points["random"]


def test_a_person_who_stops_keeps_what_was_played(tmp_path):
    def keys(count=[0]):
        count[0] += 1
        if count[0] > 10: raise KeyboardInterrupt
        return "FIRE"
    env = Environment(PONG)
    path = record(PONG, Person(env.actions, keys), tmp_path, 500)
    assert len(read_episode(path)) == 11 and set(read_episode(path).actions) == {1}
    second = record(PONG, "random", tmp_path, 10, seed=0)
    with pytest.raises(ValueError, match="not replaced"): record(PONG, "random", tmp_path, 20, seed=0)
    assert len(read_episode(second)) == 10


def test_a_person_at_a_terminal(tmp_path):
    parent, child = pty.openpty()
    with subprocess.Popen([LWM, "data", "record", PONG, "--out", str(tmp_path)], stdin=child, stdout=child, stderr=child,
                          close_fds=True, start_new_session=True) as process:
        os.close(child)
        seen, deadline = b"", time.monotonic() + 60
        with contextlib.suppress(OSError):     # the terminal closes when the program ends
            while time.monotonic() < deadline:
                seen += os.read(parent, 65536)
                if b"\xe2\x96\x80" in seen: os.write(parent, b"\x1b[C" if len(seen) < 200_000 else b"q")
        os.close(parent)
        assert process.wait(20) == 0, seen[-500:]
    [path] = episodes(tmp_path)
    episode = read_episode(path)
    assert episode.player == "person" and len(episode) > 2 and episode.actions_names[episode.actions.max()] == "RIGHT"


# Collection

def test_collection_is_reproducible_whatever_the_workers(tmp_path, collection):
    collect([PONG, FREEWAY], tmp_path, episodes=2, workers=2, max_frames=64)
    for path in episodes(tmp_path): assert digest(read_episode(path)) == digest(read_episode(collection/path.relative_to(tmp_path)))


def test_hours_decide_how_many_episodes(tmp_path):
    report = collect([PONG], tmp_path, hours=100/15/3600, workers=1, max_frames=40)
    assert report["added"] == 3 and report["hours_added"] == pytest.approx(120/15/3600)
    assert collect([PONG], tmp_path, hours=100/15/3600, workers=1, max_frames=40)["added"] == 0


@pytest.mark.parametrize("arguments", [dict(), dict(hours=1, episodes=1), dict(episodes=1, player="expert"), dict(episodes=1, max_frames=1)])
def test_collection_refuses(tmp_path, arguments):
    with pytest.raises(ValueError): collect([PONG], tmp_path, **arguments)
    assert bytes_of(tmp_path) == {}


def test_kill_9_loses_only_the_running_episodes(tmp_path):
    command = [LWM, "data", "collect", PONG, FREEWAY, "--episodes", "40", "--frames", "300", "--workers", "2", "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(episodes(tmp_path)) < 3 and time.monotonic() < deadline: time.sleep(0.02)
    workers = [int(p) for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    process.send_signal(signal.SIGKILL)
    process.wait()
    while any(Path(f"/proc/{pid}/fd").exists() for pid in workers) and time.monotonic() < deadline: time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}/fd").exists() for pid in workers), "workers outlived the process that started them"
    kept = {path: digest(read_episode(path)) for path in episodes(tmp_path)}     # every one of them is whole
    assert 3 <= len(kept) < 80
    count = len(kept)//2 + 2
    report = collect([PONG, FREEWAY], tmp_path, episodes=count, workers=1, max_frames=300)
    assert report["added"] + report["kept"] == 2*count
    assert all(digest(read_episode(path)) == sha for path, sha in kept.items())
    assert validate(tmp_path)["problems"] == []


def test_old_leftovers_are_removed_and_fresh_ones_kept(tmp_path):
    place = tmp_path/slug(PONG)
    place.mkdir()
    for name, age in ("old", 3600), ("fresh", 0):
        (place/f".{name}.npz.1.tmp").write_bytes(b"half")
        os.utime(place/f".{name}.npz.1.tmp", (time.time() - age,)*2)
    collect([PONG], tmp_path, episodes=1, workers=1, max_frames=10)
    assert [path.name for path in place.glob(".*.tmp")] == [".fresh.npz.1.tmp"]


# Objects

@pytest.mark.parametrize("game", sorted(data.OBJECTS))
def test_objects_are_drawn_where_the_memory_says(game):
    episode = read_episode(episodes(SAMPLES, [game], "val")[0])
    frames, still = episode.frames, data.background(episode)
    for name, sprite in data.OBJECTS[game].items():
        boxes = sprite.boxes(episode.ram)
        moved = np.r_[False, (np.diff(boxes, axis=0) != 0).any(1)]
        there, beside = (data.drawn(frames, still, boxes + shift)[moved].mean() for shift in (0, [[30, 30, 30, 30]]))
        assert there > (0.5 if name.startswith("bomb") else 0.8), name      # a second bomb is often not in flight
        assert there > beside + 0.2, name                                   # it is this place, not any place


@pytest.mark.parametrize("game", sorted(data.NUMBERS))
def test_numbers_in_the_memory_are_the_sums_of_rewards_and_the_lives_of_the_emulator(game):
    env, numbers = Environment(game, (64, 64)), data.NUMBERS[game]
    player, reserve = data.player_of("scripted", game, env.actions, 5), game in ("ALE/MsPacman-v5", "ALE/Kangaroo-v5")
    total, points = 0, 0
    for _ in range(900):
        env.step_native(player(env))
        total = 0 if env.games_started > 1 and env.reward == 0 and fresh else total + env.reward
        points += abs(env.reward)
        fresh, value = env.done, {name: int(number.read(env.ram)) for name, number in numbers.items()}
        assert value.get("score", value.get("player_score", 0) - value.get("enemy_score", 0)) == total
        lives = env._game.ale.lives()
        if "lives" in numbers and lives: assert value["lives"] == lives - reserve
    assert points > 0, "nothing was scored: this shows nothing"


@pytest.mark.parametrize("game", sorted(data.NUMBERS))
def test_numbers_in_recordings_change_with_their_rewards(game):
    for path in episodes(SAMPLES, [game]):
        episode, numbers = read_episode(path), data.NUMBERS[game]
        score = numbers["score"].read(episode.ram) if "score" in numbers else (
            numbers["player_score"].read(episode.ram) - numbers["enemy_score"].read(episode.ram))
        within = ~np.r_[False, episode.ends[:-1]]       # not from one game to the next
        assert (np.diff(score)[within] == episode.rewards[within]).all()


def test_numbers_are_decoded():
    number = data.Number((3, 1), 10)
    ram = np.zeros((2, 128), np.uint8)
    ram[1, [3, 1]] = 0x12, 0x34
    assert number.read(ram).tolist() == [0, 12340] and data.Number((3,), decimal=False).read(ram[1]) == 0x12


# Splits and clips

def test_splits_never_change():
    assert "".join(split_of(seed)[1] for seed in range(30)) == "errerrrrrrrrarerrrrrrrrrrrrrar"     # second letters: train, val, test


def test_splits_share_no_episode(collection):
    parts = [set(episodes(collection, split=split)) for split in ("train", "val", "test")]
    assert set.union(*parts) == set(episodes(collection)) and sum(map(len, parts)) == 8
    with pytest.raises(ValueError, match="Unknown split"): episodes(collection, split="trian")


def test_clips(collection):
    batch, again = (clips(collection, [FREEWAY, PONG], 5, 64, 8, seed=2) for _ in range(2))
    assert all((batch[name] == again[name]).all() for name in batch)
    assert batch["frames"].shape == (8, 5, 64, 64, 3) and batch["actions"].shape == (8, 4) and batch["game"].tolist() == [0, 1]*4
    train = [resize(read_episode(path).frames, 64) for path in episodes(collection, FREEWAY, "train")]
    for frames, game in zip(batch["frames"], batch["game"]):
        if game == 0: assert any((frames == e[t:t + 5]).all() for e in train for t in range(60))
    with pytest.raises(ValueError, match="no val episodes"): clips(collection, [PONG], 5, 64, 2, "val")
    with pytest.raises(ValueError, match="too few"): clips(collection, [PONG], 65, 64, 2)


# Validation, diversity, sizes

def test_validation_counts_what_is_wrong(tmp_path, collection):
    good = read_episode(episodes(collection, PONG)[0])
    def put(seed, **changes): write_episode(episode_path(tmp_path, PONG, seed, "x"), replace(good, **{"seed": seed, **changes}))
    black = np.zeros_like(good.indices)
    put(0)
    put(1)
    put(2, actions=np.where(np.arange(63) == 5, -1, good.actions))
    put(3, indices=np.concatenate([good.indices[:30], black[:34]]), actions=good.actions*0)
    put(4, actions=good.actions[:-2])
    report, before = validate(tmp_path), bytes_of(tmp_path)
    assert report["copies"] == 1 and report["missing"] == 1 and report["blank"] == 34 and len(report["problems"]) == 3
    assert report["frames"] == 5*64 and bytes_of(tmp_path) == before
    named = {seed: [p for p in report["problems"] if p.startswith(str(episode_path(tmp_path, PONG, seed, "x")))] for seed in range(5)}
    assert "same frames" in named[1][0] and "lacks the action of 1" in named[2][0] and "61 actions instead of 63" in named[4][0]


def test_validation_names_a_damaged_file(tmp_path, collection):
    for path in episodes(collection, PONG): write_episode(tmp_path/path.parent.name/path.name, read_episode(path))
    broken = episodes(tmp_path)[2]
    broken.write_bytes(broken.read_bytes()[:1000])
    report = validate(tmp_path)
    assert report["problems"] == [check_episode(broken)["problems"][0]] and str(broken) in report["problems"][0]


def test_an_empty_folder_is_named(tmp_path):
    for function in validate, diversity:
        with pytest.raises(ValueError, match="has no episodes"): function(tmp_path/"nothing")


def test_diversity_falls_with_repetition(tmp_path, collection):
    varied = diversity(collection)
    for path in episodes(collection):
        episode = read_episode(path)
        write_episode(tmp_path/path.parent.name/path.name, replace(episode, indices=np.repeat(episode.indices[:1], 64, 0), actions=episode.actions*0))
    dull = diversity(tmp_path)
    assert all(0 <= value <= 1 + 1e-9 for value in [*varied.values(), *dull.values()])
    assert dull["actions"] == 0 and dull["scenes"] < 0.05 < varied["scenes"] and dull["score"] < varied["score"]


@pytest.mark.parametrize("size", data.SIZES)
def test_preprocessing(tmp_path, collection, size):
    report = preprocess(collection, tmp_path, size, [PONG])
    assert report["added"] == 4 and preprocess(collection, tmp_path, size, [PONG])["added"] == 0
    for path in episodes(tmp_path):
        source, small = read_episode(collection/path.relative_to(tmp_path)), read_episode(path)
        assert (small.frames == resize(source.frames, size)).all() and (small.actions == source.actions).all()
        assert small.versions["source"] == digest(source)


def test_preprocessing_refuses(tmp_path, collection):
    before = bytes_of(collection)
    with pytest.raises(ValueError, match="64, 128, 256"): preprocess(collection, tmp_path, 100)
    with pytest.raises(ValueError, match="originals"): preprocess(collection, collection, 64)
    assert bytes_of(collection) == before


# Videos

@pytest.fixture
def films(tmp_path):
    "A folder with one good video of 21 frames and its log."
    imageio = pytest.importorskip("imageio.v3")
    pytest.importorskip("imageio_ffmpeg")
    folder = tmp_path/"Robot"
    folder.mkdir()
    frames = np.zeros((21, 64, 64, 3), np.uint8)
    for t, frame in enumerate(frames): frame[20:40, 2*t:2*t + 20] = 200, 120, 40
    imageio.imwrite(folder/"one.mp4", frames, fps=30)
    (folder/"one.csv").write_text("frame,action\n" + "".join(f"{t},{'RIGHT' if t % 2 else 'NOOP'}\n" for t in range(20)))
    return folder


@pytest.mark.parametrize("every, frames", [(1, 21), (2, 11), (3, 7)])
def test_videos_are_imported(films, tmp_path, every, frames):
    report = import_videos(films, tmp_path/"out", every=every, size=32)
    assert report["failed"] == {} and report["game"] == "Robot"
    [path] = episodes(tmp_path/"out", "Robot")
    episode = read_episode(path)
    assert episode.frames.shape == (frames, 32, 32, 3) and episode.fps == 30/every
    assert episode.actions.tolist() == [t*every % 2 for t in range(frames - 1)] and episode.actions_names == ["NOOP", "RIGHT"]
    assert validate(tmp_path/"out")["problems"] == []


@pytest.mark.parametrize("every, frames", [(1, 21), (2, 11)])
def test_long_videos_become_several_episodes_of_one_split(films, tmp_path, every, frames):
    whole = data.import_video(films/"one.mp4", tmp_path/"whole", "Robot", ["NOOP", "RIGHT"], every, 32)
    parts = data.import_video(films/"one.mp4", tmp_path/"parts", "Robot", ["NOOP", "RIGHT"], every, 32, max_frames=6)
    assert len(whole) == 1 and len(parts) == -(-(frames - 1)//5) and parts == episodes(tmp_path/"parts")
    whole, parts = read_episode(whole[0]), [read_episode(path) for path in parts]
    assert len({part.seed for part in parts}) == 1
    assert (np.concatenate([part.actions for part in parts]) == whole.actions).all()
    assert (np.concatenate([whole.frames[:1], *(part.frames[1:] for part in parts)]) == whole.frames).all()


def spoil(films, what):
    "Damage the good video or its log; returns words of the message to expect."
    video, log = films/"one.mp4", films/"one.csv"
    if what == "truncated": video.write_bytes(video.read_bytes()[:-900])
    if what == "no video": video.write_text("frame by frame")
    if what == "empty": video.write_bytes(b"")
    if what == "no log": log.unlink()
    if what == "short log": log.write_text(log.read_text().rsplit("\n", 2)[0])
    if what == "long log": log.write_text(log.read_text() + "20,NOOP\n")
    if what == "columns": log.write_text("time,key\n0,NOOP\n")
    if what == "gap": log.write_text(log.read_text().replace("\n7,", "\n8,", 1))
    if what == "no action": log.write_text(log.read_text().replace("3,RIGHT", "3,"))
    if what == "binary log": log.write_bytes(bytes(range(256)))
    return {"no log": "no action log", "short log": "19", "long log": "21", "columns": "frame and action", "gap": "line 9", "no action": "line 5",
            "binary log": "one.csv"}.get(what, "one.mp4")


@pytest.mark.parametrize("what", ["truncated", "no video", "empty", "no log", "short log", "long log", "columns", "gap", "no action", "binary log"])
def test_bad_videos_are_named_and_change_nothing(films, tmp_path, what, capsys):
    out = tmp_path/"out"
    import_videos(films, out, size=32)
    before, words = bytes_of(out), spoil(films, what)
    [message] = import_videos(films, out, size=32)["failed"].values()
    assert words in message and "one." in message and bytes_of(out) == before
    assert main(["data", "import", str(films), "--out", str(out), "--size", "32"]) == 1
    assert words in capsys.readouterr().err


def test_one_bad_video_does_not_stop_the_others(films, tmp_path):
    (films/"bad.mp4").write_text("no film")
    (films/"bad.csv").write_text((films/"one.csv").read_text())
    report = import_videos(films, tmp_path/"out")
    assert len(report["imported"]) == 1 and list(report["failed"]) == [str(films/"bad.mp4")]


def test_folders_without_videos(tmp_path):
    with pytest.raises(ValueError, match="no videos"): import_videos(tmp_path, tmp_path/"out")
    with pytest.raises(FileNotFoundError, match="nowhere"): import_videos(tmp_path/"nowhere")


# Samples

def test_samples_are_small_and_many():
    found = episodes(SAMPLES)
    assert sum(path.stat().st_size for path in SAMPLES.rglob("*") if path.is_file()) < 20e6
    per_game = {}
    for path in found: per_game.setdefault(path.parent.name, []).append(path)
    assert len(per_game) >= 12 and set(per_game) == {slug(game) for game in data.SAMPLES}
    for paths in per_game.values():
        assert {split_of(int(path.stem.split("-")[0])) for path in paths} == {"train", "val", "test"}


def test_samples_are_whole_and_long():
    report = validate(SAMPLES)
    assert report["problems"] == [] and report["usable_share"] > 0.9
    assert report["frames"] == report["episodes"]*data.SAMPLE_FRAMES >= 300*report["episodes"]     # 20 seconds each
    assert (SAMPLES/"README.md").read_text(encoding="utf-8") == sample_card(SAMPLES, report)


@pytest.mark.parametrize("game", [PONG, "ALE/MsPacman-v5"])
def test_a_sample_is_made_again_bit_for_bit(tmp_path, game):
    seed = data.SAMPLE_SEEDS["val"]
    collect([game], tmp_path, episodes=1, workers=1, seed=seed, max_frames=data.SAMPLE_FRAMES)
    fresh, shipped = (read_episode(episode_path(folder, game, seed, "mixed")) for folder in (tmp_path, SAMPLES))
    if fresh.versions["ale-py"] != shipped.versions["ale-py"]: pytest.skip("another version of the emulator")
    assert digest(fresh) == digest(shipped) and (fresh.frames == shipped.frames).all()


def test_without_samples_some_are_recorded_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "root", lambda: tmp_path)     # as of an installed package
    monkeypatch.setattr(data, "SAMPLE_FRAMES", 8)
    found = episodes(samples_of([PONG]), [PONG])
    assert sorted(split_of(int(path.stem.split("-")[0])) for path in found) == ["test", "train", "val"]
    made = [path.stat().st_mtime_ns for path in found]
    assert [path.stat().st_mtime_ns for path in episodes(samples_of([PONG]), [PONG])] == made
    monkeypatch.undo()
    assert samples_of([PONG]) == SAMPLES


# The command

def test_the_command_from_end_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["data", "collect", PONG, "--episodes", "2", "--frames", "40", "--workers", "1"]) == 0
    assert main(["data", "preprocess", "--size", "64", "--out", "small", "--workers", "1"]) == 0
    assert main(["data", "validate", "small", "--workers", "1", "--json", "v.json"]) == 0
    names = {figure["name"] for figure in json.loads(Path("v.json").read_text())["figures"]}
    assert names == {"usable_share", "hours", "mb_per_hour", "diversity"}
    assert main(["data", "record", PONG, "--player", "random", "--frames", "20"]) == 0
    assert "00000000-random.npz" in capsys.readouterr().out
    episodes("data")[0].write_bytes(b"broken")
    assert main(["data", "validate", "--workers", "1"]) == 1
    assert "is not a complete episode" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, message", [
    (["collect", "ALE/Pnog-v5"], "Did you mean ALE/Pong-v5"), (["validate", "nowhere"], "nowhere has no episodes"),
    (["record", PONG, "--player", "expert"], "Unknown player"), (["preprocess", "nowhere", "--out", "x"], "no episodes"),
    (["import", "nowhere"], "no folder nowhere"), (["record", PONG], "needs a Unix terminal")])
def test_errors_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", open(os.devnull))
    assert main(["data", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and error.startswith("lwm data:")
    assert bytes_of(tmp_path) == {}


def test_the_samples_command_makes_a_card(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SAMPLES", [PONG])
    monkeypatch.setattr(data, "SAMPLE_FRAMES", 40)
    samples(tmp_path)
    card = (tmp_path/"README.md").read_text(encoding="utf-8")
    assert "3 short episodes of 1 Atari 2600 games" in card and "| ALE/Pong-v5 | 3 |" in card


def test_the_benchmark_writes_every_figure_of_the_gate(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SAMPLES", [PONG])
    monkeypatch.setattr(data, "games", lambda: [PONG, FREEWAY])
    monkeypatch.setattr(data, "step_once", lambda game: True)
    data.bench(tmp_path/"data.json", tmp_path/"none", rounds=1, workers=1)
    figures = {f["name"]: f["value"] for f in json.loads((tmp_path/"data.json").read_text())["figures"]}
    assert {"collection_hours_per_hour", "mb_per_hour", "usable_share", "diversity", "games", "hours"} <= set(figures)
    assert figures["games"] == 2 and figures["usable_share"] > 0.5
