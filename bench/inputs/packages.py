"""Debian packages as files: downloaded by name and version, checked, and opened without being installed."""

import hashlib
import pathlib
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator

from bench.inputs.recipe import Package


def require_debian() -> None:
    """Raises ValueError where there are no Debian tools."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise ValueError(f"needs {tool}: run it on a Debian 12 system, or in a container of one")


def get_package(package: Package, folder: pathlib.Path) -> pathlib.Path:
    """The file of a package in a folder, downloaded with apt if it is not there.

    Raises:
      ValueError: apt does not have this version, or the file is another one.
    """
    path = folder / f"{package.name}_{package.version.replace(':', '%3a')}_all.deb"
    if not path.exists():
        wanted = f"{package.name}={package.version}"
        done = subprocess.run(["apt-get", "download", wanted], cwd=folder, capture_output=True, text=True)
        if done.returncode or not path.exists():
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise ValueError(
                f"apt-get download {wanted} failed: {reason}; run apt-get update, or if a newer version has taken its "
                f"place, put {path.name} from an archive of old packages into {folder}"
            )
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != package.sha256:
        raise ValueError(f"{path}: expected SHA-256 {package.sha256}, got {found}; remove it, so that it is downloaded")
    return path


def files_of(package: Package, path: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    """Path and content of the package's documents, as they lie in its file."""
    with (
        subprocess.Popen(["dpkg-deb", "--fsys-tarfile", path], stdout=subprocess.PIPE) as unpacking,
        tarfile.open(fileobj=unpacking.stdout, mode="r|") as files,
    ):
        for member in files:
            name = member.name.removeprefix("./")
            if member.isfile() and re.fullmatch(package.files, name):
                content = files.extractfile(member)
                assert content is not None  # as it is a file
                yield name, content.read()
