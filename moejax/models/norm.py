"""RMSNorm (arXiv 1910.07467), with the sum that comes before it in a block.

rms_norm(x, scale)                        # y
rms_norm(x, scale, residual=before)       # y of the sum, and the sum
"""

from typing import overload

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.checks import require
from moejax.initial import Initializer

_ONES = nnx.initializers.ones


@overload
def rms_norm(x: jax.Array, weight: jax.Array, *, residual: None = None, eps: float = 1e-6) -> jax.Array: ...
@overload
def rms_norm(
    x: jax.Array, weight: jax.Array, *, residual: jax.Array, eps: float = 1e-6
) -> tuple[jax.Array, jax.Array]: ...
def rms_norm(
    x: jax.Array, weight: jax.Array, *, residual: jax.Array | None = None, eps: float = 1e-6
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Brings x to a mean square of 1 along its last dimension, and scales each element.

    Args:
      x: [..., H].
      weight: [H].
      residual: [..., H] of the dtype of x, added to it first, or None.
      eps: added to the mean square.

    Returns:
      [..., H] in the dtype of x, computed in float32 and rounded once; with `residual` also x + residual.
    """
    if residual is not None:
        total = x + residual
        return rms_norm(total, weight, eps=eps), total
    values = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(values), axis=-1, keepdims=True) + eps)
    return (values * (inverse * weight.astype(jnp.float32))).astype(x.dtype)


class RMSNorm(nnx.Module):
    """`rms_norm` with a parameter.

    Attributes:
      scale: nnx.Param [H].
    """

    def __init__(
        self,
        width: int,
        *,
        eps: float = 1e-6,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        scale_init: Initializer = _ONES,
        rngs: nnx.Rngs,
    ):
        self.eps = eps
        self.scale = nnx.Param(scale_init(rngs.params(), (width,), param_dtype))

    @overload
    def __call__(self, x: jax.Array, *, residual: None = None) -> jax.Array: ...
    @overload
    def __call__(self, x: jax.Array, *, residual: jax.Array) -> tuple[jax.Array, jax.Array]: ...
    def __call__(self, x: jax.Array, *, residual: jax.Array | None = None) -> jax.Array | tuple[jax.Array, jax.Array]:
        """See `rms_norm`.

        Raises:
          ValueError: the last dimension of x is of another width, or `residual` is not like x.
        """
        width = self.scale.shape[0]
        require(x.shape[-1:] == (width,), "x", f"[..., {width}]", list(x.shape))
        if residual is None:
            return rms_norm(x, self.scale[...], eps=self.eps)
        is_alike = (residual.shape, residual.dtype) == (x.shape, x.dtype)
        wanted = f"as x, {x.dtype}{list(x.shape)}"
        require(is_alike, "residual", wanted, f"{residual.dtype}{list(residual.shape)}")
        return rms_norm(x, self.scale[...], residual=residual, eps=self.eps)
