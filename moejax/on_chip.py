"""The layer on one chip: what runs inside shard_map, on this chip's tokens, and by itself where there is one chip."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from moejax.config import MoEConfig
from moejax.experts import ExpertMath, math_of, shared_mlp
from moejax.param import Param
from moejax.params import EXPERT_FIELDS, EXPERT_WEIGHTS, SHARED_FIELDS, MoEParams, flat_array, param_table
from moejax.rounded_experts import in_both_layouts
from moejax.routers.base import Given, Router
from moejax.stages import Stages, way_of
from pallas_kernels.float32_matmul import float32_matmul
from pallas_kernels.grouped_matmul.weights import WEIGHTS_NAME
from pallas_kernels.quantize import QTensor, RoundedWeights
from pallas_kernels.tracing.named import named
from sharding.collectives import gather
from sharding.exchange import Way
from sharding.exchange.capacity import count_dropped, limit_to_capacity
from sharding.partition import Axes
from sharding.tensor_parallel import gather_tokens, sum_tokens
from sharding.tokens import Tokens


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is fixed when the layer is traced.

    Attributes:
      config: the layer.
      max_choices: see `Way.max_choices`.
      whole_scales: names of the QTensors whose scale covers all of H.
    """

    config: MoEConfig
    max_choices: int | None = None
    whole_scales: frozenset[str] = frozenset()


def whole_scales(params: MoEParams, config: MoEConfig) -> frozenset[str]:
    """See `Settings.whole_scales`."""
    table = param_table(config)
    names = [name for name in EXPERT_WEIGHTS if isinstance(getattr(params, name), QTensor)]

    def has_one(name: str) -> bool:
        row = getattr(table, name)
        return getattr(params, name).scale.shape[row.k_major(row.axes).index("embed")] == 1

    return frozenset(filter(has_one, names))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Held:
    """What every chip is given beside its tokens.

    Attributes:
      params: the layer's.
      key: for the router's noise, or None.
      mlp_rank: int32 [1], the chip's place among those that share the experts' width; None where none do.
    """

    params: MoEParams
    key: jax.Array | None = None
    mlp_rank: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerToken:
    """What comes with each token: arrays [..., n].

    Attributes:
      x: [..., H].
      residual: [..., H], what y is added to, or None.
      token_ids: int32 [..., 1] or None.
      topk_ids: int32 [..., K], choices to be made again, or for `experts_on_chip` those that were made; or None.
      topk_weights: float32 [..., K], for `experts_on_chip`.
    """

    x: jax.Array
    residual: jax.Array | None = None
    token_ids: jax.Array | None = None
    topk_ids: jax.Array | None = None
    topk_weights: jax.Array | None = None


def layer_on_chip(
    per_token: PerToken, held: Held, tokens: Tokens, axes: Axes, settings: Settings
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], Any]:
    """Router and experts on this chip's tokens: y, topk_ids, topk_weights [T, …]; and losses and load of all chips."""
    config = settings.config
    x = tokens.keep(per_token.x.astype(config.dtype))
    params = gathered(held.params, settings, axes)
    experts = LayerExperts(config, axes, params, held.mlp_rank)
    ids = per_token.token_ids
    residual, adds_itself = per_token.residual, type(config.router).apply is Router.apply
    token_ids = None if ids is None else ids[:, 0]
    given = Given(token_ids, held.key, per_token.topk_ids, residual if adds_itself else None)
    router = params.router or {}
    y, outcome = config.router.apply(x, router, config, tokens, given, experts)
    if residual is not None and not adds_itself:
        y = y + residual
    y = tokens.keep(y).astype(per_token.x.dtype)
    return (y, outcome.topk_ids, outcome.topk_weights), (outcome.losses, outcome.load)


def experts_on_chip(
    per_token: PerToken, held: Held, tokens: Tokens, axes: Axes, settings: Settings
) -> tuple[jax.Array, jax.Array]:
    """The chosen experts, and the shared one, on this chip's tokens: y [T, H], and int32 [E] dropped of all chips."""
    x = tokens.keep(per_token.x.astype(settings.config.dtype))
    experts = LayerExperts(settings.config, axes, gathered(held.params, settings, axes), held.mlp_rank)
    assert per_token.topk_ids is not None
    assert per_token.topk_weights is not None
    ids = tokens.keep(per_token.topk_ids, -1)
    y, dropped = experts(
        x, per_token.topk_weights, ids, tokens, max_choices=settings.max_choices, residual=per_token.residual
    )
    return tokens.keep(y).astype(per_token.x.dtype), dropped


