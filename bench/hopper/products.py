"""Grouped products on the Hopper kernels, each with its data: what is measured stage by stage, and tuned.

    product = Product(GemmShape(8, 48, 7168, 2048), "fp8")
    lhs, rhs, sizes = make_inputs(product)
    product.run(lhs, rhs, sizes, stage="dma")

Groups have equal numbers of rows.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from bench.inputs.weights import normal
from bench.measure.clock import require_nvidia_gpu
from bench.measure.devices import known_chip
from bench.model.roofline import gemm_cost
from bench.model.shapes import GemmShape
from pallas_kernels.chips import Chip
from pallas_kernels.cost import Cost, grouped_gate_up_cost
from pallas_kernels.grouped_matmul import Operand, gpu
from pallas_kernels.grouped_matmul.gpu.hopper.problem import Problem
from pallas_kernels.quantize import QTensor, quantize
from pallas_kernels.stage import Stage

ProductDtype = Literal["bf16", "fp16", "fp8", "fp8-blocks"]

PRODUCT_DTYPES: dict[str, tuple[str, str | None, str | None]] = {
    "bf16": ("bfloat16", None, None),
    "fp16": ("float16", None, None),
    "fp8": ("float8_e4m3fn", "per_row", "per_row"),
    "fp8-blocks": ("float8_e4m3fn", "1x128", "128x128"),
}
"""Dtype of both operands, and how lhs [M, K] and rhs [G, N, K] are scaled."""


@dataclasses.dataclass(frozen=True)
class Product:
    """A grouped product.

    Attributes:
      shape: G groups of M rows, K -> N; N counts gate and up when they are fused.
      dtype: a key of `PRODUCT_DTYPES`. Weights in 8 bits lie as [G, N, K], others as [G, K, N].
      fused: gate and up together, with silu.
      num_rows: rows of lhs, at least G·M, all of them if None. No group owns those past G·M.
      transposed: weights in 16 bits lie as [G, N, K] too.
      result_in_8_bits: whether a fused product rounds its result to FP8, with 1x128 scales; else it is BF16.
    """

    shape: GemmShape
    dtype: ProductDtype
    fused: bool = False
    num_rows: int | None = None
    transposed: bool = False
    result_in_8_bits: bool = False

    def __post_init__(self):
        if self.result_in_8_bits and not self.fused:
            raise ValueError("only a fused product rounds its result to 8 bits; add --fused")

    @property
    def lhs_rows(self) -> int:
        """Rows of lhs."""
        return self.num_rows or self.shape.G * self.shape.M

    @property
    def k_major(self) -> bool:
        """Whether weights lie as [G, N, K]."""
        return self.transposed or self.dtype.startswith("fp8")

    @property
    def operand(self) -> str:
        """The full name of the operands' dtype."""
        return PRODUCT_DTYPES[self.dtype][0]

    @property
    def problem(self) -> Problem:
        """What its tiles depend on."""
        return Problem(
            self.operand,
            self.dtype == "fp8-blocks",
            self.fused,
            self.result_in_8_bits,
            num_groups=self.shape.G,
            num_rows=self.lhs_rows,
            depth=self.shape.K,
            columns=self.shape.N,
        )

    @property
    def cost(self) -> Cost:
        """The least work of all groups' rows, with a result in BF16."""
        s = self.shape
        if not self.fused:
            return gemm_cost(s, self.operand)
        return grouped_gate_up_cost(s.G * s.M, s.K, s.N // 2, s.G, lhs_dtype=self.operand, rhs_dtype=self.operand)

    @property
    def name(self) -> str:
        """What it is, in a few words."""
        return f"{self.shape} {self.dtype}" + " gate/up" * self.fused + " to fp8" * self.result_in_8_bits

    def run(self, lhs: Operand, rhs: Operand, group_sizes: jax.Array, stage: Stage = "full") -> Any:
        """The kernel, all of it or one of its stages.

        Raises:
          Unsupported: it cannot do this product.
        """
        kernel: Callable[..., Any] = gpu.grouped_matmul
        if self.fused:
            kernel = functools.partial(gpu.grouped_gate_up, activation="silu", activation_limit=None)
        return kernel(
            lhs,
            rhs,
            group_sizes,
            bias=None,
            group_offset=0,
            transpose_rhs=self.k_major,
            out_dtype=jnp.float8_e4m3fn if self.result_in_8_bits else jnp.bfloat16,
            stage=stage,
        )


def layer_products(
    shape: GemmShape, dtype: ProductDtype, *, num_rows: int | None = None, result_in_8_bits: bool = False
) -> tuple[Product, Product]:
    """Gate/up and down of a layer with hidden width K and expert width N; down takes what gate/up gives."""
    up, down = dataclasses.replace(shape, N=2 * shape.N), dataclasses.replace(shape, K=shape.N, N=shape.K)
    return (
        Product(up, dtype, fused=True, num_rows=num_rows, result_in_8_bits=result_in_8_bits),
        Product(down, "fp8-blocks" if result_in_8_bits else dtype, num_rows=num_rows),
    )


@functools.partial(jax.jit, static_argnums=0)
def make_inputs(product: Product) -> tuple[Operand, Operand, jax.Array]:
    """Random lhs, rhs and group sizes; all groups have the same weights, which are drawn once."""
    shape = product.shape
    dtype, lhs_scaling, rhs_scaling = PRODUCT_DTYPES[product.dtype]
    lhs = _operand(normal(0, (product.lhs_rows, shape.K)), dtype, lhs_scaling)
    layout = (shape.N, shape.K) if product.k_major else (shape.K, shape.N)
    one = _operand(normal(1, layout, scale=shape.K**-0.5), dtype, rhs_scaling)
    rhs = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (shape.G, *leaf.shape)), one)
    return lhs, rhs, jnp.full(shape.G, shape.M, jnp.int32)


def hopper_at_hand() -> Chip:
    """The chip that jax runs on.

    Raises:
      ValueError: it is not an NVIDIA Hopper, or not a known one.
    """
    require_nvidia_gpu()
    device = jax.devices()[0]
    if device.compute_capability != "9.0":
        raise ValueError(f"the kernels need an NVIDIA Hopper GPU, and jax runs on {device.device_kind} here")
    return known_chip(device)


def _operand(x: jax.Array, dtype: str, scaling: str | None) -> jax.Array | QTensor:
    return x.astype(dtype) if scaling is None else quantize(x, dtype, scaling=scaling)
