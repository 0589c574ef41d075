"The yardstick: what is perfect scores 1, what copies scores what theory says, and a planted fault is seen by the figure that asks for it."
import json
import math
import shutil
import sys
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch

from lwm_course import course, data, evaluation
from lwm_course.dynamics import WorldModel, moments, rollout
from lwm_course.network import Dynamics, DynamicsConfig
from lwm_course.evaluation import (CONTEXT, WHERE, Copier, Deaf, GameEncoder, Reader, Simulator, Stretch, answers, ball_figures, beside,
                                   blobs, clip_figures, collapse, count_balls, crowd_figure, cut, fact_figures, fd_figures, figure,
                                   frechet, twins, lately, long_figures, motion, own_colour, play_figures, presence, readers_of,
                                   recall, recordings, response_figures, roll, save_film, seconds, share, spells, stretches, strip,
                                   targets, train_encoder, where_drawn, write_report)
from lwm_course.speed import joules
from lwm_course.tokenizer import Tokenizer, TokenizerConfig, place_dictionary
from lwm_course.training import TrainConfig

PONG, BREAKOUT, FREEWAY, TETRIS = "ALE/Pong-v5", "ALE/Breakout-v5", "ALE/Freeway-v5", "ALE/Tetris-v5"
SAMPLES = course.root() / "data_samples"


pytestmark = pytest.mark.usefixtures("one_thread")


def of(figures, name, game=None):
    "The one figure of a name."
    [found] = [f for f in figures if f.name == name and game in (None, f.game)]
    return found


@pytest.fixture(scope="module")
def pong():
    return data.read_episode(data.episodes(SAMPLES, [PONG], "val")[0])


@pytest.fixture(scope="module")
def clips(pong):
    return [Stretch(pong, first) for first in (40, 120)]


@pytest.fixture(scope="module")
def emulator(pong):
    return Simulator([pong])


def small_world(games=(PONG, TETRIS)):
    "An untrained world of a few thousand weights."
    torch.manual_seed(0)
    tokenizer = Tokenizer(TokenizerConfig(frame_size=64, levels=(8, 5), encoder_width=32, encoder_depth=1, width=32, depth=1))
    names = {game: tuple(data.Environment(game).actions) for game in games}
    size = dict(grid=8, codebook=40, code=2, group=2, token_width=8, closer=32, width=64, depth=2, head_depth=1, attention_heads=2)
    return WorldModel(tokenizer, Dynamics(DynamicsConfig(names, **size))).ready("cpu", "float32")


# Objects

def square(top, left, size=6, value=250):
    "A bright square on a dark field."
    frame = np.full((64, 64, 3), 20, np.uint8)
    frame[top:top + size, left:left + size] = value
    return frame


@pytest.fixture(scope="module")
def target():
    still = square(0, 0, 0)
    return evaluation.Target.of("box", 0, np.array([30, 30, 36, 36]), square(30, 30), still, np.array([250, 250, 250]))


@pytest.mark.parametrize("down, right", [(0, 0), (4, 0), (0, -4), (-4, 4), (3, 2)])
def test_an_object_within_four_pixels_is_found(target, down, right):
    assert target.found(square(30 + down, 30 + right))


@pytest.mark.parametrize("down, right", [(5, 0), (0, -5), (6, 6), (8, 0), (0, 12), (-30, -30)])
def test_an_object_that_is_farther_off_is_not(target, down, right):
    assert not target.found(square(30 + down, 30 + right))


def test_a_faint_object_counts_when_half_of_it_is_there(target):
    faint = lambda much: square(30, 30, value=round(20 + much * 230))
    assert target.found(faint(0.35)) and not target.found(faint(0.25))      # 1 - (1 - much)² explained: half at 0.29
    assert not target.found(square(30, 30, 0)) and not target.found(square(22, 22, 20))     # nothing; a blob, much too large


def test_a_large_object_is_found_by_its_place_and_not_by_its_overlap():
    still, white = square(0, 0, 0), np.array([250, 250, 250])
    large = evaluation.Target.of("wall", 0, np.array([10, 10, 50, 50]), square(10, 10, 40), still, white)
    assert large.found(square(14, 10, 40)) and not large.found(square(15, 10, 40))      # 35 of 40 rows would overlap


def test_objects_at_the_edge_and_outside():
    assert cut(np.ones((3, 3)), 5, 5, 2, 2).sum() == 0 and cut(np.ones((3, 3)), -9, 0, 2, 2).sum() == 0
    corner = evaluation.Target.of("box", 0, np.array([0, 58, 6, 64]), square(0, 58), square(0, 0, 0), np.array([250] * 3))
    assert corner.found(square(0, 58)) and corner.found(square(3, 57)) and not corner.found(square(9, 58))


def test_presence_ignores_an_object_of_the_background_colour():
    frame = square(10, 10)
    assert presence(frame, square(0, 0, 0), np.array([30, 30, 30])).max() == 0
    assert presence(frame, square(0, 0, 0), np.array([250] * 3)).max() == 1 == presence(frame, square(0, 0, 0), np.array([135] * 3)).max()


