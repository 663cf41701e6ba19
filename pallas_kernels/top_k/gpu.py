"""Top-k on NVIDIA GPUs: K rounds of finding the maximum, with the scores of 64 tokens in a warpgroup's registers.

XLA sorts every row instead. The scores are read once:

    floor in time = (4·T·E + 8·T·K) bytes / HBM bandwidth
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.backend import Unsupported
from pallas_kernels.on_gpu.device import require_hopper
from pallas_kernels.top_k import reference

_TOKENS = 64
_MOST_EXPERTS = 256  # two registers a thread for each, of 255
_COLUMNS = 8  # of the choices that are stored together


def top_k(scores: jax.Array, k: int, *, normalize: bool) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.top_k.top_k`."""
    _require(scores)
    if scores.shape[0] < _TOKENS:
        return reference.top_k(scores, k, normalize=normalize)
    ids, weights = _choose(scores, k, with_weights=True, normalize=normalize)
    return weights, ids


def top_k_ids(scores: jax.Array, k: int) -> jax.Array:
    """See `pallas_kernels.top_k.top_k_ids`."""
    _require(scores)
    if scores.shape[0] < _TOKENS:
        return reference.top_k_ids(scores, k)
    (ids,) = _choose(scores, k, with_weights=False, normalize=False)
    return ids


def _require(scores: jax.Array) -> None:
    require_hopper("top_k")
    num_experts = scores.shape[1]
    if scores.dtype != jnp.float32 or num_experts % 8 or num_experts > _MOST_EXPERTS:
        raise Unsupported(
            f"top_k: the kernel takes float32 scores of up to {_MOST_EXPERTS} experts, a multiple of 8, got "
            f"{scores.dtype} and {num_experts}"
        )


def _choose(scores: jax.Array, k: int, *, with_weights: bool, normalize: bool) -> list[jax.Array]:
    """The kernel: ids [T, K], and their weights [T, K] if wanted."""
    num_tokens, num_experts = scores.shape
    parts = pl.cdiv(k, _COLUMNS)

    def body(scores, ids_out, *weights_out):
        # The last block starts early enough to end with the rows: what two blocks share they both find.
        begin = jnp.minimum(lax.axis_index("block") * _TOKENS, num_tokens - _TOKENS)
        tile = pl.ds(begin, _TOKENS)
        remaining = plgpu.load(scores.at[tile, :], layout=plgpu.Layout.WGMMA, optimized=False)
        expert = plgpu.broadcasted_iota(jnp.int32, remaining.shape, 1, layout=plgpu.Layout.WGMMA)
        column = plgpu.broadcasted_iota(jnp.int32, (_TOKENS, _COLUMNS), 1, layout=plgpu.Layout.WGMMA)
        ids: list[jax.Array] = []
        weights: list[jax.Array] = []
        total: Any = 0.0
        for i in range(k):
            best = jnp.max(remaining, axis=1)
            is_best = remaining == lax.broadcast_in_dim(best, remaining.shape, (0,))
            place = jnp.min(jnp.where(is_best, expert, num_experts - 1), axis=1)
            remaining = jnp.where(expert == lax.broadcast_in_dim(place, expert.shape, (0,)), -jnp.inf, remaining)
            total = total + best
            for chosen, value in ((ids, place), (weights, best)):
                value = lax.broadcast_in_dim(value, column.shape, (0,))
                if i % _COLUMNS:
                    chosen[-1] = jnp.where(column == i % _COLUMNS, value, chosen[-1])
                else:
                    chosen.append(value)
        if normalize:
            total = lax.broadcast_in_dim(jnp.maximum(total, jnp.finfo(jnp.float32).tiny), column.shape, (0,))
            weights = [weight / total for weight in weights]
        for out, chosen in ((ids_out, ids), *((out, weights) for out in weights_out)):
            for part, value in enumerate(chosen):
                out[part, tile] = value

    shape = (parts, num_tokens, _COLUMNS)
    dtypes = (jnp.int32, jnp.float32) if with_weights else (jnp.int32,)
    chosen = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(shape, dtype) for dtype in dtypes],
        grid=(pl.cdiv(num_tokens, _TOKENS),),
        grid_names=("block",),
        kernel_name="top_k",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )(scores)
    return [x.transpose(1, 0, 2).reshape(num_tokens, parts * _COLUMNS)[:, :k] for x in chosen]
