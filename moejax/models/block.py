"""A decoder block as a flax.nnx module: attention, and experts or a dense network, behind norms, beside residuals."""

import functools
import warnings
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from moejax.aux_output import MoEAux
from moejax.checks import require
from moejax.layer import MoE
from moejax.models.attention import Attention
from moejax.models.cache import KVCache, check_cache
from moejax.models.checks import check_prompts, check_step, check_tokens
from moejax.models.config import BlockConfig, MLPConfig
from moejax.models.masks import kept, real_tokens
from moejax.models.mlp import MLP
from moejax.models.norm import RMSNorm
from moejax.rounded_experts import RoundedExperts
from sharding.partition import Partition


class DecoderBlock(nnx.Module):
    """One block of a decoder.

        x = x + attention(attention_norm(x))
        x = x + feed_forward(feed_forward_norm(x))

    What is masked, and what is in an idle slot, comes out as it came in. Over a mesh experts are spread as `moejax.MoE`
    spreads them, and all else is whole on every chip and works on that chip's tokens.

    Attributes:
      config: the block's BlockConfig.
      attention: Attention.
      feed_forward: MoE, or MLP where the configuration is a dense network's. A layer in 8 bits may take its place:
        `block.feed_forward = block.feed_forward.quantized()`.
      attention_norm, feed_forward_norm: RMSNorm.
    """

    feed_forward: MoE | MLP

    def __init__(
        self,
        config: BlockConfig,
        *,
        rngs: nnx.Rngs,
        mesh: Mesh | None = None,
        partition: Partition | None = None,
    ):
        """Makes the parameters.

        Args:
          config: the block.
          rngs: see `moejax.MoE`.
          mesh: see `moejax.MoE`.
          partition: which axes of the mesh split what, for the feed-forward network.
        """
        if not isinstance(config, BlockConfig):
            raise TypeError(f"config must be BlockConfig(attention, feed_forward), got {type(config).__name__}")
        if not isinstance(rngs, nnx.Rngs):
            raise TypeError(f"rngs must be nnx.Rngs, such as nnx.Rngs(0), got {type(rngs).__name__}")
        self.config = config
        attention, feed_forward = config.attention, config.feed_forward
        norm = functools.partial(
            RMSNorm,
            config.hidden_size,
            eps=config.rms_norm_eps,
            param_dtype=attention.param_dtype,
            backend=feed_forward.backend,
            rngs=rngs,
            mesh=mesh,
        )
        self.attention_norm = norm()
        self.attention = Attention(attention, rngs=rngs, mesh=mesh)
        self.feed_forward_norm = norm()
        if isinstance(feed_forward, MLPConfig):
            self.feed_forward = MLP(feed_forward, rngs=rngs, mesh=mesh, partition=partition)
        else:
            self.feed_forward = MoE(feed_forward, rngs=rngs, mesh=mesh, partition=partition)

    @property
    def causal(self) -> bool:
        """Whether the output of a token never depends on later tokens, which is for the experts' router to say."""
        return isinstance(self.feed_forward, MLP) or self.feed_forward.causal

    def quantized_for_training(self) -> RoundedExperts | None:
        """The weights of its experts in 8 bits, for `rounded=`; see `MoE`. None of a dense network, which has none."""
        return None if isinstance(self.feed_forward, MLP) else self.feed_forward.quantized_for_training()

    def __call__(
        self,
        x: jax.Array,
        *,
        mask: jax.Array | None = None,
        token_ids: jax.Array | None = None,
        topk_ids: jax.Array | None = None,
        rounded: RoundedExperts | None = None,
        train: bool | None = None,
    ) -> tuple[jax.Array, MoEAux | None]:
        """Whole sequences.

        Args:
          x: [B, L, H], BF16, FP16 or float32.
          mask: bool [B, L], true for real tokens; None if all are.
          token_ids: for the experts, as is all that follows; see `moejax.MoE`.
          topk_ids: choices to repeat.
          rounded: what `quantized_for_training` made, or None.
          train: whether a noisy router adds its noise.

        Returns:
          [B, L, H] in the dtype of x, and what the router did, None where there is none.

        Raises:
          ValueError: shapes or dtypes do not fit.
        """
        check_tokens(x, self.config.hidden_size, mask)
        fits = rounded is None or not isinstance(self.feed_forward, MLP)
        require(fits, "rounded", "None for a dense network, which has no experts", type(rounded).__name__)
        real = kept(x, mask)
        attended = self.attention(self.attention_norm(real), mask=mask)
        of_experts: Any = {"token_ids": token_ids, "topk_ids": topk_ids, "rounded": rounded, "train": train}
        y, aux = self._fed_forward(attended, real, mask, **of_experts)
        return kept(y, mask, x), aux

    def prefill(
        self,
        x: jax.Array,
        cache: KVCache,
        *,
        slots: jax.Array,
        lengths: jax.Array | None = None,
        token_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, MoEAux | None, KVCache]:
        """Whole sequences, whose keys and values go into slots of the cache; see `Attention.prefill`.

        `token_ids` [B, L] are for the experts. Warns where the block is not `causal`: tokens decoded one by one then
        differ from those of a whole sequence.
        """
        check_tokens(x, self.config.hidden_size)
        check_cache(cache, self.config.attention)
        check_prompts(x, slots, lengths, num_slots=cache.num_slots, max_length=cache.max_length)
        if not self.causal:
            warnings.warn(
                "what a token's experts make of it depends on later tokens (by the router, or a capacity), so decoding "
                "differs from whole sequences; see moejax.MoE.causal",
                stacklevel=2,
            )
        mask = None if lengths is None else real_tokens(lengths, x.shape[1])
        real = kept(x, mask)
        attended, cache = self.attention.prefill(self.attention_norm(real), cache, slots=slots, lengths=lengths)
        y, aux = self._fed_forward(attended, real, mask, token_ids=token_ids, train=False)
        return kept(y, mask, x), aux, cache

    def decode(
        self,
        x: jax.Array,
        cache: KVCache,
        *,
        active: jax.Array | None = None,
        token_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, MoEAux | None, KVCache]:
        """One more token in every active slot, x [S, 1, H]; see `Attention.decode`. `token_ids` are [S, 1]."""
        check_tokens(x, self.config.hidden_size)
        check_cache(cache, self.config.attention)
        check_step(x, active, is_full=cache.is_full)
        mask = None if active is None else active[:, None]
        real = kept(x, mask)
        attended, cache = self.attention.decode(self.attention_norm(real), cache, active=active)
        y, aux = self._fed_forward(attended, real, mask, token_ids=token_ids, train=False)
        return kept(y, mask, x), aux, cache

    def _fed_forward(
        self, attended: jax.Array, x: jax.Array, mask: jax.Array | None, **of_experts: Any
    ) -> tuple[jax.Array, MoEAux | None]:
        """The second half of the block."""
        normed, x = self.feed_forward_norm(attended, residual=x)
        if isinstance(self.feed_forward, MLP):
            return self.feed_forward(normed, residual=x, mask=mask), None
        return self.feed_forward(normed, residual=x, mask=mask, **of_experts)
