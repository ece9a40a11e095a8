"""The files around the package say the same thing, and importing it costs next to nothing."""

from __future__ import annotations

import importlib.metadata
import re
import statistics
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import turbo_lab

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT: dict[str, Any] = PYPROJECT["project"]
DEPENDENCIES: list[str] = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


@pytest.mark.parametrize("text", DEPENDENCIES)
def test_every_dependency_is_justified_bounded_and_pinned(text: str) -> None:
    line = next(
        line for line in (ROOT / "pyproject.toml").read_text().splitlines() if f'"{text}"' in line
    )
    assert re.search(r",\s+# \S+", line), "say in a comment what it is for"
    wanted = Requirement(text)
    assert ">=" in str(wanted.specifier)
    assert pins()[canonicalize_name(wanted.name)] in wanted.specifier


def test_torch_and_torchvision_are_of_one_release() -> None:
    """The installed torchvision names the torch it was built against."""
    wanted = next(
        Requirement(text)
        for text in importlib.metadata.requires("torchvision") or []
        if Requirement(text).name == "torch"
    )
    assert wanted.specifier.contains(pins()["torch"])
    installed = Version(importlib.metadata.version("torchvision")).base_version
    assert installed == pins()["torchvision"].base_version


def test_environment_yml_is_pyproject() -> None:
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    *packages, last = conda["dependencies"]
    assert conda["name"] == PROJECT["name"]
    assert conda["channels"] == ["conda-forge"]
    assert packages == [f"python={PROJECT['requires-python'].removeprefix('>=')}", "pip"]
    assert last == {"pip": ["-c constraints.txt", "-e .[dev]"]}


def test_one_version_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert PROJECT["version"] == turbo_lab.__version__ == citation["version"]
    assert f"## {turbo_lab.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_import_pulls_nothing_heavy() -> None:
    code = (
        "import sys, turbo_lab\n"
        "heavy = ('torch', 'diffusers', 'matplotlib', 'numpy', 'pydantic')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_import_takes_less_than_300_ms() -> None:
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import turbo_lab"], check=True)
        seconds.append(time.perf_counter() - began)
    assert statistics.median(seconds) < 0.3


def test_no_private_paths_in_what_people_read() -> None:
    private = re.compile(r"(?<![\w.])/(home|root|work|Users|mnt|scratch)/\w+")
    files = [*ROOT.glob("*.md"), *ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("docs/**/*.md")]
    found = {path.name: private.findall(path.read_text()) for path in files}
    assert not any(found.values()), found


def test_make_help_names_every_command() -> None:
    done = subprocess.run(
        ["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert targets is not None
    for target in set(targets.group(1).split()) - {"help"}:
        assert f"make {target} " in done.stdout


def test_the_wheel_would_carry_the_artefacts() -> None:
    wheel = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["packages"] == ["turbo_lab"]
    assert "turbo_lab/artifacts/**" in wheel["artifacts"]
