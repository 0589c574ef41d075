"Every chapter, and the front page, runs from a clean kernel in the smoke size."
from pathlib import Path

import pytest
from measure import run_notebook

NOTEBOOKS = sorted(path.name for path in (Path(__file__).resolve().parent.parent/"nbs").glob("*.ipynb"))
SECONDS = 600 # a kernel that hangs is ended; how long a chapter takes is measured by tools/measure.py


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs(name, repository_copy, tmp_path, monkeypatch):
    # The notebook and the library lie in a copy, so that the tree stays clean.
    monkeypatch.setenv("PYTHONPATH", str(repository_copy))
    monkeypatch.setenv("LWM_SIZE", "smoke")
    monkeypatch.setenv("LWM_HOME", str(tmp_path/"home"))
    _, notebook = run_notebook(repository_copy/"nbs"/name, longest=SECONDS)
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip())


def test_notebooks_are_found():
    assert {"index.ipynb", "00_start.ipynb"} <= set(NOTEBOOKS)