@pytest.mark.parametrize("game", [PONG, BREAKOUT, FREEWAY, "ALE/SpaceInvaders-v5", "ALE/Boxing-v5"])
def test_targets_of_a_recording(game):
    episode = data.read_episode(data.episodes(SAMPLES, [game], "val")[0])
    times, frames = range(10, 360, 35), data.resize(episode.frames, 128)
    found = targets(episode, times)
    assert len(found) >= len(times) * 0.7 and {t.time for t in found} <= set(times)
    assert all(t.found(frames[t.time]) for t in found)
    assert not any(t.found(data.resize(evaluation.background(episode), 128)) for t in found)
    lost = [t.found(frames[(t.time + 175) % 350]) for t in found]       # elsewhere in the game things are elsewhere
    assert np.mean(lost) < 0.7
    assert targets(replace(episode, game=TETRIS), times) == []          # a game whose objects nobody knows


def test_balls_are_counted(pong):
    still = evaluation.background(pong)
    boxes = data.OBJECTS[PONG]["ball"].boxes(pong.ram)
    there = data.drawn(pong.frames, still, boxes)
    colour, small = own_colour(pong.frames[there], still, boxes[there]), data.resize(still, 128)
    frames = small[None].repeat(3, 0)
    for i, column in enumerate((40, 70)): frames[1 + i:, 60:63, column:column + 2] = colour       # none, one, two
    assert count_balls(frames, small, colour, PONG).tolist() == [0, 1, 2]
    frames[1, 60:63, 40:42] = (0.7 * small[60, 40] + 0.3 * colour).astype(np.uint8)                # a shadow of a ball
    assert count_balls(frames, small, colour, PONG).tolist() == [0, 0, 2]


@pytest.mark.parametrize("picture, count", [("", 0), ("#", 1), ("##/##", 1), ("#./.#", 1), ("#.#", 2), ("#.#/#.#/###", 1), ("#../..#/#..", 3)])
def test_blobs(picture, count):
    rows = picture.split("/")
    assert blobs(np.array([[c == "#" for c in row] for row in rows]).reshape(len(rows), -1)) == count


def test_a_frame_counts_when_all_of_its_objects_are_found(target):
    still, white = square(0, 0, 0), np.array([250] * 3)
    other = evaluation.Target.of("ball", 0, np.array([10, 10, 13, 12]), square(10, 10, 3), still, white)
    film = np.stack([np.maximum(square(30, 30), square(10, 10, 3)), square(30, 30)])
    there = [target, other, replace(target, time=1), replace(other, time=1)]
    assert recall(there, film) == (1, 2) and recall(there, film, "box") == (2, 2) and recall(there, film, "ball") == (1, 2)
    names = {f.name: (f.value, f.baseline) for f in evaluation.recall_figures("o", [there], [film], [still[None].repeat(2, 0)])}
    assert names == {"o": (0.5, 0), "o_ball": (0.5, 0), "o_box": (1, 0)}
    assert evaluation.recall_figures("o", [[]], [film], [film]) == []


# Statistics

def test_interval_knows_about_clips():
    rng = np.random.default_rng(0)
    once = rng.normal(size=8)
    honest, proud = figure("a", np.mean, once), figure("a", np.mean, once.repeat(100))      # 100 frames of each clip are no new clips
    width = lambda f: f.interval[1] - f.interval[0]
    assert honest.n == 8 and width(proud) < width(honest) / 5
    assert honest.interval[0] < honest.value < honest.interval[1]
    assert figure("a", np.mean, once).interval == honest.interval != figure("a", np.mean, once, seed=1).interval


def test_a_ratio_without_anything_to_count_has_no_interval():
    empty = figure("objects", share, [0, 0], [0, 0])
    assert math.isnan(empty.value) and empty.interval is None


@pytest.mark.parametrize("strange, first", [([0] * 20, 20), ([1] * 20, 0), ([0] * 3 + [1] * 15, 3), ([1] * 14 + [0] + [1] * 15, 15), ([1] * 14, 14)])
def test_collapse(strange, first):
    assert collapse(np.array(strange, bool)) == first


def test_lately_is_the_mean_of_the_last_second():
    values = np.random.default_rng(0).random((2, 40))
    expected = [[row[max(0, t - 14):t + 1].mean() for t in range(40)] for row in values]
    assert np.allclose(lately(values), expected)


# Answers

@pytest.mark.parametrize("groups", [[0, 0, 2], [0, 1, 2, 3], [0, 0, 0, 3, 3, 5]])
def test_answers_of_an_oracle_and_of_the_deaf(groups):
    true = np.random.default_rng(0).integers(0, 256, (len(groups), 8, 8, 3), np.uint8)[groups]
    assert twins(true).tolist() == groups
    row = answers(true, true)
    assert row["balanced"] == row["plain"] == 1 and math.isclose(row["chance"], 1 / len(set(groups)))
    for always in groups:
        deaf = answers(true[[always] * len(groups)], true)
        assert math.isclose(deaf["balanced"], row["chance"]) and math.isclose(deaf["plain"], groups.count(always) / len(groups))
    assert answers(true[:1].repeat(3, 0), true[:1].repeat(3, 0)) is None


