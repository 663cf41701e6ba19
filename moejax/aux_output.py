"""What a layer says beside its output."""

from typing import Any, Self

import jax
import jax.numpy as jnp

from moejax.losses import LoadStats

_FIELDS = "losses", "load", "topk_ids", "topk_weights"


@jax.tree_util.register_pytree_with_keys_class
class MoEAux(dict[str, Any]):
    """What a layer returns beside its output.

    It is a dict whose entries are attributes too, because `nnx.tabulate` can only show arrays and Python containers
    in what a call returns.

    Attributes:
      losses: the router losses of the configuration, weighted, float32 []; add `loss` to the training loss.
      load: how the tokens fell on the experts, and how many were dropped.
      topk_ids: int32 [..., K], the choices; −1 where none was made. Give them to a later call to route it alike.
      topk_weights: float32 [..., K], what they weigh.
    """

    def __init__(
        self, losses: dict[str, jax.Array], load: LoadStats, topk_ids: jax.Array, topk_weights: jax.Array
    ) -> None:
        super().__init__(zip(_FIELDS, (losses, load, topk_ids, topk_weights), strict=True))

    @property
    def losses(self) -> dict[str, jax.Array]:
        """Name → float32 [], weighted."""
        return self["losses"]

    @property
    def load(self) -> LoadStats:
        """How the tokens fell on the experts."""
        return self["load"]

    @property
    def topk_ids(self) -> jax.Array:
        """int32 [..., K], −1 where no choice was made."""
        return self["topk_ids"]

    @property
    def topk_weights(self) -> jax.Array:
        """float32 [..., K]."""
        return self["topk_weights"]

    @property
    def loss(self) -> jax.Array:
        """float32 []: the sum of all router losses."""
        return sum(self.losses.values(), start=jnp.zeros((), jnp.float32))

    def tree_flatten_with_keys(self) -> tuple[list[tuple[jax.tree_util.GetAttrKey, Any]], None]:
        """For jax: the four entries, by name."""
        return [(jax.tree_util.GetAttrKey(name), self[name]) for name in _FIELDS], None

    @classmethod
    def tree_unflatten(cls, _: None, children: tuple[Any, ...]) -> Self:
        """For jax."""
        return cls(*children)
