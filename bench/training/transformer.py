"""A small decoder-only transformer over bytes, whose feed-forward layers are Mixtures of Experts.

    x = embedding[bytes]
    x = x + attention(norm(x))         causal, rotary positions (RoPE, arXiv 2104.09864)
    x = x + experts(norm(x))           the layer under test
    logits = norm(x) · head

Norms are RMSNorm (arXiv 1910.07467). Sums, norms, logits and the loss are in float32 where that is cheap; the products
are in the layer's dtype.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from moejax import MoE, MoEAux, MoEConfig

VOCABULARY = 256
_ROTARY_BASE = 10_000.0


class Attention(nnx.Module):
    """Causal multi-head attention, x [B, L, H] -> [B, L, H], with rotary positions."""

    def __init__(self, hidden_size: int, num_heads: int, dtype: jax.typing.DTypeLike, *, rngs: nnx.Rngs):
        self.num_heads = num_heads
        self.qkv = nnx.Linear(hidden_size, 3 * hidden_size, use_bias=False, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(hidden_size, hidden_size, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """In the dtype of the model."""
        batch, length, hidden = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, hidden // self.num_heads)
        q, k, v = rotate(qkv[:, :, 0]), rotate(qkv[:, :, 1]), qkv[:, :, 2]
        return self.out(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(batch, length, hidden))


class Block(nnx.Module):
    """Attention and experts, each behind a norm and beside a residual."""

    def __init__(self, config: MoEConfig, num_heads: int, *, rngs: nnx.Rngs):
        self.attention_norm = nnx.RMSNorm(config.hidden_size, dtype=config.dtype, rngs=rngs)
        self.attention = Attention(config.hidden_size, num_heads, config.dtype, rngs=rngs)
        self.experts_norm = nnx.RMSNorm(config.hidden_size, dtype=config.dtype, rngs=rngs)
        self.experts = MoE(config, rngs=rngs)

    def __call__(self, x: jax.Array, token_ids: jax.Array, train: bool) -> tuple[jax.Array, MoEAux]:
        """X [B, L, H] of bytes token_ids [B, L] -> [B, L, H], and what the router did."""
        x = x + self.attention(self.attention_norm(x))
        y, aux = self.experts(self.experts_norm(x), token_ids=token_ids, train=train)
        return x + y, aux


class Transformer(nnx.Module):
    """Next-byte prediction; in each of its `blocks`, `block.experts` is the layer under test."""

    def __init__(self, config: MoEConfig, num_layers: int, num_heads: int, *, rngs: nnx.Rngs):
        """Makes the parameters; the hidden size and dtype of `config`, the feed-forward layers', are the model's.

        Raises:
          ValueError: the hidden size does not divide into heads of even width.
        """
        if config.hidden_size % (2 * num_heads):
            raise ValueError(
                f"hidden_size must be a multiple of 2 · num_heads, so that rotary positions turn pairs; got "
                f"hidden_size={config.hidden_size}, num_heads={num_heads}"
            )
        self.dtype = config.dtype
        self.embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), (VOCABULARY, config.hidden_size)))
        self.blocks = nnx.List([Block(config, num_heads, rngs=rngs) for _ in range(num_layers)])
        self.norm = nnx.RMSNorm(config.hidden_size, dtype=config.dtype, rngs=rngs)
        self.head = nnx.Linear(config.hidden_size, VOCABULARY, use_bias=False, dtype=config.dtype, rngs=rngs)

    @property
    def causal(self) -> bool:
        """Whether no output depends on a later byte, which is for the routers to say."""
        return all(block.experts.causal for block in self.blocks)

    def __call__(self, token_ids: jax.Array, *, train: bool = False) -> tuple[jax.Array, list[MoEAux]]:
        """Bytes [B, L] -> logits float32 [B, L, 256], and what each layer's router did."""
        # The gradient of a look-up adds in no fixed order on a GPU; that of a product does, and 256 rows are cheap.
        one_hot = jax.nn.one_hot(token_ids, VOCABULARY, dtype=self.dtype)
        x = one_hot @ self.embedding[...].astype(self.dtype)
        auxes = []
        for block in self.blocks:
            x, aux = block(x, token_ids, train)
            auxes.append(aux)
        return self.head(self.norm(x)).astype(jnp.float32), auxes


def rotate(x: jax.Array) -> jax.Array:
    """Turns the pairs (i, i + D/2) of x [B, L, N, D] by angles that grow with the position along L."""
    length, width = x.shape[1], x.shape[3] // 2
    frequency = _ROTARY_BASE ** (-jnp.arange(width, dtype=jnp.float32) / width)
    angle = jnp.arange(length, dtype=jnp.float32)[:, None, None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = x[..., :width].astype(jnp.float32), x[..., width:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)
