"""What the axes of a mesh are to a layer, and whether its sizes can be split over them."""

import dataclasses

from flax.core import spmd

from moejax.config import MoEConfig
from moejax.params import MoEParams, param_table
from pallas_kernels.quantize import QTensor, RoundedWeights, scale_shape
from sharding.mesh import AnyMesh
from sharding.partition import Axes, Partition
from sharding.placement import Placement


def axes_on(mesh: AnyMesh, partition: Partition | None, config: MoEConfig, *, num_slots: int | None = None) -> Axes:
    """The axes of the layer on `mesh`, with so many slots for its experts; None for one each.

    Raises:
      ValueError: the partition does not fit the mesh, or a size of the layer does not divide.
    """
    axes = partition_here(partition).on(mesh)
    if num_slots not in (None, config.num_experts) and num_slots % axes.ep:
        raise ValueError(
            f"params have {num_slots} slots for experts, which ep={axes.ep} chips cannot share evenly; place them in a "
            f"multiple of {axes.ep} slots"
        )
    Placement(config.num_experts if num_slots is None else num_slots, axes.ep)  # raises where they do not fit
    widths = {"intermediate_size": "mlp", "shared_intermediate_size": "mlp"}
    for name, role in {**widths, "hidden_size": "embed"}.items():
        _check_divides(name, getattr(config, name), role, axes.size(getattr(axes, role)))
    _check_divides("hidden_size", config.hidden_size, "mlp", axes.tp)
    if config.precision == "w8a8":
        config.check_scale_blocks(axes.tp)
    return axes


def partition_here(partition: Partition | None) -> Partition:
    """`partition`, or what flax's logical axis rules say, or the default."""
    if partition is not None:
        if not isinstance(partition, Partition):
            raise TypeError(f"partition must be a moejax.Partition, got {type(partition).__name__}")
        return partition
    return partition_by_rules() or Partition()


def partition_by_rules() -> Partition | None:
    """What flax's logical axis rules say that are in force, None if they say nothing of ours."""
    rules = spmd.get_logical_axis_rules()
    is_ours = any(name in ("expert", "embed", "mlp", "tokens") for name, _ in rules)
    return Partition.from_rules(rules) if is_ours else None


def check_scales(params: MoEParams, config: MoEConfig, axes: Axes) -> None:
    """Raises ValueError unless the scales of 8-bit parameters, and of rows that travel, can be split with them."""
    table = param_table(config)
    for field in dataclasses.fields(params):
        value, row = getattr(params, field.name), getattr(table, field.name)
        value = value.k_major if isinstance(value, RoundedWeights) else value
        if not isinstance(value, QTensor):
            continue
        for size, logical in zip(value.scale.shape, row.k_major(row.axes), strict=True):
            if logical in ("embed", "mlp") and size > 1:
                _check_divides(f"scales of params.{field.name}", size, logical, axes.size(getattr(axes, logical)))
    if axes.tp > 1 and axes.ep > 1 and config.precision == "w8a8":
        scales = scale_shape((1, config.hidden_size), config.scaling_of_rows)[1]
        if scales > 1:
            _check_divides(f"scales ({config.scaling_of_rows!r}) of a row that travels", scales, "mlp", axes.tp)


def _check_divides(name: str, size: int, role: str, parts: int) -> None:
    if size % parts:
        raise ValueError(
            f"{name}={size} is not divisible by the {parts} chips that the partition splits {role!r} over; take an "
            f"axis of another length, or Partition({role}=None)"
        )
