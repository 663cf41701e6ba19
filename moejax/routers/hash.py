"""Hash routing (Roller et al. 2021, arXiv 2106.04426): a token's experts are fixed by its id, and nothing is learnt.

The table is the paper's random hash, balanced over the vocabulary: every run of E ids has each expert once as its
first choice, once as its second, and so on. A load is then as uneven as the frequencies of the tokens are.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from moejax.checks import require_integer, require_number
from moejax.param import Param
from moejax.router import Routing
from moejax.routers.base import Decision, Given, Params, Router
from sharding.tokens import Tokens

if TYPE_CHECKING:
    from moejax.config import MoEConfig


@dataclasses.dataclass(frozen=True)
class HashRouter(Router):
    """Experts by token id, each of the K weighted 1/K. A negative id makes no choice.

    Attributes:
      vocabulary: ids of the table, rounded up to a multiple of E; larger ids begin anew at 0.
      seed: of the table, which is the same in every layer and run.
      routed_scaling_factor: the weights are multiplied by this.
    """

    replays = False

    vocabulary: int = 65536
    seed: int = 0
    routed_scaling_factor: float = 1.0

    def check(self, num_experts: int, top_k: int) -> None:
        """See `Router.check`."""
        super().check(num_experts, top_k)
        require_integer("vocabulary", self.vocabulary, at_least=1)
        require_integer("seed", self.seed, at_least=0)
        require_number("routed_scaling_factor", self.routed_scaling_factor)

    def table(self, config: "MoEConfig") -> dict[str, Param]:
        """The table [V, K] itself, which no gradient trains."""
        rows = -(-self.vocabulary // config.num_experts) * config.num_experts
        init = _table_init(self.vocabulary, config.num_experts, config.top_k, self.seed)
        return {"table": Param((rows, config.top_k), (None, None), "state", init)}

    def route(self, x: jax.Array, params: Params, config: "MoEConfig", tokens: Tokens, given: Given) -> Decision:
        """What the table says of the tokens' ids."""
        if given.token_ids is None:
            raise ValueError(
                "token_ids must be given for hash routing, got None; call the layer, or the block around it, with "
                "token_ids=ids, those that x was embedded from"
            )
        ids, table = given.token_ids, params["table"]
        topk_ids = jnp.where((ids >= 0)[:, None], table[jnp.maximum(ids, 0) % table.shape[0]], -1)
        shape = (x.shape[0], config.num_experts)
        scores = jnp.full(shape, 1 / config.num_experts, jnp.float32)
        weights = jnp.full(topk_ids.shape, self.routed_scaling_factor / config.top_k, jnp.float32)
        return Decision(Routing(topk_ids, weights, scores, jnp.zeros(shape, jnp.float32)), {})


@functools.cache
def _table_init(vocabulary: int, num_experts: int, top_k: int, seed: int) -> Callable[..., jax.Array]:
    """One initialiser for each table, as programs that make parameters are kept by it."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.Array:
        del key, shape, dtype
        return jnp.asarray(hash_table(vocabulary, num_experts, top_k, seed))

    return init


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
