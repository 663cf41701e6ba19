"""What a TPU core does with tiles in VMEM: multiply, scale, add the bias, activate. All sums are in float32.

Both operands are converted to one dtype that the matrix unit takes (`Arithmetic.multiply`): values of 8 bits are exact
in bfloat16. Scales of blocks apply to the product of each block of K; one a row or a column, to the sum.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.activations import Activation, gated


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """What is computed of a tile.

    Attributes:
      out_dtype: of the result.
      multiply: dtype in which the matrix unit takes both operands.
      lhs_scale: one a row, one for each row and block of K, or none.
      rhs_scale: one a column, one for each column and block of K, or none.
      scale_block: depth of a block of K; all of K without block scales.
      k_major: whether K is the minor dimension of rhs.
      activation: of the fused gate/up product; None for a plain product.
      activation_limit: its clamp.
    """

    out_dtype: jnp.dtype
    multiply: jnp.dtype
    lhs_scale: Literal["row", "block"] | None
    rhs_scale: Literal["channel", "block"] | None
    scale_block: int
    k_major: bool
    activation: Activation | None = None
    activation_limit: float | None = None

    @property
    def halves(self) -> int:
        """Column ranges of rhs that a tile of the result needs: gate and up, or one."""
        return 2 if self.activation else 1


def product(lhs: Any, lhs_scale: Any, rhs: Any, rhs_scale: Any, arithmetic: Arithmetic) -> jax.Array:
    """The product of tiles with all of K, with its scales.

    Args:
      lhs: ref [strips, s, K], rows in strips of s.
      lhs_scale: ref [strips, s, 1], [strips, s, K/scale_block], or None.
      rhs: ref [K, columns] ([columns, K] if K-major).
      rhs_scale: ref [1, columns], [K/scale_block, columns], or None.
      arithmetic: what to do.

    Returns:
      float32 [rows, columns].
    """
    strips, sublanes, depth = lhs.shape
    block = arithmetic.scale_block

    def rows(ref: Any, at: slice = slice(None)) -> jax.Array:
        x = ref[:, :, at]
        return x.reshape(strips * sublanes, x.shape[2])

    total = None
    for index in range(depth // block):
        at = slice(index * block, (index + 1) * block)
        part = _multiply(rows(lhs, at), rhs[:, at] if arithmetic.k_major else rhs[at, :], arithmetic)
        if arithmetic.lhs_scale == "block":
            part *= rows(lhs_scale, slice(index, index + 1))
        if arithmetic.rhs_scale == "block":
            part *= rhs_scale[index : index + 1, :]
        total = part if total is None else total + part
    assert total is not None, "K is at least one block"
    if arithmetic.lhs_scale == "row":
        total *= rows(lhs_scale)
    if arithmetic.rhs_scale == "channel":
        total *= rhs_scale[...]
    return total


def activate(parts: list[jax.Array], arithmetic: Arithmetic) -> jax.Array:
    """The product itself, or the gated activation of gate and up."""
    if arithmetic.activation is None:
        return parts[0]
    return gated(parts[0], parts[1], arithmetic.activation, arithmetic.activation_limit)


def _multiply(lhs: jax.Array, rhs: jax.Array, arithmetic: Arithmetic) -> jax.Array:
    """The product of [rows, k] and [k, columns] ([columns, k] if K-major), in float32."""
    dtype = arithmetic.multiply
    out = lax.dot_general(
        lhs.astype(dtype),
        rhs.astype(dtype),
        (((1,), (1 if arithmetic.k_major else 0,)), ((), ())),
        precision=lax.Precision.HIGHEST if dtype == jnp.float32 else None,
        preferred_element_type=jnp.int32 if dtype == jnp.int8 else jnp.float32,
    )
    return out.astype(jnp.float32)
