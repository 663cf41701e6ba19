"""A user's own file with the name of one of moejax's packages is named in the error."""

import subprocess
import sys

import pytest

import moejax


@pytest.mark.parametrize("shadow", ["sharding.py", "sharding/__init__.py", "pallas_kernels.py"])
def test_the_file_that_shadows_is_named(shadow, tmp_path):
    file = tmp_path / shadow
    file.parent.mkdir(exist_ok=True)
    file.write_text("x = 1\n")
    script = tmp_path / "train.py"
    # Found after the script's folder, as an installed package is.
    root = str(next(iter(moejax.__path__))).removesuffix("/moejax")
    script.write_text(f"import sys\nsys.path.append({root!r})\nimport moejax\n")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert str(file) in last
    assert "shadows the package" in last
    assert "rename it" in last


def test_a_folder_of_another_kind_does_no_harm(tmp_path):
    (tmp_path / "bench").mkdir()
    script = tmp_path / "train.py"
    root = str(next(iter(moejax.__path__))).removesuffix("/moejax")
    script.write_text(f"import sys\nsys.path.append({root!r})\nimport moejax\nprint('fine')\n")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "fine"
