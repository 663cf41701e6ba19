"""A state comes back as it was, or not at all."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench.training.checkpoints import latest_step, open_checkpoints

STATE = {"weights": jnp.arange(4096, dtype=jnp.float32), "key": jax.random.key(3)}


@pytest.fixture
def folder(tmp_path):
    with open_checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(4, STATE)
        checkpoints.save(8, STATE)
    return tmp_path / "run"


def restored(folder):
    with open_checkpoints(folder) as checkpoints:
        return checkpoints.restore(checkpoints.latest, jax.tree.map(jnp.zeros_like, STATE))


def test_what_was_saved_is_restored(folder):
    assert latest_step(folder) == 8
    assert latest_step(folder / "none") == 0
    found = restored(folder)
    np.testing.assert_array_equal(found["weights"], STATE["weights"])
    assert found["key"] == STATE["key"]


@pytest.mark.parametrize("damage", ["cut off", "a bit"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # see pyproject.toml
def test_damage_is_one_line(folder, damage):
    largest = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    if damage == "cut off":
        del data[len(data) // 2 :]
    else:
        data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    with pytest.raises(ValueError, match=f"^{folder}: the checkpoint of step 8 is damaged: .*; remove that folder"):
        restored(folder)
    gc.collect()
