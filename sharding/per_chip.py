"""One function on every chip's share of the tokens: directly on one chip, under shard_map over a mesh.

Activations x [..., H] are taken as they lie. Mesh axes that they are not split over yet are given to the first leading
dimension that they divide, so that no chip repeats another's work; where none fits, the tokens are padded and cut
anew. The function sees its chip's tokens as [T, …]; which of the batch they are, `Tokens` tells it.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from pallas_kernels.tracing.target import target_chip
from pallas_kernels.tracing.varying import vary_over, varying_axes
from sharding.in_one_piece import in_one_piece
from sharding.mesh import AnyMesh, free_axes, has_explicit_axes, place, spec_in
from sharding.partition import ONE_CHIP, Axes, names_of, one_or_all
from sharding.tokens import Tokens


class Body(Protocol):
    """What a chip does with its tokens: a function of a module, no closure, as `jax.jit` keeps programs by it."""

    def __call__(self, per_token: Any, params: Any, tokens: Tokens, axes: Axes, static: Any) -> tuple[Any, Any]:
        """Arrays [T, …], parameters -> a tree of arrays [T, …], and a tree of arrays that are equal on all chips."""


def per_chip(
    body: Body,
    per_token: Any,
    params: Any,
    static: Any,
    *,
    leading: tuple[Any, ...],
    specs: Any = None,
    mesh: AnyMesh | None = None,
    axes: Axes = ONE_CHIP,
    mask: jax.Array | None = None,
    whole_sequences: bool = False,
) -> tuple[Any, Any]:
    """Runs `body` on the tokens of every chip.

    Args:
      body: see `Body`.
      per_token: a tree of arrays [..., n] with the leading dimensions `leading`; the first says how tokens lie.
      params: a tree of whole arrays, of any sharding.
      static: handed to `body`; hashable.
      leading: dimensions before the last; the last of these is the sequence.
      specs: how `params` are split, a tree of PartitionSpecs like it.
      mesh: one chip if None.
      axes: the layer's axes on `mesh`.
      mask: bool [...], true for real tokens; None if all are.
      whole_sequences: whether every chip has to see whole sequences.

    Returns:
      What `body` returned, with `leading` in the place of T. In a mesh of Explicit axes the first of these is sharded
      as the first of `per_token` is.
    """
    chip = target_chip()
    settings = {"body": body, "static": static, "target": None if chip is None else chip.name}
    sequence_length = leading[-1] if leading else 1
    if mesh is None:
        rows = jax.tree.map(lambda array: array.reshape(-1, array.shape[-1]), per_token)
        mask = None if mask is None else mask.reshape(-1)
        of_tokens, rest = _on_chip(rows, params, mask, sequence_length=sequence_length, **settings)
        return _reshaped(of_tokens, 1, leading), rest

    first = jax.tree.leaves(per_token)[0]
    lies = spec_in(first, mesh)
    layout = choose_layout(leading, lies, axes, whole_sequences)
    arrays = {"per_token": per_token, "mask": None if mask is None else mask[..., None]}
    padding = 0
    if layout is None:
        if has_explicit_axes(mesh):  # no type says how cut and padded tokens lie
            arrays = place(arrays, mesh, jax.tree.map(lambda _: PartitionSpec(), arrays))
        arrays, padding = _cut_anew(arrays, leading, axes, whole_sequences)
        layout = (axes.tokens, *((),) * (len(jax.tree.leaves(arrays)[0].shape) - 2))
    shape = jax.tree.leaves(arrays)[0].shape[:-1]
    arrays["index"] = jnp.arange(math.prod(shape), dtype=jnp.int32).reshape(*shape, 1)
    by_token = PartitionSpec(*(one_or_all(names) for names in layout))
    specs = jax.tree.map(functools.partial(_as_tokens, mesh, sum(layout, ())), params, specs)
    arrays = place(arrays, mesh, jax.tree.map(lambda _: by_token, arrays))
    of_tokens, rest = _on_mesh(
        arrays,
        place(params, mesh, specs),
        specs=_Frozen.of(specs),
        by_token=by_token,
        mesh=mesh,
        axes=axes,
        total=math.prod(leading),
        is_padded=padding > 0,
        sequence_length=sequence_length,
        **settings,
    )
    if padding:
        if has_explicit_axes(mesh):
            of_tokens = place(of_tokens, mesh, jax.tree.map(lambda _: PartitionSpec(), of_tokens))
        of_tokens = jax.tree.map(lambda leaf: leaf[: leaf.shape[0] - padding], of_tokens)
    of_tokens = _reshaped(of_tokens, len(shape), leading)
    if has_explicit_axes(mesh):
        spec = lies or PartitionSpec()
        of_tokens = place(of_tokens, mesh, jax.tree.map(lambda _: PartitionSpec(*spec[:-1]), of_tokens))
    return of_tokens, rest


def choose_layout(
    leading: Sequence[int], lies: PartitionSpec | None, axes: Axes, whole_sequences: bool = False
) -> tuple[tuple[str, ...], ...] | None:
    """The mesh axes of each leading dimension, which together are all that tokens are split over; None if none fit.

    Args:
      leading: the dimensions.
      lies: how the tokens lie; None if that is not known.
      axes: of the mesh.
      whole_sequences: whether the last dimension has to stay whole.
    """
    splittable = len(leading) - 1 if whole_sequences else len(leading)
    layout: list[tuple[str, ...]] = [()] * len(leading)
    if axes.tokens_by_dimension:
        if len(axes.tokens_by_dimension) > splittable:
            return None
        layout[: len(axes.tokens_by_dimension)] = axes.tokens_by_dimension
    elif lies is not None:
        for dimension in range(splittable):
            entry = lies[dimension]
            layout[dimension] = tuple(name for name in names_of(entry) if name in axes.tokens)
    if any(size % axes.size(names) for size, names in zip(leading, layout, strict=True)):
        return None
    for axis in axes.tokens:
        if any(axis in names for names in layout):
            continue
        for dimension in range(splittable):
            if leading[dimension] % axes.size((*layout[dimension], axis)) == 0:
                layout[dimension] = (*layout[dimension], axis)
                break
        else:
            return None
    return tuple(layout)


def _as_tokens(mesh: AnyMesh, of_tokens: tuple[str, ...], leaf: jax.Array, spec: PartitionSpec) -> PartitionSpec:
    """`spec` of a parameter, which names of the axes of one chip those that tokens name.

    What they make together varies over these and no others, and JAX has refs for gradients of what names all axes.
    """
    if leaf.ndim == 0:
        return spec
    entries = [tuple(axis for axis in names_of(entry) if mesh.shape[axis] > 1) for entry in spec] or [()]
    entries[0] += tuple(axis for axis in of_tokens if mesh.shape[axis] == 1)
    return PartitionSpec(*map(one_or_all, entries))


def _cut_anew(arrays: Any, leading: tuple[int, ...], axes: Axes, whole_sequences: bool) -> tuple[Any, int]:
    """Tokens (or sequences) in one row, padded to a multiple of the chips; and how many were added."""
    kept = leading[-1:] if whole_sequences else ()
    rows = math.prod(leading[: len(leading) - len(kept)])
    padding = -rows % axes.size(axes.tokens)

    def cut(array: jax.Array) -> jax.Array:
        array = array.reshape(rows, *kept, array.shape[-1])
        return jnp.pad(array, ((0, padding), *((0, 0),) * (array.ndim - 1)))

    return jax.tree.map(cut, arrays), padding


def _reshaped(tree: Any, ndim: int, leading: tuple[Any, ...]) -> Any:
    """Every array of `tree` with `leading` in the place of its first `ndim` dimensions."""
    return jax.tree.map(lambda leaf: leaf.reshape(*leading, *leaf.shape[ndim:]), tree)


@dataclasses.dataclass(frozen=True)
class _Frozen:
    """A tree as a hashable value."""

    leaves: tuple[Any, ...]
    structure: Any

    @classmethod
    def of(cls, tree: Any) -> "_Frozen":
        leaves, structure = jax.tree.flatten(tree)
        return cls(tuple(leaves), structure)

    @property
    def tree(self) -> Any:
        return jax.tree.unflatten(self.structure, self.leaves)


# Jitted, so that an eager call compiles its loops once, and equal layers of a model are traced and lowered once.
@functools.partial(jax.jit, static_argnames=("body", "static", "sequence_length", "target"))
def _on_chip(
    rows: Any, params: Any, mask: jax.Array | None, *, body: Body, static: Any, sequence_length: Any, target: str | None
) -> tuple[Any, Any]:
    """`body` on the only chip; `target` tells apart what is traced for another one."""
    del target
    num_tokens = jax.tree.leaves(rows)[0].shape[0]
    return body(rows, params, Tokens.on_one_chip(num_tokens, sequence_length, mask), ONE_CHIP, static)


@functools.partial(
    jax.jit,
    static_argnames=(
        "body",
        "static",
        "specs",
        "by_token",
        "mesh",
        "axes",
        "total",
        "is_padded",
        "sequence_length",
        "target",
    ),
)
def _on_mesh(
    arrays: dict[str, Any],
    params: Any,
    *,
    body: Body,
    static: Any,
    specs: _Frozen,
    by_token: PartitionSpec,
    mesh: AnyMesh,
    axes: Axes,
    total: int,
    is_padded: bool,
    sequence_length: int,
    target: str | None,
) -> tuple[Any, Any]:
    """`body` on every chip of the mesh; `target` as for `_on_chip`."""
    del target
    last_split = max((i for i, names in enumerate(by_token) if names), default=0)

    def on_chip(arrays: dict[str, Any], params: Any) -> tuple[Any, Any]:
        params = vary_over(params, summed)
        leading = arrays["index"].shape[:-1]
        index = arrays["index"].reshape(-1)
        real = None if arrays["mask"] is None else arrays["mask"].reshape(-1)
        if is_padded:
            real = index < total if real is None else real & (index < total)
        tokens = Tokens(index, total, sequence_length, axes.tokens, math.prod(leading[last_split:]), real)
        rows = jax.tree.map(lambda array: array.reshape(-1, array.shape[-1]), arrays["per_token"])
        of_tokens, rest = body(rows, params, tokens, axes, static)
        return vary_over(_reshaped(of_tokens, 1, leading), summed), rest

    outside = varying_axes((arrays, params))
    # Gradients are summed over these axes as what they are of, and not as what a chip casts that to.
    summed = outside.union(*map(names_of, by_token)) if outside else outside
    sharded = functools.partial(
        jax.shard_map,
        mesh=mesh,
        axis_names=set(free_axes(mesh)),
        # What varies over which axes is not checked, but inside another shard_map that does; tests hold values and
        # gradients to the dense oracle instead.
        check_vma=bool(outside),
    )
    on_chips = sharded(on_chip, in_specs=(by_token, specs.tree), out_specs=(by_token, PartitionSpec()))
    if outside:
        return in_one_piece(on_chip, sharded, by_token, specs.tree)(arrays, params)
    return on_chips(arrays, params)
