"""The layer as a function: moe(x, params, config) -> y and what the router did.

Without a mesh it runs on one chip. With one it runs under shard_map: tokens are split over all chips, each chip
routes its own, and rows travel to the chips that hold their experts. `moe_experts` is the part after the router, for
choices that were made elsewhere.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from moejax.config import MoEConfig
from moejax.experts import EXPERT_FIELDS, MoEParams, check_expert_params, check_params, expert_mlp, shared_mlp
from moejax.losses import LoadStats, Tokens, router_losses, tokens_per_expert
from moejax.on_chips import on_chips
from moejax.router import route
from moejax.unless_differentiated import unless_differentiated
from pallas_kernels.concrete import nan_rows
from pallas_kernels.quantize import Operand, block_shape, quantize
from sharding.expert_parallel import Transport, expert_parallel
from sharding.mesh import EXPERT_AXIS, AnyMesh


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MoEAux:
    """What a layer says beside its output.

    Attributes:
      losses: the router losses of the configuration, weighted, float32 []; add `loss` to the training loss.
      load: how the tokens fell on the experts, and how many were dropped.
    """

    losses: dict[str, jax.Array]
    load: LoadStats

    @property
    def loss(self) -> jax.Array:
        """float32 []: the sum of all router losses."""
        return sum(self.losses.values(), start=jnp.zeros((), jnp.float32))


def moe(
    x: jax.Array,
    params: MoEParams,
    config: MoEConfig,
    *,
    mesh: AnyMesh | None = None,
    expert_axis: str = EXPERT_AXIS,
    token_axes: Sequence[str] | None = None,
) -> tuple[jax.Array, MoEAux]:
    """Sends every token through its top-k experts and the shared expert, if there is one.

    Args:
      x: [..., H], BF16, FP16 or float32; the last dimension before H is the sequence (for its balance loss).
      params: see `MoEParams`; whole arrays, of any sharding.
      config: the layer.
      mesh: where to run; default is the mesh of `jax.set_mesh`, and one chip when there is none.
      expert_axis: axis of the mesh that the experts are split over.
      token_axes: axes that tokens are split over; default "data", when the mesh has it, and the expert axis. When
        they do not divide the tokens, padding is added and taken away again.

    Returns:
      y [..., H] in the dtype of `x`, and MoEAux. In a mesh of Explicit axes y is sharded as `x` is.

    Raises:
      ValueError: shapes or dtypes do not fit the configuration, the mesh lacks an axis, ep does not divide E, or `x`
        is known (outside jit) and holds NaN. Under jit a token with NaN gets NaN.
    """
    check_input(x, config)
    check_params(params, config)
    return on_chips(
        _moe_on_chip,
        (x,),
        params,
        config,
        specs=params_spec,
        transport=_transport(config),
        mesh=mesh,
        expert_axis=expert_axis,
        token_axes=token_axes,
        num_experts=config.num_experts,
    )


def moe_experts(
    x: jax.Array,
    topk_weights: jax.Array,
    topk_ids: jax.Array,
    params: MoEParams,
    config: MoEConfig,
    *,
    max_choices: int | None = None,
    mesh: AnyMesh | None = None,
    expert_axis: str = EXPERT_AXIS,
    token_axes: Sequence[str] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`moe` from the router on: the experts that were chosen for each token, and the shared expert, if there is one.

    Args:
      x: [..., H], BF16, FP16 or float32.
      topk_weights: [..., K] floating point; K is of these choices and need not be `config.top_k`.
      topk_ids: integer [..., K], numbers of experts; −1 for a choice that is not made.
      params: see `MoEParams`; the router's are not looked at and may be None.
      config: the layer; of its routing only `scale_inputs` and `capacity_factor` play a part.
      max_choices: all that the [T, K] choices hold at most that are not −1; None for T·K. Where many are −1 this
        keeps the rows in memory to those that are made. More choices than it says are an error that is not noticed.
      mesh: as for `moe`, as the rest.
      expert_axis: axis of the mesh that the experts are split over.
      token_axes: axes that tokens are split over.

    Returns:
      y [..., H] in the dtype of `x`, and int32 [E]: choices for which the expert had no room.

    Raises:
      ValueError: shapes or dtypes do not fit, the mesh lacks an axis, or ep does not divide E.
    """
    check_input(x, config)
    check_expert_params(params, config)
    if (
        topk_ids.shape[:-1] != x.shape[:-1]
        or topk_weights.shape != topk_ids.shape
        or not jnp.issubdtype(topk_ids.dtype, jnp.integer)
    ):
        raise ValueError(
            f"topk_ids must be integer and topk_weights floating point, both [..., K] with the leading dimensions of x "
            f"{list(x.shape)}, got {topk_ids.dtype}{list(topk_ids.shape)} and {list(topk_weights.shape)}"
        )
    if max_choices is not None and max_choices < 1:
        raise ValueError(f"max_choices must be at least 1, or None for all of topk_ids, got {max_choices}")
    if config.scale_inputs and topk_ids.shape[-1] != 1:
        raise ValueError(f"config.scale_inputs=True needs one choice a token, got K = {topk_ids.shape[-1]}")
    return on_chips(
        _experts_on_chip,
        (x, topk_weights.astype(jnp.float32), topk_ids),
        params,
        config,
        specs=params_spec,
        transport=dataclasses.replace(_transport(config), max_choices=max_choices),
        mesh=mesh,
        expert_axis=expert_axis,
        token_axes=token_axes,
        num_experts=config.num_experts,
    )


