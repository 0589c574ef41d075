"Every exercise's check rejects the stub and each planted wrong answer, and accepts the solution."
from pathlib import Path

import pytest

from lwm_course.course import _quiet, check_notebook, exercises, make_exercise, read_notebook, run_cell, stub, tagged

SOLUTIONS = sorted((Path(__file__).resolve().parent.parent/"solutions").glob("*.ipynb"))
notebooks = pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)


def rejection(check, namespace):
    "How a check rejects what is defined in `namespace`: an exception, or None where it accepts."
    try: run_cell(check, namespace, "check")
    except (AssertionError, NotImplementedError) as error: return error
    return None


def accepted_wrongs(path):
    "Names of answers that a check of this notebook accepts and should reject."
    found, accepted, namespace = {e.name: e for e in exercises(path)}, [], {"__name__": "__main__", "display": lambda *_: None}
    for cell in read_notebook(path)["cells"]:
        what, name = tagged(cell)
        if what in ("markdown", "wrong"): continue
        if what == "check":
            # In the notebook's own namespace: a helper that calls the exercise's function meets the wrong one as well.
            exercise = found[name]
            for number, source in enumerate([stub(exercise.source), *exercise.wrongs]):
                run_cell(source, namespace, "answer")
                answer = f"wrong answer {number}" if number else "stub"
                if rejection(exercise.check, namespace) is None: accepted.append(f"{name}: {answer}")
            run_cell(exercise.source, namespace, "solution")
        run_cell(cell["source"], namespace, name or "set-up")  # a solution that its check rejects raises here
    return accepted


@notebooks
def test_checks_reject_the_stub_and_every_wrong_answer(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    with _quiet(): accepted = accepted_wrongs(path)
    assert accepted == []


@notebooks
def test_solutions_pass(path):
    outcomes = check_notebook(path)
    assert 3 <= len(outcomes) <= 5
    assert [(o.exercise, o.status, o.message) for o in outcomes] == [(o.exercise, "pass", "") for o in outcomes]


@notebooks
def test_generated_exercises_are_unsolved_and_keep_no_answer(path, tmp_path):
    out = tmp_path/path.name
    make_exercise(path, out)
    assert [o.status for o in check_notebook(out)] == ["todo"]*len(exercises(path))
    text = out.read_text(encoding="utf-8")
    assert "BEGIN SOLUTION" not in text and "#| wrong:" not in text
    assert all(len(e.wrongs) >= 2 for e in exercises(path))


def test_every_chapter_with_an_exercise_link_has_solutions():
    chapters = {p.stem for p in (SOLUTIONS[0].parent.parent/"nbs").glob("[0-9][0-9]_*.ipynb")}
    assert {p.stem for p in SOLUTIONS} == chapters
