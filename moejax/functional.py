"""The layer as a function: moe(x, params, config) -> y and what the router did.

Without a mesh it runs on one chip. With one it runs under shard_map: tokens are split over all chips, each chip
routes its own, and rows travel to the chips that hold their experts. `moe_experts` is the part after the router, for
choices that were made elsewhere.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from moejax.aux_output import MoEAux
from moejax.axes import axes_on, check_scales
from moejax.checks import check_config, check_residual, require_integer
from moejax.config import MoEConfig
from moejax.on_chip import Held, PerToken, Settings, experts_on_chip, layer_on_chip, whole_scales
from moejax.params import MoEParams, check_expert_params, check_params, param_specs
from moejax.rounded_experts import RoundedExperts
from pallas_kernels.arrays import require_arrays, require_given_arrays
from pallas_kernels.dtypes import is_float
from pallas_kernels.plan import as_ids, in_int32
from pallas_kernels.tracing.concrete import is_known, nan_rows
from sharding.mesh import AnyMesh, current_mesh, mesh_here, split_by_type
from sharding.partition import Partition, one_or_all
from sharding.per_chip import per_chip


def moe(
    x: jax.Array,
    params: MoEParams,
    config: MoEConfig,
    *,
    residual: jax.Array | None = None,
    mask: jax.Array | None = None,
    token_ids: jax.Array | None = None,
    topk_ids: jax.Array | None = None,
    rounded: RoundedExperts | None = None,
    key: jax.Array | None = None,
    mesh: AnyMesh | None = None,
    partition: Partition | None = None,
) -> tuple[jax.Array, MoEAux]:
    """Sends every token through the experts that its router chooses, and the shared expert, if there is one.

    Args:
      x: [..., H], BF16, FP16 or float32; the last dimension before H is the sequence.
      params: see `MoEParams`; whole arrays, of any sharding.
      config: the layer.
      residual: of the shape of x, BF16, FP16 or float32, what y is added to, as in a decoder block; None for nothing.
        Where one chip has all experts and no gradient is asked for, the kernel that sums a token's experts up adds it,
        and y is rounded once.
      mask: bool [...], true for real tokens; None if all are. What is masked takes no expert and no capacity, counts in
        no loss and no load, and comes out as zeros, whatever the residual.
      token_ids: integer [...], for routers that go by them; negative for none.
      topk_ids: integer [..., K], choices to repeat, as `MoEAux.topk_ids` of an earlier call has them; −1 where the
        router is to choose. Ids outside [0, E) count as −1, but where ids are known (outside jit), one of E or more is
        an error. The weights are those of this call.
      rounded: the experts' weights in 8 bits, as `quantize_for_training` made them of these `params`; gradients go to
        `params`. None rounds them here.
      key: random key for the noise of a noisy router in training; None for no noise.
      mesh: where to run; the default is the mesh of `jax.set_mesh`, or one chip if there is none. Inside
        `jax.shard_map` and `jax.pmap` only the axes that these have not split yet are used.
      partition: which axes of the mesh split what; default is what flax's logical axis rules say, if any are in force,
        else `Partition()`.

    Returns:
      y [..., H] in the dtype of `x`, and MoEAux. In a mesh of Explicit axes y is sharded as `x` is.

    Raises:
      ValueError: shapes or dtypes do not fit the configuration, the mesh lacks an axis or would repeat work, a size
        does not divide, or `x` is known (outside jit) and holds NaN. Under jit a token with NaN gets NaN.
    """
    check_config(config)
    require_arrays(token_ids=token_ids, topk_ids=topk_ids)
    check_input(x, config, mask)
    check_residual(residual, x)
    check_params(params, config)
    if rounded is not None:
        if not isinstance(rounded, RoundedExperts):
            raise TypeError(f"rounded must be RoundedExperts, of quantize_for_training, got {type(rounded).__name__}")
        params = rounded.beside(params, config)
    _check_router(params, x)
    per_token = PerToken(x, residual, _checked_token_ids(token_ids, x), _checked_choices(topk_ids, x, config))
    of_tokens, (losses, load) = _run(
        layer_on_chip, per_token, params, Settings(config), mask=mask, key=key, mesh=mesh, partition=partition
    )
    y, ids, weights = of_tokens
    return y, MoEAux(losses, load, ids, weights)


def moe_experts(
    x: jax.Array,
    topk_weights: jax.Array,
    topk_ids: jax.Array,
    params: MoEParams,
    config: MoEConfig,
    *,
    residual: jax.Array | None = None,
    max_choices: int | None = None,
    mask: jax.Array | None = None,
    mesh: AnyMesh | None = None,
    partition: Partition | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`moe` from the router on: the experts that were chosen for each token, and the shared expert, if there is one.

    Args:
      x: [..., H], BF16, FP16 or float32.
      topk_weights: [..., K] floating point; K is of these choices and need not be `config.top_k`.
      topk_ids: integer [..., K], numbers of experts; an id outside [0, E) makes no choice.
      params: see `MoEParams`; the router's are not looked at and may be None.
      config: the layer; its router plays no part.
      residual: as for `moe`.
      max_choices: an upper bound of the choices that are made, that is, of ids in [0, E); None for T·K. Where most
        are −1 it saves the memory of their rows. Choices beyond the bound are left out without notice.
      mask: as for `moe`, like the arguments that follow.
      mesh: where to run.
      partition: which axes of the mesh split what.

    Returns:
      y [..., H] in the dtype of `x`, and int32 [E]: choices for which the expert had no room.

    Raises:
      ValueError: shapes or dtypes do not fit, the mesh lacks an axis, or ep does not divide E.
    """
    check_config(config)
    require_given_arrays(topk_weights=topk_weights, topk_ids=topk_ids)
    check_input(x, config, mask)
    check_residual(residual, x)
    params = dataclasses.replace(params, router=None)
    check_expert_params(params, config)
    if (
        topk_ids.shape[:-1] != x.shape[:-1]
        or topk_weights.shape != topk_ids.shape
        or not jnp.issubdtype(topk_ids.dtype, jnp.integer)
        or not jnp.issubdtype(topk_weights.dtype, jnp.floating)
    ):
        raise ValueError(
            f"topk_ids must be integer and topk_weights floating point, both [..., K] with the leading dimensions of x "
            f"{list(x.shape)}, got {topk_ids.dtype}{list(topk_ids.shape)} and {topk_weights.dtype}"
            f"{list(topk_weights.shape)}"
        )
    if topk_ids.shape[-1] == 0:
        raise ValueError(f"topk_ids must hold at least one choice a token, got {list(topk_ids.shape)}")
    if max_choices is not None:
        require_integer("max_choices", max_choices, at_least=1)
    if config.scale_inputs and topk_ids.shape[-1] != 1:
        raise ValueError(f"config.scale_inputs=True needs one choice a token, got K = {topk_ids.shape[-1]}")
    per_token = PerToken(
        x, residual, topk_ids=in_int32(topk_ids, config.num_experts), topk_weights=topk_weights.astype(jnp.float32)
    )
    settings = Settings(config, max_choices)
    return _run(experts_on_chip, per_token, params, settings, mask=mask, key=None, mesh=mesh, partition=partition)