def params_spec(params: MoEParams, expert_axis: str = EXPERT_AXIS) -> MoEParams:
    """A PartitionSpec for every array in `params`: experts split over `expert_axis`, all else whole everywhere."""

    def spec(name: str) -> object:
        split = PartitionSpec(expert_axis) if name in EXPERT_FIELDS else PartitionSpec()
        return jax.tree.map(lambda _: split, getattr(params, name))

    return MoEParams(**{field.name: spec(field.name) for field in dataclasses.fields(MoEParams)})


def _moe_on_chip(
    per_token: tuple[jax.Array],
    params: MoEParams,
    *,
    config: MoEConfig,
    tokens: Tokens,
    transport: Transport,
) -> tuple[jax.Array, MoEAux]:
    """The layer on the tokens x [T, H] of this chip."""
    (x,) = per_token
    routing = route(x, params.router_kernel, config, bias=params.router_bias, correction_bias=params.correction_bias)
    y, dropped = _experts_on_chip(
        (x, routing.topk_weights, routing.topk_ids), params, config=config, tokens=tokens, transport=transport
    )
    load = LoadStats(tokens_per_expert(routing, config.num_experts, tokens), dropped)
    return y, MoEAux(router_losses(routing, config, tokens), load)


def _experts_on_chip(
    per_token: tuple[jax.Array, jax.Array, jax.Array],
    params: MoEParams,
    *,
    config: MoEConfig,
    tokens: Tokens,
    transport: Transport,
) -> tuple[jax.Array, jax.Array]:
    """The chosen experts and the shared one on the tokens x [T, H] of this chip."""
    x, topk_weights, topk_ids = per_token
    topk_ids = jnp.where(tokens.valid[:, None], topk_ids, -1)
    operands = x, topk_weights, topk_ids, params
    train = functools.partial(_apply_experts, config=config, transport=transport)
    if config.precision == "w8a8":
        serve = functools.partial(train, stays_in_8_bits=True)
        y, dropped = unless_differentiated(serve, train, *operands)
    else:
        y, dropped = train(*operands)
    return y.astype(x.dtype), tokens.sum(dropped)


def _apply_experts(
    x: jax.Array,
    topk_weights: jax.Array,
    topk_ids: jax.Array,
    params: MoEParams,
    *,
    config: MoEConfig,
    transport: Transport,
    stays_in_8_bits: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """What the experts make of x [T, H], and int32 [E], the choices that were dropped.

    `stays_in_8_bits` rounds x before its rows are copied to their experts, and the rows between the kernels inside the
    first: with the same result, and without gradients.
    """
    inputs = x
    if config.scale_inputs:
        inputs = x.astype(jnp.float32) * topk_weights
        if config.precision == "w16a16":  # 8 bits are rounded to from float32, once.
            inputs = inputs.astype(x.dtype)
        topk_weights = jnp.ones_like(topk_weights)
    rows: Operand = inputs
    q = config.quantization
    if stays_in_8_bits and transport.ep == 1 and block_shape(q.lhs_scaling)[0] == 1:
        rows = quantize(inputs, q.dtype, scaling=q.lhs_scaling)

    def experts(params: dict[str, Any], rows: Operand, group_sizes: jax.Array) -> jax.Array:
        return expert_mlp(rows, group_sizes, config=config, stays_in_8_bits=stays_in_8_bits, **params)

    y, dropped = expert_parallel(
        rows,
        topk_weights,
        topk_ids,
        experts,
        {name: getattr(params, name) for name in EXPERT_FIELDS},
        num_experts=config.num_experts,
        transport=transport,
        preferred_element_type=x.dtype if params.shared_gate_up is None else jnp.float32,
    )
    if params.shared_gate_up is not None:
        shared = shared_mlp(x, params.shared_gate_up, params.shared_down, config, stays_in_8_bits=stays_in_8_bits)
        y += shared.astype(jnp.float32)
    return y, dropped


def _transport(config: MoEConfig) -> Transport:
    """How rows travel, as far as the configuration tells."""
    return Transport(
        capacity_factor=config.capacity_factor,
        wire_scaling=config.wire_scaling if config.precision == "w8a8" else None,
        backend=config.backend,
    )


def check_input(x: jax.Array, config: MoEConfig) -> None:
    """Raises ValueError unless `x` are activations [..., H] of the layer, one token at least, and no known NaN."""
    if x.ndim < 1 or x.shape[-1] != config.hidden_size:
        raise ValueError(f"x must be [..., H] with hidden_size={config.hidden_size}, got {list(x.shape)}")
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize < 2:
        raise ValueError(f"x must be BF16, FP16 or float32 activations, got {x.dtype}; embed token ids first")
    if math.prod(x.shape) == 0:
        raise ValueError(f"x must hold at least one token, got {list(x.shape)}")
    if bad := nan_rows(x):
        raise ValueError(
            f"x holds NaN in {len(bad)} of {x.size // x.shape[-1]} tokens (first: token {bad[0]}); look for it in what "
            "comes before this layer"
        )
