"""Numbers in 8 bits with scales: FP8 (e4m3, e5m2) and INT8, per tensor, per row, per channel, or per block.

A `QTensor` stands for values · scale, where `scale` has the rank of `values` and each of its dimensions divides that
of `values`: one scale covers a block of values.scale-shape ratio. So the shapes alone say how a tensor is scaled:

    values [M, K], scale [M, K/128]            "1x128", activations
    values [G, K, N], scale [G, K/128, N/128]  "128x128", weights
    values [G, K, N], scale [G, 1, N]          "per_channel"
    values [M, K], scale [M, 1]                "per_row"
    values [G, K, N], scale [G, 1, 1]          "per_tensor" (one for each group)

Quantising maps the largest magnitude of a block to the dtype's largest finite value. Nothing overflows: values are
clipped before the cast (XLA's cast to e4m3fn turns larger values into NaN). A block of zeros gets scale 1. A block
that holds a NaN or an infinity gets scale NaN, so that all of it dequantises to NaN and the fault is seen.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels.arrays import require_given_arrays

Scaling = str
"""Block of one scale over the last two dimensions: a name of `NAMED_BLOCKS` or "RxC" such as "1x128"."""

QDtype = Literal["float8_e4m3fn", "float8_e5m2", "int8"]

NAMED_BLOCKS: dict[str, tuple[int | None, int | None]] = {
    "per_tensor": (None, None),
    "per_row": (1, None),
    "per_channel": (None, 1),
}
"""Rows and columns of one scale's block; None is the whole dimension."""

SCALE_BLOCK = 128
"""Numbers of a row, or rows and columns of a matrix, with one scale in "1x128" and "128x128", which kernels know."""

