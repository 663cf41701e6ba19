"""What a router is: settings that say which experts each token goes to, and the parameters that this takes.

A router is a value in the configuration of a layer. It decides on each chip for the tokens of that chip, [T, H], with
`Tokens` to tell it which of the batch they are and to sum over all chips. It knows nothing of dispatch, kernels or
modules.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.checks import require_number
from moejax.losses import LoadStats, tokens_per_expert
from moejax.param import Param
from moejax.router import Routing, check_logits
from pallas_kernels.float32_matmul import float32_matmul
from sharding.tokens import Tokens

if TYPE_CHECKING:
    from moejax.config import MoEConfig

Params = Mapping[str, Any]
"""The parameters of a router by name, as arrays."""


@dataclasses.dataclass(frozen=True)
class Given:
    """What a call gives a router beside its tokens.

    Attributes:
      token_ids: int32 [T], ids in a vocabulary, negative for none; None if the caller gave none.
      key: for noise, while training with a router that is `noisy`; None otherwise.
      topk_ids: int32 [T, K], choices that are to be made again, −1 where the router is free; None for none.
      residual: [T, H], what y is added to; None for nothing, as where a router has an `apply` of its own.
    """

    token_ids: jax.Array | None = None
    key: jax.Array | None = None
    topk_ids: jax.Array | None = None
    residual: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Decision:
    """What a router decided.

    Attributes:
      routing: topk_ids and topk_weights [T, K], K as the router likes, −1 for a choice that is not made.
      losses: weighted, float32 [] each.
      max_choices: an upper bound of the ids in the whole batch that are not −1, where it is far below T·K; else None.
      limited: whether the capacity of the layer limits the choices.
    """

    routing: Routing
    losses: dict[str, jax.Array]
    max_choices: int | None = None
    limited: bool = True


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a layer reports about its tokens beside its output.

    Attributes:
      topk_ids: int32 [T, K].
      topk_weights: float32 [T, K].
      losses: weighted, float32 [] each.
      load: of all chips.
    """

    topk_ids: jax.Array
    topk_weights: jax.Array
    losses: dict[str, jax.Array]
    load: LoadStats


class Experts(Protocol):
    """The experts of the layer, on the rows of this chip."""

    def __call__(
        self,
        x: jax.Array,
        topk_weights: jax.Array,
        topk_ids: jax.Array,
        tokens: Tokens,
        *,
        max_choices: int | None = None,
        with_shared: bool = True,
        limited: bool = True,
        residual: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """The weighted sum for x [T, H], and int32 [E], choices that were dropped over all chips.

        `with_shared` adds the shared expert, `limited` heeds the capacity; the sum is added to `residual` [T, H].
        """

    def shared(self, x: jax.Array) -> jax.Array | None:
        """What the shared expert makes of x [T, H], float32; None if there is none."""


@dataclasses.dataclass(frozen=True)
class Router:
    """The base of routers: frozen settings with `table` and `route`. See `moejax.routers` for those there are.

    Class attributes:
      causal: whether the choice for a token never depends on later tokens, as language models need it.
      noisy: whether `given.key` is wanted while training.
      whole_sequences: whether a chip has to see sequences whole.
      replays: whether choices of an earlier pass can be given again.
    """

    causal: ClassVar[bool] = True
    noisy: ClassVar[bool] = False
    whole_sequences: ClassVar[bool] = False
    replays: ClassVar[bool] = True

    def check(self, num_experts: int, top_k: int) -> None:
        """Raises ValueError, naming the setting, unless the router can choose `top_k` of `num_experts` experts."""
        for field in dataclasses.fields(self):
            if field.name.endswith("_loss"):
                require_number(field.name, getattr(self, field.name), at_least=0)

    def check_layer(self, config: "MoEConfig") -> None:
        """Raises ValueError unless the router suits the other settings of a layer."""

    def refuse_scaled_inputs(self, config: "MoEConfig") -> None:
        """Raises ValueError for a router whose tokens have no one weight that could scale the expert's input."""
        if config.scale_inputs:
            raise ValueError(
                f"scale_inputs must be False with {type(self).__name__}, got True: it needs exactly one expert for "
                "each token"
            )

    def choices(self, top_k: int) -> int:
        """The choices of a token in a layer of K = `top_k`, as `MoEAux.topk_ids` has them."""
        return top_k

    def table(self, config: "MoEConfig") -> dict[str, Param]:
        """The parameters that the router has in a layer of `config`, by name."""
        raise NotImplementedError(f"{type(self).__name__} must define table(config) -> dict[str, Param]")

    def route(self, x: jax.Array, params: Params, config: "MoEConfig", tokens: Tokens, given: Given) -> Decision:
        """Decides for the tokens x [T, H], in config.dtype."""
        raise NotImplementedError(f"{type(self).__name__} must define route(x, params, config, tokens, given)")

    def apply(
        self, x: jax.Array, params: Params, config: "MoEConfig", tokens: Tokens, given: Given, experts: Experts
    ) -> tuple[jax.Array, Outcome]:
        """The whole layer on the tokens x [T, H] of this chip: y [T, H], onto `given.residual`, and what to say of it.

        Here: `route`, then the experts. A router that is more than a choice of experts does it otherwise.
        """
        decision = self.route(x, params, config, tokens, given)
        ids = tokens.keep(decision.routing.topk_ids, -1)
        weights = decision.routing.topk_weights
        y, dropped = experts(
            x,
            weights,
            ids,
            tokens,
            max_choices=decision.max_choices,
            limited=decision.limited,
            residual=given.residual,
        )
        return y, Outcome(ids, weights, decision.losses, load_of(ids, dropped, config.num_experts, tokens))

    def update(self, params: Params, load: jax.Array) -> dict[str, Any]:
        """What no gradient trains, moved by the int32 [E] assignments of a step. Here: nothing."""
        return {}


def load_of(topk_ids: jax.Array, dropped: jax.Array, num_experts: int, tokens: Tokens) -> LoadStats:
    """How choices [T, K], −1 where there is no token, fell on the experts."""
    is_left_out = tokens.keep((topk_ids < 0).all(1), False)
    unrouted = tokens.sum(is_left_out.sum(dtype=jnp.int32))
    return LoadStats(tokens_per_expert(topk_ids, num_experts, tokens), dropped, unrouted)


def gate_table(config: "MoEConfig", *, bias: bool, name: str = "kernel", init: Any = None) -> dict[str, Param]:
    """The parameters of a linear map from a token to logits: `name` [H, E], and "bias" [E] if there is one."""
    hidden, experts = config.hidden_size, config.num_experts
    table = {name: Param((hidden, experts), ("embed", None), "router kernel", init)}
    if bias:
        table["bias"] = Param((experts,), (None,), "bias")
    return table


def gate_logits(x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """The logits x [T, H] · kernel [H, E] + bias [E], float32 [T, E]; known NaN is a ValueError."""
    logits = float32_matmul(x, kernel)
    if bias is not None:
        logits += bias.astype(jnp.float32)
    check_logits(logits)
    return logits


ZEROS = nnx.initializers.zeros
