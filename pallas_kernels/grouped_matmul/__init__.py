"""Grouped matrix products: row groups of one matrix times one weight matrix per group.

    lhs [M, K] · rhs [G, K, N] -> [M, N]      group_sizes = [17, 31, 24]: rows 0–16 · rhs[0], 17–47 · rhs[1], …

`grouped_matmul` is the plain product (the down projection), `grouped_gate_up` the fused gate/up projection with its
gated activation. Rows past the sum of `group_sizes`, and rows of groups outside the window that `rhs` covers, are
never read as data and come out as zeros.

Operands may be quantised two ways. A `QTensor` is a constant in 8 bits (serving: no gradient reaches it). With
`quantization=` the operands arrive in BF16 or float32 and are rounded inside; the gradient passes the rounding as if
it were not there (straight-through) and uses the rounded operands (training).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.activations import Activation, gated_halves
from pallas_kernels.backend import run
from pallas_kernels.grouped_matmul.checks import check_gate_up, check_operands
from pallas_kernels.grouped_matmul.group_sizes import within_rows
from pallas_kernels.quantize import (
    Operand,
    QDtype,
    QTensor,
    Quantization,
    Scaling,
    block_shape,
    check_qdtype,
    quantize,
    scale_shape,
)
from pallas_kernels.varying import vary_alike

_RESULT_SCALING: Scaling = "1x128"
"""How `grouped_gate_up_in_8_bits` scales its result."""


def grouped_matmul(
    lhs: Operand,
    rhs: Operand,
    group_sizes: jax.Array,
    *,
    bias: jax.Array | None = None,
    group_offset: jax.Array | int = 0,
    transpose_rhs: bool = False,
    quantization: Quantization | None = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
    backend: str = "auto",
) -> jax.Array:
    """Multiplies each group of rows by that group's matrix, and adds its bias.

    Args:
      lhs: [M, K], BF16, FP16, float32, or a QTensor. Rows lie sorted by group.
      rhs: [G, K, N] ([G, N, K] with `transpose_rhs`), the same kinds.
      group_sizes: integer [E], E ≥ G: rows per group, for all groups that the rows are sorted by. A negative one counts
        as 0, and groups end at row M however many rows they claim; inside of `pallas_kernels.debug.debug_checks` both
        are errors that name the group, when the program runs.
      bias: [G, N], or None.
      group_offset: the first group that `rhs` holds: rhs[g] belongs to group_sizes[group_offset + g].
      transpose_rhs: whether rhs lies as [G, N, K] (the layout FP8 needs on Hopper).
      quantization: round array operands to 8 bits inside, keeping gradients; None multiplies them as they are.
      preferred_element_type: dtype of the result; default is that of lhs (bfloat16 when lhs is a QTensor).
      backend: "auto", "xla", "pallas_tpu" or "pallas_gpu"; see `pallas_kernels.backend`.

    Returns:
      [M, N]; zeros in rows that belong to none of the G groups.

    Raises:
      ValueError: shapes or dtypes do not fit; group_sizes that are known at trace time are negative or exceed M.
      Unsupported: a named backend cannot do this.
    """
    check_operands(lhs, rhs, group_sizes, bias, group_offset, transpose_rhs)
    group_sizes = within_rows(group_sizes, lhs.shape[0])
    settings = _Settings(
        transpose_rhs=transpose_rhs,
        quantization=quantization,
        out_dtype=_result_dtype(lhs, preferred_element_type),
        backend=backend,
    )
    operands = lhs, rhs, bias, group_sizes, jnp.asarray(group_offset, jnp.int32)
    return _matmul(settings, *vary_alike(operands))


def grouped_gate_up(
    lhs: Operand,
    rhs: Operand,
    group_sizes: jax.Array,
    *,
    bias: jax.Array | None = None,
    activation: Activation = "silu",
    activation_limit: float | None = None,
    group_offset: jax.Array | int = 0,
    transpose_rhs: bool = False,
    quantization: Quantization | None = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
    backend: str = "auto",
) -> jax.Array:
    """act(lhs · gate + b_gate) · (lhs · up + b_up) for each group of rows: kernel one of an expert MLP.

    Args:
      lhs: [M, H], BF16, FP16, float32, or a QTensor. Rows lie sorted by group.
      rhs: [G, H, 2I] ([G, 2I, H] with `transpose_rhs`), the gate matrix in the first I columns and the up matrix in
        the last I.
      group_sizes: integer [E], E ≥ G: rows per group; see `grouped_matmul` for negative ones and too many rows.
      bias: [G, 2I], or None.
      activation: silu, gelu, gelu_tanh, swigluoai or relu2; see `pallas_kernels.activations`.
      activation_limit: clamp before the activation, or None.
      group_offset: the first group that `rhs` holds.
      transpose_rhs: whether rhs lies as [G, 2I, H] (the layout FP8 needs on Hopper).
      quantization: round array operands to 8 bits inside, keeping gradients; None multiplies them as they are.
      preferred_element_type: dtype of the result; default is that of lhs (bfloat16 when lhs is a QTensor).
      backend: "auto", "xla", "pallas_tpu" or "pallas_gpu".

    Returns:
      [M, I]; zeros in rows that belong to none of the G groups. Differentiation stores the pre-activations [M, 2I]
      in the dtype of the result; wrap the call in `jax.checkpoint` to recompute them instead.

    Raises:
      ValueError: shapes or dtypes do not fit; group_sizes that are known at trace time are negative or exceed M.
      Unsupported: a named backend cannot do this.
    """
    check_gate_up(lhs, rhs, group_sizes, bias, group_offset, transpose_rhs, activation, activation_limit)
    group_sizes = within_rows(group_sizes, lhs.shape[0])
    settings = _Settings(
        transpose_rhs=transpose_rhs,
        quantization=quantization,
        out_dtype=_result_dtype(lhs, preferred_element_type),
        activation=activation,
        activation_limit=activation_limit,
        backend=backend,
    )
    operands = lhs, rhs, bias, group_sizes, jnp.asarray(group_offset, jnp.int32)
    return _gate_up(settings, *vary_alike(operands))


def grouped_gate_up_in_8_bits(
    lhs: Operand,
    rhs: Operand,
    group_sizes: jax.Array,
    *,
    dtype: QDtype = "float8_e4m3fn",
    bias: jax.Array | None = None,
    activation: Activation = "silu",
    activation_limit: float | None = None,
    group_offset: jax.Array | int = 0,
    transpose_rhs: bool = False,
    quantization: Quantization | None = None,
    backend: str = "auto",
) -> QTensor:
    """`grouped_gate_up` whose result is rounded to 8 bits for the product that follows; no gradient passes.

    Args:
      lhs: see `grouped_gate_up`, as for all that is not listed here.
      rhs: likewise.
      group_sizes: likewise.
      dtype: of the result.
      bias: see `grouped_gate_up`.
      activation: likewise.
      activation_limit: likewise.
      group_offset: likewise.
      transpose_rhs: likewise.
      quantization: likewise.
      backend: likewise.

    Returns:
      [M, I] with scales "1x128".

    Raises:
      ValueError: as `grouped_gate_up`, or I is not divisible by 128.
      Unsupported: a named backend cannot do this.
    """
    check_gate_up(lhs, rhs, group_sizes, bias, group_offset, transpose_rhs, activation, activation_limit)
    group_sizes = within_rows(group_sizes, lhs.shape[0])
    scale_shape((lhs.shape[0], rhs.shape[1 if transpose_rhs else 2] // 2), _RESULT_SCALING)
    settings = _Settings(
        transpose_rhs=transpose_rhs,
        quantization=quantization,
        out_dtype=jnp.dtype(check_qdtype(dtype)),
        activation=activation,
        activation_limit=activation_limit,
        backend=backend,
    )
    operands = jax.lax.stop_gradient((lhs, rhs, bias))
    return _run_gate_up(settings, *operands, group_sizes, jnp.asarray(group_offset, jnp.int32))


def result_can_stay(quantization: Quantization, width: int) -> bool:
    """Whether a result [M, width] of `grouped_gate_up_in_8_bits` is what `quantization` would round it to."""
    return quantization.lhs_scaling == _RESULT_SCALING and width % 128 == 0


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What is fixed at trace time."""

    out_dtype: jnp.dtype
    backend: str
    quantization: Quantization | None
    transpose_rhs: bool = False
    activation: Activation = "silu"
    activation_limit: float | None = None

    @property
    def gradient_dtype(self) -> QDtype | None:
        """The 8-bit dtype of cotangents, if they are rounded."""
        return None if self.quantization is None else self.quantization.gradient_dtype


def _quantized(settings, lhs: Operand, rhs: Operand, group_sizes, group_offset) -> tuple[Operand, Operand]:
    """The operands, rounded if the settings say so; see `_lies_k_major` for the layout of rhs."""
    q = settings.quantization
    if q is None:
        return lhs, rhs
    if not isinstance(lhs, QTensor):
        if block_shape(q.lhs_scaling)[0] != 1:
            lhs = _without_other_rows(lhs, group_sizes, group_offset, rhs.shape[0])
        lhs = quantize(lhs, q.dtype, scaling=q.lhs_scaling)
    if not isinstance(rhs, QTensor):
        rhs = quantize(rhs.mT if settings.transpose_rhs else rhs, q.dtype, scaling=q.rhs_scaling).mT
    return lhs, rhs


def _lies_k_major(settings, rhs: Operand) -> bool:
    """Whether `_quantized` returns `rhs` as [G, N, K]: always when it rounds it, as that is what Hopper needs."""
    return settings.transpose_rhs or (settings.quantization is not None and not isinstance(rhs, QTensor))


def _without_other_rows(lhs: jax.Array, group_sizes: jax.Array, group_offset: jax.Array, num_groups: int) -> jax.Array:
    """Zeros for the rows that no group of the window owns, which must not enter a scale that rows share."""
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    begin = jnp.where(group_offset > 0, ends[group_offset - 1], 0)
    row = jnp.arange(lhs.shape[0])
    return jnp.where(((row >= begin) & (row < ends[group_offset + num_groups - 1]))[:, None], lhs, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(settings, lhs, rhs, bias, group_sizes, group_offset):
    k_major = _lies_k_major(settings, rhs)
    lhs, rhs = _quantized(settings, lhs, rhs, group_sizes, group_offset)
    return _run_matmul(settings, lhs, rhs, bias, group_sizes, group_offset, transpose_rhs=k_major)


def _matmul_fwd(settings, lhs, rhs, bias, group_sizes, group_offset):
    k_major = _lies_k_major(settings, rhs)
    quantized = _quantized(settings, lhs, rhs, group_sizes, group_offset)
    out = _run_matmul(settings, *quantized, bias, group_sizes, group_offset, transpose_rhs=k_major)
    return out, (*quantized, _Faces.of(lhs, rhs, bias, k_major), group_sizes, group_offset)


def _matmul_bwd(settings, residuals, dout):
    return _operand_gradients(settings, residuals, dout)


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gate_up(settings, lhs, rhs, bias, group_sizes, group_offset):
    return _run_gate_up(settings, lhs, rhs, bias, group_sizes, group_offset)


def _run_gate_up(settings, lhs, rhs, bias, group_sizes, group_offset):
    k_major = _lies_k_major(settings, rhs)
    lhs, rhs = _quantized(settings, lhs, rhs, group_sizes, group_offset)
    return run(
        "grouped_matmul",
        "grouped_gate_up",
        settings.backend,
        lhs,
        rhs,
        group_sizes,
        bias=bias,
        activation=settings.activation,
        activation_limit=settings.activation_limit,
        group_offset=group_offset,
        transpose_rhs=k_major,
        out_dtype=settings.out_dtype,
    )


def _gate_up_fwd(settings, lhs, rhs, bias, group_sizes, group_offset):
    k_major = _lies_k_major(settings, rhs)
    quantized = _quantized(settings, lhs, rhs, group_sizes, group_offset)
    h = _run_matmul(settings, *quantized, bias, group_sizes, group_offset, transpose_rhs=k_major)
    out = _activate(settings, h)
    return out, (h, (*quantized, _Faces.of(lhs, rhs, bias, k_major), group_sizes, group_offset))


def _gate_up_bwd(settings, residuals, dout):
    h, rest = residuals
    _, pullback = jax.vjp(functools.partial(_activate, settings), h)
    (dh,) = pullback(dout)
    return _operand_gradients(settings, rest, dh)


_gate_up.defvjp(_gate_up_fwd, _gate_up_bwd)


def _activate(settings: _Settings, h: jax.Array) -> jax.Array:
    out = gated_halves(h.astype(jnp.float32), settings.activation, settings.activation_limit)
    return out.astype(settings.out_dtype)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Faces:
    """The dtypes under which the caller sees the operands (None for one that takes no gradient), and rhs's layouts."""

    lhs: Any
    rhs: Any
    bias: Any
    k_major: bool
    """Whether the rhs that was multiplied is [G, N, K]."""

    @classmethod
    def of(cls, lhs: Operand, rhs: Operand, bias: jax.Array | None, k_major: bool) -> "_Faces":
        def dtype(operand):
            return operand.dtype if isinstance(operand, jax.Array) else None

        return cls(dtype(lhs), dtype(rhs), dtype(bias), k_major)


def _operand_gradients(settings, residuals, dout):
    """Cotangents of (lhs, rhs, bias, group_sizes, group_offset) for a product with cotangent `dout`."""
    lhs, rhs, faces, group_sizes, group_offset = residuals
    dlhs = drhs = dbias = None
    if faces.lhs is not None:
        backward = dataclasses.replace(settings, out_dtype=faces.lhs)
        dlhs = _run_matmul(
            backward,
            *_for_dlhs(settings, dout, rhs, faces.k_major, group_sizes, group_offset),
            None,
            group_sizes,
            group_offset,
            transpose_rhs=not faces.k_major if settings.gradient_dtype is None else True,
        )
    if faces.rhs is not None:
        a, b = (dout, lhs) if settings.transpose_rhs else (lhs, dout)
        drhs = _run_drhs(settings, a, b, group_sizes, group_offset, rhs.shape[0], faces.rhs)
    if faces.bias is not None:
        ones = jnp.ones((dout.shape[0], 1), dout.dtype)
        dbias = _run_drhs(settings, ones, dout, group_sizes, group_offset, rhs.shape[0], faces.bias)[:, 0]
    return dlhs, drhs, dbias, None, None


def _for_dlhs(settings, dout, rhs: Operand, k_major: bool, group_sizes, group_offset) -> tuple[Operand, Operand]:
    """The operands of the gradient of lhs. In 8 bits, both have N last, as Hopper needs it."""
    if settings.gradient_dtype is None:
        return dout, rhs
    scaling = settings.quantization.lhs_scaling
    if block_shape(scaling)[0] != 1:
        dout = _without_other_rows(dout, group_sizes, group_offset, rhs.shape[0])
    return quantize(dout, settings.gradient_dtype, scaling=scaling), rhs.mT if k_major else rhs


def _run_matmul(settings, lhs, rhs, bias, group_sizes, group_offset, *, transpose_rhs):
    return run(
        "grouped_matmul",
        "grouped_matmul",
        settings.backend,
        lhs,
        rhs,
        group_sizes,
        bias=bias,
        group_offset=group_offset,
        transpose_rhs=transpose_rhs,
        out_dtype=settings.out_dtype,
    )


def _run_drhs(settings, lhs, dout, group_sizes, group_offset, num_groups, out_dtype):
    return run(
        "grouped_matmul",
        "grouped_matmul_drhs",
        settings.backend,
        lhs,
        dout,
        group_sizes,
        num_groups=num_groups,
        group_offset=group_offset,
        out_dtype=out_dtype,
    )


def _result_dtype(lhs: Operand, preferred: jax.typing.DTypeLike | None) -> jnp.dtype:
    if preferred is not None:
        return jnp.dtype(preferred)
    return jnp.dtype(jnp.bfloat16) if isinstance(lhs, QTensor) else lhs.dtype


__all__ = ["Operand", "grouped_gate_up", "grouped_gate_up_in_8_bits", "grouped_matmul", "result_can_stay"]