# Whole figures, with models whose score is known

def test_the_real_game_is_perfect_and_finds_its_place(pong, emulator, clips):
    keys = np.stack([clip.keys(12) for clip in clips])
    played = np.stack(list(roll(emulator, clips, keys, PONG)), 1)
    assert np.array_equal(played, np.stack([clip.frames(0, 12) for clip in clips]))
    with pytest.raises(ValueError, match="No recording of"):
        emulator.start(np.zeros((1, CONTEXT, 128, 128, 3), np.uint8), np.zeros((1, CONTEXT - 1)), PONG)


def test_play_figures_of_the_real_game_of_a_copier_and_of_the_deaf(emulator, clips):
    real, copier, deaf = (play_figures(model, clips, 30) for model in (emulator, Copier(), Deaf(emulator)))
    assert of(real, "motion_ratio").value == of(real, "objects_2s").value == 1
    assert of(real, "one_ball_2s").value == of(real, "one_ball_2s").ceiling
    assert of(real, "rollout_psnr_10").value == 80 and of(real, "delta_psnr_8").value > 0
    assert of(copier, "motion_ratio").value == 0
    for name in ("rollout_psnr_10", "objects_2s", "one_ball_2s"): assert of(copier, name).value == of(copier, name).baseline
    assert of(real, "rollout_fd_game_10").value < 1e-5 < of(deaf, "rollout_fd_game_10").value
    assert math.isclose(of(copier, "rollout_fd_game_10").value, of(copier, "rollout_fd_game_10").baseline, rel_tol=1e-4)
    assert of(real, "one_ball_2s_of_real").value == 1
    for h in evaluation.HORIZONS: assert of(copier, f"delta_psnr_{h}").value == of(deaf, f"delta_psnr_{h}").value == 0
    assert of(deaf, "objects_2s").value < 1 and of(deaf, "rollout_psnr_10").value < 80


class Painted:
    "A model whose pixels are changed before they are shown."
    def __init__(self, model, paint): self.start, self.model, self.paint = model.start, model, paint
    def step(self, state, keys):
        shown, state = self.model.step(state, keys)
        return torch.from_numpy(self.paint(shown.numpy().copy())), state


def test_each_fault_lowers_its_own_figure(pong, emulator, clips):
    flat, (rows, columns) = data.resize(evaluation.background(pong), 128), evaluation.field(PONG)
    def no_ball(frames):
        frames[:, rows, columns] = flat[rows, columns]
        return frames
    def two_balls(frames):
        frames[:, 80:83, 60:62] = 236
        return frames
    none, two, bright = (play_figures(Painted(emulator, paint), clips, 30)
                         for paint in (no_ball, two_balls, lambda frames: np.minimum(frames, 253) + 2))
    real = play_figures(emulator, clips, 30)
    assert of(none, "one_ball_2s").value == 0 and of(none, "objects_2s").value < 1 and of(none, "motion_ratio").value < 1
    assert of(two, "one_ball_2s").value < of(real, "one_ball_2s").value and of(two, "objects_2s").value == 1
    assert of(bright, "objects_2s").value == 1 and of(bright, "rollout_psnr_10").value < of(none, "rollout_psnr_10").value + 10


def test_response_figures_over_horizons():
    choices = moments(FREEWAY, count=1, context=CONTEXT, horizon=8, seed=80_000)
    env = data.Environment(FREEWAY)
    plays = [data.play(env, data.player_of("mixed", FREEWAY, env.actions, s), 400, s, "mixed") for s in (80_001, 80_002)]
    emulator = Simulator(plays)
    real, deaf = (response_figures(model, FREEWAY, choices) for model in (emulator, Deaf(emulator)))
    assert [f.name for f in real] == [f"action_response{kind}{end}" for end in ("_1", "", "_8") for kind in ("", "_plain")]
    assert all(f.value == 1 and f.n == 1 for f in real)
    assert all(math.isclose(f.value, f.baseline) for f in deaf if "plain" not in f.name)


def test_long_figures_of_the_real_game():
    tokenizer, small = small_world((TETRIS,)).tokenizer, dict(side=64)
    playing, idle = recordings(TETRIS, 1, 40, "test", **small), recordings(TETRIS, 1, 40, "test", seed=1, idle=True, **small)
    assert {data.split_of(clip.episode.seed) for clip in playing + idle} == {"test"}
    found = long_figures(Simulator([clip.episode for clip in playing + idle], **small), tokenizer, playing, idle, 40)
    assert {f.name for f in found} == {"rollout_psnr_40", "rollout_fd_game_40", "frames_to_collapse", "frames_to_collapse_mean",
                                       "noop_frames_to_collapse", "noop_psnr"}
    assert of(found, "rollout_fd_game_40").value < 1e-5
    assert of(found, "rollout_psnr_40").value == of(found, "noop_psnr").value == 80
    assert of(found, "frames_to_collapse").value == of(found, "frames_to_collapse").ceiling
    copier = long_figures(Copier(), tokenizer, playing, idle, 40)
    assert of(copier, "frames_to_collapse").value < of(copier, "frames_to_collapse").ceiling     # a world that stands still is none
    for name in ("frames_to_collapse", "noop_frames_to_collapse"): assert of(copier, name).value == of(copier, name).baseline
    assert math.isclose(of(copier, "rollout_fd_game_40").value, of(copier, "rollout_fd_game_40").baseline, rel_tol=1e-4)
    assert of(copier, "rollout_psnr_40").value == of(copier, "rollout_psnr_40").baseline


