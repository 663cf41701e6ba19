"""Attention as a flax.nnx module: over whole sequences, and in two steps with a cache of keys and values."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from moejax.initial import Initializer
from moejax.models.cache import KVCache, check_cache
from moejax.models.checks import check_auto_axes, check_prompts, check_step, check_tokens
from moejax.models.config import AttentionConfig
from moejax.models.dot_product import attend
from moejax.models.linear import project
from moejax.models.masks import kept, real_tokens
from moejax.models.norm import RMSNorm
from moejax.models.rotary import beside_rotated, rotate
from sharding.mesh import mesh_here

_LECUN = nnx.initializers.lecun_normal()
_ZEROS = nnx.initializers.zeros


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary positions; see `AttentionConfig`.

        attention = Attention(AttentionConfig(2048, 32, 4, 128, qk_norm=True), rngs=nnx.Rngs(0))
        y = attention(x)                   # x [B, L, H]

    Attributes:
      config: the attention's AttentionConfig.
      qkv: nnx.Linear with a kernel [H, (N + 2G)·D]: the heads of queries, then those of keys, then those of values.
      out: nnx.Linear with a kernel [N·D, H].
      q_norm, k_norm: RMSNorm of width D, or None.
    """

    def __init__(
        self,
        config: AttentionConfig,
        *,
        rngs: nnx.Rngs,
        mesh: Mesh | None = None,
        kernel_init: Initializer = _LECUN,
        bias_init: Initializer = _ZEROS,
    ):
        """Makes the parameters.

        Args:
          config: the attention.
          rngs: the stream "params" initialises the parameters.
          mesh: that splits x, over which XLA makes all products; the default is the mesh of `jax.set_mesh`, if any:
            that in force at a call, else that in force here.
          kernel_init: initialises the two kernels.
          bias_init: initialises the biases.
        """
        self.config = config
        self._made_on = mesh_here(mesh)
        linear = functools.partial(
            nnx.Linear,
            use_bias=config.attention_bias,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            kernel_init=kernel_init,
            bias_init=bias_init,
            rngs=rngs,
        )
        heads = config.num_attention_heads + 2 * config.num_key_value_heads
        self.qkv = linear(config.hidden_size, heads * config.head_dim)
        self.out = linear(config.num_attention_heads * config.head_dim, config.hidden_size)
        norm = functools.partial(
            RMSNorm,
            config.head_dim,
            eps=config.rms_norm_eps,
            param_dtype=config.param_dtype,
            backend="xla",  # which fuses it with the rotation
            rngs=rngs,
        )
        self.q_norm = norm() if config.qk_norm else None
        self.k_norm = norm() if config.qk_norm else None

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Every token attends to itself and those before it.

        Args:
          x: [B, L, H], BF16, FP16 or float32.
          mask: bool [B, L], true for real tokens; None if all are. What is masked is seen by no token, and comes out as
            zeros.

        Returns:
          [B, L, H] in the dtype of x.

        Raises:
          ValueError: shapes or dtypes do not fit.
        """
        check_tokens(x, self.config.hidden_size, mask)
        q, k, v = self._heads(kept(x, mask), jnp.arange(x.shape[1]))
        y = attend(q, k, v, is_causal=True, key_mask=mask, backend=self.config.backend)
        return self._joined(y, x.dtype, mask)

    def prefill(
        self, x: jax.Array, cache: KVCache, *, slots: jax.Array, lengths: jax.Array | None = None
    ) -> tuple[jax.Array, KVCache]:
        """Whole sequences, whose keys and values go into slots of the cache, in the place of what was there.

        Args:
          x: [B, L, H], L at most M.
          cache: of this attention.
          slots: integer [B], each another one of [0, S); a sequence with −1 is not kept. Under jit, where they are not
            known, one with another number is not kept either, and of two with the same slot the last one is.
          lengths: integer [B], real tokens of each, which come first; None if all are. The rest comes out as zeros.
            Under jit they are brought into [0, L].

        Returns:
          [B, L, H] in the dtype of x, and the cache.

        Raises:
          ValueError: shapes or dtypes do not fit, sequences are longer than M, slots or lengths are known to be wrong,
            or a mesh of Explicit axes splits x or the cache.
        """
        check_tokens(x, self.config.hidden_size)
        check_cache(cache, self.config)
        check_auto_axes({"x": x, "cache.keys": cache.keys})
        check_prompts(x, slots, lengths, num_slots=cache.num_slots, max_length=cache.max_length)
        batch, length, _ = x.shape
        mask = None
        if lengths is None:
            lengths = jnp.full(batch, length, jnp.int32)
        else:
            lengths = jnp.clip(lengths.astype(jnp.int32), 0, length)
            mask = real_tokens(lengths, length)
        q, k, v = self._heads(kept(x, mask), jnp.arange(length))
        y = attend(q, k, v, is_causal=True, backend=self.config.backend)  # what lies behind is seen by no real token
        return self._joined(y, x.dtype, mask), cache.started(k, v, slots, lengths)

    def decode(self, x: jax.Array, cache: KVCache, *, active: jax.Array | None = None) -> tuple[jax.Array, KVCache]:
        """One more token in every active slot, which attends to itself and the slot's tokens before it.

        Args:
          x: [S, 1, H].
          cache: of this attention.
          active: bool [S], slots that hold a sequence; None if all do. The others stay as they are.

        Returns:
          [S, 1, H] in the dtype of x, and the cache. Zeros in idle slots; NaN, so that the fault stays visible, in an
          active slot that is full.

        Raises:
          ValueError: shapes or dtypes do not fit, or a slot is active and known to be full.
        """
        check_tokens(x, self.config.hidden_size)
        check_cache(cache, self.config)
        check_step(x, active, is_full=cache.is_full)
        active = jnp.ones(cache.num_slots, bool) if active is None else active
        q, k, v = self._heads(x, cache.lengths[:, None])
        after = cache.appended(k[:, 0], v[:, 0], active)
        y = attend(q, after.keys, after.values, num_keys=jnp.maximum(after.lengths, 1), backend=self.config.backend)
        y = jnp.where(cache.is_full[:, None, None, None], jnp.nan, y)
        return self._joined(y, x.dtype, active[:, None]), after

    def _heads(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, L, N, D], and keys and values [B, L, G, D], of tokens at `positions`."""
        config = self.config
        # What stands in the place of a Linear, an adapter in float32 say, may give another dtype than the cache has.
        heads = self._project(self.qkv, x).astype(config.dtype).reshape(*x.shape[:-1], -1, config.head_dim)
        ends = config.num_attention_heads, config.num_attention_heads + config.num_key_value_heads
        q, k, v = jnp.split(heads, ends, axis=-2)
        q = q if self.q_norm is None else self.q_norm(q)
        k = k if self.k_norm is None else self.k_norm(k)
        q, k = (rotate(x, positions, config.rope_theta) for x in (q, k))
        return q, k, beside_rotated(v, positions, config.rope_theta)  # v, by the kernel that turns k

    def _joined(self, y: jax.Array, dtype: jax.typing.DTypeLike, mask: jax.Array | None) -> jax.Array:
        """[B, L, N, D] -> [B, L, H], zeros where the mask [B, L] is false."""
        y = self._project(self.out, y.reshape(*y.shape[:-2], -1))
        return kept(y.astype(dtype), mask)

    def _project(self, linear: nnx.Module, x: jax.Array) -> jax.Array:
        """linear(x), by XLA alone if that is asked for."""
        return linear(x) if self.config.backend == "xla" else project(linear, x, made_on=self._made_on)
