"Chapter 00 at its edges: machines, results files, gates, budget, progress, exercises."
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from lwm_course import course
from lwm_course.course import (CHAPTERS, GATES, Budget, Figure, Gate, Outcome, bootstrap, budget_rows, check_notebook,
                               course_table, exercises, find_chapter, gates, git_revision, hardware_table, judge,
                               ledger_cost, load_ledgers,
                               load_progress, load_results, machine, make_exercise, milestone_verdict, nearest, pick,
                               record_minutes, record_progress, report, report_text, require, save_results, slow,
                               verdict, write_json)

number = st.floats(-1e6, 1e6)


# Names, sizes, extras

def test_an_extra_is_named():
    with pytest.raises(course.MissingExtra, match=r"no_such_module is not installed.*lwm-course\[games\]"):
        require("no_such_module", "games")
    assert require("json", "games") is json


def test_a_package_broken_inside_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path/"halfway_there.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency") as caught: require("halfway_there", "games")
    assert not isinstance(caught.value, course.MissingExtra)


def test_size(monkeypatch):
    for value, picked in (("smoke", 1), ("course", 2), ("", 2)):
        monkeypatch.setenv("LWM_SIZE", value)
        assert pick(smoke=1, course=2) == picked
    monkeypatch.setenv("LWM_SIZE", "huge")
    with pytest.raises(ValueError, match="huge.*smoke.*course"): pick(1, 2)


@pytest.mark.parametrize("typed, meant", [("ALE/Pnog-v5", "Pong-v5"), ("pong", "Pong-v5"), ("Breakout", "Breakout-v5")])
def test_nearest(typed, meant):
    with pytest.raises(ValueError, match=re.escape(meant)): nearest(typed, ["ALE/Pong-v5", "ALE/Breakout-v5", "ALE/Freeway-v5"])


def test_nearest_of_nothing_alike_lists_what_is_known():
    with pytest.raises(ValueError, match="Known: a, b"): nearest("zzzz", ["a", "b"])


# Machine

def test_machine_is_json_and_plausible():
    found = machine()
    assert json.loads(json.dumps(found)) == found
    assert 1 <= found["cores"] <= found["threads"] <= os.cpu_count()
    assert found["memory_gb"] is None or 0 < found["memory_gb"] < 1e5


