"Version, requirements and extras come from settings.ini; everything else is in pyproject.toml."
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

config = ConfigParser()
config.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")
settings = config["DEFAULT"]
suffix = "_requirements"
extras = {key.removesuffix(suffix): value.split() for key, value in settings.items() if key.endswith(suffix)}
extras["all"] = sorted({r for name in ("games", "video", "notebooks", "train", "export", "rtx", "dev") for r in extras[name]})

setup(version=settings["version"], install_requires=settings["requirements"].split(), extras_require=extras)