def test_motion_of_a_copier_is_nothing(clips):
    frames = clips[0].frames(0, 5)
    assert motion(frames[:1].repeat(4, 0), frames[0]) == 0 < motion(frames, clips[0].frames(-1, 0)[0])


def test_roll_plays_what_rollout_plays(clips):
    world, pieces = small_world((PONG,)), [replace(clip, side=64) for clip in clips]
    keys = np.stack([clip.keys(5) for clip in pieces])
    both = np.stack(list(roll(world, pieces, keys, PONG)), 1)
    for clip, alone, held in zip(pieces, both, keys):
        again = rollout(world, *clip.seen(), PONG, held.tolist())
        assert np.abs(alone.astype(int) - again).max() <= 1     # a batch rounds differently


def test_clips_need_recordings_that_are_long_enough(tmp_path):
    with pytest.raises(ValueError, match="lwm data collect"): stretches(tmp_path, PONG, 10, 2)
    with pytest.raises(ValueError, match="too few"): stretches(SAMPLES, PONG, 360, 2)
    assert [c.first for c in stretches(SAMPLES, PONG, 30, 4)] == [c.first for c in stretches(SAMPLES, PONG, 30, 4)]


# Numbers on the screen

GAMES = sorted(WHERE)


def play(game, seeds, frames, player="mixed"):
    "Recordings of a game."
    env = data.Environment(game)
    return [data.play(env, data.player_of(player, game, env.actions, s), frames, s, player) for s in seeds]


@pytest.fixture(scope="module")
def breakout():
    return play(BREAKOUT, range(5), 400)


def test_spells():
    assert spells(np.array([3] * 8 + [4] * 7 + [5] * 9)) == [(0, 8), (15, 24)] and spells(np.zeros(3)) == []


def test_the_places_of_numbers_are_found_again(breakout):
    "Each lies within the box of the table, and bricks, which change with the score, do not count."
    for name, room in WHERE[BREAKOUT].items():
        top, left, bottom, right = where_drawn(breakout, data.NUMBERS[BREAKOUT][name])
        assert room[0] <= top < bottom <= room[2] and room[1] <= left < right <= room[3]
    assert where_drawn(breakout[:1], data.NUMBERS[BREAKOUT]["score"]) is None       # nothing to compare with


@pytest.mark.parametrize("game", GAMES)
def test_numbers_are_read_from_real_frames(game):
    lessons = [data.read_episode(path) for path in data.episodes(SAMPLES, [game], "train")] + play(game, [100, 101], 360)
    exam = data.read_episode(data.episodes(SAMPLES, [game], "val")[0])
    for name in WHERE[game]:
        reader, true = Reader(lessons, name, 128), data.NUMBERS[game][name].read(exam.ram)
        stable = np.concatenate([np.arange(a + 4, b, 12) for a, b in spells(true, 16)])
        stable = stable[np.isin(true[stable], reader.values)]
        read = reader.read(data.resize(exam.frames[stable], 128))
        assert (read == true[stable]).mean() >= 0.9, name


def test_facts_of_the_real_game_of_a_copier_and_of_a_liar(breakout):
    episode = breakout[0]
    lives = data.NUMBERS[BREAKOUT]["lives"].read(episode.ram)
    lost = np.flatnonzero((np.diff(lives) == -1) & (np.arange(len(lives) - 1) > 60))
    assert len(lost), "no life is lost in this recording: take another seed"
    clips = [Stretch(episode, int(lost[0]) - 8), Stretch(episode, 60)]
    readers, true = {name: Reader(breakout, name) for name in WHERE[BREAKOUT]}, np.stack([clip.frames(0, 30) for clip in clips])
    copy = np.stack([clip.frames(-1, 0).repeat(30, 0) for clip in clips])
    lying = true.copy()
    lying[:, :, :12] = breakout[1].frames[:1, :1, :1]       # the line of numbers is gone
    real, copied, liar = (fact_figures(clips, readers, films, true) for films in (true, copy, lying))
    assert {f.name for f in real} >= {"fact_score_2s", "fact_lives_2s", "fact_lives_changed_2s"}
    assert all(f.value == f.ceiling == 1 and "clips" in f.source for f in real)
    assert all(f.value == f.baseline for f in copied) and of(copied, "fact_lives_changed_2s").value == 0
    assert of(copied, "fact_lives_changed_2s").n == 1 and 0 < of(copied, "fact_lives_2s").value < 1
    assert of(liar, "fact_lives_2s").value < 1


