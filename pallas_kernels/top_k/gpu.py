"""Top-k on NVIDIA GPUs: K rounds of finding the maximum, with the scores of 64 tokens in a warpgroup's registers.

XLA sorts every row instead. The scores are read once:

    floor in time = (4·T·E + 8·T·K) bytes / HBM bandwidth
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.backend import Unsupported
from pallas_kernels.on_gpu.device import require_hopper
from pallas_kernels.on_gpu.smem import Views, swizzled
from pallas_kernels.on_gpu.store import store_rows
from pallas_kernels.top_k import reference

_TOKENS = 64
_MOST_EXPERTS = 256  # two registers a thread for each, of 255
_COLUMNS = 8  # of the choices that are stored together
_SMALLEST = float(jnp.finfo(jnp.float32).tiny)
_LOWEST = float(jnp.finfo(jnp.float32).min)
_COPIED_BYTES = 128  # in multiples of which the copy engine fills shared memory

_Rounds = Callable[[jax.Array], tuple[list[jax.Array], list[jax.Array]]]


def top_k(scores: jax.Array, k: int, *, normalize: bool) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.top_k.top_k`."""
    _require(scores)
    if _is_left_to_xla(scores):
        return reference.top_k(scores, k, normalize=normalize)
    ids, weights = _choose(scores, k, with_weights=True, normalize=normalize)
    return weights, ids