def gathered(params: MoEParams, settings: Settings, axes: Axes) -> MoEParams:
    """The parameters with H whole, where it is split over the axes of "embed" (FSDP).

    Matrices of experts are rounded to 8 bits, or cast to `config.dtype`, before they are gathered. The gradient of a
    gather is a reduce-scatter.
    """
    if axes.size(axes.embed) == 1:
        return params
    config = settings.config

    def cast_and_gathered(x: jax.Array, dimension: int, has_halves: bool) -> jax.Array:
        x = x.astype(config.dtype)
        if not has_halves:
            return gather(x, axes.embed, dimension)
        # Gate and up joined, as kernels want them: XLA for TPUs turns the reduce-scatter of an array of four dimensions
        # into an all-reduce and a slice.
        halves, width = x.shape[-2:]
        joined = gather(flat_array(x), axes.embed, dimension)
        return joined.reshape(*joined.shape[:-1], halves, width)

    def whole(row: Param | None, value: Any, has_whole_scale: bool = False) -> Any:
        if row is None or value is None:
            return value
        logical = row.k_major(row.axes) if isinstance(value, QTensor) else row.axes
        if "embed" not in logical:
            return value
        dimension = logical.index("embed")
        if isinstance(value, RoundedWeights):
            array = cast_and_gathered(value.array, dimension, row.has_halves)  # only for its gradient, a reduce-scatter
            n_last = jax.tree.map(lambda part: gather(part, axes.embed, dimension), value.n_last)
            return RoundedWeights(array, whole(row, value.k_major), n_last)
        if isinstance(value, QTensor):
            scale = value.scale if has_whole_scale else gather(value.scale, axes.embed, dimension)
            return QTensor(gather(value.values, axes.embed, dimension), scale)
        if row.kind != "kernel":
            return gather(value, axes.embed, dimension)
        if config.precision == "w8a8":
            layouts = in_both_layouts(value, row=row, quantization=config.quantization, backend=config.backend)
            if layouts is not None:
                found = whole(row, RoundedWeights(value, *layouts))
                return RoundedWeights(found.array, *named((found.k_major, found.n_last), WEIGHTS_NAME))
        return cast_and_gathered(value, dimension, row.has_halves)

    table = param_table(config)
    router = params.router
    if router is not None:
        router = {name: whole(table.router[name], value) for name, value in router.items()}  # type: ignore[index]
    own = {
        name: whole(getattr(table, name), getattr(params, name), name in settings.whole_scales)
        for name in (*EXPERT_FIELDS, *SHARED_FIELDS)
    }
    return MoEParams(router=router, **own, replicas=params.replicas)


class LayerExperts:
    """The experts of a layer on this chip; see `moejax.routers.base.Experts`."""

    def __init__(self, config: MoEConfig, axes: Axes, params: MoEParams, mlp_rank: jax.Array | None):
        self.config = config
        self.axes = axes
        self.replicas = params.replicas
        self.params = {name: getattr(params, name) for name in (*EXPERT_FIELDS, *SHARED_FIELDS)}
        if axes.tp > 1 and params.down_bias is not None and mlp_rank is not None:
            # The bias goes into only one of the partial sums.
            self.params["down_bias"] = jnp.where(mlp_rank[0] == 0, params.down_bias, 0)

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
        """See `moejax.routers.base.Experts`."""
        config = self.config
        kept, max_rows = topk_ids, None
        dropped = jnp.zeros(config.num_experts, jnp.int32)
        if limited and config.capacity_factor is not None:
            kept, max_rows = limit_to_capacity(
                topk_ids, config.num_experts, config.capacity_factor, tokens, config.capacity_of, backend=config.backend
            )
            dropped = tokens.sum(count_dropped(topk_ids, kept, config.num_experts))
        slots, num_slots = kept, config.num_experts
        if self.replicas is not None:
            turn = jax.lax.axis_index(tokens.axes) if tokens.axes else 0
            slots = self.replicas.spread(kept, turn=turn, backend=config.backend)
            num_slots = self.replicas.num_slots
        way = way_of(config, self.axes, num_slots=num_slots, max_choices=max_choices, max_rows=max_rows)
        params = self.params if with_shared else {name: self.params[name] for name in EXPERT_FIELDS}
        # A residual may have more bits than the experts compute with.
        dtype = x.dtype if residual is None else jnp.promote_types(x.dtype, residual.dtype)
        run = functools.partial(_apply_experts, config=config, way=way, dtype=dtype)
        return math_of(config).serve_or_train(run, x, topk_weights, slots, params, residual), dropped

    def shared(self, x: jax.Array) -> jax.Array | None:
        """See `moejax.routers.base.Experts`."""
        return _shared_expert(x, self.params, math_of(self.config), self.config, self.axes)


def _apply_experts(
    math: ExpertMath,
    x: jax.Array,
    topk_weights: jax.Array,
    topk_ids: jax.Array,
    params: dict[str, Any],
    residual: jax.Array | None,
    *,
    config: MoEConfig,
    way: Way,
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """What the experts make of x [T, H], the shared one too if `params` have it, added to `residual`, in `dtype`."""
    shared = _shared_expert(x, params, math, config, way.axes)
    if shared is not None:
        residual = shared if residual is None else shared + residual
    return Stages(config, way, math).routed(
        x, topk_weights, topk_ids, params, residual=residual, preferred_element_type=dtype
    )


def _shared_expert(
    x: jax.Array, params: dict[str, Any], math: ExpertMath, config: MoEConfig, axes: Axes
) -> jax.Array | None:
    """The shared expert on x [T, H], float32; None if `params` have none."""
    if params.get("shared_gate_up") is None:
        return None
    rows = gather_tokens(x, axes.mlp) if axes.tp > 1 else x
    y = shared_mlp(rows, params["shared_gate_up"], params["shared_down"], math, config)
    y = sum_tokens(y, axes.mlp) if axes.tp > 1 else y.astype(jnp.float32)
    if params["shared_gate"] is not None:
        y *= jax.nn.sigmoid(float32_matmul(x, params["shared_gate"]))
    return y
