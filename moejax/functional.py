"""The layer as a function: moe(x, params, config) -> y and what the router did.

Without a mesh it runs on one chip. With one it runs under shard_map: tokens are split over all chips, each chip
routes its own, and rows travel to the chips that hold their experts.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from moejax.config import MoEConfig
from moejax.experts import EXPERT_FIELDS, MoEParams, check_params, expert_mlp, shared_mlp
from moejax.losses import LoadStats, Tokens, router_losses, tokens_per_expert
from moejax.router import route
from pallas_kernels.concrete import nan_rows
from sharding.exchange_plan import local_experts
from sharding.expert_parallel import Transport, expert_parallel
from sharding.mesh import (
    DATA_AXIS,
    EXPERT_AXIS,
    AnyMesh,
    axis_size,
    current_mesh,
    has_explicit_axes,
    place,
    sharding_in,
    tokens_spec,
    with_auto_axes,
)


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
    _check_input(x, config)
    check_params(params, config)
    mesh = current_mesh() if mesh is None else mesh
    if mesh is not None and has_explicit_axes(mesh):
        # Padding, and cutting a sharded sequence into tokens, have no sharding that the types could carry.
        on_auto_axes = functools.partial(
            moe, config=config, mesh=with_auto_axes(mesh), expert_axis=expert_axis, token_axes=token_axes
        )
        shardings = (sharding_in(x, mesh), NamedSharding(mesh, PartitionSpec()))
        return jax.sharding.auto_axes(on_auto_axes, out_sharding=shardings)(x, params)
    tokens = x.reshape(-1, config.hidden_size).astype(config.dtype)
    num_tokens = tokens.shape[0]
    index = jnp.arange(num_tokens, dtype=jnp.int32)
    sequence_length = x.shape[-2] if x.ndim > 1 else 1
    if mesh is None:
        y, aux = _moe_on_chip(
            tokens,
            index,
            params,
            config=config,
            total=num_tokens,
            sequence_length=sequence_length,
            transport=Transport(**_transport_settings(config)),
        )
        return y.reshape(x.shape).astype(x.dtype), aux

    ep = axis_size(mesh, expert_axis)
    local_experts(config.num_experts, ep)
    if token_axes is None:
        token_axes = (DATA_AXIS, expert_axis) if DATA_AXIS in mesh.shape else (expert_axis,)
    padding = -num_tokens % math.prod(axis_size(mesh, axis) for axis in token_axes)
    tokens = jnp.pad(tokens, ((0, padding), (0, 0)))
    index = jnp.arange(num_tokens + padding, dtype=jnp.int32)
    by_token, by_param = tokens_spec(token_axes), params_spec(params, expert_axis)
    y, aux = _moe_on_mesh(
        place(tokens, mesh, by_token),
        place(index, mesh, by_token),
        jax.tree.map(lambda leaf, spec: place(leaf, mesh, spec), params, by_param),
        mesh=mesh,
        expert_axis=expert_axis,
        config=config,
        total=num_tokens,
        sequence_length=sequence_length,
        transport=Transport(
            expert_axis=expert_axis, ep=ep, token_axes=tuple(token_axes), **_transport_settings(config)
        ),
    )
    return y[:num_tokens].reshape(x.shape).astype(x.dtype), aux


def params_spec(params: MoEParams, expert_axis: str = EXPERT_AXIS) -> MoEParams:
    """A PartitionSpec for every array in `params`: experts split over `expert_axis`, all else whole everywhere."""

    def spec(name: str) -> object:
        split = PartitionSpec(expert_axis) if name in EXPERT_FIELDS else PartitionSpec()
        return jax.tree.map(lambda _: split, getattr(params, name))

    return MoEParams(**{field.name: spec(field.name) for field in dataclasses.fields(MoEParams)})


# Compiled as one even outside jit, where shard_map would trace every step of its body anew in every call.
@functools.partial(jax.jit, static_argnames=("mesh", "expert_axis", "config", "total", "sequence_length", "transport"))
def _moe_on_mesh(
    tokens: jax.Array,
    index: jax.Array,
    params: MoEParams,
    *,
    mesh: AnyMesh,
    expert_axis: str,
    config: MoEConfig,
    total: int,
    sequence_length: int,
    transport: Transport,
) -> tuple[jax.Array, MoEAux]:
    """`_moe_on_chip` on every chip of the mesh."""
    by_token = tokens_spec(transport.token_axes)
    sharded = jax.shard_map(
        functools.partial(
            _moe_on_chip, config=config, total=total, sequence_length=sequence_length, transport=transport
        ),
        mesh=mesh,
        in_specs=(by_token, by_token, params_spec(params, expert_axis)),
        out_specs=(by_token, PartitionSpec()),
        # Kernels and loops inside do not say over which axes their results vary; tests hold the gradients to the
        # dense oracle instead.
        check_vma=False,
    )
    return sharded(tokens, index, params)


def _moe_on_chip(
    x: jax.Array,
    index: jax.Array,
    params: MoEParams,
    *,
    config: MoEConfig,
    total: int,
    sequence_length: int,
    transport: Transport,
) -> tuple[jax.Array, MoEAux]:
    """The layer on the tokens x [T, H] of this chip, whose places in the batch are index [T]."""
    tokens = Tokens(index, total, sequence_length, transport.token_axes)
    routing = route(x, params.router_kernel, config, bias=params.router_bias, correction_bias=params.correction_bias)
    topk_ids = jnp.where(tokens.valid[:, None], routing.topk_ids, -1)
    expert_inputs, topk_weights = x, routing.topk_weights
    if config.scale_inputs:
        expert_inputs = x.astype(jnp.float32) * topk_weights
        if config.precision == "w16a16":  # 8 bits are rounded to from float32, once.
            expert_inputs = expert_inputs.astype(x.dtype)
        topk_weights = jnp.ones_like(topk_weights)

    def experts(params: dict[str, Any], rows: jax.Array, group_sizes: jax.Array) -> jax.Array:
        return expert_mlp(rows, group_sizes, config=config, **params)

    y, dropped = expert_parallel(
        expert_inputs,
        topk_weights,
        topk_ids,
        experts,
        {name: getattr(params, name) for name in EXPERT_FIELDS},
        num_experts=config.num_experts,
        transport=transport,
        preferred_element_type=x.dtype if params.shared_gate_up is None else jnp.float32,
    )
    if params.shared_gate_up is not None:
        y += shared_mlp(x, params.shared_gate_up, params.shared_down, config).astype(jnp.float32)
    load = LoadStats(tokens_per_expert(routing, config.num_experts, tokens), tokens.sum(dropped))
    return y.astype(x.dtype), MoEAux(router_losses(routing, config, tokens), load)


def _transport_settings(config: MoEConfig) -> dict:
    return {
        "capacity_factor": config.capacity_factor,
        "wire_scaling": config.wire_scaling if config.precision == "w8a8" else None,
        "backend": config.backend,
    }


def _check_input(x: jax.Array, config: MoEConfig) -> None:
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
