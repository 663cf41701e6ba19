"""The product of queries, keys and values: jax's, by cuDNN where that runs and by XLA elsewhere."""

from typing import Literal

import jax
import jax.numpy as jnp

from moejax.models.config import AttentionBackend
from pallas_kernels.tracing.concrete import is_less
from pallas_kernels.tracing.target import target_platform

_LEAST_CAPABILITY = 8.0
"""Of GPUs for which cuDNN has flash attention."""

_FEW_KEYS = 64
"""As many as XLA's kernels go through as fast as cuDNN's one and what it needs around it, or faster: 5.0 µs in place of
6.3 for 32 keys and 4 heads of 64 on an H200, 7.1 of 7.2 for 64 keys and 32 heads, but 12.6 of 8.4 for 128."""


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    is_causal: bool = False,
    key_mask: jax.Array | None = None,
    num_keys: jax.Array | None = None,
    backend: AttentionBackend = "auto",
) -> jax.Array:
    """softmax(q · kᵀ / √D) · v, with a head of keys and values for N / G heads of queries.

    Args:
      q: [B, L, N, D].
      k: [B, M, G, D].
      v: [B, M, G, D].
      is_causal: whether query i sees the keys 0 to i only.
      key_mask: bool [B, M], the keys that are seen; None for all. "auto" gives those to XLA, as cuDNN would make a bias
        of L × M numbers of it.
      num_keys: int32 [B], so many keys are seen, the first ones, at least one; None for all.
      backend: see `AttentionConfig`.

    Returns:
      [B, L, N, D] in the dtype of q. Queries that see no key have some finite result.

    Raises:
      NotImplementedError: "cudnn" cannot do this.
    """
    if backend == "auto":
        backend = "xla" if key_mask is not None else best_backend(q.dtype, q.shape[-1], k.shape[1])
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=None if key_mask is None else key_mask[:, None, None, :],
        is_causal=is_causal,
        key_value_seq_lengths=num_keys,
        implementation=backend,
    )


def best_backend(dtype: jax.typing.DTypeLike, head_dim: int, num_keys: int) -> Literal["cudnn", "xla"]:
    """What "auto" takes: cuDNN for 16-bit heads of a width that it knows, on an NVIDIA GPU that is at hand.

    Not for so few keys that XLA's kernels are as fast.
    """
    capability = _nvidia_capability()
    widest = 256 if capability >= 9.0 else 128
    fits = jnp.dtype(dtype).itemsize == 2 and head_dim % 8 == 0 and head_dim <= widest
    return "cudnn" if capability >= _LEAST_CAPABILITY and fits and not is_less(num_keys, _FEW_KEYS + 1) else "xla"


def _nvidia_capability() -> float:
    """The compute capability of the GPU that is traced for and at hand, as jax asks its cuDNN while tracing; else 0."""
    device = jax.devices()[0]
    if target_platform() != "gpu" or device.platform != "gpu" or "rocm" in device.client.platform_version.lower():
        return 0.0
    return float(device.compute_capability)
