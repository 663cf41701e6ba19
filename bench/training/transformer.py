"""A small decoder-only transformer over bytes, whose feed-forward layers are Mixtures of Experts.

    x = embedding[bytes]
    x = block(x)                       `moejax.models.DecoderBlock`, whose experts are the layer under test
    logits = norm(x) · head

Sums, norms, logits and the loss are in float32 where that is cheap; the products are in the layer's dtype.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from moejax import MoEAux, MoEConfig
from moejax.models import AttentionConfig, BlockConfig, DecoderBlock, RMSNorm

VOCABULARY = 256


class Transformer(nnx.Module):
    """Next-byte prediction; in each of its `blocks`, `block.feed_forward` is the layer under test."""

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
        attention = AttentionConfig(
            hidden_size=config.hidden_size,
            num_attention_heads=num_heads,
            num_key_value_heads=num_heads,
            head_dim=config.hidden_size // num_heads,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            backend="xla",  # so that a seed gives the same bits in every run
        )
        block = BlockConfig(attention, config)
        self.blocks = nnx.List([DecoderBlock(block, rngs=rngs) for _ in range(num_layers)])
        self.norm = RMSNorm(config.hidden_size, param_dtype=config.param_dtype, rngs=rngs)
        self.head = nnx.Linear(config.hidden_size, VOCABULARY, use_bias=False, dtype=config.dtype, rngs=rngs)

    @property
    def causal(self) -> bool:
        """Whether no output depends on a later byte, which is for the routers to say."""
        return all(block.causal for block in self.blocks)

    def __call__(self, token_ids: jax.Array, *, train: bool = False) -> tuple[jax.Array, list[MoEAux]]:
        """Bytes [B, L] -> logits float32 [B, L, 256], and what each layer's router did."""
        # The gradient of a look-up adds in no fixed order on a GPU; that of a product does, and 256 rows are cheap.
        one_hot = jax.nn.one_hot(token_ids, VOCABULARY, dtype=self.dtype)
        x = one_hot @ self.embedding[...].astype(self.dtype)
        auxes = []
        for block in self.blocks:
            x, aux = block(x, token_ids=token_ids, train=train)
            assert aux is not None  # as there are experts
            auxes.append(aux)
        return self.head(self.norm(x)).astype(jnp.float32), auxes
