"""One expert-parallel decode step for real: text through the layer on all devices, and the dense oracle beside it."""

import dataclasses
import statistics
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bench.expert_parallel.chain import chain_of_layers
from bench.expert_parallel.communication import Communication
from bench.expert_parallel.layer_stages import StageTimes, time_stages
from bench.inputs.text import embed, sample_contexts
from bench.measure.clock import kernel_times, wall_seconds, wall_times
from bench.measure.errors import norm_error
from moejax import LoadStats, MoEConfig, MoEParams, balance, dense_moe, moe, param_specs, place
from moejax.axes import axes_on
from moejax.stages import way_of
from sharding.exchange import transport_name
from sharding.mesh import EXPERT_AXIS
from sharding.replicas import Replicas

ORACLE_FLOPS = 2.5e12
"""The dense oracle does E / K times the arithmetic of the layer; it checks as many tokens as this allows."""

TOLERANCE = 1e-2
"""Of ‖layer − oracle‖ / ‖oracle‖, both on the same (quantised) operands, with BF16 results."""

_REPEATS = 3
_LAYERS = 16  # on end


@dataclasses.dataclass(frozen=True)
class Replicated:
    """The same step with the hottest experts in spare slots.

    Attributes:
      experts: [P] the expert of each slot, planned for the load of this very step.
      difference: ‖y − y of the step without‖ / ‖y of the step without‖.
      wall_seconds: median time of a step on these devices, compilation left out.
      busiest_rows: rows of the chip that got the most.
    """

    experts: np.ndarray
    difference: float
    wall_seconds: float
    busiest_rows: int


@dataclasses.dataclass(frozen=True)
class DecodeRun:
    """What one real decode step gave.

    Attributes:
      relative_error: ‖layer − oracle‖ / ‖oracle‖ over the tokens that were checked.
      checked_tokens: how many those are.
      wall_seconds: median time of a step on these devices, compilation left out.
      stages: times of each stage run by itself.
      load: how the text fell on the experts.
      busiest_rows: rows of the chip that got the most.
      transport: what carried the rows; None on one chip.
      communication: what of it a layer shows; None unless there are several NVIDIA GPUs that tell their kernels' times.
      replicated: what spare slots change, where there are some.
    """

    relative_error: float
    checked_tokens: int
    wall_seconds: float
    stages: StageTimes
    load: LoadStats
    busiest_rows: int
    transport: str | None = None
    communication: Communication | None = None
    replicated: Replicated | None = None


def tokens_of_text(text: np.ndarray, batch_size: int, config: MoEConfig, mesh: Mesh, seed: int) -> jax.Array:
    """Activations [T, H] for `batch_size` places of the text, split over the mesh."""
    contexts = sample_contexts(text, batch_size, seed)
    make = jax.jit(
        lambda bytes_: embed(bytes_, config.hidden_size, seed).astype(config.dtype),
        out_shardings=NamedSharding(mesh, PartitionSpec(axes_on(mesh, None, config).tokens)),
    )
    replicated = NamedSharding(mesh, PartitionSpec())
    return make(jax.make_array_from_callback(contexts.shape, replicated, lambda index: contexts[index]))


