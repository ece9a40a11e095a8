"""Where a result comes from: commit, machine, versions. The same on every call of a run."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import turbo_lab

_PACKAGES = ("turbo-lab", "torch", "diffusers", "peft", "numpy", "safetensors")
_CPUINFO = Path("/proc/cpuinfo")


def provenance() -> dict[str, Any]:
    """Return commit (or None), dirty (or None), machine and versions of this installation.

    ``dirty`` says whether the package's source differs from the commit; figures and notebooks,
    which a run writes itself, do not count. There is no time and no host name in it.
    """
    folder = Path(turbo_lab.__file__).parent
    commit, dirty = git_state(folder)
    return {"commit": commit, "dirty": dirty, "machine": machine(), "versions": versions()}


def git_state(folder: Path) -> tuple[str | None, bool | None]:
    """Return the commit of a package folder and whether its source was changed since.

    (None, None) without git, outside a repository, or where the repository around the folder
    does not track it: an environment inside somebody's project is not that project's commit.
    """
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None, None
    changes = _git(folder, "status", "--porcelain", "--", ".", ":(exclude)artifacts")
    return _git(folder, "rev-parse", "HEAD"), None if changes is None else bool(changes)


def machine() -> dict[str, Any]:
    """Return platform, processor, its instructions, threads in use and the GPU.

    The last digits of a training depend on the processor, and some of other generations bear one
    name: so there are its family and model, and what torch uses of it (``isa``, as AVX2). That and
    the GPU are None where torch is not loaded.
    """
    torch = sys.modules.get("torch")  # never the reason for importing it
    threads = torch.get_num_threads() if torch else os.environ.get("OMP_NUM_THREADS")
    gpu = torch.cuda.get_device_name() if torch and torch.cuda.is_available() else None
    return {
        "platform": platform.platform(),
        "cpu": _cpu(),
        "isa": torch.backends.cpu.get_cpu_capability() if torch else None,
        "threads": int(threads or os.cpu_count() or 1),
        "gpu": gpu,
    }


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of the packages results depend on."""
    return {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}


def _version(name: str) -> str | None:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return turbo_lab.__version__ if name == "turbo-lab" else None


def _cpu() -> str:
    with suppress(OSError, KeyError):
        lines = (line.partition(":") for line in _CPUINFO.read_text().splitlines())
        said = {key.strip(): value.strip() for key, _, value in lines}
        return f"{said['model name']}, family {said['cpu family']} model {said['model']}"
    return platform.processor() or platform.machine()


def _git(folder: Path, *arguments: str) -> str | None:
    """Run a read-only git command; None if it fails, is missing or takes long."""
    # A hook's GIT_DIR would answer for another repository; no optional locks: a status must not
    # stand in the way of somebody's commit.
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    env["GIT_OPTIONAL_LOCKS"] = "0"
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
