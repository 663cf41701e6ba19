"""What the whole layer is timed on: over chips, and on one with the share of each."""

import contextlib

import jax
import numpy as np
import pytest

from bench.exchange import whole_layer
from bench.exchange.tokens import Tokens
from bench.measure.clock import CallTime
from bench.one_chip.cases import Case
from moejax import MoEConfig
from pallas_kernels.top_k import top_k_ids
from sharding.mesh import make_mesh

CONFIG = MoEConfig(128, 64, 8, 2)


@pytest.fixture
def timed(monkeypatch):
    """What was timed: the shape of the tokens, the experts, the calls, and how many rows each expert gets."""
    seen = []

    def wall_times(chain, x, params, *, repeats, calls):
        ids = top_k_ids(x.astype("float32") @ params.router["kernel"], 2, backend="xla")
        rows = np.bincount(np.asarray(ids).reshape(-1), minlength=params.gate_up.shape[0])
        seen.append((x.shape, params.gate_up.shape[0], calls, set(rows.tolist())))
        return CallTime.of([7.0])

    monkeypatch.setattr(whole_layer, "wall_times", wall_times)
    return seen


def test_one_chip_has_its_share_of_experts_and_tokens_and_a_load_of_the_same_kind(timed):
    case = Case("topk", tokens=4 * 8, experts=8, k=2, hidden=128, load="balanced")
    tokens = Tokens.of(case, CONFIG, make_mesh(4, devices=jax.devices("cpu")[:4]))
    how = dict(length=3, repeats=2, seed=0, watch=lambda _: contextlib.nullcontext())
    assert whole_layer.time_on_one_chip(case, CONFIG, 4, **how) == 7.0
    assert whole_layer.time_over_chips(tokens, "dense", **how) == 7.0
    assert timed == [((8, 128), 2, 3, {8}), ((32, 128), 8, 3, {8})]


def test_a_chip_with_fewer_experts_than_choices_has_no_layer(timed):
    case = Case("topk", tokens=8 * 8, experts=8, k=2, hidden=128, load="balanced")
    how = dict(length=3, repeats=2, seed=0, watch=lambda _: contextlib.nullcontext())
    assert whole_layer.time_on_one_chip(case, CONFIG, 8, **how) is None
    assert timed == []
