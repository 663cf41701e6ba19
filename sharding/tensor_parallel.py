"""Moving rows between chips that share the width of every expert (tensor parallelism).

Each chip of such a group holds other tokens, and a part of the width I of all the same experts. It needs the whole rows
of all tokens of the group, and gives a part of their sum:

    gather_tokens   [T, H] of each   -> [tp·T, H] on all
    sum_tokens      partial [tp·T, H] -> [T, H], own tokens, summed

Where rows also travel between groups, they do so in columns, H / tp on each chip, so that no row travels twice:

    to_columns      [T, H]           -> [tp·T, H / tp]
    gather_columns  [R, H / tp]      -> [R, H] on all
    sum_columns     partial [R, H]   -> [R, H / tp], summed
    to_tokens       [tp·T, H / tp]   -> [T, H]

Sums are made in float32 of terms that travel in the dtype that they are given in.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.quantize import Copied, Operand, QTensor
from sharding.collectives import as_bytes, gather

AxisNames = tuple[str, ...]


def gather_tokens[Kind: Copied](rows: Kind, axes: AxisNames) -> Kind:
    """[T, …] of each chip -> [tp·T, …] on all of them, in the order of the chips; as they are along no axes."""
    return jax.tree.map(lambda leaf: gather(leaf, axes, 0), rows) if axes else rows


def sum_tokens(partial: jax.Array, axes: AxisNames) -> jax.Array:
    """Partial sums [tp·T, H] -> float32 [T, H], the whole sums of this chip's tokens."""
    return _sum(lax.all_to_all(partial, axes, 0, 0, tiled=True), axes)


def to_columns[Kind: Operand](rows: Kind, axes: AxisNames) -> Kind:
    """[T, H] of each chip -> [tp·T, H / tp], a part of the columns of all tokens of the group."""

    def move(leaf: jax.Array) -> jax.Array:
        if leaf.shape[1] == 1:  # the scale of a whole row
            return gather(leaf, axes, 0)
        return as_bytes(lambda x: lax.all_to_all(x, axes, 1, 0, tiled=True), leaf)

    return jax.tree.map(move, rows)


def to_tokens(columns: jax.Array, axes: AxisNames) -> jax.Array:
    """[tp·T, H / tp] -> [T, H]: what `to_columns` undoes."""
    return lax.all_to_all(columns, axes, 0, 1, tiled=True)


def gather_columns[Kind: Operand](columns: Kind, axes: AxisNames, *, has_row_scales: bool = False) -> Kind:
    """[R, H / tp] of each chip -> [R, H] on all of them; `has_row_scales` if a scale is one of a whole row."""
    if isinstance(columns, QTensor) and has_row_scales:
        return dataclasses.replace(columns, values=gather(columns.values, axes, 1))
    return jax.tree.map(lambda leaf: gather(leaf, axes, 1), columns)


def sum_columns(partial: jax.Array, axes: AxisNames) -> jax.Array:
    """Partial sums [R, H] -> float32 [R, H / tp], the whole sums of this chip's columns."""
    return _sum(lax.all_to_all(partial, axes, 1, 0, tiled=True), axes)


def _sum(terms: jax.Array, axes: AxisNames) -> jax.Array:
    """The sum of the tp parts that lie one after the other, in that order."""
    parts = terms.astype(jnp.float32).reshape(lax.axis_size(axes), -1, terms.shape[1])
    return parts.sum(0)
