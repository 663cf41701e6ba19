"""One function on the tokens of every chip: directly on one chip, under shard_map over a mesh.

The function sees tokens [T, …] that are its chip's own; which of the batch they are, `Tokens` tells it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from moejax.config import MoEConfig
from moejax.losses import Tokens
from pallas_kernels.concrete import is_known
from pallas_kernels.target import target_chip
from sharding.exchange_plan import local_experts
from sharding.expert_parallel import Transport
from sharding.mesh import (
    DATA_AXIS,
    AnyMesh,
    axis_size,
    current_mesh,
    has_explicit_axes,
    place,
    sharding_in,
    tokens_spec,
    with_auto_axes,
)


class Body(Protocol):
    """What a chip does with its tokens."""

    def __call__(
        self, per_token: Any, params: Any, *, config: MoEConfig, tokens: Tokens, transport: Transport
    ) -> tuple[jax.Array, Any]:
        """A tuple of arrays [T, …], parameters -> y [T, H], and arrays that are equal on all chips."""


def on_chips(
    body: Body,
    per_token: tuple[jax.Array, ...],
    params: Any,
    config: MoEConfig,
    *,
    specs: Callable[[Any, str], Any],
    transport: Transport,
    mesh: AnyMesh | None,
    expert_axis: str,
    token_axes: Sequence[str] | None = None,
    num_experts: int | None = None,
) -> tuple[jax.Array, Any]:
    """Runs `body` where the mesh says, on tokens that are split over its chips.

    Args:
      body: a function of a module (compiled programs are kept by it).
      per_token: x [..., H], which is cast to config.dtype, and arrays [..., n] with the same leading dimensions. The
        last dimension before H is the sequence.
      params: a pytree of whole arrays, of any sharding.
      config: handed to `body`.
      specs: (params, expert_axis) -> their PartitionSpecs; a function of a module.
      transport: handed to `body`, with the axes of the mesh.
      mesh: default is the mesh of `jax.set_mesh`, and one chip when there is none.
      expert_axis: axis of the mesh that the experts are split over.
      token_axes: axes that tokens are split over; default "data", when the mesh has it, and the expert axis. When
        they do not divide the tokens, padding is added and taken away again.
      num_experts: E, where `params` hold experts that are split over the expert axis.

    Returns:
      y in the shape and dtype of x, and what else `body` returned. In a mesh of Explicit axes y is sharded as x is.

    Raises:
      ValueError: the mesh lacks an axis, or ep does not divide E.
    """
    x = per_token[0]
    mesh = current_mesh() if mesh is None else mesh
    if mesh is not None and has_explicit_axes(mesh):
        # Padding, and cutting a sharded sequence into tokens, have no sharding that the types could carry.
        on_auto_axes = functools.partial(
            on_chips,
            body,
            config=config,
            specs=specs,
            transport=transport,
            mesh=with_auto_axes(mesh),
            expert_axis=expert_axis,
            token_axes=token_axes,
            num_experts=num_experts,
        )
        shardings = (sharding_in(x, mesh), NamedSharding(mesh, PartitionSpec()))
        return jax.sharding.auto_axes(on_auto_axes, out_sharding=shardings)(per_token, params)
    rows = tuple(array.reshape(-1, array.shape[-1]) for array in (x.astype(config.dtype), *per_token[1:]))
    num_tokens = rows[0].shape[0]
    sequence_length = x.shape[-2] if x.ndim > 1 else 1
    target = None if (chip := target_chip()) is None else chip.name
    if mesh is None:
        # What is known is looked at as it is, so that NaN is found; what is traced is traced and lowered once for all
        # layers of a model that are alike.
        run = _on_chip if is_known(x) else _once_for_all_layers
        y, rest = run(
            rows,
            params,
            body=body,
            config=config,
            sequence_length=sequence_length,
            transport=transport,
            target=target,
        )
        return y.reshape(x.shape).astype(x.dtype), rest

    ep = axis_size(mesh, expert_axis)
    if num_experts is not None:
        local_experts(num_experts, ep)
    if token_axes is None:
        token_axes = (DATA_AXIS, expert_axis) if DATA_AXIS in mesh.shape else (expert_axis,)
    padding = -num_tokens % math.prod(axis_size(mesh, axis) for axis in token_axes)
    index = jnp.arange(num_tokens + padding, dtype=jnp.int32)
    by_token = tokens_spec(token_axes)
    y, rest = _on_mesh(
        tuple(place(jnp.pad(array, ((0, padding), (0, 0))), mesh, by_token) for array in rows),
        place(index, mesh, by_token),
        jax.tree.map(lambda leaf, spec: place(leaf, mesh, spec), params, specs(params, expert_axis)),
        body=body,
        specs=specs,
        mesh=mesh,
        expert_axis=expert_axis,
        config=config,
        total=num_tokens,
        sequence_length=sequence_length,
        transport=dataclasses.replace(transport, expert_axis=expert_axis, ep=ep, token_axes=tuple(token_axes)),
        target=target,
    )
    return y[:num_tokens].reshape(x.shape).astype(x.dtype), rest


def _on_chip(
    rows: tuple[jax.Array, ...],
    params: Any,
    *,
    body: Body,
    config: MoEConfig,
    sequence_length: int,
    transport: Transport,
    target: str | None,
) -> tuple[jax.Array, Any]:
    """`body` on the only chip; `target` tells apart what is traced for another one."""
    del target
    num_tokens = rows[0].shape[0]
    tokens = Tokens(jnp.arange(num_tokens, dtype=jnp.int32), num_tokens, sequence_length)
    return body(rows, params, config=config, tokens=tokens, transport=transport)


_once_for_all_layers = jax.jit(_on_chip, static_argnames=("body", "config", "sequence_length", "transport", "target"))


# Compiled as one even outside jit, where shard_map would trace every step of its body anew in every call.
@functools.partial(
    jax.jit,
    static_argnames=(
        "body",
        "specs",
        "mesh",
        "expert_axis",
        "config",
        "total",
        "sequence_length",
        "transport",
        "target",
    ),
)
def _on_mesh(
    rows: tuple[jax.Array, ...],
    index: jax.Array,
    params: Any,
    *,
    body: Body,
    specs: Callable[[Any, str], Any],
    mesh: AnyMesh,
    expert_axis: str,
    config: MoEConfig,
    total: int,
    sequence_length: int,
    transport: Transport,
    target: str | None,
) -> tuple[jax.Array, Any]:
    """`body` on every chip of the mesh; `target` as for `_on_chip`."""
    del target

    def on_chip(rows: tuple[jax.Array, ...], index: jax.Array, params: Any) -> tuple[jax.Array, Any]:
        tokens = Tokens(index, total, sequence_length, transport.token_axes)
        return body(rows, params, config=config, tokens=tokens, transport=transport)

    by_token = tokens_spec(transport.token_axes)
    sharded = jax.shard_map(
        on_chip,
        mesh=mesh,
        in_specs=(by_token, by_token, specs(params, expert_axis)),
        out_specs=(by_token, PartitionSpec()),
        # What varies over which axes is not checked; tests hold values and gradients to the dense oracle instead.
        check_vma=False,
    )
    return sharded(rows, index, params)