def test_a_number_that_never_changes_says_so(pong):
    clips = [Stretch(pong, 40)]
    scores = data.NUMBERS[PONG]["player_score"].read(pong.ram)
    assert len(set(scores[39:60])) == 1
    found = fact_figures(clips, {"player_score": Reader([pong], "player_score")}, clips[0].frames(0, 20)[None], clips[0].frames(0, 20)[None])
    assert [f.name for f in found] == ["fact_player_score_1.33333s"] and "changes in 0 of 1 clips: copying is as good" in found[0].source


def test_games_without_a_table_have_no_facts():
    assert readers_of(SAMPLES, "ALE/Hero-v5") == {} and set(readers_of(SAMPLES, PONG)) == {"player_score", "enemy_score"}


# Crowds of seconds

def test_seconds_notice_order_and_standstill():
    rng = np.random.default_rng(0)
    walk = lambda n: np.cumsum(rng.normal(size=(n, 60, 16)), 1)
    known, true = {"a": seconds(walk(60)).reshape(-1, 32)[::3], "b": 9 + seconds(walk(60)).reshape(-1, 32)[::3]}, walk(20)
    still = true[:, :1]
    real, frozen, mixed = (clip_figures(films, true, still, known, "a")[0] for films in
                           (true, still.repeat(60, 1), true[:, rng.permutation(60)]))
    assert math.isclose(real.value, real.ceiling) and math.isclose(frozen.value, frozen.baseline)
    assert real.value < min(frozen.value, mixed.value) and real.interval[0] <= real.value <= real.interval[1]
    assert real.name == "fvd_game" and real.n == 20 and "shuffled" in real.source and "other games" in real.source


def test_intervals_of_distances_hold_the_distance():
    rng = np.random.default_rng(0)
    true = rng.normal(size=(6, 30, 8))
    found = crowd_figure("d", true + 0.5 * rng.normal(size=true.shape), true, true[:, 0])
    assert found.interval[0] <= found.value <= found.interval[1] and found.ceiling == 0 and "among themselves" in found.source


class Moving(torch.nn.Module):
    "Stands in for I3D: same call, mean colours of a piece of film instead of 400 features."
    def forward(self, x: torch.Tensor, rescale: bool = True, resize: bool = True, return_features: bool = True) -> torch.Tensor:
        return x.mean((2, 3, 4))


