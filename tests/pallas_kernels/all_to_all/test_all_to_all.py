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
from pallas_kernels.quantize import QTensor, quantize
from tests.helpers import normal, same_bits
from tests.pallas_kernels.backends import every_backend
from tests.pallas_kernels.kernels_tpu import interpreted

backend = every_backend("all_to_all")


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Chips along axes, of which some take part together."""

    shape: tuple[int, ...]
    names: tuple[str, ...]
    axes: tuple[str, ...]

    def __str__(self):
        return f"{self.chips}-of-{self.chips * self.groups}"

    @property
    def chips(self) -> int:
        return int(np.prod([size for name, size in zip(self.names, self.shape, strict=True) if name in self.axes]))

    @property
    def groups(self) -> int:
        return int(np.prod(self.shape)) // self.chips

    def make(self) -> jax.sharding.Mesh:
        return jax.make_mesh(self.shape, self.names, axis_types=(jax.sharding.AxisType.Auto,) * len(self.names))


FOUR = Mesh((4,), ("expert",), ("expert",))
OTHER_AXES = Mesh((2, 2, 2), ("data", "expert", "more"), ("expert", "more"))
OTHER_ORDER = Mesh((2, 3), ("expert", "data"), ("expert",))


def tables(sizes: np.ndarray) -> np.ndarray:
    """Sizes [s, d, n] -> [3, s, d, n]: sizes, first rows at the sender, first rows at the receiver, without gaps."""
    chips = sizes.shape[0]
    sources = np.cumsum(sizes.reshape(chips, -1), 1).reshape(sizes.shape) - sizes
    by_receiver = sizes.transpose(1, 2, 0)  # sorted by block, then by sender
    places = np.cumsum(by_receiver.reshape(chips, -1), 1).reshape(by_receiver.shape) - by_receiver
    return np.stack([sizes, sources, places.transpose(2, 0, 1)]).astype(np.int32)


def blocks_of(table: np.ndarray) -> Blocks:
    """[3, s, d, n] -> what every chip knows of it, chips first."""
    return Blocks(*table, *table.swapaxes(1, 2))


@functools.cache
def moving(mesh: Mesh, num_rows: int, backend: str):
    """(x [chips of the mesh, N, H], blocks [chips of a group, ep, n]) -> [chips of the mesh, R, H]."""
    split = PartitionSpec(mesh.names)

    def on_chip(x, blocks):
        x, blocks = jax.tree.map(lambda leaf: leaf[0], (x, blocks))
        return jax.tree.map(lambda leaf: leaf[None], all_to_all(x, blocks, num_rows, mesh.axes, backend=backend))

    by_rank = PartitionSpec(mesh.axes)
    return jax.jit(jax.shard_map(on_chip, mesh=mesh.make(), in_specs=(split, by_rank), out_specs=split))


def chips_of(mesh: Mesh) -> np.ndarray:
    """[groups, chips of a group] -> the chip's place in the mesh."""
    places = np.arange(mesh.chips * mesh.groups).reshape(mesh.shape)
    others = [i for i, name in enumerate(mesh.names) if name not in mesh.axes]
    return places.transpose(*others, *[mesh.names.index(name) for name in mesh.axes]).reshape(mesh.groups, mesh.chips)


def check(mesh: Mesh, sizes: np.ndarray, x, backend: str, num_rows: int | None = None) -> None:
    """Against a loop over blocks. `x` is an array, or a QTensor, of leaves [chips of the mesh, N, H]."""
    table = tables(sizes)
    num_rows = int(sizes.sum((0, 2)).max(initial=0)) if num_rows is None else num_rows
    out = moving(mesh, num_rows, backend)(x, blocks_of(table))
    for moved, leaf in zip(jax.tree.leaves(out), jax.tree.leaves(x), strict=True):
        moved, leaf = np.asarray(moved), np.asarray(leaf)
        assert moved.shape == (leaf.shape[0], num_rows, *leaf.shape[2:])
        assert moved.dtype == leaf.dtype
        for group in chips_of(mesh):
            for s, d, j in np.argwhere(sizes):
                rows, source, place = table[:, s, d, j]
                sent = leaf[group[s], source : source + rows]
                assert sent.tobytes() == moved[group[d], place : place + rows].tobytes(), (group, s, d, j)


def random_sizes(rng, mesh: Mesh, each: int, most: int = 3) -> np.ndarray:
    return rng.integers(0, most + 1, (mesh.chips, mesh.chips, each))


@pytest.mark.parametrize("mesh", [FOUR, OTHER_AXES, OTHER_ORDER], ids=str)
@pytest.mark.parametrize(
    ("dtype", "hidden"), [("float32", 5), ("bfloat16", 300), ("float8_e4m3fn", 640), ("int8", 16), ("float16", 256)]
)
@pytest.mark.quick("*-bfloat16-300-4-of-8", "*-bfloat16-300-2-of-6", "*-float8_e4m3fn-640-4-of-4")
def test_random_blocks(backend, dtype, hidden, mesh, rng):
    sizes = random_sizes(rng, mesh, 2)
    x = normal(rng, mesh.chips * mesh.groups, max(1, sizes.sum((1, 2)).max()), hidden)
    check(mesh, sizes, (x * 20).astype(dtype), backend, num_rows=int(sizes.sum((0, 2)).max()) + 3)


def loads(chips: int) -> dict[str, np.ndarray]:
    """Sizes [s, d, 2] of the cruel cases."""
    none, all_to_one, one_row = (np.zeros((chips, chips, 2), int) for _ in range(3))
    all_to_one[:, 1, 1] = 9
    one_row[chips - 1, 0, 0] = 1
    in_place = np.zeros_like(none)
    in_place[np.arange(chips), np.arange(chips), 0] = 4
    silent = np.full_like(none, 2)
    silent[2] = 0
    return {"nothing": none, "all to one": all_to_one, "one row": one_row, "stays": in_place, "one is silent": silent}


@pytest.mark.parametrize("load", loads(4))
def test_cruel_loads(backend, load, rng):
    sizes = loads(4)[load]
    check(FOUR, sizes, normal(rng, 4, 18, 8), backend, num_rows=36)


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

        def there_and_back(_, x):
            there = all_to_all(x, blocks, rows_there, FOUR.axes, backend=backend)
            return all_to_all(there, blocks.back, rows_here, FOUR.axes, backend=backend)

        return jax.lax.fori_loop(0, 3, there_and_back, x[0])[None]

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
