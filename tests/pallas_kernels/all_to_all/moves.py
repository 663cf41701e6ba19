"""Blocks of rows between chips, and the check that each row of them lands where it should."""

import dataclasses
import functools

import jax
import numpy as np
from jax.sharding import PartitionSpec

from pallas_kernels.all_to_all import Blocks, all_to_all, make_routes
from pallas_kernels.plan import make_plan, unsorted_plan
from pallas_kernels.quantize import dequantize, quantize


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
def moving_tokens(mesh: Mesh, num_rows: int, backend: str):
    """(tokens x [chips, T, H], ids [chips, T, K], blocks [chips, ep, n]) -> [chips, R, H], on a mesh of one group."""
    split = PartitionSpec(mesh.names)

    def on_chip(x, ids, blocks):
        x, ids, blocks = jax.tree.map(lambda leaf: leaf[0], (x, ids, blocks))
        plan = make_plan(ids, mesh.chips)
        rows = all_to_all(x, blocks, num_rows, mesh.axes, plan=plan, backend=backend)
        return jax.tree.map(lambda leaf: leaf[None], rows)

    return jax.jit(jax.shard_map(on_chip, mesh=mesh.make(), in_specs=split, out_specs=split))


@functools.cache
def routes_of(mesh: Mesh, num_rows: int, num_experts: int, backend: str):
    """Ids [chips, T, K] -> (routes, sizes) of `make_routes`, chips first, on a mesh of one group."""

    def on_chip(ids):
        made = make_routes(ids[0], make_plan(ids[0], num_experts), num_rows, mesh.axes, backend=backend)
        return jax.tree.map(lambda leaf: leaf[None], made)

    split = PartitionSpec(mesh.names)
    return jax.jit(jax.shard_map(on_chip, mesh=mesh.make(), in_specs=split, out_specs=split, check_vma=False))


@functools.cache
def by_routes_and_back(mesh: Mesh, num_rows: int, num_experts: int, scaling: str | None, backend: str):
    """(x [chips, T, H], ids [chips, T, K]) -> [chips, T·K, H]: what comes back of each choice, by its route."""

    def on_chip(x, ids):
        x, ids = x[0], ids[0]
        by_expert = make_plan(ids, num_experts, backend=backend)
        routes, _ = make_routes(ids, by_expert, num_rows, mesh.axes, backend=backend)
        sent = x if scaling is None else quantize(x, "float8_e4m3fn", scaling=scaling)
        move = functools.partial(all_to_all, axes=mesh.axes, backend=backend)
        rows = move(sent, routes, num_rows, plan=unsorted_plan(ids))
        rows = rows if scaling is None else dequantize(rows, x.dtype)
        return move(rows, routes.back, ids.size)[None]

    split = PartitionSpec(mesh.names)
    return jax.jit(jax.shard_map(on_chip, mesh=mesh.make(), in_specs=split, out_specs=split))


def tokens_for(rng, mesh: Mesh, num_tokens: int, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids [chips, T, K] of chips, some −1, and the sizes [s, d, 1] of the blocks that they make."""
    ids = np.stack(
        [rng.permuted(np.tile(np.arange(-1, mesh.chips), (num_tokens, 1)), axis=1) for _ in range(mesh.chips)]
    )
    ids = ids[:, :, :top_k].astype(np.int32)
    sizes = np.stack([[np.sum(ids[s] == d) for d in range(mesh.chips)] for s in range(mesh.chips)])
    return ids, sizes[..., None]


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


def loads(chips: int) -> dict[str, np.ndarray]:
    """Sizes [s, d, 2] of the cruel cases."""
    none, all_to_one, one_row = (np.zeros((chips, chips, 2), int) for _ in range(3))
    all_to_one[:, 1, 1] = 9
    one_row[chips - 1, 0, 0] = 1
    in_place = np.zeros_like(none)
    in_place[np.arange(chips), np.arange(chips), 0] = 4
    silent = np.full_like(none, 2)
    silent[chips - 1] = 0
    return {"nothing": none, "all to one": all_to_one, "one row": one_row, "stays": in_place, "one is silent": silent}


def check_tokens(mesh: Mesh, x, ids: np.ndarray, sizes: np.ndarray, backend: str) -> None:
    """Of tokens, a QTensor or an array of leaves [chips, T, H], those rows arrive that were chosen, by sender."""
    num_rows = int(sizes.sum((0, 2)).max()) + 2
    out = moving_tokens(mesh, num_rows, backend)(x, ids, blocks_of(tables(sizes)))
    for moved, leaf in zip(jax.tree.leaves(out), jax.tree.leaves(x), strict=True):
        moved, leaf = np.asarray(moved), np.asarray(leaf)
        for chip in range(mesh.chips):
            expected = leaf[np.nonzero(ids == chip)[:2]]
            assert expected.tobytes() == moved[chip, : len(expected)].tobytes(), chip
