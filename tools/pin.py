"`python tools/pin.py > constraints.txt`: the versions, in this environment, of everything that settings.ini asks for."
import sys
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, version, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HEADER = """\
# Exact versions of what `make` installs, on Python 3.11, 3.12 and 3.13. Made by `python tools/pin.py` in an environment
# with lwm-course[all]. The library's own bounds, in settings.ini, are loose. Torch carries no local version (such as +cpu),
# so that the index given in PIP_ARGS decides which build is installed."""
EXTRAS = "games", "video", "notebooks", "train", "export", "rtx", "dev"              # what the extra `all` joins, in setup.py
ELSEWHERE = ['audioop-lts==0.2.2; python_version >= "3.13"']        # needed by gradio where Python no longer has audioop


def wanted():
    "Requirements of the library and of the extra `all`, from settings.ini."
    config = ConfigParser()
    config.read(Path(__file__).resolve().parent.parent/"settings.ini", encoding="utf-8")
    keys = ["requirements", *(f"{extra}_requirements" for extra in EXTRAS)]
    return [Requirement(line) for key in keys for line in config["DEFAULT"][key].split()]


def applies(requirement, extras):
    "Whether a package that was asked for with `extras` needs `requirement` on this Python."
    if requirement.marker is None: return True
    return any(requirement.marker.evaluate({"extra": extra}) for extra in extras or {""})


def closure(requirements): # -> {canonical name: version}, everything that `requirements` bring with them
    "Walk the installed packages' own requirements."
    todo, seen, pins = list(requirements), set(), {}
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if (name, frozenset(requirement.extras)) in seen: continue
        seen.add((name, frozenset(requirement.extras)))
        pins[name] = version(name).split("+")[0]
        needs = [Requirement(line) for line in requires(name) or []]
        todo += [need for need in needs if applies(need, requirement.extras)]
    return pins


if __name__ == "__main__":
    try: pins = closure(wanted())
    except PackageNotFoundError as e: sys.exit(f"pin.py: {e.name} is not installed here. Install lwm-course[all] first.")
    lines = [f"{name}=={number}" for name, number in pins.items() if not name.startswith(("nvidia-", "cuda-", "triton"))]
    print("\n".join([HEADER, *sorted(lines + ELSEWHERE)]))
