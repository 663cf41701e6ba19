"""Hash routing (Roller et al. 2021, arXiv 2106.04426): a token's experts are fixed by its id, and nothing is learnt.

The table is the paper's random hash, balanced over the vocabulary: every run of E ids has each expert once as its
first choice, once as its second, and so on. A load is then as uneven as the frequencies of the tokens are.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from moejax.config import MoEConfig
from moejax.layer import RouterState
from moejax.router import Routing
from moejax.routers.base import Batch, Decision, Router, plain_choice
from moejax.routers.layer import RoutedMoE


class HashRouter(Router):
    """Experts by token id, each of the K weighted 1/K.

    Attributes:
      table: RouterState int32 [V, K], V the vocabulary rounded up to a multiple of E; larger ids begin anew at 0.
    """

    def __init__(self, config: MoEConfig, *, vocabulary: int = 65536, seed: int = 0):
        if vocabulary < 1:
            raise ValueError(f"vocabulary must be at least 1, got {vocabulary}")
        super().__init__(config)
        self.table = RouterState(jnp.asarray(hash_table(vocabulary, config.num_experts, config.top_k, seed)))

    def __call__(self, x: jax.Array, batch: Batch) -> Decision:
        """What the table says of `batch.token_ids`."""
        if batch.token_ids is None:
            raise ValueError(
                "token_ids must be given for hash routing, got None; call layer(x, token_ids=ids) with the ids that x "
                "was embedded from"
            )
        config, table = self.config, self.table[...]
        ids = batch.token_ids
        topk_ids = jnp.where((ids >= 0)[:, None], table[jnp.maximum(ids, 0) % table.shape[0]], -1)
        weight = config.routed_scaling_factor / config.top_k
        shape = (batch.num_tokens, config.num_experts)
        scores = jnp.full(shape, 1 / config.num_experts, jnp.float32)
        weights = jnp.full(topk_ids.shape, weight, jnp.float32)
        return Decision(Routing(topk_ids, weights, scores, jnp.zeros(shape, jnp.float32)), {})


def hash_table(vocabulary: int, num_experts: int, top_k: int, seed: int) -> np.ndarray:
    """int32 [V, K]: K distinct experts for each id, every expert equally often in each column of every E rows."""
    rng = np.random.default_rng(seed)
    blocks = -(-vocabulary // num_experts)
    order = rng.permuted(np.tile(np.arange(num_experts), (blocks, 1)), axis=1)
    # Choice k of a block is its first choice shifted, by other amounts in each block.
    shifts = rng.permuted(np.tile(np.arange(1, num_experts), (blocks, 1)), axis=1)[:, : top_k - 1]
    shifts = np.concatenate([np.zeros((blocks, 1), int), shifts], axis=1)
    place = (np.arange(num_experts)[None, :, None] + shifts[:, None, :]) % num_experts
    table = np.take_along_axis(order[:, :, None], place, axis=1)
    return table.reshape(-1, top_k).astype(np.int32)


def hash_routing(config: MoEConfig, *, rngs: nnx.Rngs, mesh: Mesh | None = None, vocabulary: int = 65536) -> RoutedMoE:
    """Experts by token id, from a table that is the same in every layer and run; no losses.

    Calls need token_ids; a negative id makes no choice. Ids from `vocabulary` on share the experts of smaller ones.
    """
    config = plain_choice(config)
    return RoutedMoE(config, HashRouter(config, vocabulary=vocabulary), rngs=rngs, mesh=mesh)
