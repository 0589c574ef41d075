"The `lwm` command: help, exit codes, and errors in one line."
import json
import re
import subprocess
import sys

import pytest

from lwm_course import course
from lwm_course.course import COMMANDS, main

NAMES = ["data", "train", "play", "demo", "bench", "eval", "ablate", "quantize", "export", "report", "check"]


def lwm(*arguments, cwd=None, seconds=120):
    "Run the command in a process of its own."
    code = "import sys; from lwm_course.course import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=seconds, cwd=cwd)


def one_line_error(run, code=1):
    "The message of a failed run; it must be one line, and no traceback."
    assert run.returncode == code, run.stderr
    assert "Traceback" not in run.stderr
    lines = run.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("lwm"), run.stderr
    return lines[0]


def test_commands_are_the_promised_ones():
    assert list(COMMANDS) == NAMES


def test_help_names_every_command_and_imports_no_chapter():
    code = "import sys; from lwm_course.course import main; main(['--help']); print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.rstrip().endswith("False")
    assert all(re.search(rf"^  {name} +\w+", run.stdout, re.M) for name in NAMES)


@pytest.mark.parametrize("command", NAMES)
def test_help_of_a_command(command, capsys):
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"usage: lwm {command}" in text and "--seed" in text
    assert len(text.split("options:")[0]) > 80  # it says what the command does
    if command in ("data", "bench", "eval", "ablate", "quantize", "report"): assert "--json" in text


@pytest.mark.parametrize("command", NAMES)
def test_every_option_has_help(command):
    actions = course.command_parser(command)._actions
    assert [a.dest for a in actions if not a.help] == []
    assert course.command_parser(command).get_default("run") is not None
    assert course.command_parser(command).get_default("seed") == 0


@pytest.mark.parametrize("command", NAMES)
def test_unknown_option_is_wrong_usage(command, capsys):
    assert main([command, "--no-such-option"]) == 2
    assert "--no-such-option" in capsys.readouterr().err


def test_no_command_shows_the_help(capsys):
    assert main([]) == 0
    assert "usage: lwm COMMAND" in capsys.readouterr().out


def test_version(capsys):
    import lwm_course
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == lwm_course.__version__


def test_unknown_command():
    assert "report" in one_line_error(lwm("reprot"), code=2)


@pytest.mark.parametrize("arguments", [("data", "collect"), ("train", "--games"), ("play",), ("bench", "--game"), ("eval", "--games"), ("ablate", "--games"), ("quantize", "--games")], ids=" ".join)
def test_unknown_game_is_one_line_with_the_nearest_name(arguments, tmp_path):
    message = one_line_error(lwm(*arguments, "ALE/Pnog-v5", cwd=tmp_path))
    assert "Pnog" in message and "Pong" in message


@pytest.mark.parametrize("command", ["play", "demo", "bench", "eval"])
def test_unknown_model_is_one_line(command, tmp_path):
    assert "no-such-model" in one_line_error(lwm(command, "--model", "no-such-model", cwd=tmp_path))


def test_debug_shows_the_traceback(tmp_path):
    for arguments in (["report", "--results", "nowhere", "--debug"], ["--debug", "report", "--results", "nowhere"]):
        run = lwm(*arguments, cwd=tmp_path)
        assert run.returncode == 1 and "Traceback" in run.stderr and "nowhere" in run.stderr


@pytest.mark.parametrize("error, code, said", [
    (ValueError("wrong value"), 1, "lwm report: wrong value"),
    (FileNotFoundError("no such file: a.npz"), 1, "lwm report: no such file: a.npz"),
    (course.MissingExtra("x is not installed"), 1, "lwm report: x is not installed"),
    (KeyboardInterrupt(), 130, "lwm report: stopped"),
    (RuntimeError("two\nlines"), 1, "lwm report: unexpected RuntimeError: two lines (this is a bug; add --debug to see where)"),
])
def test_errors_become_one_line(error, code, said, monkeypatch, capsys):
    def broken(*_): raise error
    monkeypatch.setattr(course, "load_results", broken)
    assert main(["report"]) == code
    assert capsys.readouterr().err.strip() == said