def test_fvd_is_there_when_its_weights_are_and_only_then(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    films = np.random.default_rng(0).integers(0, 256, (3, 32, 8, 8, 3), np.uint8)
    try:
        evaluation.i3d.cache_clear()
        assert evaluation.fvd(films, films) is None
        (tmp_path / "checkpoints").mkdir()
        torch.jit.script(Moving()).save(str(tmp_path / "checkpoints" / "i3d_torchscript.pt"))
        evaluation.i3d.cache_clear()
        found = evaluation.fvd(films, films)
        assert found.name == "fvd" and found.n == 3 and found.value < 1e-6 < evaluation.fvd(films // 2, films).value
    finally: evaluation.i3d.cache_clear()


# Balls, films, speed

def test_balls_are_told_from_none_and_from_several():
    [one, beside_real] = ball_figures("b", np.array([[1, 0, 2, 1], [1, 1, 1, 1]]), np.array([[1, 1, 1, 0]] * 2), np.array([[0] * 4, [1] * 4]))
    assert (one.value, one.baseline, one.ceiling) == (0.75, 0.5, 0.75) and beside_real.value == 1
    assert "none in 12%, several in 12%; real game: none in 25%, several in 0%" in one.source


def test_one_ball_is_counted_after_a_minute_when_the_rollout_is_longer(monkeypatch, clips):
    B, N = 3, 1000
    rng, ones = np.random.default_rng(0), np.ones((B, N))
    rows = {name: rng.random((B, N)) for name in ("entropy", "true_entropy", "copy_entropy", "drawn_entropy", "motion", "true_motion",
                                                 "copy_motion", "error", "copy")}
    rows |= {name: rng.normal(size=(B, N, 4)) for name in ("features", "true_features", "copy_features")}
    rows |= {name: ones.astype(int) for name in ("balls", "true_balls", "copy_balls")}
    rows["balls"][:, 900:950], rows["balls"][0, 990:] = 0, 2
    monkeypatch.setattr(evaluation, "long_play", lambda *_: rows)
    found = long_figures(None, None, clips, clips[:1], N)
    assert math.isclose(of(found, "one_ball_900").value, 1 - (2 * 50 + 10) / 200) and of(found, "one_ball_1000").n == 2
    assert {"rollout_psnr_300", "rollout_fd_game_300", "rollout_psnr_1000", "rollout_fd_game_1000"} <= {f.name for f in found}


def test_the_figure_of_collapse_is_the_median(monkeypatch, clips):
    B, N = 4, 200
    rows = {name: np.random.default_rng(0).random((B, N)) for name in ("true_entropy", "drawn_entropy", "true_motion", "error", "copy")}
    rows |= {"entropy": np.full((B, N), 0.5), "copy_entropy": np.full((B, N), 0.5), "motion": np.full((B, N), 0.5), "copy_motion": np.zeros((B, N))}
    rows |= {name: np.random.default_rng(0).normal(size=(B, N, 4)) for name in ("features", "true_features", "copy_features")}
    for player, frame in enumerate((20, 100)): rows["entropy"][player, frame:] = 9
    monkeypatch.setattr(evaluation, "long_play", lambda *_: rows)
    found = long_figures(None, None, [clips[0]] * 3, clips[:1], N)
    assert of(found, "frames_to_collapse").value == 100 and math.isclose(of(found, "frames_to_collapse_mean").value, 320 / 3)
    assert of(found, "frames_to_collapse").interval == (20, 200) and of(found, "frames_to_collapse").baseline == 0
    assert of(found, "noop_frames_to_collapse").value == N and "1 of 3 players" in of(found, "frames_to_collapse").source


def test_a_world_that_stands_still_collapses_even_where_the_real_one_rests_for_a_while(monkeypatch, clips):
    "A tenth of the real frames are still, so that a low motion alone says nothing."
    B, N = 3, 300
    rng = np.random.default_rng(0)
    rows = {name: rng.random((B, N)) for name in ("true_entropy", "drawn_entropy", "error", "copy")}
    rows |= {"entropy": np.full((B, N), 0.5), "copy_entropy": np.full((B, N), 0.5), "copy_motion": np.zeros((B, N))}
    rows |= {name: rng.normal(size=(B, N, 4)) for name in ("features", "true_features", "copy_features")}
    rows["true_motion"] = 1 + rng.random((B, N))
    rows["true_motion"][:, 50:80] = 0                       # a rest of 30 frames
    rows["motion"] = rows["true_motion"].copy()
    rows["motion"][:2, 200:] = 0                            # two players freeze
    monkeypatch.setattr(evaluation, "long_play", lambda *_: rows)
    found = long_figures(None, None, clips, clips[:1], N)
    assert of(found, "frames_to_collapse").value == 230 and of(found, "frames_to_collapse").ceiling == N
    assert of(found, "frames_to_collapse").baseline == 30


def test_a_film_shows_the_real_game_beside_the_model(emulator, clips, tmp_path):
    films = beside(emulator, clips[0], 20)
    assert films.shape == (2, 20, 128, 128, 3) and np.array_equal(*films) and strip(films).shape == (256, 128 * 5, 3)
    assert data.video_rate(save_film(tmp_path / "a.mp4", films)) == (20, 15)
    again = next(data.video_frames(tmp_path / "a.mp4"))
    assert again.shape == (128, 256, 3) and np.abs(again[:, 128:].astype(int) - films[1, 0]).mean() < 6


def test_without_the_extra_the_report_says_why_there_is_no_film(tmp_path, monkeypatch):
    def missing(*_): raise course.MissingExtra("imageio is not installed")
    monkeypatch.setattr(evaluation, "save_film", missing)
    page = write_report(tmp_path, [], [(PONG, np.zeros((8, 8, 3), np.uint8), np.zeros((2, 4, 8, 8, 3), np.uint8))])
    assert "No film: imageio is not installed" in page.read_text()


def test_players_are_a_curve_and_a_soak_measures_memory(tmp_path):
    small_world((PONG,)).save_pretrained(tmp_path / "model")
    out = tmp_path / "bench.json"
    def bench(*words):
        assert course.main(["bench", "--model", str(tmp_path / "model"), *words, "--json", str(out)]) == 0
        return {f["name"]: f for f in json.loads(out.read_text())["figures"]}
    figures = bench("--frames", "12", "--players", "2", "1")
    assert {"fps", "fps_players_1", "fps_players_2", "latency_p50_ms", "latency_p95_ms_players_2", "state_bytes"} <= set(figures)
    assert figures["fps"]["value"] == figures["fps_players_1"]["value"] and figures["peak_memory_gb"]["source"].endswith("players: 1")
    assert figures["fps_players_2"]["interval"][0] <= figures["fps_players_2"]["value"] <= figures["fps_players_2"]["interval"][1]
    figures = bench("--frames", "5", "--players", "1", "--refine", "2")
    assert figures["fps"]["source"].endswith(", 2 passes")
    figures = bench("--soak", "30")
    assert figures["memory_soak_start"]["n"] == 3 and "fps" not in figures and "memory_soak_end" in figures
    assert 0.05 < figures["memory_soak_end"]["value"] < 64 and figures["soak_frames"]["value"] == 30


def test_joules_are_those_of_all_processors_or_none(tmp_path):
    assert joules(tmp_path) is None
    for name, energy in (("intel-rapl:0", "2000000\n"), ("intel-rapl:1", "500000\n"), ("intel-rapl:0:0", "9\n")):    # the last is a part of the first
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(energy)
    assert joules(tmp_path) == 2.5
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()      # as where only root may read it
    assert joules(tmp_path) is None


# The command

@pytest.mark.parametrize("arguments, code, words", [
    (["--model", "nanno"], 1, ["nanno"]),
    (["--split", "train"], 2, ["train"]),
    (["--clips", "many"], 2, ["many"]),
    (["--clips", "0"], 1, ["--clips"]),
    (["--frames", "3"], 1, ["--frames"]),
    (["--play", "nowhere"], 1, ["nowhere", "lwm data collect"]),
])
def test_the_command_refuses_in_one_line(arguments, code, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert course.main(["eval", *arguments]) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert all(word in lines[-1] for word in words) and "Traceback" not in " ".join(lines)
    assert list(tmp_path.iterdir()) == []


def test_the_command_measures_and_reports(tmp_path, capsys, monkeypatch):
    small_world().save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    out, kept = tmp_path / "out" / "eval" / "eval.json", []       # unless asked otherwise
    save = course.save_results
    monkeypatch.setattr(course, "save_results", lambda *given, **more: kept.append(more["complete"]) or save(*given, **more))
    few = tmp_path / "play"         # two games, or the crowds of sixteen would be described
    for game in (PONG, TETRIS): shutil.copytree(SAMPLES / data.slug(game), few / data.slug(game))
    arguments = [str(tmp_path / "model"), "--play", str(few), "--games", PONG, "--quick", "--clips", "2", "--frames", "20"]
    assert course.main(["eval", *arguments]) == 0 and kept == [False, True]      # what there was after a game, and all of it
    figures = json.loads(out.read_text())["figures"]
    names = [f["name"] for f in figures]
    assert len(set(names)) == len(names)
    assert {"skill", "next_frame_mse", "reconstruction_psnr", "reconstruction_objects", "token_flicker", "action_response",
            "action_response_plain_8", "delta_psnr_4", "motion_ratio", "objects_5s", "one_ball_5s", "frames_to_collapse",
            "noop_psnr", "rollout_psnr_20", "rollout_fd_game_60", "fvd_game", "fact_enemy_score_5s"} <= set(names)
    assert all(f["n"] and (f["interval"] is None or f["interval"][0] <= f["interval"][1]) for f in figures)
    compared = "skill", "fd_game", "fvd_game", "rollout", "objects", "one_ball", "fact", "frames_to", "noop_frames", "motion", "delta"
    for f in figures:
        if f["name"].startswith(compared): assert f["baseline"] is not None, f["name"]
    page = (out.parent / "report.md").read_text()
    assert "ALE-Pong-v5.png" in page and (out.parent / "ALE-Pong-v5.png").stat().st_size > 1000
    assert "ALE-Pong-v5.mp4" in page and data.video_rate(out.parent / "ALE-Pong-v5.mp4") == (300, 15)
    assert "motion_ratio" in capsys.readouterr().out


@pytest.mark.slow
def test_games_measured_at_once_are_measured_alike(tmp_path, capsys):
    small_world().save_pretrained(tmp_path / "model")
    for game in (PONG, TETRIS): shutil.copytree(SAMPLES / data.slug(game), tmp_path / "play" / data.slug(game))
    found = []
    for workers in ("1", "2"):
        effort = "--quick", "--clips", "2", "--frames", "15", "--workers", workers, "--report", str(tmp_path / workers)
        assert course.main(["eval", str(tmp_path / "model"), "--play", str(tmp_path / "play"), "--games", PONG, TETRIS, *effort]) == 0
        found.append(json.loads((tmp_path / workers / "eval.json").read_text())["figures"])
    assert [(f["name"], f["game"]) for f in found[0]] == [(f["name"], f["game"]) for f in found[1]]
    assert all(a["value"] == pytest.approx(b["value"], rel=1e-3, abs=1e-3, nan_ok=True) for a, b in zip(*found) if a["value"] is not None)


# Tokenizers alone

@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    "A dictionary for Pong, in a folder."
    pairs = data.clips(SAMPLES, [PONG], 2, 64, 40)["frames"]
    config = TokenizerConfig(frame_size=64, quantizer="open", codes=64, masks=32, games=(PONG,))
    return place_dictionary(Tokenizer(config), pairs).save_pretrained(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def small_encoder(monkeypatch):
    "A network of fd_game with random weights in the place of the shipped one."
    torch.manual_seed(0)
    encoder = GameEncoder([PONG]).eval()
    monkeypatch.setattr(evaluation, "game_encoder", lambda: encoder)
    evaluation.training_crowds.cache_clear()
    yield encoder
    evaluation.training_crowds.cache_clear()


def test_a_tokenizer_is_measured_alone_and_strangers_are_named(tokenizer_folder, small_encoder, tmp_path, capsys):
    file, page = tmp_path / "tokenizer.json", tmp_path / "page"
    arguments = ["eval", "--model", str(tokenizer_folder), "--games", PONG, TETRIS, "--play", str(SAMPLES), "--quick", "--clips", "2",
                 "--json", str(file), "--report", str(page)]
    assert course.main(arguments) == 0
    found = {(f["game"], f["name"]): f for f in json.loads(file.read_text())["figures"]}
    assert {name for game, name in found if game == PONG} >= {"reconstruction_psnr", "token_flicker", "fd_game", "reconstruction_objects"}
    assert all(name.startswith("unseen_") for game, name in found if game == TETRIS)
    assert found[PONG, "reconstruction_psnr"]["value"] > found[TETRIS, "unseen_reconstruction_psnr"]["value"]
    assert found[PONG, "token_flicker"]["value"] == 0 and not any(name == "fid" for _, name in found), "no Inception weights, no FID"
    assert {path.name for path in page.iterdir()} == {"report.md", "ALE-Pong-v5.png", "ALE-Tetris-v5.png"}


def test_without_a_quantizer_there_are_no_figures_of_tokens(small_encoder):
    torch.manual_seed(0)
    plain = Tokenizer(TokenizerConfig(frame_size=64, quantizer="none", encoder_width=16, encoder_depth=1, width=16, depth=1)).eval()
    names = {f.name for f in evaluation.tokenizer_figures(plain, SAMPLES, [PONG], clips=2, length=2, crowd=8)}
    assert {"reconstruction_psnr", "fd_game"} <= names and not names & {"token_flicker", "perplexity"}


def test_a_tokenizer_is_timed_alone(tokenizer_folder, tmp_path):
    file = tmp_path / "bench.json"
    assert course.main(["bench", "--model", str(tokenizer_folder), "--frames", "10", "--json", str(file)]) == 0
    figures = {f["name"]: f for f in json.loads(file.read_text())["figures"]}
    assert {"encode_p50_ms", "decode_p95_ms", "both_p50_ms", "peak_memory_gb"} <= set(figures)
    assert figures["both_p50_ms"]["value"] >= figures["encode_p50_ms"]["value"] > 0 and any("batch 32" in name for name in figures)


# Crowds

def test_fd_of_real_frames_is_its_own_floor_and_noise_is_far(small_encoder):
    [real] = fd_figures(np.array, SAMPLES, PONG, 64, count=40)
    assert math.isclose(real.value, real.ceiling) and real.n == 40 and real.interval[0] < real.interval[1]
    [noise] = fd_figures(lambda frames: np.random.default_rng(0).integers(0, 256, frames.shape, np.uint8), SAMPLES, PONG, 64, count=40)
    assert noise.value > 2 * real.value and noise.ceiling == real.ceiling


def test_a_crowd_needs_two():
    with pytest.raises(ValueError, match="two pictures or more, got 1 and 5"): frechet(np.zeros((1, 3)), np.zeros((5, 3)))


def test_the_encoder_learns_from_games_with_a_memory_and_comes_back(tmp_path):
    config = TrainConfig(steps=60, lr=3e-3, ema=0.9, dtype="float32")
    trained = train_encoder(SAMPLES, tmp_path / "run", config, [PONG, BREAKOUT], pairs=8, quiet=True)
    batch, fresh = evaluation.encoder_batches(SAMPLES, [PONG, BREAKOUT], 8)(0), GameEncoder([PONG, BREAKOUT])
    fresh.centre[:], fresh.spread[:] = trained.centre, trained.spread
    before, after = (evaluation.encoder_loss(model, batch)[0].item() for model in (fresh, trained))
    assert after < 0.95 * before, "a hundred steps say little about the memory yet, but they say something"
    frames = data.clips(SAMPLES, [PONG], 1, 128, 4)["frames"][:, 0]
    again = evaluation.game_encoder(str(tmp_path / "run"))
    assert again.games == [PONG, BREAKOUT] and np.allclose(trained.describe(frames), again.describe(frames), atol=0.05)
    assert (trained.spread == 0).any(), "bytes that never change are left out"


def test_recordings_without_a_memory_are_refused(tmp_path):
    episode = data.read_episode(data.episodes(SAMPLES, [PONG])[0])
    for seed in range(20): data.write_episode(data.episode_path(tmp_path, PONG, seed, "mixed"), replace(episode, ram=None, seed=seed))
    with pytest.raises(ValueError, match="without the console's memory"): evaluation.encoder_batches(tmp_path, [PONG], 4)


class Inception(torch.nn.Module):
    "Stands in for the extractor of torch-fidelity: same call, mean colours instead of 2,048 features."
    def __init__(self, name, features, feature_extractor_weights_path):
        super().__init__()
        assert (name, features) == ("inception-v3-compat", ["2048"]) and feature_extractor_weights_path.endswith(".pth")

    def forward(self, x):
        assert x.dtype == torch.uint8 and x.shape[1] == 3
        return (x.float().mean((2, 3)),)


def test_fid_is_there_when_its_weights_are_and_only_then(tmp_path, monkeypatch):
    package, module = ModuleType("torch_fidelity"), ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Inception
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    try:
        evaluation.inception.cache_clear()
        assert evaluation.fid(np.array, SAMPLES, [PONG], 64, count=20) is None                     # no package
        monkeypatch.setitem(sys.modules, "torch_fidelity", package)
        monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)
        evaluation.inception.cache_clear()
        assert evaluation.fid(np.array, SAMPLES, [PONG], 64, count=20) is None                     # no weights
        file = tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
        file.parent.mkdir()
        file.touch()
        evaluation.inception.cache_clear()
        figure = evaluation.fid(np.array, SAMPLES, [PONG], 64, count=20)
        assert figure.name == "fid" and figure.n == 20 and math.isclose(figure.value, figure.ceiling)
    finally:
        evaluation.inception.cache_clear()
