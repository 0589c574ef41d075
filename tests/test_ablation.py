"The ablation: what is done is not done again, rows of other settings are refused, and every figure says what it is of."
import json
import signal

import numpy as np
import pytest
import torch

from lwm_course import ablation as chapter
from lwm_course import course, tokenizer
from lwm_course.ablation import Ablation, ablate, ablation_table, combinations, train_one
from lwm_course.tokenizer import LOSSES, QUANTIZERS, reconstruction_loss

pytestmark = pytest.mark.usefixtures("one_thread")


GAME = "ALE/Breakout-v5"


@pytest.fixture
def shared(repository, monkeypatch):
    "Settings of a tiny ablation, with a tiny network."
    monkeypatch.setattr(chapter, "LITTLE", dict(encoder_width=24, encoder_depth=1, width=16, depth=1))
    return Ablation(str(repository / "data_samples"), (GAME,), steps=3, batch=2, pairs=4, frames=3)


def timeless(rows): return [{key: value for key, value in row.items() if "seconds" not in key} for row in rows]


def table(path): return timeless(json.loads(path.read_text())["table"])


TWO = [("fsq", "motion"), ("hybrid", "motion")]


def test_interrupted_ablation_goes_on_and_ends_as_an_uninterrupted_one(shared, tmp_path, monkeypatch):
    whole, parts, trained = tmp_path / "whole.json", tmp_path / "parts.json", []
    ablate(shared, TWO, [0, 1], whole, quiet=True)

    def train_one(shared, quantizer, loss, seed, pairs, each, real=chapter.train_one):
        if len(trained) == 2: signal.raise_signal(signal.SIGINT)     # in the third of four
        trained.append((quantizer, loss, seed))
        return real(shared, quantizer, loss, seed, pairs, each)

    monkeypatch.setattr(chapter, "train_one", train_one)
    with pytest.raises(KeyboardInterrupt): ablate(shared, TWO, [0, 1], parts, quiet=True)
    assert trained == [("fsq", "motion", 0), ("hybrid", "motion", 0)] and len(table(parts)) == 2
    trained += [None]       # beyond two: no more signals
    ablate(shared, TWO, [0, 1], parts, quiet=True)
    assert trained[3:] == [("fsq", "motion", 1), ("hybrid", "motion", 1)], "what is done is not done again"
    assert table(parts) == table(whole)
    trained.clear()
    ablate(shared, TWO, [0, 1], parts, quiet=True)
    assert trained == []


def test_ablation_stops_within_a_run(shared, tmp_path):
    stop = lambda *_: signal.raise_signal(signal.SIGINT)
    path = tmp_path / "ablation.json"
    ablate(shared, TWO[:1], [0], path, quiet=True)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(chapter, "reconstruction_loss", lambda *args, **more: (stop(), reconstruction_loss(*args, **more))[1])
        ablate(shared, TWO, [0], path, quiet=True)
    assert [row["quantizer"] for row in table(path)] == ["fsq"]


def test_figures_of_an_ablation_say_what_they_are_of(shared, tmp_path):
    path = tmp_path / "ablation.json"
    ablate(shared, [("lsq", "adversarial")], [3], path, quiet=True)
    found = course.load_results(tmp_path)["ablation"]
    figures = {figure["name"]: figure for figure in found["figures"]}
    assert set(figures) == {name for name, _ in chapter.MEASURED.values()}
    assert figures["changed_psnr"]["source"] == "lsq, adversarial, seed 3" and figures["changed_psnr"]["n"] == 3
    assert figures["changed_psnr"]["baseline"] == found["copy"]["moving_psnr"] and figures["token_flicker"]["value"] == 0
    assert found["settings"]["steps"] == 3 and found["seed"] == [3]


def test_ablation_refuses_to_mix_settings(shared, tmp_path):
    ablate(shared, TWO[:1], [0], tmp_path / "a.json", quiet=True)
    other = Ablation(shared.play, shared.games, steps=4, batch=2, pairs=4, frames=3)
    with pytest.raises(ValueError, match="steps was 3 and is now 4"): ablate(other, TWO, [0], tmp_path / "a.json", quiet=True)


@pytest.mark.parametrize("chosen, message", [(("fqs", "motion"), "Unknown quantizer 'fqs'. Did you mean fsq"),
                                             (("fsq", "multiscal"), "Unknown loss 'multiscal'. Did you mean multiscale")])
