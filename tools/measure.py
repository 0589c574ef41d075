"""Measure how long the chapters and the make targets take, and write that to results/.

python tools/measure.py notebooks [00 07]        results/notebooks.json: every chapter, or those named, in the size LWM_SIZE
python tools/measure.py commands [demo test]     results/commands.json: make targets in a fresh clone with a new environment
"""
import argparse
import asyncio
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGETS = "demo", "test", "bench", "train"


def copy_tree(target): # folder to make; returned
    "Copy what git tracks or would track: a run leaves the tree as it was."
    if not (ROOT/".git").exists(): # unpacked from an archive
        left_out = shutil.ignore_patterns(".venv*", "__pycache__", ".pytest_cache", "build", "dist", "*.egg-info", "runs", ".lwm")
        return Path(shutil.copytree(ROOT, target, ignore=left_out, dirs_exist_ok=True))
    command = ["git", "-c", "safe.directory=*", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if not (ROOT/name).is_file(): continue # deleted, not yet committed
        (target/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT/name, target/name)
    return target


def run_notebook(path,         # notebook to execute; its folder is the working folder, as in JupyterLab
                 longest=5400, # seconds
                ):             # (seconds it took, executed notebook)
    "Execute a notebook in a new kernel."
    import nbformat
    from nbclient import NotebookClient
    notebook, place = nbformat.read(path, as_version=4), {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(notebook, timeout=longest, startup_timeout=120, kernel_name="python3", resources=place)
    start = time.monotonic()
    with ThreadPoolExecutor(1) as pool: # the caller's thread may have an event loop of its own
        pool.submit(asyncio.run, asyncio.wait_for(client.async_execute(), longest)).result()
    return time.monotonic() - start, notebook


def notebooks(numbers):
    "Run chapters in their order, in a copy, so that a later one finds what an earlier one made."
    from lwm_course.course import record_minutes
    with tempfile.TemporaryDirectory() as folder:
        copy_tree(Path(folder))
        os.environ.update(PYTHONPATH=folder, LWM_HOME=str(Path(folder)/"home"))
        for path in sorted((Path(folder)/"nbs").glob("[0-9][0-9]_*.ipynb")):
            if numbers and path.stem[:2] not in numbers: continue
            minutes = run_notebook(path)[0]/60
            print(f"{path.stem}: {minutes:.2f} min")
            record_minutes(path.stem, minutes, path=ROOT/"results"/"notebooks.json")


def free_port():
    "A TCP port that nobody listens on."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def served(address):
    "Whether the page is there."
    try: return urllib.request.urlopen(address, timeout=10).status == 200
    except urllib.error.HTTPError: raise
    except OSError: return False


def time_demo(clone):
    "Seconds from the command to the served page; the environment is there."
    port = free_port()
    start = time.monotonic()
    demo = subprocess.Popen(["make", "demo", f"ARGS=--port {port}"], cwd=clone, start_new_session=True)
    try:
        while not served(f"http://127.0.0.1:{port}/"):
            if demo.poll() is not None: sys.exit("make demo ended before it served a page")
            time.sleep(0.1)
        return time.monotonic() - start
    finally:
        os.killpg(demo.pid, 15)
        demo.wait(30)


def time_make(clone, *arguments):
    "Seconds of one make run."
    start = time.monotonic()
    subprocess.run(["make", *arguments], cwd=clone, check=True)
    return time.monotonic() - start


def commands(targets):
    "Time make targets in a fresh clone of the last commit, beginning without an environment."
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder)/"course"
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        taken = {"install for make demo": time_make(clone, ".venv/.playable")}
        taken["install for the rest"] = time_make(clone, ".venv/.complete")
        for target in targets or TARGETS:
            taken[f"make {target}"] = time_demo(clone) if target == "demo" else time_make(clone, target)
    for name, seconds in taken.items(): print(f"{name}: {seconds:.0f} s")
    record_commands(taken)


def record_commands(taken): # {name: seconds}
    "Write results/commands.json; what another run on this machine measured, and this one did not, stays."
    from lwm_course.course import Figure, load_results, machine, save_results
    here, old = machine(), load_results(ROOT/"results").get("commands", dict(machine={}, figures=[]))
    same = all(old["machine"].get(key) == here[key] for key in ("cpu", "threads", "gpu"))
    kept = [Figure(**figure) for figure in old["figures"] if same and figure["name"] not in taken]
    figures = [Figure(name, round(seconds, 1), "s", n=1) for name, seconds in taken.items()]
    save_results(ROOT/"results"/"commands.json", "python tools/measure.py commands", sorted(kept + figures, key=lambda f: f.name))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("notebooks", "commands"))
    parser.add_argument("names", nargs="*", help="chapter numbers, or make targets; none: all")
    args = parser.parse_args()
    (notebooks if args.what == "notebooks" else commands)(args.names)
