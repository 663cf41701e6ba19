"""The code that README.md shows, run as it stands there, on a layer of that shape made narrow."""

import pathlib
import re

import chex
import jax
import jax.numpy as jnp

import moejax
from tests.moejax.layers import narrow

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_first_screen_shows_the_layer_in_five_lines():
    lines = [line for line in BLOCKS[0].splitlines() if line]
    assert len(lines) <= 5
    assert README.index(BLOCKS[0]) < 1200


def test_code_runs(monkeypatch):
    """Each block after those before it."""
    monkeypatch.setattr(moejax, "get_preset", lambda name, **changes: narrow(name, **changes))
    x = jax.random.normal(jax.random.key(0), (2, 5, narrow("qwen3-30b-a3b").hidden_size), jnp.bfloat16)
    names = {"x": x}
    for block in BLOCKS:
        exec(block, names)
        chex.assert_trees_all_equal_shapes_and_dtypes(names["y"], x)
        chex.assert_tree_all_finite(names["y"])
        assert float(names["aux"].loss) > 0


def test_every_preset_is_named():
    assert all(f"`{name}`" in README for name in moejax.PRESETS)
