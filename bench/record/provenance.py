"""Where figures come from: the command, chip, driver, versions, commit and date that belong beside them."""

import datetime
import importlib.metadata
import os
import pathlib
import platform
import shlex
import subprocess
from collections.abc import Sequence
from typing import Any

import jax


def provenance(
    module: str, argv: Sequence[str], chip: str, packages: Sequence[str], commit: str | None
) -> dict[str, Any]:
    """The head of a record; the driver is that of an NVIDIA GPU, "unknown" where there is none.

    Args:
      module: what `python -m` ran.
      argv: its arguments.
      chip: as the device calls itself.
      packages: distributions whose versions matter.
      commit: the commit to record; None for what git says.
    """
    return {
        "command": command_line(module, argv),
        "chip": chip,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown",
        "versions": {package: package_version(package) for package in packages},
        "commit": commit or current_commit(),
        "date": now(),
    }


def command_line(module: str, argv: Sequence[str]) -> str:
    """What was typed."""
    return shlex.join(["python", "-m", module, *argv])


def now() -> str:
    """The time in UTC, as ISO 8601 has it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def package_version(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def chip_name(device: jax.Device | None = None) -> str:
    """A device, the first if None, as it calls itself; a CPU's architecture and cores."""
    device = jax.devices()[0] if device is None else device
    return f"{platform.machine()} CPU, {os.cpu_count()} cores" if device.platform == "cpu" else device.device_kind


def current_commit() -> str:
    """The commit of this code, "+dirty" after it when files differ from it; "unknown" where it is in no checkout."""
    here = pathlib.Path(__file__)
    git = "git", "-C", str(here.parent)
    if not _output(*git, "ls-files", here.name):  # git is silent, or tells of a project that has this one installed
        return "unknown"
    return _output(*git, "rev-parse", "--short", "HEAD") + ("+dirty" if _output(*git, "status", "--porcelain") else "")


def _output(*command: str) -> str:
    """The first line that a command prints; empty when it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except OSError:
        return ""
    return next(iter(done.stdout.splitlines()), "").strip() if done.returncode == 0 else ""