def test_ablation_refuses_unknown_names_before_it_trains(shared, tmp_path, monkeypatch, chosen, message):
    monkeypatch.setattr(chapter, "train_one", lambda *_: pytest.fail("it trains"))
    with pytest.raises(ValueError, match=message): ablate(shared, [("fsq", "l1"), chosen], [0], tmp_path / "a.json", quiet=True)


def test_command_names_unknown_names_and_missing_weights(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lpips", None)
    monkeypatch.setattr(chapter, "train_one", lambda *_: pytest.fail("it trains"))
    tokenizer.perceptual.cache_clear()
    run = lambda *arguments: (course.main(["ablate", "--json", str(tmp_path / "a.json"), *arguments]), capsys.readouterr().err)
    for option, wrong, right in (("--quantizers", "vqq", "vq"), ("--losses", "l2", "l1"), ("--games", "ALE/Pnog-v5", "Pong")):
        code, said = run(option, wrong)
        assert code == 1 and wrong in said and right in said
    code, said = run("--losses", "lpips")
    assert code == 1 and "lwm-course[perceptual]" in said and not (tmp_path / "a.json").exists()


def test_two_arms_cross_in_the_default():
    pairs = combinations(list(QUANTIZERS), list(LOSSES))
    assert pairs[0] == ("fsq", "motion") and len(set(pairs)) == len(pairs) == len(QUANTIZERS) + len(LOSSES) - 1
    assert all("fsq" == quantizer or "motion" == loss for quantizer, loss in pairs)


@pytest.mark.parametrize("full", [False, True])
def test_a_dictionary_has_one_row_whatever_the_losses(full):
    pairs = combinations(list(QUANTIZERS), list(LOSSES), full)
    assert [pair for pair in pairs if pair[0] == "dictionary"] == [("dictionary", "motion")] and len(set(pairs)) == len(pairs)
    if full: assert {("vq", loss) for loss in LOSSES} <= set(pairs)


@pytest.mark.parametrize("quantizer, loss", [("dictionary", "motion"), ("vq", "l1"), ("fsq", "adversarial")])
def test_a_run_tells_of_all_its_steps_and_depends_on_its_seed_alone(shared, quantizer, loss):
    pairs = np.random.default_rng(0).integers(0, 256, (20, 2, 128, 128, 3), dtype=np.uint8)
    def run(seed):
        done = []
        model, spent = train_one(shared, quantizer, loss, seed, pairs, done.append)
        assert sum(done) == shared.steps and not model.training and spent.keys() == {"seconds_per_step", "core_seconds_per_step"}
        assert all(seconds > 0 for seconds in spent.values())
        return model.reconstruct(pairs[:2, 0])
    first = run(0)
    assert torch.equal(first, run(0)) and not torch.equal(first, run(1))


def test_table_names_no_loss_for_what_is_placed(shared, tmp_path):
    rows = ablate(shared, [("dictionary", "motion"), ("vq", "motion")], [0], tmp_path / "a.json", quiet=True)
    placed, learned = ablation_table(rows).rows if rows[0]["quantizer"] == "dictionary" else ablation_table(rows).rows[::-1]
    assert (placed["quantizer"], placed["loss"], learned["loss"]) == ("dictionary", "-", "motion")
    assert rows[0]["codes"] == rows[1]["codes"] == 1000 and float(placed["PSNR, dB"]) > float(learned["PSNR, dB"]) + 5


def test_ablation_goes_on_from_rows_without_codes(shared, tmp_path):
    path, chosen = tmp_path / "a.json", [("none", "motion"), ("fsq", "motion")]
    rows = ablate(shared, chosen[:1], [0, 1], path, quiet=True)
    assert [row["codes"] for row in rows] == [0, 0] and "NaN" not in path.read_text()
    rows = ablate(shared, chosen, [0, 1], path, quiet=True)
    assert [(row["quantizer"], row["seed"]) for row in rows] == [("none", 0), ("none", 1), ("fsq", 0), ("fsq", 1)]
    shown = str(ablation_table(rows))
    [none, fsq] = [[line for line in shown.splitlines() if name in line][0] for name in ("none", "fsq")]
    assert none.count(" - ") == 2 and fsq.count(" - ") == 0 and "nan" not in shown
