"""The version that moejax says it has."""

import importlib.metadata
import pathlib
import re
import tomllib

import moejax
from moejax import version

PROJECT = tomllib.loads((pathlib.Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


def test_the_version_is_that_of_the_package(monkeypatch):
    asked = []
    monkeypatch.setattr(importlib.metadata, "version", lambda package: asked.append(package) or "1.2.3")
    assert version.installed_version() == "1.2.3"
    assert asked == [PROJECT["name"]]


def test_a_checkout_that_is_not_installed_says_so():
    assert version.installed_version("moejax-that-nobody-installed") == version.NOT_INSTALLED


def test_it_is_a_version_in_the_package():
    assert moejax.__version__ in (PROJECT["version"], version.NOT_INSTALLED)
    assert re.fullmatch(r"\d+(\.\d+)*(\+[a-z0-9.]+)?", moejax.__version__)
    assert "__version__" in moejax.__all__
