"""The text from packages: what is in it, and that another package is refused."""

import hashlib
import lzma
import shutil
import subprocess

import pytest

import bench.corpus
from bench.command.parser import run
from bench.inputs.recipe import PACKAGES, Package

ESSAY = b"Of routers and of the experts that they choose, much is said, and little of it is measured. " * 4

needs_debian = pytest.mark.skipif(
    shutil.which("dpkg-deb") is None or shutil.which("apt-get") is None, reason="needs the tools of Debian"
)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A recipe of one package, whose file lies in a folder."""
    root = tmp_path / "root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN/control").write_text(
        "Package: essays\nVersion: 1:2-3\nArchitecture: all\nMaintainer: a <a@b>\nDescription: x\n"
    )
    for name, content in {"b.txt": ESSAY, "a.txt": ESSAY.upper(), "c.bin": ESSAY[::-1], "short.txt": b"short"}.items():
        (root / name).write_bytes(content)
    folder = tmp_path / "debs"
    folder.mkdir()
    path = folder / "essays_1%3a2-3_all.deb"
    subprocess.run(["dpkg-deb", "--build", root, path], check=True, capture_output=True)
    made = Package("essays", "1:2-3", hashlib.sha256(path.read_bytes()).hexdigest(), r".*\.txt")
    monkeypatch.setattr(bench.corpus, "PACKAGES", (made,))
    return path


def call(tmp_path):
    return run(bench.corpus.main, [str(tmp_path / "text.xz"), "--packages", str(tmp_path / "debs")])


@needs_debian
def test_documents_of_a_package_become_a_text(package, tmp_path, monkeypatch, capsys):
    expected = ESSAY.upper() + b"\0" + ESSAY
    monkeypatch.setattr(bench.corpus, "SHA256", hashlib.sha256(expected).hexdigest())
    assert call(tmp_path) == 0
    assert lzma.decompress((tmp_path / "text.xz").read_bytes()) == expected
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[2:4]] == [["essays", "2"], ["all", "2"]]
    monkeypatch.setattr(bench.corpus, "SHA256", "another")
    assert call(tmp_path) == 1
    assert "expected the SHA-256 another" in capsys.readouterr().err


@needs_debian
def test_another_package_is_refused(package, tmp_path, capsys):
    package.write_bytes(package.read_bytes() + b"x")
    assert call(tmp_path) == 2
    assert "essays_1%3a2-3_all.deb: expected SHA-256" in capsys.readouterr().err


def test_a_name_that_does_not_say_how_it_is_packed_is_refused(tmp_path, capsys):
    assert run(bench.corpus.main, [str(tmp_path / "text.txt")]) == 2
    assert "FILE must end in .xz" in capsys.readouterr().err


def test_every_package_is_named_with_its_version_and_hash():
    assert len({package.name for package in PACKAGES}) == len(PACKAGES)
    assert all(package.version and len(package.sha256) == 64 for package in PACKAGES)
