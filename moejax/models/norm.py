"""RMSNorm (arXiv 1910.07467) with a parameter, and with the sum that comes before it in a block.

norm = RMSNorm(2048, rngs=rngs)
norm(x)                         # y
norm(x, residual=before)        # y of the sum, and the sum
"""

from typing import overload

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from moejax.checks import require
from moejax.initial import Initializer
from pallas_kernels.arrays import require_arrays, require_given_arrays
from pallas_kernels.rms_norm import rms_norm
from pallas_kernels.tracing.concrete import is_less
from sharding.mesh import is_split_here, mesh_here

_ONES = nnx.initializers.ones

_FEW_NUMBERS = 1 << 17
"""Numbers of x up to which XLA joins a norm with what comes before or after; a kernel of its own would be mostly launch
(a block of 128 tokens on an H200: of 768 columns 45.6 µs in place of 48.8, of 1024 as long; TPUs take the same)."""


class RMSNorm(nnx.Module):
    """`rms_norm` of `pallas_kernels.rms_norm` with a parameter.

    Attributes:
      scale: nnx.Param [H].
      eps: added to the mean square.
      backend: "auto", "xla", "pallas_tpu" or "pallas_gpu". Over a mesh it is XLA in any case, which lets every chip do
        its share: arrays that a mesh splits would be gathered for a kernel.
    """

    def __init__(
        self,
        width: int,
        *,
        eps: float = 1e-6,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        scale_init: Initializer = _ONES,
        backend: str = "auto",
        rngs: nnx.Rngs,
        mesh: Mesh | None = None,
    ):
        """Makes the parameter.

        Args:
          width: H.
          eps: see the attribute.
          param_dtype: of the parameter.
          scale_init: initialises it.
          backend: see the attribute.
          rngs: the stream "params" is for that.
          mesh: that splits what is normalised; the default is the mesh of `jax.set_mesh`, if any: that in force at a
            call, else that in force here.
        """
        self.eps, self.backend = eps, backend
        self._made_on = mesh_here(mesh)
        self.scale = nnx.Param(scale_init(rngs.params(), (width,), param_dtype))

    @overload
    def __call__(self, x: jax.Array, *, residual: None = None) -> jax.Array: ...
    @overload
    def __call__(self, x: jax.Array, *, residual: jax.Array) -> tuple[jax.Array, jax.Array]: ...
    def __call__(self, x: jax.Array, *, residual: jax.Array | None = None) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Brings x to a mean square of 1 along its last dimension, and scales each element.

        Args:
          x: [..., H], BF16, FP16 or float32.
          residual: of the shape and dtype of x, added to it first, or None.

        Returns:
          [..., H] in the dtype of x, computed in float32 and rounded once; with `residual` also x + residual.

        Raises:
          TypeError: x or `residual` is not an array.
          ValueError: the last dimension of x is of another width, or `residual` is not like x.
        """
        require_given_arrays(x=x)
        require_arrays(residual=residual)
        width = self.scale.shape[0]
        require(x.shape[-1:] == (width,), "x", f"[..., {width}]", list(x.shape))
        if residual is None:
            return rms_norm(x, self.scale[...], eps=self.eps, backend=self._backend_here(x, residual))
        is_alike = (residual.shape, residual.dtype) == (x.shape, x.dtype)
        wanted = f"as x, {x.dtype}{list(x.shape)}"
        require(is_alike, "residual", wanted, f"{residual.dtype}{list(residual.shape)}")
        return rms_norm(x, self.scale[...], residual=residual, eps=self.eps, backend=self._backend_here(x, residual))

    def _backend_here(self, x: jax.Array, residual: jax.Array | None) -> str:
        """XLA's where a launch costs more than a kernel gains, and over a mesh."""
        if self.backend == "auto" and is_less(x.size, _FEW_NUMBERS + 1):
            return "xla"
        return "xla" if is_split_here(self._made_on, x, residual) else self.backend