def _run(
    body: Callable[..., tuple[Any, Any]],
    per_token: PerToken,
    params: MoEParams,
    settings: Settings,
    *,
    mask: jax.Array | None,
    key: jax.Array | None,
    mesh: AnyMesh | None,
    partition: Partition | None,
) -> tuple[Any, Any]:
    """`body` on the chips of the mesh, if there is one."""
    config = settings.config
    mesh = mesh_here(mesh)
    leading = per_token.x.shape[:-1]
    if mesh is None:
        _check_whole(per_token.x)
        return per_chip(body, per_token, Held(params, key), settings, leading=leading, mask=mask)
    axes = axes_on(mesh, partition, config, num_slots=params.num_slots)
    check_scales(params, config, axes)
    ranks = jnp.arange(axes.tp, dtype=jnp.int32) if axes.tp > 1 else None
    held = Held(params, key, ranks)
    specs = Held(
        param_specs(params, config, axes),
        None if key is None else PartitionSpec(),  # type: ignore[arg-type]
        None if ranks is None else PartitionSpec(one_or_all(axes.mlp)),  # type: ignore[arg-type]
    )
    return per_chip(
        body,
        per_token,
        held,
        dataclasses.replace(settings, whole_scales=whole_scales(params, config)),
        leading=leading,
        specs=specs,
        mesh=mesh,
        axes=axes,
        mask=mask,
        whole_sequences=body is layer_on_chip and config.router.whole_sequences,
    )


