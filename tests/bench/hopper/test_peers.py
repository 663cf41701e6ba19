"""The peers that run here are right; the others say why they do not."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from bench.hopper import peers
from bench.hopper.peers import Implementation, matmul_bf16_peers, matmul_fp8_peers
from bench.model.shapes import GemmShape
from bench.record.provenance import package_version


def test_a_package_that_is_missing_is_the_reason():
    missing = Implementation("x", "no_such_package", {})
    assert missing.why_not() == "no_such_package is not installed"
    assert package_version("jax") == jax.__version__


def test_torch_that_is_missing_is_the_reason(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    peers.why_not_torch.cache_clear()
    (torch,) = matmul_fp8_peers()
    assert torch.why_not() == "torch is not installed"
    peers.why_not_torch.cache_clear()


def test_bf16_peers():
    names = [peer.name for peer in matmul_bf16_peers(GemmShape(8, 48, 7168, 2048))]
    assert names == ["jax.lax.ragged_dot", "tokamax.ragged_dot", "jax ragged_dot_mgpu", "torch._grouped_mm"]


@pytest.mark.parametrize(("rows", "block_m"), [(48, 64), (64, 64), (4096, 128)])
def test_mgpu_configurations_fit_shared_memory(rows, block_m):
    configurations = matmul_bf16_peers(GemmShape(8, rows, 7168, 2048))[2].functions
    assert len(configurations) > 1
    for name in configurations:
        m, n, k, steps, _ = map(int, name.split("x"))
        assert m == block_m
        assert 2 * (steps * (m + n) * k + m * n) <= 227 * 1024


def test_preparation_leaves_inputs_as_they_are():
    x = jnp.ones(3)
    assert Implementation("x", "jax", {}).prepare(x, 1) == (x, 1)
