"""Initial values of parameters, of which each chip makes its own share, outside jit too.

Every expert has a key of its own, so that its values are the same on every mesh up to rounding. Experts are made one
after the other, so that memory holds no more than one of them beside the result.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from moejax.param import Param
from sharding.mesh import AnyMesh, free_axes
from sharding.partition import names_of

Initializer = Callable[..., Any]
"""(key, shape, dtype) -> array, as in `flax.nnx.initializers`."""


def initial(
    row: Param,
    initializer: Initializer,
    dtype: jax.typing.DTypeLike,
    key: jax.Array,
    mesh: AnyMesh | None = None,
    spec: PartitionSpec | None = None,
) -> jax.Array:
    """The initial value of one parameter.

    Args:
      row: the parameter; an initialiser of its own comes before `initializer`.
      initializer: applied to each of its matrices [in, out], gate and up separately, and to a bias as a whole.
      dtype: of the value; state is float32, or what its initialiser makes.
      key: random.
      mesh: where the value is to lie; one chip if None.
      spec: how it is split over the mesh.
    """
    kept = jnp.float32 if row.kind == "state" else jnp.dtype(dtype)
    # An initialiser of the row's own, and one of vectors, make all of it at once.
    is_matrix = row.init is None and row.kind in ("kernel", "router kernel")
    stacked = row.stacked if is_matrix else 0
    has_halves = is_matrix and row.has_halves
    settings = (row.init or initializer, row.shape, stacked, has_halves, kept)
    if mesh is None:
        return _draw(*settings, key)
    programs = _on_mesh(*settings, mesh, PartitionSpec() if spec is None else spec)
    if stacked == 0 or isinstance(key, jax.core.Tracer):
        return programs.whole(key)
    value = programs.begin()
    for number in range(programs.steps):
        value = programs.add(value, jnp.int32(number), key)
    return value


def _draw(
    init: Initializer,
    shape: tuple[int, ...],
    stacked: int,
    has_halves: bool,
    dtype: jax.typing.DTypeLike,
    key: jax.Array,
    part: "_Part | None" = None,
) -> jax.Array:
    """An array of `shape`, every matrix drawn from a key of its own; of it, the chip's `part`, if one is given."""
    if stacked == 0 and has_halves:
        rows, halves, columns = shape
        own = None if part is None else part.without(1)
        draw_half = functools.partial(_draw, init, (rows, columns), 0, False, dtype, part=own)
        return jnp.moveaxis(lax.map(draw_half, jax.random.split(key, halves)), 0, 1)
    if stacked == 0:
        value = init(key, shape, dtype)
        return value if part is None else part.of(value)
    keys = jax.random.split(key, shape[0])
    rest = None
    if part is not None:
        keys, rest = part.first(keys), part.without(0)
    return lax.map(lambda key: _draw(init, shape[1:], stacked - 1, has_halves, dtype, key, rest), keys)


class _Part:
    """The part of an array that a chip holds: what of each dimension, by the chip's place on the mesh axes."""

    def __init__(self, axes: tuple[tuple[str, ...], ...]):
        self.axes = axes

    def of(self, value: jax.Array) -> jax.Array:
        """The part of a whole array."""
        for dimension, names in enumerate(self.axes):
            value = _own(value, names, dimension)
        return value

    def first(self, keys: jax.Array) -> jax.Array:
        """The part of what numbers the first dimension."""
        return _own(keys, self.axes[0], 0)

    def without(self, dimension: int) -> "_Part":
        """The same without one dimension."""
        return _Part(self.axes[:dimension] + self.axes[dimension + 1 :])


def _own(value: jax.Array, names: tuple[str, ...], dimension: int) -> jax.Array:
    if not names:
        return value
    size = value.shape[dimension] // math.prod(lax.axis_size(name) for name in names)
    return lax.dynamic_slice_in_dim(value, lax.axis_index(names) * size, size, dimension)


class _Programs(NamedTuple):
    """The programs that make a kind of parameter over a mesh.

    Attributes:
      whole: key -> the value, for use inside other programs.
      begin: -> its memory.
      add: (value so far, step, key) -> with one more matrix on every chip, in the same memory.
      steps: matrices of a chip.
    """

    whole: Callable[[jax.Array], jax.Array]
    begin: Callable[[], jax.Array]
    add: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    steps: int


@functools.lru_cache(maxsize=1024)
def _on_mesh(
    init: Initializer,
    shape: tuple[int, ...],
    stacked: int,
    has_halves: bool,
    dtype: jax.typing.DTypeLike,
    mesh: AnyMesh,
    spec: PartitionSpec,
) -> _Programs:
    """The programs for one kind of parameter, kept by its initialiser, so that further layers compile nothing."""
    entries = tuple(spec) + (None,) * (len(shape) - len(spec))
    axes = tuple(map(names_of, entries))
    whole_spec = PartitionSpec(*entries)
    part = _Part(axes)
    parts = math.prod(mesh.shape[name] for name in axes[0]) if axes else 1

    def whole(key: jax.Array) -> jax.Array:
        return _draw(init, shape, stacked, has_halves, dtype, key, part)

    def begin() -> jax.Array:
        local = [size // math.prod(mesh.shape[name] for name in names) for size, names in zip(shape, axes, strict=True)]
        return jnp.zeros(local, dtype)

    def add(value: jax.Array, step: jax.Array, key: jax.Array) -> jax.Array:
        own = part.first(jax.random.split(key, shape[0]))
        matrix = _draw(init, shape[1:], stacked - 1, has_halves, dtype, own[step], part.without(0))
        return lax.dynamic_update_index_in_dim(value, matrix, step, 0)

    sharded = functools.partial(
        jax.shard_map, mesh=mesh, out_specs=whole_spec, axis_names=set(free_axes(mesh)), check_vma=False
    )
    nothing = PartitionSpec()
    return _Programs(
        jax.jit(sharded(whole, in_specs=nothing)),
        jax.jit(sharded(begin, in_specs=())),
        jax.jit(sharded(add, in_specs=(whole_spec, nothing, nothing)), donate_argnums=0),
        shape[0] // parts if shape else 1,
    )
