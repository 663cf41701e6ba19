"""Blocks of decoders around the layer: attention with a cache of keys and values, norms, dense feed-forward networks.

    block = DecoderBlock(BlockConfig(AttentionConfig(2048, 32, 4, 128, qk_norm=True), get_preset("qwen3-30b-a3b")),
                         rngs=nnx.Rngs(0))
    y, aux = block(x)                                                 # whole sequences, x [B, L, H]

    cache = KVCache.empty(block.config.attention, num_slots=8, max_length=4096)
    y, aux, cache = block.prefill(prompts, cache, slots=slots)        # prompts [B, L, H] into some of the slots
    y, aux, cache = block.decode(x, cache, active=is_busy)            # a token in each slot, x [8, 1, H]

Letters: B sequences, L their length, S slots, M the longest sequence of a slot, N heads of queries, G heads of keys and
values, D the width of a head; H and I as everywhere.

| file | holds |
|---|---|
| `config.py` | what each part is |
| `norm.py` | RMSNorm, with the sum of the residual |
| `rotary.py` | positions |
| `dot_product.py` | the product of queries, keys and values, and whose kernel does it |
| `masks.py` | which tokens are real, and what becomes of the others |
| `cache.py` | keys and values of earlier tokens, in slots |
| `attention.py` | projections around these |
| `mlp.py` | the dense feed-forward network |
| `block.py` | all of them together |
"""

from moejax.models.attention import Attention
from moejax.models.block import DecoderBlock
from moejax.models.cache import KVCache
from moejax.models.config import AttentionConfig, BlockConfig, MLPConfig
from moejax.models.mlp import MLP
from moejax.models.norm import RMSNorm

__all__ = ["MLP", "Attention", "AttentionConfig", "BlockConfig", "DecoderBlock", "KVCache", "MLPConfig", "RMSNorm"]
