"What every test may use: the repository, copies of it, a browser; and settings that keep tests off the network."
import os
import shutil
import signal
from pathlib import Path

import pytest
from measure import copy_tree # of tools/, see pyproject.toml

REPOSITORY = Path(__file__).resolve().parent.parent

# A shell's background job ignores Ctrl-C, and so would every process that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("LWM_SIZE", "smoke")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("MPLBACKEND", "Agg")


@pytest.fixture(scope="session", autouse=True)
def private_folders(tmp_path_factory):
    "Progress files and the settings of Jupyter and matplotlib go to a temporary folder."
    folder = tmp_path_factory.mktemp("home")
    names = dict(LWM_HOME="lwm", JUPYTER_CONFIG_DIR="jupyter", JUPYTER_DATA_DIR="jupyter-data",
                 JUPYTER_RUNTIME_DIR="jupyter-runtime", IPYTHONDIR="ipython", MPLCONFIGDIR="matplotlib")
    with pytest.MonkeyPatch.context() as patch:
        for variable, name in names.items(): patch.setenv(variable, str(folder/name))
        yield folder


@pytest.fixture(scope="module")
def one_thread():
    "Tensors as small as those of the tests are slower on several threads."
    import torch
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def repository():
    "The top folder of the repository."
    return REPOSITORY


@pytest.fixture(scope="session")
def repository_copy(tmp_path_factory):
    "A copy of the repository that all tests share: write only below folders that git ignores."
    return copy_tree(tmp_path_factory.mktemp("shared")/"course")


@pytest.fixture
def copy_of_repository(tmp_path):
    "A copy of the repository that one test may damage."
    return copy_tree(tmp_path/"course")


def chromium_path():
    "An installed Chromium, or None: then Playwright looks for its own."
    found = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    return os.environ.get("LWM_BROWSER") or next(filter(None, found), None)


@pytest.fixture(scope="module")
def browser():
    "A headless Chromium that talks to this machine only."
    from playwright.sync_api import sync_playwright
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=arguments)
        yield browser
        browser.close()
