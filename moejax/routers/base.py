"""What a router is: a module that says which experts each token goes to.

A router sees all tokens of a call at once, whole (T of them, on however many chips they lie), and its choices go to
the experts by `moejax.functional.moe_experts`. It knows nothing of dispatch, kernels or meshes.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.config import MoEConfig
from moejax.layer import new_param
from moejax.losses import Tokens
from moejax.router import Routing, check_logits
from moejax.router_logits import router_logits

_KERNEL = nnx.initializers.lecun_normal()


@dataclasses.dataclass(frozen=True)
class Batch:
    """What comes with the tokens x [T, H] of a call.

    Attributes:
      num_tokens: T.
      sequence_length: tokens of one sequence; T is a multiple of it.
      token_ids: integer [T] or None, ids in a vocabulary; negative for padding.
      key: for noise, while training with a router that is `noisy`; None otherwise.
      backend: of top-k: the layer's own on one chip, "xla" over a mesh, which the compiler can split.
    """

    num_tokens: int
    sequence_length: int
    token_ids: jax.Array | None = None
    key: jax.Array | None = None
    backend: str = "auto"

    @property
    def tokens(self) -> Tokens:
        """All T tokens, for the losses."""
        return Tokens(jnp.arange(self.num_tokens, dtype=jnp.int32), self.num_tokens, self.sequence_length)


@dataclasses.dataclass(frozen=True)
class Decision:
    """What a router decided.

    Attributes:
      routing: topk_ids and topk_weights [T, K], K as the router likes, −1 for a choice that is not made.
      losses: weighted, float32 [] each.
      max_choices: how many ids are not −1 at most, where that is far below T·K; None for all of them.
    """

    routing: Routing
    losses: dict[str, jax.Array]
    max_choices: int | None = None


class Router(nnx.Module):
    """The base of routers: `router(x, batch) -> Decision`, and `update`.

    Attributes:
      config: the layer's.
      noisy: whether `batch.key` is wanted while training.
      causal: whether the choice for a token never depends on later tokens, as language models need it.
    """

    noisy = False
    causal = True

    def __init__(self, config: MoEConfig):
        self.config = config

    def __call__(self, x: jax.Array, batch: Batch) -> Decision:
        """Decides for the tokens x [T, H], in config.dtype."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__(x, batch) -> Decision")

    def update(self, load: jax.Array) -> None:
        """Applies what no gradient trains, from the int32 [E] assignments of a step. Here: nothing."""


class Gate(nnx.Module):
    """The linear map from a token to its logits, float32, with a bias where `config.router_bias` says so.

    Attributes:
      kernel: nnx.Param [H, E].
      bias: nnx.Param [E], or None.
    """

    def __init__(
        self,
        config: MoEConfig,
        *,
        rngs: nnx.Rngs,
        mesh: Any = None,
        initializer: nnx.initializers.Initializer = _KERNEL,
    ):
        settings: dict[str, Any] = {"rngs": rngs, "mesh": mesh}
        shape = (config.hidden_size, config.num_experts)
        self.kernel = new_param(initializer, shape, config.param_dtype, **settings)
        self.bias = None
        if config.router_bias:
            self.bias = new_param(nnx.initializers.zeros, (config.num_experts,), config.param_dtype, **settings)

    def __call__(self, x: jax.Array) -> jax.Array:
        """X [T, H] -> float32 [T, E]; known NaN is a ValueError."""
        logits = router_logits(x, self.kernel[...])
        if self.bias is not None:
            logits += self.bias[...].astype(jnp.float32)
        check_logits(logits)
        return logits


def or_default(config: MoEConfig, **defaults: Any) -> MoEConfig:
    """`config` with each of `defaults` in the place of a loss weight (or capacity factor) that it does not set."""
    return dataclasses.replace(config, **{name: value for name, value in defaults.items() if not getattr(config, name)})


def plain_choice(config: MoEConfig, **changes: Any) -> MoEConfig:
    """`config` with softmax scores and neither groups nor a correction bias, and `changes`."""
    plain: dict[str, Any] = {"scoring": "softmax", "num_groups": 1, "topk_groups": 1, "correction_bias": False}
    return dataclasses.replace(config, **plain | changes)