def run_decode(
    x: jax.Array, params: MoEParams, config: MoEConfig, mesh: Mesh, say: Callable[[str], None], *, spare_slots: int = 0
) -> DecodeRun:
    """Runs the layer on x [T, H], times it, and holds it against the dense oracle; with spare slots once more."""
    step = jax.jit(lambda x, params: moe(x, params, config, mesh=mesh))
    say("compiling and running the layer")
    y, aux = jax.block_until_ready(step(x, params))
    wall = statistics.median(wall_seconds(step, x, params) for _ in range(_REPEATS))
    say("checking against the dense oracle")
    error, num_checked = error_of_some_tokens(x, y, params, config, mesh)
    say("timing the stages one by one")
    stages = time_stages(x, params, config, mesh, say)
    load, ep = np.asarray(aux.load.tokens_per_expert), mesh.shape[EXPERT_AXIS]
    busiest = int(load.reshape(ep, -1).sum(1).max())
    communication = None
    if stages.by_kernels and ep > 1:
        say("timing layers on end, and their kernels")
        communication = _communication(x, params, config, mesh)
    transport = transport_name(way_of(config, axes_on(mesh, None, config))) if ep > 1 else None
    run = DecodeRun(error, num_checked, wall, stages, aux.load, busiest, transport, communication)
    if not spare_slots:
        return run
    say(f"planning {spare_slots} spare slots for this load, moving weights, and running the layer again")
    experts = balance(load, config.num_experts + spare_slots, ep)
    placed = place(params, experts)
    placed_y, _ = jax.block_until_ready(step(x, placed))
    again = statistics.median(wall_seconds(step, x, placed) for _ in range(_REPEATS))
    rows = _rows_of_chips(aux.topk_ids, Replicas.of(experts, config.num_experts), ep)
    replicated = Replicated(experts, float(jax.jit(norm_error)(placed_y, y)), again, int(rows.max()))
    return dataclasses.replace(run, replicated=replicated)


def _communication(x: jax.Array, params: MoEParams, config: MoEConfig, mesh: Mesh) -> Communication:
    """Of layers on end: their time, and by their kernels, mean over the chips of this process, what it is made of."""
    layers = chain_of_layers(config, mesh, _LAYERS)
    kernels = kernel_times(layers, x, params, repeats=_REPEATS, calls=_LAYERS * len(mesh.local_devices)).kernels
    return Communication.of(wall_times(layers, x, params, repeats=_REPEATS, calls=_LAYERS).median_us, kernels)


def _rows_of_chips(topk_ids: jax.Array, replicas: Replicas, ep: int) -> np.ndarray:
    """The rows of each chip, [ep], where chip r holds the r-th part of the tokens."""
    ids = multihost_utils.process_allgather(topk_ids, tiled=True).reshape(ep, -1, topk_ids.shape[-1])
    spread = jax.jit(lambda ids, chip: replicas.spread(ids, turn=chip))
    slots = np.stack([np.asarray(spread(part, chip)) for chip, part in enumerate(ids)])
    return np.bincount(slots[slots >= 0] // (replicas.num_slots // ep), minlength=ep)


def error_of_some_tokens(
    x: jax.Array, y: jax.Array, params: MoEParams, config: MoEConfig, mesh: Mesh
) -> tuple[float, int]:
    """‖y − oracle‖ / ‖oracle‖ of some of y [T, H], and of how many: as many as `ORACLE_FLOPS` allows."""
    oracle_flops = 6 * config.num_experts * config.hidden_size * config.intermediate_size  # of a token
    num_checked = max(1, min(x.shape[0], int(ORACLE_FLOPS / oracle_flops)))
    # Tokens from all over the batch, so that every chip's share is looked at.
    checked = np.linspace(0, x.shape[0] - 1, num_checked).astype(np.int32)
    return float(_relative_error(x, y, params, config, mesh, checked)), num_checked


def _relative_error(
    x: jax.Array, y: jax.Array, params: MoEParams, config: MoEConfig, mesh: Mesh, checked: np.ndarray
) -> jax.Array:
    """Every chip applies its experts to each of the tokens `checked`; the sums are compared where they lie."""
    is_8_bit = config.precision == "w8a8"

    def oracle(x: jax.Array, params: MoEParams) -> jax.Array:
        return dense_moe(x, params, config, quantized=is_8_bit, expert_axis=EXPERT_AXIS)

    everywhere = PartitionSpec()
    specs = param_specs(params, config, axes_on(mesh, None, config))
    sharded = jax.shard_map(oracle, mesh=mesh, in_specs=(everywhere, specs), out_specs=everywhere, check_vma=False)

    @jax.jit
    def error(x: jax.Array, y: jax.Array, params: MoEParams) -> jax.Array:
        replicate = NamedSharding(mesh, everywhere)
        some_x, some_y = (jax.lax.with_sharding_constraint(a, replicate)[checked] for a in (x, y))
        return norm_error(some_y, sharded(some_x, params))

    return error(x, y, params)
