"""The experts' weights, rounded to 8 bits once for several forward and backward passes.

    rounded = layer.quantized_for_training()           # once a step, outside of the loop over micro-batches
    y, aux = layer(x, rounded=rounded)                 # in the loop; gradients go to the layer's parameters

A layer in "w8a8" rounds its weights in every pass. A compiler for GPUs leaves that in a loop in which weights do not
change, and what `jax.checkpoint` repeats rounds them again. Who rounds them before holds them in both layouts that
products take, two bytes a number. Each chip rounds the part that it holds, and over an FSDP axis 8 bits are gathered.
"""

import dataclasses
import functools
from typing import Any

import jax

from moejax.axes import axes_on
from moejax.checks import check_config
from moejax.config import MoEConfig
from moejax.param import Param
from moejax.params import EXPERT_WEIGHTS, MoEParams, check_expert_params, operand_spec, param_table
from pallas_kernels.grouped_matmul.weights import in_one_pass
from pallas_kernels.quantize import QTensor, Quantization, RoundedWeights
from pallas_kernels.quantize_transpose import quantize_transpose
from sharding.mesh import AnyMesh, mesh_here, place
from sharding.partition import Axes, Partition

Layouts = tuple[QTensor, QTensor]
"""Weights as `MoEParams` has them in 8 bits, and the same numbers in the order of the parameter."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoundedExperts:
    """What `quantize_for_training` makes of the parameters of these names; None for what the layer lacks."""

    gate_up: Layouts
    down: Layouts
    shared_gate_up: Layouts | None = None
    shared_down: Layouts | None = None

    def beside(self, params: MoEParams, config: MoEConfig) -> MoEParams:
        """`params` with these beside their arrays.

        Raises:
          ValueError: they are of other parameters, or those of `config` are not multiplied in 8 bits.
        """
        _require_8_bits(config)
        found: dict[str, Any] = {}
        for name in EXPERT_WEIGHTS:
            array, layouts = getattr(params, name), getattr(self, name)
            expected, got = (None if value is None else list(value.shape) for value in (array, layouts and layouts[1]))
            if isinstance(array, QTensor) or expected != got:
                raise ValueError(
                    f"rounded.{name} must be of params.{name}, an array {expected}, got {got}: "
                    "quantize_for_training(params, config) makes it"
                )
            found[name] = None if array is None else RoundedWeights(array, *layouts)
        return dataclasses.replace(params, **found)


def quantize_for_training(
    params: MoEParams, config: MoEConfig, *, mesh: AnyMesh | None = None, partition: Partition | None = None
) -> RoundedExperts:
    """Rounds the weights of all experts to 8 bits for `moe(..., rounded=...)`. No gradient passes here.

    Args:
      params: arrays.
      config: the layer, in "w8a8", with weights that are scaled by "128x128" in FP8.
      mesh: as for `moe`.
      partition: likewise.

    Raises:
      TypeError: `params` are no MoEParams.
      ValueError: the layer is another one, a parameter is in 8 bits, or a size that a chip holds is not a multiple of
        128.
    """
    if not isinstance(params, MoEParams):
        raise TypeError(f"params must be MoEParams, got {type(params).__name__}; of a layer, layer.params()")
    check_config(config)
    _require_8_bits(config)
    check_expert_params(params, config)
    mesh = mesh_here(mesh)
    axes = None if mesh is None else axes_on(mesh, partition, config, num_slots=params.num_slots)
    table = param_table(config)
    found: dict[str, Any] = {}
    for name in EXPERT_WEIGHTS:
        weights, row = getattr(params, name), getattr(table, name)
        if isinstance(weights, QTensor):
            raise ValueError(f"params.{name} must be an array, got a QTensor, which is not trained")
        if weights is None or row is None:
            found[name] = None
            continue
        round_ = functools.partial(
            _in_both_layouts, name, row=row, quantization=config.quantization, backend=config.backend
        )
        found[name] = round_(weights) if axes is None else _over_mesh(round_, weights, row, mesh, axes)
    return RoundedExperts(**found)


def _require_8_bits(config: MoEConfig) -> None:
    if config.precision != "w8a8":
        raise ValueError(f"config.precision must be 'w8a8' for rounded weights, got {config.precision!r}")


def _over_mesh(round_: Any, weights: jax.Array, row: Param, mesh: Any, axes: Axes) -> Layouts:
    """`round_` of the part that each chip holds."""
    spec = axes.spec(row.axes)
    shapes = jax.eval_shape(round_, jax.ShapeDtypeStruct(weights.shape, weights.dtype))
    specs = operand_spec(row, RoundedWeights(weights, *shapes), axes)
    on_chips = jax.shard_map(round_, mesh=mesh, in_specs=spec, out_specs=(specs.k_major, specs.n_last), check_vma=False)
    return on_chips(place(weights, mesh, spec))


def _in_both_layouts(name: str, weights: jax.Array, *, row: Param, quantization: Quantization, backend: str) -> Layouts:
    joined = weights.reshape(*weights.shape[:-2], -1) if row.has_halves else weights
    matrices = jax.lax.stop_gradient(joined.reshape(-1, *joined.shape[-2:]))
    if weights.shape[-1] % 128 or not in_one_pass(matrices, quantization):
        raise ValueError(
            f"params.{name} is rounded for training to FP8 with scales of '128x128', where its sizes on each chip are "
            f"multiples of 128; got {list(weights.shape)}, quantization.rhs_scaling={quantization.rhs_scaling!r} and "
            f"dtype={quantization.dtype!r}"
        )
    k_major, n_last = quantize_transpose(matrices, quantization.dtype, backend=backend)
    assert k_major is not None, "it was asked for"
    assert n_last is not None, "it was asked for"

    def shaped(found: QTensor, shape: tuple[int, ...], order: Any) -> QTensor:
        blocks = list(weights.shape)
        for dimension in (-3, -1) if row.has_halves else (-2, -1):
            blocks[dimension] //= 128
        return QTensor(found.values.reshape(shape), found.scale.reshape(order(tuple(blocks))))

    return (
        shaped(k_major, row.k_major(weights.shape), row.k_major),
        shaped(n_last, weights.shape, lambda sizes: sizes),
    )
