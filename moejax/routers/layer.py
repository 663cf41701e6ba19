"""The MoE layer with a router of choice: the router decides, `moe_experts` does."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moejax.config import MoEConfig
from moejax.experts import EXPERT_FIELDS, SHARED_FIELDS, MoEParams, param_shapes
from moejax.functional import MoEAux, check_input, moe_experts
from moejax.layer import check_mesh, layer_param
from moejax.losses import LoadStats, tokens_per_expert
from moejax.routers.base import Batch, Decision, Router
from sharding.mesh import (
    EXPERT_AXIS,
    AnyMesh,
    current_mesh,
    has_explicit_axes,
    sharding_in,
    with_auto_axes,
)


class RoutedMoE(nnx.Module):
    """A Mixture-of-Experts feed-forward layer with any `Router`.

        layer = ROUTERS["expert_choice"](config, rngs=nnx.Rngs(params=0, router=1))
        y, aux = layer(x, train=True)
        loss = task_loss(y) + aux.loss
        ...
        layer.update(aux)                  # after the step

    Under a mesh it behaves as `moejax.MoE`: experts are split over the expert axis, and the result is that of one chip.

    Attributes:
      config: the layer's MoEConfig; of its routing, only the capacity factor concerns the experts.
      router: decides.
      gate_up, down, …: nnx.Param of the shapes that `moejax.MoEParams` states, None for what the configuration lacks.
      noise: the stream "router" of random numbers, if the router is noisy.
    """

    def __init__(
        self,
        config: MoEConfig,
        router: Router,
        *,
        rngs: nnx.Rngs,
        mesh: Mesh | None = None,
        expert_axis: str = EXPERT_AXIS,
    ):
        """Makes the parameters of the experts.

        Args:
          config: the layer.
          router: decides; made before, from the same `rngs`.
          rngs: its stream "params" initialises, its stream "router" gives noise.
          mesh: default is that of `jax.set_mesh`, if any.
          expert_axis: axis of the mesh that the experts are split over.

        Raises:
          ValueError: the mesh has no such axis, or it does not divide the experts.
        """
        self.config = config
        self.router = router
        self.mesh = mesh
        self.expert_axis = expert_axis
        check_mesh(config, mesh, expert_axis)
        shapes = param_shapes(config)
        for name in (*EXPERT_FIELDS, *SHARED_FIELDS):
            shape = getattr(shapes, name)
            param = None
            if shape is not None:
                param = layer_param(name, shape, config, rngs=rngs, mesh=mesh, expert_axis=expert_axis)
            setattr(self, name, param)
        self.noise = rngs.router.fork() if router.noisy else None

    @property
    def causal(self) -> bool:
        """Whether the output of a token never depends on later tokens.

        Where experts have a capacity, the first choices of later tokens take room from second choices of earlier ones.
        """
        has_order = self.config.capacity_factor is None or self.config.top_k == 1
        return has_order and all(router.causal for router in self.routers())

    def routers(self) -> list[Router]:
        """All routers of the layer."""
        return [self.router]

    def expert_params(self) -> MoEParams:
        """The parameters of the experts as arrays; those of the router are None."""
        values = {name: getattr(self, name) for name in (*EXPERT_FIELDS, *SHARED_FIELDS)}
        arrays = {name: None if value is None else value[...] for name, value in values.items()}
        return MoEParams(router_kernel=None, **arrays)

    def __call__(
        self, x: jax.Array, *, token_ids: jax.Array | None = None, train: bool = False
    ) -> tuple[jax.Array, MoEAux]:
        """Sends every token through the experts that the router gives it.

        Args:
          x: [..., H], BF16, FP16 or float32; the last dimension before H is the sequence.
          token_ids: integer [...], where the router asks for them.
          train: whether a noisy router adds its noise, from the layer's stream "router".

        Returns:
          y [..., H] in the dtype of `x`, and MoEAux(losses, load).

        Raises:
          ValueError: shapes or dtypes do not fit, or `x` is known and holds NaN.
        """
        check_input(x, self.config)
        _check_token_ids(token_ids, x)
        key = self.noise() if train and self.noise is not None else None
        mesh = current_mesh() if self.mesh is None else self.mesh
        if mesh is None or not has_explicit_axes(mesh):
            return self.forward(x, token_ids, key, mesh)
        # A router need not know of shardings that are part of types.
        graph, *states = nnx.split(self, nnx.RngState, ...)
        streams, state = states

        def on_auto_axes(x: jax.Array, token_ids: Any, key: Any, state: Any) -> tuple[jax.Array, MoEAux]:
            return nnx.merge(graph, streams, state).forward(x, token_ids, key, with_auto_axes(mesh))

        shardings = (sharding_in(x, mesh), NamedSharding(mesh, PartitionSpec()))
        return jax.sharding.auto_axes(on_auto_axes, out_sharding=shardings)(x, token_ids, key, state)

    def forward(
        self, x: jax.Array, token_ids: jax.Array | None, key: jax.Array | None, mesh: AnyMesh | None
    ) -> tuple[jax.Array, MoEAux]:
        """The call, after its checks, on one chip or a mesh of Auto axes; changes nothing in the module."""
        tokens = x.reshape(-1, x.shape[-1]).astype(self.config.dtype)
        batch = self.batch(x, token_ids, key, mesh)
        decision = self.router(tokens, batch)
        y, dropped = self.apply_experts(tokens, decision, mesh)
        return y.reshape(x.shape).astype(x.dtype), MoEAux(
            decision.losses, load_stats(decision, dropped, self.config.num_experts, batch)
        )

    def batch(self, x: jax.Array, token_ids: jax.Array | None, key: jax.Array | None, mesh: AnyMesh | None) -> Batch:
        """What a router may know of the tokens of x [..., H]."""
        return Batch(
            num_tokens=x.size // x.shape[-1],
            sequence_length=x.shape[-2] if x.ndim > 1 else 1,
            token_ids=None if token_ids is None else token_ids.reshape(-1),
            key=key,
            backend=self.config.backend if mesh is None else "xla",
        )

    def apply_experts(self, tokens: jax.Array, decision: Decision, mesh: AnyMesh | None) -> tuple[jax.Array, jax.Array]:
        """Tokens [T, H] through the experts of `decision` -> [T, H], and int32 [E] dropped choices."""
        return moe_experts(
            tokens,
            decision.routing.topk_weights,
            decision.routing.topk_ids,
            self.expert_params(),
            self.config,
            max_choices=decision.max_choices,
            mesh=mesh,
            expert_axis=self.expert_axis,
        )

    def update(self, aux: MoEAux) -> None:
        """Applies what no gradient trains, from the aux of a step. Call it after each, where no gradient is taken."""
        for router in self.routers():
            router.update(aux.load.tokens_per_expert)


def load_stats(decision: Decision, dropped: jax.Array, num_experts: int, batch: Batch) -> LoadStats:
    """How the choices of `decision` fell on the experts."""
    unrouted = (decision.routing.topk_ids < 0).all(1).sum(dtype=jnp.int32)
    return LoadStats(tokens_per_expert(decision.routing, num_experts, batch.tokens), dropped, unrouted)


def refuse_scaled_inputs(config: MoEConfig, name: str) -> None:
    """Raises ValueError for a router whose tokens have no one weight that could scale the expert's input."""
    if config.scale_inputs:
        raise ValueError(
            f"scale_inputs must be False for the router {name!r}, got True: it needs exactly one expert for each token"
        )


def without_capacity(config: MoEConfig) -> MoEConfig:
    """`config` for experts that no choice can overfill."""
    return dataclasses.replace(config, capacity_factor=None)


def _check_token_ids(token_ids: jax.Array | None, x: jax.Array) -> None:
    if token_ids is None:
        return
    if token_ids.shape != x.shape[:-1] or not jnp.issubdtype(token_ids.dtype, jnp.integer):
        raise ValueError(
            f"token_ids must be integers of shape {list(x.shape[:-1])}, one for each token of x, got "
            f"{token_ids.dtype}{list(token_ids.shape)}"
        )