def softmax_top_k(logits: jax.Array, k: int, *, normalize: bool) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.top_k.softmax_top_k`."""
    _require(logits)
    if _is_left_to_xla(logits):
        return reference.softmax_top_k(logits, k, normalize=normalize)
    ids, weights = _choose(logits, k, with_weights=True, normalize=normalize, softmax=True)
    return weights, ids


def top_k_ids(scores: jax.Array, k: int) -> jax.Array:
    """See `pallas_kernels.top_k.top_k_ids`."""
    _require(scores)
    if _is_left_to_xla(scores):
        return reference.top_k_ids(scores, k)
    (ids,) = _choose(scores, k, with_weights=False, normalize=False)
    return ids


def _require(scores: jax.Array) -> None:
    require_hopper("top_k")
    experts = scores.shape[1]
    if scores.dtype != jnp.float32 or experts % 8 or experts > _MOST_EXPERTS:
        raise Unsupported(
            f"top_k: the kernel takes float32 scores of up to {_MOST_EXPERTS} experts, a multiple of 8, got "
            f"{scores.dtype} and {experts}"
        )


def _is_left_to_xla(scores: jax.Array) -> bool:
    """Whether there is nothing to choose, or the copy engine cannot bring the scores of so few tokens."""
    tokens = scores.shape[0]
    return tokens == 0 or (tokens < _TOKENS and scores.nbytes % _COPIED_BYTES != 0)


def _choose(
    scores: jax.Array, k: int, *, with_weights: bool, normalize: bool, softmax: bool = False
) -> list[jax.Array]:
    """The kernel for the number of tokens: ids [T, K], and their weights [T, K] if wanted."""
    launch = _of_few_tokens if scores.shape[0] < _TOKENS else _of_many_tokens
    dtypes = (jnp.int32, jnp.float32) if with_weights else (jnp.int32,)
    rounds = functools.partial(_rounds, k=k, normalize=normalize, softmax=softmax)
    return launch(scores, rounds, pl.cdiv(k, _COLUMNS), dtypes, k)


def _of_many_tokens(scores: jax.Array, rounds: _Rounds, parts: int, dtypes: Sequence[Any], k: int) -> list[jax.Array]:
    """A block for every 64 tokens, whose scores go straight to the registers."""
    num_tokens = scores.shape[0]

    def body(scores, *outs):
        # The last block starts early enough to end with the rows: what two blocks share they both find.
        begin = jnp.minimum(lax.axis_index("block") * _TOKENS, num_tokens - _TOKENS)
        tile = pl.ds(begin, _TOKENS)
        chosen = rounds(plgpu.load(scores.at[tile, :], layout=plgpu.Layout.WGMMA, optimized=False))
        for out, values in zip(outs, chosen, strict=False):
            for part, value in enumerate(values):
                out[part, tile] = value

    outs = [jax.ShapeDtypeStruct((parts, num_tokens, _COLUMNS), dtype) for dtype in dtypes]
    chosen = _launch(body, outs, pl.cdiv(num_tokens, _TOKENS))(scores)
    return [x.transpose(1, 0, 2).reshape(num_tokens, -1)[:, :k] for x in chosen]


def _of_few_tokens(scores: jax.Array, rounds: _Rounds, parts: int, dtypes: Sequence[Any], k: int) -> list[jax.Array]:
    """One block, and the rows of a tile in shared memory: those past the tokens are whatever lies there."""
    num_tokens, num_experts = scores.shape

    def body(scores, *refs):
        *outs, tile, staging, copied = refs
        plgpu.copy_gmem_to_smem(scores, tile.at[:num_tokens], copied)
        plgpu.barrier_wait(copied)
        chosen = rounds(plgpu.load(tile, layout=plgpu.Layout.WGMMA, optimized=False))
        for out, buffer, values in zip(outs, staging, chosen, strict=False):
            for part, value in enumerate(values):
                column = part * _COLUMNS
                store_rows(out, Views.of(buffer), 0, value, row=0, rows=num_tokens, column=column)
        plgpu.wait_smem_to_gmem(0)

    scratch = [
        plgpu.SMEM((_TOKENS, num_experts), jnp.float32),
        [swizzled((1, parts, _TOKENS, _COLUMNS), dtype) for dtype in dtypes],
        plgpu.Barrier(),
    ]
    outs = [jax.ShapeDtypeStruct((num_tokens, parts * _COLUMNS), dtype) for dtype in dtypes]
    return [x[:, :k] for x in _launch(body, outs, 1, scratch)(scores)]


def _rounds(remaining: jax.Array, *, k: int, normalize: bool, softmax: bool) -> tuple[list[jax.Array], list[jax.Array]]:
    """Ids and weights of the K largest of 64 rows of scores, 8 columns of them at a time."""
    num_experts = remaining.shape[1]
    expert = plgpu.broadcasted_iota(jnp.int32, remaining.shape, 1, layout=plgpu.Layout.WGMMA)
    column = plgpu.broadcasted_iota(jnp.int32, (_TOKENS, _COLUMNS), 1, layout=plgpu.Layout.WGMMA)
    ids: list[jax.Array] = []
    weights: list[jax.Array] = []
    first = jnp.max(remaining, axis=1)
    of_chosen: Any = 0.0
    of_all: Any = None
    if softmax and normalize:  # a NaN, which a maximum passes over, or nothing
        of_chosen = jnp.sum(jnp.where(remaining == remaining, 0.0, jnp.nan), axis=1)
    elif softmax:
        of_all = jnp.sum(jnp.exp(remaining - lax.broadcast_in_dim(first, remaining.shape, (0,))), axis=1)
    if softmax:  # logits of -inf rank before those that were chosen
        remaining = jnp.maximum(remaining, _LOWEST)
    for i in range(k):
        best = jnp.max(remaining, axis=1) if i else first
        is_best = remaining == lax.broadcast_in_dim(best, remaining.shape, (0,))
        place = jnp.min(jnp.where(is_best, expert, num_experts - 1), axis=1)
        remaining = jnp.where(expert == lax.broadcast_in_dim(place, expert.shape, (0,)), -jnp.inf, remaining)
        weight = jnp.exp(best - first) if softmax else best
        of_chosen = of_chosen + weight
        for chosen, value in ((ids, place), (weights, weight)):
            value = lax.broadcast_in_dim(value, column.shape, (0,))
            if i % _COLUMNS:
                chosen[-1] = jnp.where(column == i % _COLUMNS, value, chosen[-1])
            else:
                chosen.append(value)
    if normalize or softmax:
        # Those of a softmax are at least 1; of other scores, all that are chosen may underflow.
        total = of_all if not normalize else of_chosen if softmax else jnp.maximum(of_chosen, _SMALLEST)
        total = lax.broadcast_in_dim(total, column.shape, (0,))
        weights = [weight / total for weight in weights]
    return ids, weights


def _launch(body: Any, outs: list[jax.ShapeDtypeStruct], blocks: int, scratch: Sequence[Any] = ()) -> Any:
    return plgpu.kernel(
        body,
        out_type=outs,
        scratch_types=scratch,
        grid=(blocks,),
        grid_names=("block",),
        kernel_name="top_k",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )
