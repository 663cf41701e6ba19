"""PERFT: parameter-efficient routed fine-tuning of a Mixture-of-Experts (Liu et al. 2024, arXiv 2411.08212).

This is the paper's PERFT-R: N small experts with a router of their own work beside a frozen MoE layer,

    y = MoE(x) + scale · Σ_j softmax(x · W)_j · up_j(act(down_j(x)))        over the K best j

The small experts are of low rank (no activation, as LoRA) or bottlenecks (silu). `up` begins at zero, so that
training begins with the frozen layer's output.
"""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from moejax.aux_output import MoEAux
from moejax.axes import partition_here
from moejax.config import MoEConfig
from moejax.functional import check_input
from moejax.initial import initial
from moejax.layer import MoE
from moejax.losses import LoadStats
from moejax.param import Param
from moejax.rounded_experts import RoundedExperts
from moejax.routers.base import load_of
from moejax.routers.top_k import TopKRouter, route
from pallas_kernels.grouped_matmul import grouped_matmul
from sharding.exchange import Way, exchange
from sharding.mesh import mesh_here
from sharding.partition import Axes
from sharding.per_chip import Body, per_chip
from sharding.placement import Placement
from sharding.tokens import Tokens

_KERNEL = nnx.initializers.lecun_normal()


class AdapterParam(nnx.Param):
    """A parameter that PERFT trains."""


class Perft(nnx.Module):
    """A frozen MoE layer with routed adapters beside it. Call it as the layer that it wraps.

        model.moe = Perft(model.moe, num_adapters=8, width=16, top_k=2, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=AdapterParam)

    No gradient reaches the parameters of the base layer; one reaches its input. It runs without noise, and its losses
    are left out. Over a mesh every chip holds all adapters, so that no token travels for them.

    Attributes:
      base: the frozen layer.
      gate: AdapterParam [H, N], W.
      down: AdapterParam [N, H, R].
      up: AdapterParam [N, R, H].
      config: the MoEConfig of the adapters' router.
    """

    def __init__(
        self,
        base: MoE,
        num_adapters: int,
        width: int,
        top_k: int,
        *,
        rngs: nnx.Rngs,
        activation: Literal["silu"] | None = None,
        scale: float = 1.0,
        load_balance_loss: float = 0.01,
    ):
        """Makes the adapters.

        Args:
          base: the layer; its mesh, dtypes and backend are the adapters' too.
          num_adapters: N.
          width: R, rank or width of an adapter.
          top_k: K, adapters a token.
          rngs: its stream "params" initialises.
          activation: None for low rank, "silu" for bottlenecks.
          scale: of the adapters' sum.
          load_balance_loss: weight of the Switch loss of the adapters' router.

        Raises:
          ValueError: a size is not positive, top_k exceeds num_adapters, or the activation is unknown.
        """
        if activation not in (None, "silu"):
            raise ValueError(f"activation must be None (low rank) or 'silu' (bottleneck), got {activation!r}")
        for name, size in (("num_adapters", num_adapters), ("width", width)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if not 1 <= top_k <= num_adapters:
            raise ValueError(f"top_k must be 1 to num_adapters={num_adapters}, got {top_k}")
        self.base = base
        self.activation = activation
        self.config = MoEConfig(
            hidden_size=base.config.hidden_size,
            intermediate_size=width,
            num_experts=num_adapters,
            top_k=top_k,
            router=TopKRouter(normalize_topk=False, routed_scaling_factor=scale, load_balance_loss=load_balance_loss),
            dtype=base.config.dtype,
            param_dtype=base.config.param_dtype,
            backend=base.config.backend,
        )
        hidden = base.config.hidden_size
        self.gate = self._new(Param((hidden, num_adapters), (None, None), "kernel", _KERNEL), rngs)
        self.down = self._new(Param((num_adapters, hidden, width), (None,) * 3, "kernel", stacked=1), rngs)
        zeros = nnx.initializers.zeros
        self.up = self._new(Param((num_adapters, width, hidden), (None,) * 3, "kernel", zeros), rngs)

    def _new(self, row: Param, rngs: nnx.Rngs) -> AdapterParam:
        """A parameter at its initial value, whole on every chip."""
        mesh = mesh_here(self.base.mesh_at_call())
        spec = PartitionSpec(*row.axes)
        value = initial(row, _KERNEL, self.config.param_dtype, rngs.params(), mesh, spec)
        return (
            AdapterParam(value) if mesh is None else AdapterParam(value, out_sharding=tuple(spec), mesh=self.base.mesh)
        )

    @property
    def causal(self) -> bool:
        """Whether the output of a token never depends on later tokens."""
        return self.base.causal

    def __call__(
        self,
        x: jax.Array,
        *,
        residual: jax.Array | None = None,
        mask: jax.Array | None = None,
        token_ids: jax.Array | None = None,
        topk_ids: jax.Array | None = None,
        rounded: RoundedExperts | None = None,
        train: bool | None = None,
    ) -> tuple[jax.Array, MoEAux]:
        """The base layer's output plus the adapters'.

        Args:
          x: [..., H], as for the base layer.
          residual: of the shape of x, what y is added to; None for nothing.
          mask: bool [...], true for real tokens; None if all are.
          token_ids: for a base layer that routes by them.
          topk_ids: choices of the base layer to be made again.
          rounded: what `quantized_for_training` made of the base layer, or None.
          train: has no effect: neither the frozen layer nor the adapters' router has noise.

        Returns:
          y [..., H] in the dtype of `x`, and MoEAux with the losses of the adapters' router (keys "adapter_…") and the
          load and choices of the base layer.
        """
        check_input(x, self.base.config, mask)
        graph, *states = nnx.split(self.base, nnx.Param, ...)
        params, rest = states
        frozen = nnx.merge(graph, jax.lax.stop_gradient(params), rest)
        of_base: Any = {"token_ids": token_ids, "topk_ids": topk_ids, "rounded": rounded, "train": False}
        y, aux = frozen(x, residual=residual, mask=mask, **of_base)
        adapted, (losses, _) = self._adapters(x, mask)
        losses = {f"adapter_{name}": loss for name, loss in losses.items()}
        return y + adapted, MoEAux(losses, aux.load, aux.topk_ids, aux.topk_weights)

    def quantized_for_training(self) -> RoundedExperts:
        """The weights of the base layer's experts in 8 bits, for as long as it is frozen; see `MoE`."""
        return self.base.quantized_for_training()

    def adapter_load(self, x: jax.Array, *, mask: jax.Array | None = None) -> LoadStats:
        """How the tokens x [..., H] fall on the N adapters."""
        return self._adapters(x, mask)[1][1]

    def update(self, aux: MoEAux) -> None:
        """Nothing: the base layer is frozen, and the adapters are trained by gradients alone."""

    def _adapters(
        self, x: jax.Array, mask: jax.Array | None
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], LoadStats]]:
        params = {"gate": self.gate[...], "down": self.down[...], "up": self.up[...]}
        mesh = mesh_here(self.base.mesh_at_call())
        return per_chip(
            _BODIES[self.activation],
            x,
            params,
            self.config,
            leading=x.shape[:-1],
            specs=dict.fromkeys(params, PartitionSpec()),
            mesh=mesh,
            axes=Axes() if mesh is None else partition_here(self.base.partition).on(mesh),
            mask=mask,
        )


def perft_mask(module: nnx.Module) -> nnx.State:
    """True for the parameters of `module` that PERFT trains, False for all others, for `optax.masked`.

        mask = perft_mask(model)
        frozen = jax.tree.map(operator.not_, mask)
        tx = optax.chain(optax.masked(optax.adam(1e-3), mask), optax.masked(optax.set_to_zero(), frozen))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    `optax.masked` alone hands on the gradients that it does not transform. Those of a layer in `Perft` are zeros, those
    of the rest of a model are not: set them to zero, as here.

    Returns:
      The structure of `nnx.state(module, nnx.Param)`, with a bool for each parameter.
    """
    return jax.tree.map(
        lambda param: isinstance(param, AdapterParam),
        nnx.state(module, nnx.Param),
        is_leaf=lambda node: isinstance(node, nnx.Variable),
    )


def _adapters_on_chip(
    x: jax.Array,
    params: dict[str, jax.Array],
    tokens: Tokens,
    axes: Axes,
    config: MoEConfig,
    *,
    activation: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, tuple[dict[str, jax.Array], LoadStats]]:
    """The adapters on the tokens x [T, H] of this chip, which holds all of them."""
    del axes  # nothing is split
    rows = tokens.keep(x.astype(config.dtype))
    router = config.router
    assert isinstance(router, TopKRouter)
    routing = route(rows, params["gate"], config)
    ids = tokens.keep(routing.topk_ids, -1)

    def adapt(params: dict[str, jax.Array], rows: jax.Array, group_sizes: jax.Array) -> jax.Array:
        down, up = params["down"].astype(rows.dtype), params["up"].astype(rows.dtype)
        h = activation(grouped_matmul(rows, down, group_sizes, backend=config.backend))
        return grouped_matmul(h, up, group_sizes, backend=config.backend)

    way = Way(Placement(config.num_experts), backend=config.backend)
    y = exchange(rows, routing.topk_weights, ids, adapt, params, way, preferred_element_type=rows.dtype)
    dropped = jnp.zeros(config.num_experts, jnp.int32)
    load = load_of(ids, dropped, config.num_experts, tokens)
    return tokens.keep(y).astype(x.dtype), (router.losses(routing, tokens), load)


_BODIES: Mapping[str | None, Body] = MappingProxyType(
    {
        None: functools.partial(_adapters_on_chip, activation=lambda h: h),
        "silu": functools.partial(_adapters_on_chip, activation=jax.nn.silu),
    }
)
