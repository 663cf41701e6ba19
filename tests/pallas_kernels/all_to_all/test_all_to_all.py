"""Every row of a block lands where it should, on every backend, and nothing else is asked for."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from pallas_kernels.all_to_all import Blocks, all_to_all
from pallas_kernels.quantize import QTensor, dequantize, quantize
from tests.helpers import normal, same_bits
from tests.pallas_kernels.all_to_all.moves import (
    FOUR,
    OTHER_AXES,
    Mesh,
    blocks_of,
    by_routes_and_back,
    check,
    check_tokens,
    loads,
    moving,
    moving_tokens,
    random_sizes,
    routes_of,
    tables,
    tokens_for,
)
from tests.pallas_kernels.backends import every_backend
from tests.pallas_kernels.kernels_tpu import interpreted

backend = every_backend("all_to_all", without=("pallas_gpu",))  # which has as many chips as there are: see its suite


OTHER_ORDER = Mesh((2, 3), ("expert", "data"), ("expert",))


@pytest.mark.parametrize("mesh", [FOUR, OTHER_AXES, OTHER_ORDER], ids=str)
@pytest.mark.parametrize(
    ("dtype", "hidden"), [("float32", 5), ("bfloat16", 300), ("float8_e4m3fn", 640), ("int8", 16), ("float16", 256)]
)
@pytest.mark.quick("*-bfloat16-300-4-of-8", "*-bfloat16-300-2-of-6", "*-float8_e4m3fn-640-4-of-4")
def test_random_blocks(backend, dtype, hidden, mesh, rng):
    sizes = random_sizes(rng, mesh, 2)
    x = normal(rng, mesh.chips * mesh.groups, max(1, sizes.sum((1, 2)).max()), hidden)
    check(mesh, sizes, (x * 20).astype(dtype), backend, num_rows=int(sizes.sum((0, 2)).max()) + 3)


@pytest.mark.parametrize("load", loads(4))
def test_cruel_loads(backend, load, rng):
    sizes = loads(4)[load]
    check(FOUR, sizes, normal(rng, 4, 18, 8), backend, num_rows=36)


@pytest.mark.quick("xla")
def test_tokens_by_a_plan(backend, rng):
    ids, sizes = tokens_for(rng, FOUR, 7, 3)
    x = normal(rng, 4, 7, 256, dtype="bfloat16")
    check_tokens(FOUR, x, ids, sizes, backend)
    check_tokens(FOUR, jax.vmap(lambda x: quantize(x, "int8", scaling="per_row"))(x), ids, sizes, backend)


@pytest.mark.quick("xla")
def test_the_gradient_of_tokens_sums_their_rows(backend, rng):
    ids, sizes = tokens_for(rng, FOUR, 7, 3)
    x, table = normal(rng, 4, 7, 8), blocks_of(tables(sizes))
    num_rows = int(sizes.sum((0, 2)).max())
    move = moving_tokens(FOUR, num_rows, backend)
    direction = normal(rng, 4, num_rows, 8)
    rows_used = np.arange(num_rows)[None, :, None] < sizes.sum((0, 2))[:, None, None]
    (found,) = jax.vjp(lambda x: move(x, ids, table), x)[1](jnp.where(rows_used, direction, jnp.nan))
    expected = np.zeros_like(found)
    for chip in range(4):
        senders, tokens, _ = np.nonzero(ids == chip)
        np.add.at(expected, (senders, tokens), np.asarray(direction)[chip, : len(tokens)])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scaling", [None, "per_row"])
def test_by_routes(scaling, rng):
    ids = rng.integers(-1, 12, (4, 9, 3)).astype(np.int32)
    x = normal(rng, 4, 9, 16, dtype="bfloat16")
    back = by_routes_and_back(FOUR, 4 * 27, 12, scaling, "xla")(x, ids).reshape(4, 9, 3, 16)
    sent = x if scaling is None else dequantize(quantize(x, "float8_e4m3fn", scaling=scaling), "bfloat16")
    expected = jnp.where((ids >= 0)[..., None], sent[:, :, None], 0)
    np.testing.assert_array_equal(back.astype(jnp.float32), expected.astype(jnp.float32))


def test_routes_on_which_chips_disagree_bring_nothing(rng):
    ids = rng.integers(0, 12, (4, 9, 3)).astype(np.int32)
    routes, _ = routes_of(FOUR, 4 * 27, 12, "xla")(ids)
    x = normal(rng, 4, 27, 8)
    assert not np.isnan(moving(FOUR, 108, "xla")(x, routes)).any()
    for name in ("targets", "addresses"):
        wrong = dataclasses.replace(
            routes, **{name: getattr(routes, name).at[1, :2].set(getattr(routes, name)[1, :2][::-1])}
        )
        assert np.isnan(moving(FOUR, 108, "xla")(x, wrong)).any()


@pytest.mark.parametrize("mode", ["eager", "on_wait"])
def test_values_and_scales_travel_together_whenever_copies_are_made(mode, rng):
    """Interpret mode finds faults of some kinds only where copies are made at once, of others only where late."""
    sizes = random_sizes(rng, OTHER_AXES, 2)
    x = normal(rng, 8, 24, 256, dtype="bfloat16")
    in_8_bits = jax.vmap(lambda x: quantize(x, "float8_e4m3fn", scaling="1x128"))(x)
    with interpreted(dma_execution_mode=mode):
        moving.cache_clear()
        check(OTHER_AXES, sizes, in_8_bits, "pallas_tpu")


def test_more_of_it_one_after_the_other(backend, rng):
    """Calls follow each other without a wait of the program's, in a loop, there and back."""
    sizes = random_sizes(rng, FOUR, 2)
    table = blocks_of(tables(sizes))
    rows_here, rows_there = max(1, sizes.sum((1, 2)).max()), max(1, int(sizes.sum((0, 2)).max()))
    x = normal(rng, 4, rows_here, 8)

    @functools.partial(
        jax.shard_map, mesh=FOUR.make(), in_specs=PartitionSpec("expert"), out_specs=PartitionSpec("expert")
    )
    def on_chip(x, blocks):
        blocks = jax.tree.map(lambda leaf: leaf[0], blocks)

        def by_routes_and_back(_, x):
            there = all_to_all(x, blocks, rows_there, FOUR.axes, backend=backend)
            return all_to_all(there, blocks.back, rows_here, FOUR.axes, backend=backend)

        return jax.lax.fori_loop(0, 3, by_routes_and_back, x[0])[None]

    back = np.asarray(jax.jit(on_chip)(x, table))
    for chip in range(4):
        rows = sizes[chip].sum()
        np.testing.assert_array_equal(back[chip, :rows], np.asarray(x)[chip, :rows])


