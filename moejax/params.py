"""The parameters of a layer, and the one table that describes them.

    table = param_table(config)          # a MoEParams with a `Param` in every place: shape, logical axes, initialiser
    shapes = param_shapes(config)
    specs = param_specs(params, config, axes)

Kernels, sharding, 8-bit weights, initial values, checkpoints and the oracle all read it.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from moejax.checks import check_config
from moejax.config import MoEConfig
from moejax.param import Param
from pallas_kernels.quantize import Operand, QTensor, RoundedWeights, Weights, block_shape, check_qtensor, quantize
from sharding.mesh import has_explicit_axes, spec_in
from sharding.partition import Axes
from sharding.replicas import Replicas


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MoEParams:
    """The parameters of one layer; what the configuration leaves out is None.

    Attributes:
      router: those of the router by name, such as "kernel" [H, E] of most; see `Router.table`.
      gate_up: [E, H, 2, I], gate and then up. For serving, a QTensor [E, 2, I, H].
      down: [E, I, H]. For serving, a QTensor [E, H, I]: 8-bit weights lie with the dimension that is summed over last,
        as Hopper needs them.
      gate_up_bias: [E, 2, I].
      down_bias: [E, H].
      shared_gate_up: [H, 2, S], S the width of the shared expert; a QTensor [2, S, H].
      shared_down: [S, H]; a QTensor [H, S].
      shared_gate: [H, 1].
      replicas: which slots hold which expert, where that is not each once and in order; see `moejax.place`. The leading
        dimension of the routed experts' parameters is P then, the number of slots, in the place of E.
    """

    router: Mapping[str, Any] | None
    gate_up: Any
    down: Any
    gate_up_bias: Any = None
    down_bias: Any = None
    shared_gate_up: Any = None
    shared_down: Any = None
    shared_gate: Any = None
    replicas: Replicas | None = None

    @property
    def num_slots(self) -> int:
        """Places for the weights of an expert: E, or P where there are replicas."""
        return self.down.shape[0]


EXPERT_FIELDS = ("gate_up", "down", "gate_up_bias", "down_bias")
"""The parameters of the routed experts, which are split over the expert axis."""

SHARED_FIELDS = ("shared_gate_up", "shared_down", "shared_gate")
"""The parameters of the shared expert."""

EXPERT_WEIGHTS = ("gate_up", "down", "shared_gate_up", "shared_down")
"""The matrices of the experts, which "w8a8" holds in 8 bits."""


def param_table(config: MoEConfig) -> MoEParams:
    """A `Param` for every parameter that `config` has, None for those that it has not."""
    hidden, width, experts = config.hidden_size, config.intermediate_size, config.num_experts
    shared = config.shared_intermediate_size
    bias, has_shared = config.expert_bias, shared > 0
    return MoEParams(
        router=config.router.table(config),
        gate_up=Param((experts, hidden, 2, width), ("expert", "embed", None, "mlp"), "kernel", stacked=1),
        down=Param((experts, width, hidden), ("expert", "mlp", "embed"), "kernel", stacked=1),
        gate_up_bias=Param((experts, 2, width), ("expert", None, "mlp"), "bias") if bias else None,
        down_bias=Param((experts, hidden), ("expert", "embed"), "bias") if bias else None,
        shared_gate_up=Param((hidden, 2, shared), ("embed", None, "mlp"), "kernel") if has_shared else None,
        shared_down=Param((shared, hidden), ("mlp", "embed"), "kernel") if has_shared else None,
        shared_gate=Param((hidden, 1), ("embed", None), "router kernel") if config.shared_gate else None,
    )


def map_table(function: Callable[..., Any], config: MoEConfig, *params: Any) -> MoEParams:
    """function(row, …) for every row of the table, with what each of `params` (of that structure) has in its place."""
    return jax.tree.map(function, param_table(config), *params, is_leaf=lambda leaf: isinstance(leaf, Param))


def param_shapes(config: MoEConfig) -> MoEParams:
    """The shape of every parameter that `config` has, None for those that it has not."""
    return map_table(lambda row: row.shape, config)


def param_specs(params: MoEParams, config: MoEConfig, axes: Axes) -> MoEParams:
    """A PartitionSpec for every array in `params` (which may lack the router's): how it is split over `axes`."""
    table = param_table(config)
    if params.router is None:
        table = dataclasses.replace(table, router=None)

    def spec(row: Param, value: Weights) -> Any:
        return operand_spec(row, value, axes)

    without = dataclasses.replace(params, replicas=None)
    specs = jax.tree.map(spec, table, without, is_leaf=lambda leaf: isinstance(leaf, Param))
    return dataclasses.replace(specs, replicas=jax.tree.map(lambda _: PartitionSpec(), params.replicas))


def operand_spec(row: Param, value: Weights, axes: Axes) -> Any:
    """The PartitionSpec of one parameter; of the values and of the scales of what is in 8 bits."""
    if isinstance(value, RoundedWeights):
        array, k_major = axes.spec(row.axes), axes.spec(row.k_major(row.axes))
        n_last = None if value.n_last is None else _qtensor_specs(array, value.n_last.scale.shape)
        return RoundedWeights(array, _qtensor_specs(k_major, value.k_major.scale.shape), n_last)  # type: ignore[arg-type]
    if not isinstance(value, QTensor):
        return axes.spec(row.axes)
    return _qtensor_specs(axes.spec(row.k_major(row.axes)), value.scale.shape)


def _qtensor_specs(values: PartitionSpec, scale_shape: tuple[int, ...]) -> Any:
    """How values and scales are split: a scale of a whole dimension is repeated beside every part of it."""
    scale = (None if size == 1 else names for size, names in zip(scale_shape, values, strict=True))
    return QTensor(values, PartitionSpec(*scale))  # type: ignore[arg-type]


def check_params(params: MoEParams, config: MoEConfig) -> None:
    """Raises ValueError, naming the parameter, unless `params` are those of `config`."""
    if not isinstance(params, MoEParams):
        raise TypeError(f"params must be MoEParams, got {type(params).__name__}")
    check_expert_params(params, config)
    table = config.router.table(config)
    got = {} if params.router is None else params.router
    if set(got) != set(table):
        raise ValueError(
            f"params.router must hold {sorted(table)}, those of {type(config.router).__name__}, got {sorted(got)}; "
            "those that an older moejax saved have other names (see CHANGELOG.md)"
        )
    for name, row in table.items():
        _check_one(f"params.router[{name!r}]", got[name], row)


def check_expert_params(params: MoEParams, config: MoEConfig) -> None:
    """`check_params` without the router's parameters."""
    table = param_table(config)
    replicas = params.replicas
    if replicas is not None:
        _check_replicas(replicas, config.num_experts)
    for name in (*EXPERT_FIELDS, *SHARED_FIELDS):
        row = getattr(table, name)
        if replicas is not None and row is not None and name in EXPERT_FIELDS:
            row = dataclasses.replace(row, shape=(replicas.num_slots, *row.shape[1:]))
        _check_one(f"params.{name}", getattr(params, name), row)


def _check_replicas(replicas: Any, num_experts: int) -> None:
    if not isinstance(replicas, Replicas):
        raise TypeError(f"params.replicas must be what moejax.place made, got {type(replicas).__name__}")
    shapes = {
        field.name: getattr(getattr(replicas, field.name), "shape", None) for field in dataclasses.fields(replicas)
    }
    per_slot, per_expert = shapes["experts"], (num_experts,)
    if shapes["count"] not in (per_expert, None) and len(shapes["count"]) == 1:
        raise ValueError(f"params.replicas must be of num_experts={num_experts}, got {shapes['count'][0]}")
    is_whole = all(jnp.issubdtype(leaf.dtype, jnp.integer) for leaf in jax.tree.leaves(replicas))
    wanted = {"experts": per_slot, "slots": per_slot, "first": per_expert, "count": per_expert}
    if shapes != wanted or per_slot is None or not is_whole:
        raise ValueError(
            f"params.replicas must be int32 tables of the shapes {wanted}, got {shapes}; moejax.place makes them"
        )


def _check_one(name: str, value: Any, row: Param | None) -> None:
    if row is None or value is None:
        if (row is None) != (value is None):
            want = "None (the configuration has none)" if row is None else list(row.shape)
            raise ValueError(f"{name} must be {want}, got {None if value is None else list(value.shape)}")
        return
    if isinstance(value, QTensor) and row.kind != "kernel":
        raise ValueError(f"{name} must be an array: only the matrices of experts are held in 8 bits")
    shape = row.k_major(row.shape) if isinstance(value, QTensor) else row.shape
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {list(value.shape)}{_hint(value, row, shape)}")
    if isinstance(value, QTensor):
        _check_blocks(name, value)
    is_float = jnp.issubdtype(value.dtype, jnp.floating) and value.dtype.itemsize >= 2
    if not isinstance(value, QTensor) and row.init is None and not is_float:
        raise ValueError(f"{name} must be BF16, FP16 or float32, or a QTensor for 8 bits, got {value.dtype}")


def _check_blocks(name: str, value: QTensor) -> None:
    """Raises ValueError for scales that are surely meant for other blocks than the equal ones that a QTensor has."""
    check_qtensor(name, value)
    blocks = [size // max(scales, 1) for size, scales in zip(value.shape[-2:], value.scale.shape[-2:], strict=True)]
    sizes = zip(blocks, value.shape[-2:], strict=True)
    if not all(block == size or block.bit_count() == 1 for block, size in sizes):
        raise ValueError(
            f"{name}: scale {list(value.scale.shape)} of values {list(value.shape)} means blocks of {blocks[0]} x "
            f"{blocks[1]}; if those of the checkpoint are cut short at an edge, dequantise its weights before, or pad "
            "them to whole blocks"
        )


def _hint(value: Operand, row: Param, shape: tuple[int, ...]) -> str:
    if row.kind != "kernel":
        is_turned = row.kind == "router kernel" and tuple(value.shape) == shape[::-1]
        return "; is it [out, in]? transpose it" if is_turned else ""
    if row.has_halves and value.ndim == len(shape) - 1:
        return (
            "; gate and up have an axis of their own: pack_experts() makes it of a checkpoint's weights, and "
            f".reshape{shape} of those that an older moejax saved (see CHANGELOG.md)"
        )
    if not isinstance(value, QTensor) and tuple(value.shape) == row.k_major(row.shape):
        return "; these are matrices [out, in]: pack_experts(layout='out_in') turns them"
    return ""


def quantize_params(params: MoEParams, config: MoEConfig) -> MoEParams:
    """Rounds the weights of all experts to 8 bits for serving, as QTensors (see `MoEParams`); the rest is unchanged.

    Raises:
      ValueError: a block of `config.quantization.rhs_scaling` does not divide the weights.
    """
    if not isinstance(params, MoEParams):
        raise TypeError(f"params must be MoEParams, got {type(params).__name__}; of a layer, layer.params()")
    check_config(config)
    q = config.quantization

    def to_8_bits(weights: Operand | None, row: Param | None) -> Any:
        if weights is None or isinstance(weights, QTensor) or row is None:
            return weights
        round_ = functools.partial(_to_8_bits, row=row, dtype=q.dtype, scaling=q.rhs_scaling)
        mesh = jax.typeof(weights).sharding.mesh
        spec = spec_in(weights, mesh) if has_explicit_axes(mesh) else None
        if spec is None:
            return round_(weights)
        # Once a dimension is reshaped into blocks, the type cannot say how it was split; the compiler finds out.
        shapes = jax.eval_shape(round_, jax.ShapeDtypeStruct(weights.shape, weights.dtype))
        specs = _qtensor_specs(PartitionSpec(*row.k_major(tuple(spec))), shapes.scale.shape)
        shardings = jax.tree.map(functools.partial(NamedSharding, mesh), specs)
        return jax.jit(jax.sharding.auto_axes(round_, out_sharding=shardings))(weights)

    table, rounded = param_table(config), {}
    for name in EXPERT_WEIGHTS:
        try:
            rounded[name] = to_8_bits(getattr(params, name), getattr(table, name))
        except ValueError as reason:
            raise ValueError(f"{name} does not fit config.quantization.rhs_scaling: {reason}") from None
    return dataclasses.replace(params, **rounded)


def _to_8_bits(weights: jax.Array, row: Param, dtype: str, scaling: str) -> QTensor:
    """The matrices of a row as a QTensor in the order that `MoEParams` states."""
    if not row.has_halves:
        return quantize(weights, dtype, scaling=scaling).mT
    if block_shape(scaling) == (None, None):  # one scale for both
        joined = quantize(flat_array(weights), dtype, scaling=scaling)
        values = jnp.moveaxis(joined.values.reshape(weights.shape), -2, -3)
        return QTensor(values.mT, joined.scale[..., None])
    return quantize(jnp.moveaxis(weights, -2, -3), dtype, scaling=scaling).mT


def flat_halves(gate_up: Any) -> Any:
    """Gate and up as one matrix for the kernels: [L, H, 2, I] -> [L, H, 2I], or QTensors [L, 2, I, H] -> [L, 2I, H].

    RoundedWeights become those of one matrix, with the scales of blocks that they have.
    """
    return flat_array(flat_layouts(gate_up))


def flat_array(gate_up: Any) -> Any:
    """`flat_halves` of an array, and of that in RoundedWeights; all that is in 8 bits stays as it is."""
    if isinstance(gate_up, RoundedWeights):
        return dataclasses.replace(gate_up, array=flat_array(gate_up.array))
    return gate_up if isinstance(gate_up, QTensor) else gate_up.reshape(*gate_up.shape[:-2], -1)


def flat_layouts(gate_up: Any) -> Any:
    """`flat_halves` of what is in 8 bits; arrays, in RoundedWeights too, stay as they are."""
    if isinstance(gate_up, RoundedWeights):
        k_major, n_last = gate_up.k_major, gate_up.n_last
        parts = (k_major.values, k_major.scale)
        rows = QTensor(*(part.reshape(*part.shape[:-3], -1, part.shape[-1]) for part in parts))
        columns = None if n_last is None else QTensor(flat_array(n_last.values), flat_array(n_last.scale))
        return RoundedWeights(gate_up.array, rows, columns)
    if not isinstance(gate_up, QTensor):
        return gate_up
    *batch, halves, width, depth = gate_up.shape
    scale = gate_up.scale
    if scale.shape[-3:] == (halves, 1, 1):  # one scale for each of the two: as channels the kernels know it
        scale = jnp.broadcast_to(scale, (*scale.shape[:-2], width, scale.shape[-1]))
    return QTensor(
        gate_up.values.reshape(*batch, halves * width, depth),
        scale.reshape(*scale.shape[:-3], -1, scale.shape[-1]),
    )
