"""RMSNorm in front of a product of `bench.hopper.products`: it rounds what that multiplies, if it is in FP8."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from bench.hopper.products import PRODUCT_DTYPES, Product, ProductDtype
from bench.inputs.weights import normal
from pallas_kernels.rms_norm import gpu

_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class Norm:
    """The norm of BF16 rows, with a weight.

    Attributes:
      rows: how many.
      columns: of each.
      dtype: a key of `PRODUCT_DTYPES`: of the result, with the scales that a product's rows have.
    """

    rows: int
    columns: int
    dtype: ProductDtype

    @classmethod
    def before(cls, product: Product) -> "Norm":
        """The norm whose result is the rows of a product."""
        return cls(product.lhs_rows, product.shape.K, product.dtype)

    @property
    def name(self) -> str:
        """What it is, in a few words."""
        return f"RMSNorm {self.rows},{self.columns} {self.dtype}"

    def run(self, x: jax.Array, weight: jax.Array) -> Any:
        """The kernel.

        Raises:
          Unsupported: it cannot do this.
        """
        dtype, scaling, _ = PRODUCT_DTYPES[self.dtype]
        settings: Any = {"eps": _EPS, "out_dtype": jnp.dtype(dtype), "scaling": scaling, "with_sum": False}
        return gpu.rms_norm(x, weight, None, **settings)


@functools.partial(jax.jit, static_argnums=0)
def make_inputs(norm: Norm) -> tuple[jax.Array, jax.Array]:
    """Random rows and weight."""
    return normal(0, (norm.rows, norm.columns)), normal(1, (norm.columns,))