def check_input(x: jax.Array, config: MoEConfig, mask: jax.Array | None = None) -> None:
    """Raises ValueError unless `x` are activations [..., H] of the layer, one token at least, and no known NaN."""
    require_given_arrays(x=x)
    require_arrays(mask=mask)
    if x.ndim < 1 or x.shape[-1] != config.hidden_size:
        raise ValueError(f"x must be [..., H] with hidden_size={config.hidden_size}, got {list(x.shape)}")
    if not is_float(x.dtype):
        advice = "embed token ids first" if jnp.issubdtype(x.dtype, jnp.integer) else "cast it"
        raise ValueError(f"x must be BF16, FP16 or float32 activations, got {x.dtype}; {advice}")
    if any(size == 0 for size in x.shape):
        raise ValueError(f"x must hold at least one token, got {list(x.shape)}")
    if mask is not None and (mask.shape != x.shape[:-1] or mask.dtype != jnp.bool_):
        raise ValueError(
            f"mask must be bool {list(x.shape[:-1])}, true for each real token of x, got {mask.dtype}{list(mask.shape)}"
        )
    if bad := nan_rows(_readable(x), mask):
        raise ValueError(
            f"x holds NaN in {len(bad)} of {math.prod(x.shape[:-1])} tokens (first: token {bad[0]}); look for it in "
            "what comes before this layer"
        )


def _check_whole(x: jax.Array) -> None:
    """Raises ValueError where the type of x says that it is split over a mesh, and the layer is called without one."""
    if over := split_by_type(x):
        raise ValueError(
            f"x is split over the mesh {dict(over.mesh.shape)} as {over.spec}, and the layer is called without a mesh; "
            "call it within jax.set_mesh(mesh), or give it mesh="
        )


def _readable(x: Any) -> Any:
    """`x` in a place where it can be inspected: on the host if it is committed to devices other than the mesh's."""
    mesh = current_mesh()
    if not isinstance(mesh, Mesh) or not is_known(x) or not getattr(x, "committed", False):
        return x
    return x if x.sharding.device_set == set(mesh.devices.flat) else np.asarray(x)


def _check_router(params: MoEParams, x: jax.Array) -> None:
    """Raises ValueError if the router's parameters hold NaN, where all of this is known."""
    for name, value in (params.router or {}).items():
        if is_known((x, value)) and jnp.issubdtype(value.dtype, jnp.floating) and nan_rows(_readable(value)):
            raise ValueError(f"params.router[{name!r}] holds NaN; look for it in what trained the layer")


def _checked_token_ids(token_ids: jax.Array | None, x: jax.Array) -> jax.Array | None:
    if token_ids is None:
        return None
    if token_ids.shape != x.shape[:-1] or not jnp.issubdtype(token_ids.dtype, jnp.integer):
        raise ValueError(
            f"token_ids must be integers of shape {list(x.shape[:-1])}, one for each token of x, got "
            f"{token_ids.dtype}{list(token_ids.shape)}"
        )
    return token_ids.astype(jnp.int32)[..., None]


def _checked_choices(topk_ids: jax.Array | None, x: jax.Array, config: MoEConfig) -> jax.Array | None:
    if topk_ids is None:
        return None
    name = type(config.router).__name__
    if not config.router.replays:
        raise ValueError(f"topk_ids cannot be given to a layer with {name}, whose choices are not made token by token")
    shape = (*x.shape[:-1], config.router.choices(config.top_k))
    if topk_ids.shape != shape or not jnp.issubdtype(topk_ids.dtype, jnp.integer):
        raise ValueError(
            f"topk_ids must be integers of shape {list(shape)}, the choices of each token of x by {name}, got "
            f"{topk_ids.dtype}{list(topk_ids.shape)}"
        )
    if is_known(topk_ids):
        with jax.ensure_compile_time_eval():
            largest = int(topk_ids.max())
        if largest >= config.num_experts:
            raise ValueError(
                f"topk_ids must be below num_experts={config.num_experts}, or −1 where the router chooses, got "
                f"{largest}"
            )
    return as_ids(topk_ids, config.num_experts)