def test_a_missing_chapter_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setitem(COMMANDS, "eval", ("nowhere", "measure"))
    assert main(["eval"]) == 1
    assert "nowhere" in (message := capsys.readouterr().err) and "pip install" in message


def test_report_writes_json(tmp_path, monkeypatch, capsys):
    course.save_results(tmp_path/"results"/"eval.json", "a test", [course.Figure("next_frame_mse", 0.002, n=5, baseline=0.004)])
    monkeypatch.chdir(tmp_path)
    assert main(["report", "--json", "report.json"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"M4 +next-frame error +<= 0.01 .* 0.002 .* 0.004 +5 +go", shown)
    found = json.loads((tmp_path/"report.json").read_text())
    gate = next(g for m in found["milestones"] for g in m["gates"] if g["figure"] == "next_frame_mse")
    assert (gate["verdict"], gate["measured"], gate["baseline"]) == ("go", 0.002, 0.004)


def test_report_on_a_damaged_file_names_it(tmp_path):
    (tmp_path/"results").mkdir()
    (tmp_path/"results"/"bench.json").write_text('{"figures": [')
    assert "bench.json" in one_line_error(lwm("report", cwd=tmp_path))


def test_report_on_the_machine(capsys):
    assert main(["report", "--machine"]) == 0
    assert re.search(r"^free disk +\d+", capsys.readouterr().out, re.M)


def test_report_all_lists_unmeasured_figures(capsys):
    assert main(["report", "--all"]) == 0
    assert "players at once" in capsys.readouterr().out


@pytest.fixture
def learner(tmp_path, monkeypatch, repository):
    "A learner's folder with the exercises of chapter 00, unsolved."
    course.make_exercise(repository/"solutions"/"00_start.ipynb", tmp_path/"exercises"/"00_start.ipynb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LWM_HOME", str(tmp_path/"home"))
    return tmp_path


def test_check_fails_on_stubs_and_says_what_is_next(learner, capsys):
    assert main(["check", "0", "--json", "out.json"]) == 1
    shown = capsys.readouterr().out
    names = [e.name for e in course.exercises(learner/"exercises"/"00_start.ipynb")]
    assert all(f"todo   exercise {name}" in shown for name in names)
    assert f"Next: exercise '{names[0]}'" in shown
    assert [e["status"] for e in json.loads((learner/"out.json").read_text())[0]["exercises"]] == ["todo"]*len(names)
    assert set(course.load_progress()["chapters"]["00"]["exercises"].values()) == {"todo"}


def test_check_passes_when_solved(learner, repository, capsys):
    solved = (repository/"solutions"/"00_start.ipynb").read_bytes()
    (learner/"exercises"/"00_start.ipynb").write_bytes(solved)
    assert main(["check"]) == 0
    assert set(course.load_progress()["chapters"]["00"]["exercises"].values()) == {"pass"}


def test_check_of_solutions_leaves_progress_alone(learner):
    assert main(["check", "start", "--solutions"]) == 0
    assert course.load_progress()["chapters"] == {}


def test_check_of_an_unknown_chapter(learner):
    assert "03_tokenizer" in one_line_error(lwm("check", "03_tokeniser", cwd=learner))


def test_check_of_a_damaged_notebook(learner):
    (learner/"exercises"/"00_start.ipynb").write_text('{"cells": [')
    assert "00_start.ipynb" in one_line_error(lwm("check", "0", cwd=learner))


def test_check_with_a_damaged_progress_file(learner):
    course.write_json(course.home()/"progress.json", {"version": 99, "chapters": {}})
    assert "progress.json" in one_line_error(lwm("check", "0", cwd=learner))