def test_the_kernel_waits_for_its_peers_before_it_writes_and_before_it_leaves():
    """Interpret mode does not tell: its results are there before any chip begins, and nothing is left of a call."""
    blocks = blocks_of(tables(np.ones((4, 4, 1), int)))
    program = jax.make_jaxpr(moving(FOUR, 4, "pallas_tpu"))(jnp.zeros((4, 4, 8)), blocks)
    steps = re.findall(r"\b(dma_start|dma_wait|semaphore_signal|semaphore_wait)\b", str(program))
    copies, entered, writes = ["dma_start"], ["semaphore_signal", "semaphore_wait", "semaphore_signal"], ["dma_start"]
    assert steps == [*copies, *entered, *writes, *["dma_wait"] * 3, "semaphore_wait"]


def test_every_set_of_axes_has_a_barrier_of_its_own():
    numbers = set()
    for axes in (("data",), ("expert",), ("more",), ("data", "expert"), ("data", "more"), ("expert", "more")):
        mesh = dataclasses.replace(OTHER_AXES, axes=axes)
        blocks = blocks_of(tables(np.ones((mesh.chips, mesh.chips, 1), int)))
        program = jax.make_jaxpr(moving(mesh, 4, "pallas_tpu"))(jnp.zeros((8, 4, 8)), blocks)
        numbers |= set(re.findall(r"collective_id=(\d+)", str(program)))
    assert len(numbers) == 6


@pytest.mark.parametrize("mesh", [FOUR, OTHER_AXES], ids=str)
@pytest.mark.quick("xla-4-of-8")
def test_the_gradient_brings_rows_back(backend, mesh, rng):
    sizes = random_sizes(rng, mesh, 2)
    table = blocks_of(tables(sizes))
    num_rows = int(sizes.sum((0, 2)).max())
    x = normal(rng, mesh.chips * mesh.groups, max(1, sizes.sum((1, 2)).max()), 8)
    direction = normal(rng, mesh.chips * mesh.groups, num_rows, 8)
    move = moving(mesh, num_rows, backend)
    _, pullback = jax.vjp(lambda x: move(x, table), x)
    back = moving(mesh, x.shape[1], backend)(direction, jax.vmap(lambda blocks: blocks.back)(table))
    assert same_bits(pullback(direction)[0], back)
    _, moved = jax.jvp(lambda x: move(x, table), (x,), (2 * x,))
    np.testing.assert_array_equal(moved, 2 * move(x, table))


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Blocks) if field.name != "recv_sizes"])
def test_chips_that_disagree_get_nothing_on_a_cpu(name, rng):
    """What undefined behaviour would be elsewhere does not pass for a result."""
    sizes = np.full((4, 4, 1), 2)
    blocks = blocks_of(tables(sizes))
    wrong = np.array(getattr(blocks, name))
    wrong[1, 2] += 1
    blocks = dataclasses.replace(blocks, **{name: wrong})
    out = moving(FOUR, 8, "xla")(normal(rng, 4, 8, 8), blocks)
    assert np.isnan(np.asarray(out)).all((1, 2)).any()


@pytest.mark.parametrize(("num_sent", "num_rows"), [(7, 8), (8, 7)])
def test_blocks_beyond_the_rows_that_there_are_bring_nothing_on_a_cpu(num_sent, num_rows, rng):
    out = moving(FOUR, num_rows, "xla")(normal(rng, 4, num_sent, 8), blocks_of(tables(np.full((4, 4, 1), 2))))
    assert np.isnan(np.asarray(out)).all((1, 2)).any()


@pytest.mark.parametrize(
    ("x", "sizes", "message"),
    [
        (
            jnp.zeros((4, 8, 4)),
            np.zeros((4, 3, 2), int),
            r"blocks must be \[ep, n\] with ep = 4 chips along \('expert'",
        ),
        (
            QTensor(jnp.zeros((4, 8, 4), jnp.int8), jnp.ones((4, 1, 1))),
            np.zeros((4, 4, 2), int),
            r"x: rows that travel need scales of their own, got scale \[1, 1\] for 8 rows",
        ),
    ],
)
def test_errors(x, sizes, message):
    blocks = Blocks(*[jnp.asarray(sizes)] * 6)
    with pytest.raises(ValueError, match=message):
        moving(FOUR, 8, "xla")(x, blocks)
