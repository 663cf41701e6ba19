"""The product of queries, keys and values: jax's, by cuDNN where that runs and by XLA elsewhere."""

from typing import Literal

import jax

from moejax.models.config import AttentionBackend
from pallas_kernels.tracing.concrete import is_less
from pallas_kernels.tracing.target import target_platform

_LEAST_CAPABILITY = 8.0
"""Of GPUs for which cuDNN has flash attention."""

_FEW_LOGITS = 1 << 18
"""As many as XLA's kernels go through as fast as cuDNN's one and what it needs around it, or faster, of sequences: on
an H200 a block with 12 heads and 128 keys takes 66 µs in place of 77, 16 heads 62 of 70, 32 heads and 64 keys 64 of 67.
For twice as many cuDNN wins: 4 sequences with 32 heads and 64 keys take 87 µs in place of 93."""

_FEW_KEYS = 64
"""The same for a token in every slot of a cache."""


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
      ValueError: "cudnn" is not there.
    """
    if backend == "auto":
        backend = "xla" if key_mask is not None else best_backend(q, k)
    elif backend == "cudnn" and not _nvidia_capability():
        raise ValueError(
            "backend 'cudnn' of attention needs an NVIDIA GPU, and jax finds none here: take 'auto' or 'xla'"
        )
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=None if key_mask is None else key_mask[:, None, None, :],
        is_causal=is_causal,
        key_value_seq_lengths=num_keys,
        implementation=backend,
    )


def best_backend(q: jax.Array, k: jax.Array) -> Literal["cudnn", "xla"]:
    """What "auto" takes: cuDNN for 16-bit heads of a width that it knows, on an NVIDIA GPU that is at hand.

    Not for so few keys that XLA's kernels are as fast.
    """
    capability = _nvidia_capability()
    batch, num_queries, heads, head_dim = q.shape
    num_keys, widest = k.shape[1], 256 if capability >= 9.0 else 128
    fits = q.dtype.itemsize == 2 and head_dim % 8 == 0 and head_dim <= widest
    if capability < _LEAST_CAPABILITY or not fits:
        return "xla"
    if isinstance(num_queries, int) and num_queries == 1:
        return "xla" if is_less(num_keys, _FEW_KEYS + 1) else "cudnn"
    return "xla" if is_less(batch * heads * num_queries * num_keys, _FEW_LOGITS + 1) else "cudnn"


def _nvidia_capability() -> float:
    """The compute capability of the GPU that is traced for and at hand, as jax asks its cuDNN while tracing; else 0."""
    device = jax.devices()[0]
    if target_platform() != "gpu" or device.platform != "gpu" or "rocm" in device.client.platform_version.lower():
        return 0.0
    return float(device.compute_capability)
