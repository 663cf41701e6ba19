"""The experts' weights, rounded to 8 bits once for several forward and backward passes.

    rounded = layer.quantized_for_training()           # once a step, outside of the loop over micro-batches
    y, aux = layer(x, rounded=rounded)                 # in the loop; gradients go to the layer's parameters

A layer in "w8a8" rounds its weights in every pass. A compiler for GPUs leaves that in a loop in which weights do not
change, and what `jax.checkpoint` repeats rounds them again. Who rounds them before holds them in the layouts that
products take, a byte a number each. Each chip rounds the part that it holds, and an FSDP axis gathers 8 bits.
"""

import dataclasses
import functools
from typing import Any

import jax

from moejax.axes import axes_on
from moejax.checks import check_config
from moejax.config import MoEConfig
from moejax.param import Param
from moejax.params import EXPERT_WEIGHTS, MoEParams, check_expert_params, flat_array, operand_spec, param_table
from pallas_kernels.grouped_matmul.weights import can_be_in_one_pass, in_one_pass
from pallas_kernels.quantize import SCALE_BLOCK, QTensor, Quantization, RoundedWeights
from pallas_kernels.quantize_transpose import SCALING, quantize_transpose
from sharding.mesh import AnyMesh, mesh_here, place
from sharding.partition import Axes, Partition

Layouts = tuple[QTensor, QTensor | None]
"""Weights as `MoEParams` has them in 8 bits, and the same numbers in the order of the parameter.

The latter are None where no gradient is multiplied in 8 bits.
"""


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
        _require_fp8(config)
        table, quantization = param_table(config), config.quantization
        found: dict[str, Any] = {}
        for name in EXPERT_WEIGHTS:
            array, layouts, row = getattr(params, name), getattr(self, name), getattr(table, name)
            if isinstance(array, QTensor):
                raise ValueError(f"params.{name} must be an array where rounded is given, got a QTensor")
            if array is None or row is None:
                if layouts is not None:
                    raise ValueError(f"rounded.{name} must be None, as params.{name} is, got {_told(layouts)}")
                found[name] = None
                continue
            expected = _expected(name, array, row, quantization)
            if _told(layouts) != _told(expected):
                raise ValueError(
                    f"rounded.{name} must be what quantize_for_training(params, config) makes of params.{name}, with "
                    f"the same config (sizes, quantization): {_told(expected)}, got {_told(layouts)}"
                )
            found[name] = RoundedWeights(array, *layouts)
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
    _require_fp8(config)
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


def _told(layouts: Any) -> str:
    """Dtypes and shapes."""
    leaves, structure = jax.tree.flatten(layouts)
    names = [f"{leaf.dtype}{list(leaf.shape)}" if hasattr(leaf, "shape") else type(leaf).__name__ for leaf in leaves]
    return str(jax.tree.unflatten(structure, names)).replace("'", "")


def _expected(name: str, array: jax.Array, row: Param, quantization: Quantization) -> Layouts:
    """Layouts without values of a parameter."""
    rounded = functools.partial(_in_both_layouts, name, row=row, quantization=quantization, backend="xla")
    return jax.eval_shape(rounded, jax.ShapeDtypeStruct(array.shape, array.dtype))


_WITHOUT = "leave rounded= out, and the layer rounds its weights in each call"


def _require_fp8(config: MoEConfig) -> None:
    if config.precision != "w8a8":
        raise ValueError(f"config.precision must be 'w8a8' for rounded weights, got {config.precision!r}")
    if not can_be_in_one_pass(config.quantization):
        dtype, scaling = config.quantization.dtype, config.quantization.rhs_scaling
        raise ValueError(
            f"config.quantization must be of FP8 with rhs_scaling={SCALING!r} for rounded weights, got dtype={dtype!r} "
            f"and rhs_scaling={scaling!r}; {_WITHOUT}"
        )


def _over_mesh(round_: Any, weights: jax.Array, row: Param, mesh: Any, axes: Axes) -> Layouts:
    """`round_` of the part that each chip holds."""
    spec = axes.spec(row.axes)
    shapes = jax.eval_shape(round_, jax.ShapeDtypeStruct(weights.shape, weights.dtype))
    specs = operand_spec(row, RoundedWeights(weights, *shapes), axes)
    out_specs = specs.k_major, specs.n_last
    on_chips = jax.shard_map(round_, mesh=mesh, in_specs=spec, out_specs=out_specs, check_vma=False)
    return on_chips(place(weights, mesh, spec))


def _in_both_layouts(name: str, weights: jax.Array, *, row: Param, quantization: Quantization, backend: str) -> Layouts:
    found = in_both_layouts(weights, row=row, quantization=quantization, backend=backend)
    if found is None:
        raise ValueError(
            f"params.{name} must be BF16, FP16 or float32 with sizes on each chip that are multiples of {SCALE_BLOCK} "
            f"to be rounded for training, got {weights.dtype}{list(weights.shape)}; {_WITHOUT}"
        )
    return found


def in_both_layouts(weights: jax.Array, *, row: Param, quantization: Quantization, backend: str) -> Layouts | None:
    """What a chip holds of a parameter, rounded; None where no kernel rounds it to both layouts in one pass."""
    joined = flat_array(weights) if row.has_halves else weights
    matrices = jax.lax.stop_gradient(joined.reshape(-1, *joined.shape[-2:]))
    if weights.shape[-1] % SCALE_BLOCK or not in_one_pass(matrices, quantization):
        return None
    back = quantization.gradient_dtype is not None
    k_major, n_last = quantize_transpose(matrices, quantization.dtype, n_last=back, backend=backend)
    assert k_major is not None, "it was asked for"

    def shaped(found: QTensor, shape: tuple[int, ...], order: Any) -> QTensor:
        blocks = list(weights.shape)
        for dimension in (-3, -1) if row.has_halves else (-2, -1):
            blocks[dimension] //= SCALE_BLOCK
        return QTensor(found.values.reshape(shape), found.scale.reshape(order(tuple(blocks))))

    return (
        shaped(k_major, row.k_major(weights.shape), row.k_major),
        None if n_last is None else shaped(n_last, weights.shape, lambda sizes: sizes),
    )