_LARGEST = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0, "int8": 127.0}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QTensor:
    """An 8-bit tensor: `values` (fp8 or int8) times `scale` (float32), one scale a block. See the module's page."""

    values: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the values."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        """The rank of the values."""
        return self.values.ndim

    @property
    def dtype(self) -> jnp.dtype:
        """The 8-bit dtype of the values."""
        return self.values.dtype

    @property
    def mT(self) -> "QTensor":
        """The same numbers with the last two dimensions exchanged."""
        return QTensor(self.values.mT, self.scale.mT)


@dataclasses.dataclass(frozen=True)
class _OfArray:
    """What goes by the shape of the array that it holds."""

    array: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return self.array.shape

    @property
    def ndim(self) -> int:
        """The rank of the array."""
        return self.array.ndim

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the array."""
        return self.array.dtype


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rounded(_OfArray):
    """An array with what it is in 8 bits: products take the 8 bits, and gradients pass the rounding to the array.

    Of the array, nothing is computed but what someone takes of it.

    Attributes:
      array: floating point.
      in_8_bits: the same, rounded.
      is_widened: whether the array holds what the 8 bits say; products that need those in 16 bits, for gradients of
        weights, take it then.
    """

    in_8_bits: QTensor
    is_widened: bool = dataclasses.field(default=False, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoundedWeights(_OfArray):
    """Weights with what they are in 8 bits, as products of them and of their gradients take them.

    Products take the 8 bits, and gradients pass the rounding to the array, of which nothing else is taken.

    Attributes:
      array: [..., K, N], floating point.
      k_major: the same, rounded: values [..., N, K].
      n_last: the same numbers, values [..., K, N]; None where no gradient is multiplied in 8 bits.
    """

    k_major: QTensor
    n_last: QTensor | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ToRound(_OfArray):
    """An array that whoever copies it to experts rounds to 8 bits, with scales "1x128", before that or on the way.

    No gradient passes.

    Attributes:
      array: [T, H], floating point.
      qdtype: of 8 bits.
    """

    qdtype: QDtype = dataclasses.field(metadata={"static": True})


Operand = jax.Array | QTensor
"""What a matrix product takes."""

Weights = Operand | RoundedWeights
"""What its weights may be."""

Rows = Operand | Rounded
"""What its rows may be, and what may travel."""

Copied = Rows | ToRound
"""What may be copied to experts on the same chip."""


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How the two operands of a matrix product are quantised.

    Attributes:
      dtype: 8-bit dtype of both operands.
      lhs_scaling: scaling of the activations [M, K].
      rhs_scaling: scaling of the weights [G, K, N].
      gradient_dtype: 8-bit dtype to which the cotangent is rounded (by `lhs_scaling`) for the gradient of the
        activations, float8_e5m2 say, and with it for what follows from that gradient, as a router's does; None
        multiplies it as it comes.
      weights_gradient_dtype: 8-bit dtype to which the cotangent is rounded for the gradient of the weights, a sum over
        the rows of a group: 128 of these have a scale for each feature. Activations are rounded to `dtype` likewise.
        None multiplies both as they come; with it, weights have no second derivatives.
    """

    dtype: QDtype = "float8_e4m3fn"
    lhs_scaling: Scaling = "1x128"
    rhs_scaling: Scaling = "128x128"
    gradient_dtype: QDtype | None = None
    weights_gradient_dtype: QDtype | None = None

    def __post_init__(self):
        for field in ("dtype", "gradient_dtype", "weights_gradient_dtype"):
            if (dtype := getattr(self, field)) is not None:
                object.__setattr__(self, field, check_qdtype(dtype, field))
        for field in ("lhs_scaling", "rhs_scaling"):
            block_shape(getattr(self, field), field)


def check_qdtype(dtype: jax.typing.DTypeLike, argument: str = "dtype") -> str:
    """The name of an 8-bit dtype; raises ValueError when `dtype` is none of those that can be quantised to."""
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = repr(dtype)
    if name not in _LARGEST:
        raise ValueError(f"{argument} must be one of {', '.join(_LARGEST)}, got {name}")
    return name


def block_shape(scaling: Scaling, argument: str = "scaling") -> tuple[int | None, int | None]:
    """Rows and columns that one scale covers; None stands for the whole dimension.

    Raises:
      ValueError: `scaling` is neither a name of `NAMED_BLOCKS` nor of the form "RxC" with positive numbers.
    """
    if isinstance(scaling, str) and scaling in NAMED_BLOCKS:
        return NAMED_BLOCKS[scaling]
    rows, cross, columns = scaling.partition("x") if isinstance(scaling, str) else ("", "", "")
    if cross and rows.isdecimal() and columns.isdecimal() and int(rows) and int(columns):
        return int(rows), int(columns)
    raise ValueError(
        f"unknown {argument} {scaling!r}; expected one of {', '.join(NAMED_BLOCKS)}, or rows x columns such as '1x128'"
    )


def is_of_one_row(scaling: Scaling) -> bool:
    """Whether a scale covers (a part of) one row, so that rows can be rounded, copied and sent one by one."""
    return block_shape(scaling)[0] == 1


def scale_shape(shape: tuple[int, ...], scaling: Scaling) -> tuple[int, ...]:
    """The shape of the scales of a tensor of `shape`.

    Raises:
      ValueError: the tensor has fewer than two dimensions, or a block does not divide its dimension.
    """
    if len(shape) < 2:
        raise ValueError(f"a quantised tensor needs at least 2 dimensions, got shape {shape}")
    counts = []
    for size, block in zip(shape[-2:], block_shape(scaling), strict=True):
        if block is not None and size % block:
            raise ValueError(
                f"shape {shape} cannot be scaled by {scaling!r}: {size} is not divisible by {block}; "
                "choose a block that divides it, or 'per_row' for tokens and 'per_channel' for weights"
            )
        counts.append(1 if block is None else size // block)
    return (*shape[:-2], *counts)


def quantize(
    x: jax.Array, dtype: jax.typing.DTypeLike = "float8_e4m3fn", *, scaling: Scaling = "per_tensor"
) -> QTensor:
    """Rounds `x` to 8 bits (to nearest, ties to even), each block scaled to the range of `dtype`.

    Args:
      x: floating-point [..., R, C].
      dtype: float8_e4m3fn, float8_e5m2 or int8.
      scaling: the block that shares one scale, over the last two dimensions.

    Raises:
      ValueError: `x` is not floating point, `dtype` is none of the three, or a block does not divide its dimension.
      TypeError: on differentiation. A rounding has no useful gradient and 8-bit cotangents lose what they carry, so
        the operators take BF16 and quantise inside: pass them `quantization=`.
    """
    require_given_arrays(x=x)
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize == 1:
        raise ValueError(f"x must be a 16-, 32- or 64-bit floating-point array, got {x.dtype}{list(x.shape)}")
    name = check_qdtype(dtype)
    shape = scale_shape(x.shape, scaling)
    return QTensor(*_no_gradient(*_quantize(jax.lax.stop_gradient(x), name, shape), x))


def _quantize(x: jax.Array, name: str, scales: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    blocks = x.reshape(_interleave(x.shape, scales)).astype(jnp.float32)
    axes = tuple(range(1, blocks.ndim, 2))
    # As integers, because XLA's float maximum over rows skips NaN on CPUs: the bits of |x| are in the order of |x|,
    # with the infinity and then NaN on top.
    bits = jax.lax.bitcast_convert_type(jnp.abs(blocks), jnp.int32)
    amax = jax.lax.bitcast_convert_type(jnp.max(bits, axis=axes, keepdims=True, initial=0), jnp.float32)
    largest = _LARGEST[name]
    scale = scale_of(amax, name)
    scaled = jnp.clip(blocks * (1 / scale), -largest, largest)
    return _round(scaled, name).astype(name).reshape(x.shape), scale.reshape(scales)


def scale_of(amax: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The scale of a block whose largest magnitude is `amax`, NaN where that is not finite; for kernels too."""
    return jnp.where(amax < jnp.inf, finite_scale(amax, dtype), jnp.nan)


def clipped_to(scaled: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Values that have been divided by their scale, in an 8-bit dtype: for use inside kernels, where a cast rounds."""
    largest = _LARGEST[check_qdtype(dtype)]
    scaled = jnp.clip(scaled, -largest, largest)
    if jnp.dtype(dtype) == jnp.int8:
        scaled = jnp.round(jnp.where(scaled == scaled, scaled, 0.0))
    return scaled.astype(dtype)


def finite_scale(amax: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The scale of a block whose largest magnitude `amax` is finite, float32; also for use inside kernels."""
    largest = _LARGEST[check_qdtype(dtype)]
    # Below this the reciprocal of the scale would overflow; such values are zero in any 8-bit format anyway.
    smallest = largest * float(jnp.finfo(jnp.float32).tiny) * 4
    return jnp.where(amax > smallest, amax * (1 / largest), 1.0)


def _round(x: jax.Array, name: str) -> jax.Array:
    """`x` rounded to values that the 8-bit dtype holds exactly, in float32.

    The cast alone would round as well, but XLA on GPUs takes a cast to 8 bits and back for superfluous, and with it
    the rounding.
    """
    if name == "int8":
        return jnp.where(jnp.isnan(x), 0, jnp.round(x))
    info = jnp.finfo(name)
    step = float(info.smallest_subnormal)
    subnormal = jnp.round(x / step) * step
    normal = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=info.nmant)
    return jnp.where(jnp.abs(x) < float(info.smallest_normal), subnormal, normal)


@jax.custom_jvp
def _no_gradient(values: jax.Array, scale: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    del x
    return values, scale


@_no_gradient.defjvp
def _no_gradient_jvp(primals, tangents):
    raise TypeError(
        "quantize() cannot be differentiated: 8-bit cotangents lose the gradient. Pass BF16 or float32 and let the "
        "operator quantise inside (quantization=Quantization(...)), or wrap the input in jax.lax.stop_gradient"
    )


def dequantize(q: QTensor, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """Values · scale, computed in float32, as an array of `dtype` with the shape of the values."""
    blocks = q.values.astype(jnp.float32).reshape(_interleave(q.shape, q.scale.shape))
    scale = jnp.expand_dims(q.scale, tuple(range(1, blocks.ndim, 2)))
    return (blocks * scale).reshape(q.shape).astype(dtype)


def check_qtensor(name: str, q: QTensor) -> None:
    """Raises ValueError, naming the argument, unless the scales of `q` fit its values."""
    fits = q.ndim == q.scale.ndim and all(
        v % s == 0 if s else v == 0 for v, s in zip(q.shape, q.scale.shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"{name}: scale {list(q.scale.shape)} does not fit values {list(q.shape)}: both need the same rank, and "
            "each dimension of scale must divide that of values"
        )
    check_qdtype(q.dtype)


def check_row_scales(name: str, q: QTensor) -> None:
    """Raises ValueError, naming the argument, unless every row of `q` [R, C] has scales of its own."""
    check_qtensor(name, q)
    if q.scale.shape[0] != q.shape[0]:
        raise ValueError(
            f"{name}: rows that travel need scales of their own, got scale {list(q.scale.shape)} for {q.shape[0]} "
            "rows; quantize with scaling '1x128' or 'per_row'"
        )


def scaling_of_rows(q: QTensor) -> Scaling:
    """The scaling of `q` [R, C], whose rows have scales of their own."""
    blocks = q.scale.shape[1]
    return "per_row" if blocks == 1 else f"1x{q.shape[1] // blocks}"


def _interleave(shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, ...]:
    """(number of blocks, length of a block) for each dimension, in one flat shape."""
    return tuple(size for n, length in zip(scales, shape, strict=True) for size in (n, length // n if n else 1))


def takes_gradient(leaf: jax.Array) -> bool:
    """Whether `leaf` is trained: floating point of 16 bits or more, as 8-bit values are constants."""
    return jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize >= 2


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def moved_in_8_bits(move: Callable[..., Any], dtype: QDtype, rows: jax.Array, *args: Any) -> jax.Array:
    """move(rows, *args) of rows [N, H] that travel in 8 bits, each with a scale; the derivatives are those of `move`.

    Args:
      move: moves rows, an array or a QTensor, and does no more; closes over nothing that is traced.
      dtype: of 8 bits.
      rows: floating point.
      *args: pytrees of arrays that take no gradient.
    """
    return dequantize(move(quantize(rows, dtype, scaling="per_row"), *args), rows.dtype)


@moved_in_8_bits.defjvp
def _moved_in_8_bits_jvp(move, dtype, primals, tangents):
    return moved_in_8_bits(move, dtype, *primals), move(tangents[0], *primals[1:])
