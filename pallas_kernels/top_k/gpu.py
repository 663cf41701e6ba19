"""Top-k on NVIDIA GPUs: K rounds of finding the maximum, with the scores of 64 tokens in a warpgroup's registers.

XLA sorts every row instead. The scores are read once:

    floor in time = (4·T·E + 4·T·K) bytes / HBM bandwidth
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.backend import Unsupported
from pallas_kernels.hopper import require_hopper
from pallas_kernels.top_k import reference

_TOKENS = 64
_MOST_EXPERTS = 256  # two registers a thread for each, of 255


def top_k_ids(scores: jax.Array, k: int) -> jax.Array:
    """See `pallas_kernels.top_k.top_k_ids`."""
    require_hopper("top_k")
    num_tokens, num_experts = scores.shape
    if scores.dtype != jnp.float32 or num_experts % 8 or num_experts > _MOST_EXPERTS:
        raise Unsupported(
            f"top_k: the kernel takes float32 scores of up to {_MOST_EXPERTS} experts, a multiple of 8, got "
            f"{scores.dtype} and {num_experts}"
        )
    if num_tokens < _TOKENS:
        return reference.top_k_ids(scores, k)

    def body(scores, out):
        # The last block starts early enough to end with the rows: what two blocks share they both find.
        begin = jnp.minimum(lax.axis_index("block") * _TOKENS, num_tokens - _TOKENS)
        tile = pl.ds(begin, _TOKENS)
        remaining = plgpu.load(scores.at[tile, :], layout=plgpu.Layout.WGMMA, optimized=False)
        expert = plgpu.broadcasted_iota(jnp.int32, remaining.shape, 1, layout=plgpu.Layout.WGMMA)
        for i in range(k):
            best = jnp.max(remaining, axis=1)
            is_best = remaining == lax.broadcast_in_dim(best, remaining.shape, (0,))
            place = jnp.min(jnp.where(is_best, expert, num_experts - 1), axis=1)
            out[i, tile] = place
            remaining = jnp.where(expert == lax.broadcast_in_dim(place, expert.shape, (0,)), -jnp.inf, remaining)

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((k, num_tokens), jnp.int32),
        grid=(pl.cdiv(num_tokens, _TOKENS),),
        grid_names=("block",),
        kernel_name="top_k",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )
    return kernel(scores).T
