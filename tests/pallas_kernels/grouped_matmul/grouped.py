"""Grouped products in float64, one dense product per group: what the suites of grouped_matmul compare with."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.grouped_matmul import grouped_gate_up, grouped_matmul
from pallas_kernels.grouped_matmul.gradients import correlated
from pallas_kernels.quantize import QTensor, quantize
from tests.helpers import LIMIT, float64, normal


@functools.cache
def jitted(function, **options):
    """`grouped_matmul` or `grouped_gate_up`, compiled once for all tests that use the same options and shapes."""
    return jax.jit(functools.partial(function, **options))


matmul = functools.partial(jitted, grouped_matmul)
gate_up = functools.partial(jitted, grouped_gate_up)


quantized = jax.jit(quantize, static_argnums=1, static_argnames=("dtype", "scaling"))
"""`quantize`, compiled once for all tests that use the same shape."""


def limit_in_8_bits(backend: str, dtype="float32") -> float:
    """The largest error of a product of 8-bit operands: Hopper's tensor cores add FP8 products with about 13 bits."""
    return max(LIMIT[dtype], 1e-3) if backend == "pallas_gpu" else LIMIT[dtype]


def limit_beside_8_bits(backend: str) -> float:
    """The largest error of a float32 operand beside one in 8 bits: Hopper kernels round it to BF16."""
    return LIMIT["bfloat16" if backend == "pallas_gpu" else "float32"]


def values(operand) -> np.ndarray:
    """The numbers that an operand stands for, in float64."""
    if not isinstance(operand, QTensor):
        return float64(operand)
    scale = float64(operand.scale)
    for axis, (size, count) in enumerate(zip(operand.shape, scale.shape, strict=True)):
        scale = np.repeat(scale, size // count, axis)
    return float64(operand.values) * scale


def group_rows(group_sizes, num_groups: int, group_offset: int = 0):
    """(index into rhs, slice of rows) of each group in the window."""
    ends = np.cumsum(np.asarray(group_sizes, np.int64))
    for g in range(num_groups):
        end = ends[group_offset + g]
        yield g, slice(int(end - np.asarray(group_sizes)[group_offset + g]), int(end))


def owned(num_rows: int, group_sizes, num_groups: int, group_offset: int = 0) -> np.ndarray:
    """Which rows belong to a group of the window: bool [M]."""
    mask = np.zeros(num_rows, bool)
    for _, rows in group_rows(group_sizes, num_groups, group_offset):
        mask[rows] = True
    return mask


def dense_matmul(lhs, rhs, group_sizes, bias=None, group_offset: int = 0) -> np.ndarray:
    """lhs [M, K] · rhs [G, K, N] + bias [G, N], zeros in rows outside the window."""
    lhs, rhs = values(lhs), values(rhs)
    out = np.zeros((lhs.shape[0], rhs.shape[2]))
    for g, rows in group_rows(group_sizes, rhs.shape[0], group_offset):
        out[rows] = lhs[rows] @ rhs[g] + (0 if bias is None else float64(bias)[g])
    return out


def dense_gate_up(lhs, rhs, group_sizes, bias=None, group_offset: int = 0, activation="silu", limit=None) -> np.ndarray:
    """Gated activation of `dense_matmul`, zeros in rows outside the window."""
    h = dense_matmul(lhs, rhs, group_sizes, bias, group_offset)
    mask = owned(h.shape[0], group_sizes, values(rhs).shape[0], group_offset)
    return np.where(mask[:, None], gated(*np.split(h, 2, axis=1), activation, limit), 0)


def drhs(backend, lhs, dout, group_sizes, onto=None, *, out_dtype="float32", **window) -> jax.Array:
    """The gradient of weights by `backend`, added to `onto`; `window` is group_offset and num_groups."""
    operands = {"lhs": lhs, "lhs_face": None, "dout": dout, "dout_face": None, "group_sizes": group_sizes}
    window = {"group_offset": jnp.int32(0), "num_groups": group_sizes.shape[0]} | window
    return correlated(backend, **operands, **window, onto=onto, out_dtype=jnp.dtype(out_dtype))


def dense_drhs(lhs, dout, group_sizes, num_groups: int, group_offset: int = 0) -> np.ndarray:
    """lhs[rows of g]ᵀ · dout[rows of g], zeros for groups without rows."""
    lhs, dout = values(lhs), float64(dout)
    groups = group_rows(group_sizes, num_groups, group_offset)
    return np.stack([lhs[rows].T @ dout[rows] for _, rows in groups])


def dense_dbias(dout, group_sizes, num_groups: int, group_offset: int = 0) -> np.ndarray:
    """The sum of `dout` over the rows of each group."""
    return dense_drhs(np.ones((dout.shape[0], 1)), dout, group_sizes, num_groups, group_offset)[:, 0]


@np.errstate(over="ignore")  # an exponential without bound makes a logistic function of zero
def gated(gate: np.ndarray, up: np.ndarray, activation: str, limit: float | None = None) -> np.ndarray:
    """The activations by their formulas, in float64."""
    if limit is not None:
        gate, up = np.where(gate > limit, limit, gate), np.where(np.abs(up) > limit, np.sign(up) * limit, up)
    if activation == "silu":
        return gate / (1 + np.exp(-gate)) * up
    if activation == "gelu":
        return gate * 0.5 * (1 + np.vectorize(math.erf, otypes=[float])(gate / math.sqrt(2))) * up
    if activation == "gelu_tanh":
        return 0.5 * gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up
    if activation == "relu2":
        return np.where(gate > 0, gate, 0) ** 2 * up
    assert activation == "swigluoai"
    return gate / (1 + np.exp(-1.702 * gate)) * (up + 1)


def gated_gradient(h: np.ndarray, dout: np.ndarray, activation: str, limit: float | None = None) -> np.ndarray:
    """The cotangent of pre-activations [M, 2I], by central differences in float64."""
    step = 1e-6
    gate, up = np.split(h, 2, axis=1)
    dgate = gated(gate + step, up, activation, limit) - gated(gate - step, up, activation, limit)
    dup = gated(gate, up + step, activation, limit) - gated(gate, up - step, activation, limit)
    return np.concatenate([dgate * dout, dup * dout], axis=1) / (2 * step)


def operands(rng, shape, dtype=jnp.float32):
    """lhs, rhs, bias of a problem [M, K] · [G, K, N] whose results are of order 1."""
    m, k, n, g = shape
    rhs = (normal(rng, g, k, n) / k**0.5).astype(dtype)
    return normal(rng, m, k, dtype=dtype), rhs, normal(rng, g, n, dtype=dtype)


def patterns_of_empty_groups(rng: np.random.Generator, num_groups: int, share: str) -> list[tuple[bool, ...]]:
    """Which groups have rows: "all" ways that there are, or "some": none, every one, and 14 others, drawn anew."""
    patterns = list(itertools.product([False, True], repeat=num_groups))
    if share == "all":
        return patterns
    return [patterns[0], patterns[-1], *(patterns[i] for i in rng.choice(len(patterns), 14, replace=False))]


def random_sizes(rng: np.random.Generator, num_groups: int, num_rows: int) -> jax.Array:
    """Group sizes with the sum `num_rows`, a third of the groups empty on average."""
    weights = rng.random(num_groups) * (rng.random(num_groups) > 1 / 3)
    shares = weights / weights.sum() if weights.any() else np.full(num_groups, 1 / num_groups)
    return jnp.asarray(rng.multinomial(num_rows, shares), jnp.int32)
