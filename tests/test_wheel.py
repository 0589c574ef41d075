"The built wheel, installed into an empty environment, plays the shipped model."
import os
import re
import shlex
import subprocess
import sys
import time
import venv
import zipfile

import pytest
from measure import free_port, served

LARGEST_WHEEL = 40_000_000 # bytes


def run(*command, **options):
    "Run a command to its end; show what it printed when it fails."
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(repository_copy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--outdir", folder, repository_copy)
    [path] = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def empty_environment(wheel, repository, tmp_path_factory):
    "Command folder of a new environment that holds the wheel and what it requires, nothing else."
    folder = tmp_path_factory.mktemp("empty")/"venv"
    venv.create(folder, with_pip=True)
    run(folder/"bin"/"python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
        "-c", repository/"constraints.txt", *shlex.split(os.environ.get("PIP_ARGS", "")), wheel)
    return folder/"bin"


def test_wheel_is_small_and_holds_the_model(wheel):
    assert wheel.stat().st_size <= LARGEST_WHEEL
    names = zipfile.ZipFile(wheel).namelist()
    assert any(re.fullmatch(r"lwm_course/models/nano/.*\.safetensors", name) for name in names)
    assert any(name.startswith("lwm_course/web/") for name in names)
    assert not any(name.startswith(("tests/", "nbs/", "solutions/", "data_samples/")) for name in names)


def test_command_starts_without_optional_packages(empty_environment, tmp_path):
    assert "demo" in run(empty_environment/"lwm", "--help", cwd=tmp_path)
    installed = run(empty_environment/"python", "-m", "pip", "list", "--format=freeze", cwd=tmp_path).lower()
    assert "gymnasium" not in installed and "jupyterlab" not in installed


@pytest.fixture(scope="module")
def page(empty_environment, tmp_path_factory):
    "Address of a demo that runs from the wheel, in a folder that is not the repository."
    port, folder = free_port(), tmp_path_factory.mktemp("anywhere")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "LWM_SIZE")}
    with open(folder/"log", "w") as log:
        command = [empty_environment/"lwm", "demo", "--port", str(port)]
        demo = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=environment)
    try:
        address, end = f"http://127.0.0.1:{port}/", time.monotonic() + 120
        while not served(address):
            assert demo.poll() is None and time.monotonic() < end, (folder/"log").read_text()
            time.sleep(0.3)
        yield address
    finally:
        demo.terminate()
        demo.wait(30)


def test_demo_plays_from_the_wheel(page, browser):
    tab = browser.new_page()
    tab.goto(page)
    tab.wait_for_selector(".lwm[data-frame='0']", state="attached", timeout=60_000)
    picture = "document.querySelector('.lwm-model').toDataURL()"
    first = tab.evaluate(picture)
    tab.keyboard.down("ArrowRight") # a key starts the game
    tab.wait_for_function("Number(document.querySelector('.lwm').dataset.frame) >= 15", timeout=60_000)
    assert tab.evaluate(picture) != first
    tab.close()