ARM = "processor\t: 0\nBogoMIPS\t: 108.00\nFeatures\t: fp asimd aes\nCPU part\t: 0xd0b\n\nprocessor\t: 1\nFeatures\t: fp asimd\n"
OLD = "processor\t: {}\nmodel name\t: Old CPU\nflags\t\t: sse avx2\nphysical id\t: 0\ncore id\t\t: {}\n\n"
PAIR = "".join(OLD.format(i, i//2) for i in range(4))  # two cores of two threads each


def test_cpu_of_other_linux_machines(monkeypatch):
    monkeypatch.setattr(course.platform, "system", lambda: "Linux")
    monkeypatch.setattr(course, "_read", lambda path: ARM)
    assert "asimd" in course._cpu()[2]
    monkeypatch.setattr(course, "_read", lambda path: PAIR)
    assert course._cpu() == ("Old CPU", 2, {"sse", "avx2"})


def test_cpu_of_a_mac(monkeypatch):
    values = {"machdep.cpu.brand_string": "Apple M2", "hw.physicalcpu": "8"}
    monkeypatch.setattr(course, "_read", lambda path: "")
    monkeypatch.setattr(course, "_sysctl", lambda name: values.get(name, ""))
    monkeypatch.setattr(course.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(course.platform, "machine", lambda: "arm64")
    assert course._cpu() == ("Apple M2", 8, {"asimd"})


def test_machine_of_a_system_that_tells_nothing(monkeypatch):
    monkeypatch.setattr(course, "_read", lambda path: "")
    monkeypatch.setattr(course, "_memory_bytes", lambda: None)
    found = machine()
    assert found["memory_gb"] is None and found["cores"] >= 1 and "memory" in str(course.machine_table(found))
    slow(found)


@pytest.mark.parametrize("text, limit", [("max\n", None), ("", None), ("2000000000\n", 2*10**9), ("9223372036854771712\n", None)])
def test_container_limit(monkeypatch, text, limit):
    monkeypatch.setattr(course, "_read", lambda path: text)
    assert course._cgroup_limit() == limit


def test_container_quota(monkeypatch):
    monkeypatch.setattr(course, "_read", lambda path: "100000 100000\n")
    assert course._threads() == 1


def test_git_revision(tmp_path, monkeypatch):
    monkeypatch.setattr(course, "root", lambda: tmp_path)
    assert git_revision() is None
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    git = lambda *args: subprocess.run(["git", "-C", tmp_path, *who, *args], check=True, capture_output=True)
    git("init")
    assert git_revision() is None  # no commit yet
    (tmp_path/"lwm_course").mkdir()
    (tmp_path/"lwm_course"/"a.py").write_text("a = 1\n")
    git("add", "."), git("commit", "-m", "a")
    assert re.fullmatch(r"[0-9a-f]{40}", git_revision())
    (tmp_path/"lwm_course"/"a.py").write_text("a = 2\n")
    assert git_revision().endswith("+dirty")


# Results files

def test_results_keep_numbers_of_numpy_and_torch(tmp_path):
    figure = Figure("x", np.float32(0.5), n=np.int64(3), interval=(torch.tensor(0.25), np.float64("nan")))
    save_results(tmp_path/"deep"/"a.json", "a test", [figure], seed=np.int64(7), table={1: np.arange(3)}, where=tmp_path)
    found = load_results(tmp_path/"deep")["a"]
    assert found["figures"][0]["value"] == 0.5 and found["figures"][0]["interval"] == [0.25, None]
    assert (found["seed"], found["table"], found["where"]) == (7, {"1": [0, 1, 2]}, str(tmp_path))
    assert {"command", "date", "machine", "git_revision"} <= set(found)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path/"a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError): write_json(path, {"a": object()})
    with pytest.raises(ValueError): write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_written_file_is_readable_by_others_and_alone(tmp_path):
    write_json(tmp_path/"new"/"a.json", {"a": 1})
    assert (tmp_path/"new"/"a.json").stat().st_mode & 0o777 == 0o644 and len(list((tmp_path/"new").iterdir())) == 1


def test_an_interrupted_replace_leaves_no_temporary_file(tmp_path, monkeypatch):
    def full(*_): raise OSError("No space left on device")
    monkeypatch.setattr(course.os, "replace", full)
    with pytest.raises(OSError, match="No space"): write_json(tmp_path/"a.json", {"a": 1})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ['{"figures": [', "", "[1, 2]", '{"figures": 3}', "null"])
def test_damaged_results_are_named(tmp_path, text):
    (tmp_path/"bench.json").write_text(text)
    with pytest.raises(ValueError, match="bench.json"): load_results(tmp_path)


def test_results_that_are_not_there(tmp_path):
    assert load_results(tmp_path) == {}
    with pytest.raises(FileNotFoundError, match="nowhere"): load_results(tmp_path/"nowhere")


def test_committed_results_can_be_read():
    load_results(course.root()/"results")


def test_bootstrap_has_the_width_of_theory():
    values = np.random.default_rng(0).normal(3, 2, 400)
    mean, low, high = bootstrap(values)
    assert abs(mean - values.mean()) < 1e-9 and low < mean < high
    assert abs((high - low)/(2*1.96*values.std()/20) - 1) < 0.15
    with pytest.raises(ValueError): bootstrap([])


# Gates

ORDER = ["no-go", "pivot", "go"]


@given(number, number, number, number, st.booleans())
def test_a_better_value_never_gets_a_worse_verdict(a, b, target, no_go, higher):
    worse, better = (min(a, b), max(a, b)) if higher else (max(a, b), min(a, b))
    no_go = min(no_go, target) if higher else max(no_go, target)
    words = [verdict(v, target, no_go, higher) for v in (worse, better)]
    assert ORDER.index(words[0]) <= ORDER.index(words[1])


@given(number, number, st.booleans())
def test_more_and_less_are_mirror_images(value, target, higher):
    assert verdict(value, target, higher=higher) == verdict(-value, -target, higher=not higher)


@given(number, number)
def test_nothing_that_only_equals_its_baseline_is_a_go(value, target):
    assert verdict(value, target, baseline=value) != "go" and verdict(value, target, higher=False, baseline=value) != "go"


@pytest.mark.parametrize("value", [None, float("nan")])
def test_nothing_measured_is_no_verdict(value):
    assert verdict(value, 0) == "not measured"


def run_with(*figures, gpu=None):
    return dict(figures=[dict(f) for f in figures], machine=dict(gpu=gpu, cores=2), date="2026-01-01T00:00:00+00:00")


FPS = Gate("M9", "speed", "fps", 30, file="bench serving", gpu="RTX 4090", bar=60)


@pytest.mark.parametrize("gpu, word", [(None, "not measured"), ("NVIDIA RTX 3060", "not measured"), ("NVIDIA RTX 4090", "go")])
def test_a_gate_of_one_card_counts_on_that_card(gpu, word):
    assert judge(FPS, {"bench": run_with(dict(name="fps", value=40), gpu=gpu)})["verdict"] == word


def test_a_gate_reads_the_first_file_that_has_the_figure():
    card = "RTX 4090"
    other = run_with(dict(name="other", value=1), gpu=card)
    results = {"serving": run_with(dict(name="fps", value=70), gpu=card), "bench": other}
    row = judge(FPS, results)
    assert (row["measured"], row["bar_reached"], row["machine"], row["date"][:4]) == (70, True, "RTX 4090", "2026")


def test_the_worst_game_decides():
    gate = Gate("M4", "error", "e", 0.01, higher=False, no_go=1)
    of = lambda game, value, baseline=None: dict(name="e", value=value, game=game, baseline=baseline)
    assert judge(gate, {"eval": run_with(of("A", .001), of("B", .5), of("C", .2))})["game"] == "B"
    # The best value of all, and still the worst game: it does no better than its baseline.
    row = judge(gate, {"eval": run_with(of("A", .004, .009), of("B", .001, .001))})
    assert (row["game"], row["verdict"]) == ("B", "pivot")
    assert judge(gate, {"eval": run_with(of("A", None))})["verdict"] == "not measured"


def test_a_milestone_is_as_good_as_its_worst_figure():
    rows = lambda *words: [dict(verdict=w) for w in words]
    assert milestone_verdict(rows("go", "go")) == "go"
    assert milestone_verdict(rows("go", "not measured")) == "not measured"
    assert milestone_verdict(rows("go", "not measured", "pivot")) == "pivot"
    assert milestone_verdict(rows("pivot", "no-go")) == "no-go"
    assert milestone_verdict([]) == "not measured"


def test_gates_are_sound():
    plan = {f"M{i}" for i in range(1, 13)} | {f"D{i}" for i in range(1, 5)}
    assert plan <= {g.milestone for g in GATES}
    for g in GATES:
        sign = 1 if g.higher else -1
        assert g.pivot and (g.no_go is None or sign*g.no_go < sign*g.target) and (g.bar is None or sign*g.bar >= sign*g.target), g


def test_gates_of_every_chapter_can_be_shown():
    for chapter in CHAPTERS:
        table = gates(chapter.number, results={})
        assert len(table.rows) == sum(g.milestone in chapter.milestones.split() for g in GATES)
        assert str(table) and table._repr_markdown_()


def test_the_report_on_two_machines_says_which(tmp_path):
    bench = run_with(dict(name="fps", value=40), gpu="RTX 4090")
    one, two = report({"bench": bench}, []), report({"bench": bench, "eval": run_with(dict(name="skill", value=0.5))}, [])
    assert "machine: RTX 4090" in report_text(one)
    assert re.search(r"skill over copying.*2 CPU cores", report_text(two)) and re.search(r"M9 .*RTX 4090", report_text(two))


def test_the_report_reads_results_alone():
    found = report({"eval": run_with(dict(name="skill", value=0.5, n=9, baseline=0))}, [])
    text = report_text(found)
    assert "0.5" in text and "pivot" in text and "lwm bench --json results/bench.json" in text
    assert {m["name"] for m in found["milestones"]} == {g.milestone for g in GATES}


# Map

def test_the_map_and_the_notebooks_agree(repository):
    there = {p.stem for p in (repository/"nbs").glob("[0-9][0-9]_*.ipynb")}
    assert there <= {c.notebook for c in CHAPTERS}
    assert {c.notebook for c in CHAPTERS if c.exists} == there


def test_links_of_the_course_table_lead_somewhere(repository):
    links = re.findall(r"\]\((\S+?)\)", course_table())
    assert links and [link for link in links if not (repository/link).exists()] == []


@pytest.mark.parametrize("name", [7, "7", "07", "dynamics", "07_dynamics", " Dynamics "])
def test_a_chapter_has_several_names(name):
    assert find_chapter(name).notebook == "07_dynamics"


def test_minutes_are_kept_by_notebook_size_and_machine(tmp_path, monkeypatch):
    path = tmp_path/"notebooks.json"
    record_minutes("03_tokenizer", 5, "course", path)
    record_minutes("03_tokenizer", 4, "course", path)
    record_minutes("03_tokenizer", 0.5, "smoke", path)
    here = machine()
    for name, gb in (("Tesla T4", 15.8), ("NVIDIA H200", 150.0)):
        monkeypatch.setattr(course, "machine", lambda: dict(here, gpu=name, vram_gb=gb))
        record_minutes("03_tokenizer", 1, "course", path)
    rows = {row["machine"]: row["LWM_SIZE=course"] for row in hardware_table(3, load_results(tmp_path)).rows}
    assert rows["T4-class GPU"] == rows["large GPU"] == "1 min" and rows[course.kind(dict(here, gpu=None))] == "4 min"
    assert all(row["LWM_SIZE=course"] == "not measured" for row in hardware_table(7, load_results(tmp_path)).rows)


# Budget

def test_budget_sums_ledgers_once(tmp_path):
    ledger = dict(seconds=3600, device="cuda", devices=2, cost_usd=3.5, date="2026-01-01")
    for folder in ("runs/a", "runs/b/deep", "models/nano"): write_json(tmp_path/folder/"ledger.json", ledger)
    write_json(tmp_path/"runs"/"c"/"ledger.json", dict(ledger, date="2026-01-02", device="cpu"))
    found = load_ledgers((tmp_path/"runs", tmp_path/"models", tmp_path/"nowhere"))
    spent = Budget.spent(found)
    assert len(found) == 2 and (spent.hours, spent.gpu_hours, spent.money) == (2, 2, 7)
    assert spent.storage_gb > 0


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_damaged_ledger_is_named(tmp_path, text):
    (tmp_path/"ledger.json").write_text(text)
    with pytest.raises(ValueError, match="ledger.json"): load_ledgers((tmp_path,))


def test_a_ledger_without_time_is_an_error():
    with pytest.raises(ValueError, match="seconds"): ledger_cost(dict(device="cuda"))


def test_budget_verdicts():
    words = lambda gpu_hours: {r["what"]: r["verdict"] for r in budget_rows(Budget(1, gpu_hours, 0, 0))}["gpu_hours"]
    assert [words(h) for h in (99, 101, 501)] == ["go", "pivot", "no-go"]


# Progress

@pytest.fixture
def learner_home(tmp_path, monkeypatch):
    monkeypatch.setenv("LWM_HOME", str(tmp_path/"me"))
    return tmp_path/"me"


def test_progress_survives_and_adds_up(learner_home):
    assert load_progress()["chapters"] == {}
    record_progress("01", [Outcome("a", "pass"), Outcome("b", "todo")], "go")
    record_progress("02", [Outcome("c", "fail")], "pivot")
    found = load_progress()["chapters"]
    assert found["01"]["exercises"] == {"a": "pass", "b": "todo"} and found["02"]["gate"] == "pivot"


@pytest.mark.parametrize("text", ['{"version": 1, "chapters"', "[]", '{"version": 1}', '{"version": 2, "chapters": {}}', ""])
def test_damaged_progress_is_named_and_kept(learner_home, text):
    learner_home.mkdir()
    (learner_home/"progress.json").write_text(text)
    with pytest.raises(ValueError, match="progress.json"): record_progress("01", [], "go")
    assert (learner_home/"progress.json").read_text() == text


# Exercises

SOLVED = "#| exercise: double\ndef double(x):\n    ### BEGIN SOLUTION\n    y = 2\n    return y*x\n    ### END SOLUTION\n"
CHECK = "#| check: double\nassert double(3) == 6"
WRONGS = ["#| wrong: double\ndouble = lambda x: x", "#| wrong: double\ndouble = lambda x: x*x"]


@pytest.fixture
def notebook(tmp_path):
    "Write a notebook of these code cells."
    def write(*sources):
        empty = dict(cell_type="code", metadata={}, outputs=[], execution_count=None)
        cells = [dict(empty, id=f"c{i}", source=s) for i, s in enumerate(sources)]
        write_json(tmp_path/"a.ipynb", dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5))
        return tmp_path/"a.ipynb"
    return write


def outcomes(path): return [(o.exercise, o.status) for o in check_notebook(path)]


@pytest.mark.parametrize("answer, status, said", [
    ("def double(x): return 2*x", "pass", ""),
    ("def double(x): raise NotImplementedError('your code here')", "todo", "not solved"),
    ("def double(x): return x", "fail", "assert double(3) == 6"),
    ("def double(x) return x", "fail", "SyntaxError in line 2"),
    ("def double(x): return x/0", "fail", "ZeroDivisionError"),
    ("def double(x): raise SystemExit(3)", "fail", "SystemExit"),
    ("import no_such_package", "fail", "no_such_package"),
    ("twice = 2", "fail", "double"),
])
def test_what_a_check_says(notebook, answer, status, said):
    outcome, = check_notebook(notebook(f"#| exercise: double\n{answer}", CHECK))
    assert outcome.status == status and said in outcome.message and "\n" not in outcome.message


def test_other_cells_may_fail_or_hold_magics(notebook):
    magics, where = "%matplotlib inline\n!ls\nif True:\n    %pip install x", "from pathlib import Path\nhere = Path('a.ipynb')"
    path = notebook(magics, SOLVED, "print(1/0)", where, CHECK + "\nassert here.exists()")
    assert outcomes(path) == [("double", "pass")]


def test_checks_print_nothing_and_restore_the_folder(notebook, capsys):
    before = os.getcwd()
    check_notebook(notebook(SOLVED, "print('loud')", CHECK))
    assert capsys.readouterr().out == "" and os.getcwd() == before


def test_a_check_that_draws_opens_no_window(notebook):
    plot = "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()\nassert plt.get_backend().lower() == 'agg'\n"
    assert outcomes(notebook(SOLVED, f"{CHECK}\n{plot}")) == [("double", "pass")]


def test_generated_notebook_is_stable_and_runs_in_jupyter(notebook, tmp_path):
    path = notebook("import json", SOLVED, CHECK, *WRONGS)
    make_exercise(path, tmp_path/"out"/"a.ipynb")
    first = (tmp_path/"out"/"a.ipynb").read_bytes()
    make_exercise(path, tmp_path/"out"/"a.ipynb")
    assert (tmp_path/"out"/"a.ipynb").read_bytes() == first
    nbformat = pytest.importorskip("nbformat")
    nb = nbformat.read(tmp_path/"out"/"a.ipynb", as_version=4)
    nbformat.validate(nb)
    assert [c.source for c in nb.cells] == ["import json", course.stub(SOLVED), CHECK]
    assert "    raise NotImplementedError(\"your code here\")\n" in course.stub(SOLVED) and "y = 2" not in course.stub(SOLVED)


@pytest.mark.parametrize("cells, said", [
    ([SOLVED, *WRONGS], "check cell"),
    ([SOLVED, SOLVED, CHECK, *WRONGS], "one exercise cell"),
    ([CHECK], "no exercise cell for double"),
    ([SOLVED, CHECK, WRONGS[0]], "plant two"),
    ([SOLVED.replace("### BEGIN SOLUTION", ""), CHECK, *WRONGS], "BEGIN SOLUTION"),
])
def test_malformed_solutions_are_refused(notebook, tmp_path, cells, said):
    path = notebook(*cells)
    with pytest.raises(ValueError, match=said) as caught: make_exercise(path, tmp_path/"out.ipynb")
    assert "a.ipynb" in str(caught.value) and not (tmp_path/"out.ipynb").exists()


def test_two_solution_parts_in_one_exercise(notebook):
    two = SOLVED.rstrip() + "\n\ndef triple(x):\n    ### BEGIN SOLUTION\n    return 3*x\n    ### END SOLUTION\n"
    assert course.stub(two).count("NotImplementedError") == 2 and "3*x" not in course.stub(two)
    assert len(exercises(notebook(two, CHECK))) == 1


def test_the_package_imports_without_torch_being_loaded():
    code = "import sys, lwm_course.course; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
