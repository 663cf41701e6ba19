"""Time of each stage of an expert-parallel layer, by running the stages one at a time.

The layer itself runs them as one program, in as many rounds as the load needs. Here every stage is a program of its
own on what the stage before it left on each chip, and a slab is as large as the fullest one, so that one round holds
all rows. The times add up to more than the layer's: nothing overlaps, and each stage ends with a wait for all chips.

Times are wall times. On NVIDIA GPUs those of the routed experts and of the exchange are device times, the sum of a
stage's kernels, mean over this process's chips; and the two products are measured once more, whole, their arithmetic
alone and their copies alone.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from bench.expert_parallel.communication import link_us
from bench.expert_parallel.hopper_products import down_kernel, gate_up_kernel, lhs_of_kernel
from bench.measure.clock import CallTime, is_nvidia, kernel_times, wall_seconds
from bench.measure.every_chip import on_every_chip
from bench.measure.overlap import KERNEL_STAGES, OverlapTimes
from moejax import MoEConfig, MoEParams, param_specs
from moejax.axes import axes_on
from moejax.experts import math_of, shared_mlp
from moejax.stages import Stages, way_of
from pallas_kernels.backend import Unsupported
from sharding.mesh import EXPERT_AXIS
from sharding.tokens import Tokens

_REPEATS = 3
_EXCHANGE = ("dispatch", "combine")
_ON_DEVICE = (*_EXCHANGE, "routed_gate_up", "routed_down")


@dataclasses.dataclass
class StageTimes:
    """What the stages took.

    Attributes:
      seconds: of each stage, the median of a few runs.
      by_kernels: the stages whose time is device time; the others' is wall time.
      link_us: microseconds of the kernels between chips, of dispatch and of combine; empty without kernel times.
      overlaps: of the products alone, on operands that are ready; None for one that has no Hopper kernel, and empty
        where there is no NVIDIA GPU.
    """

    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    by_kernels: set[str] = dataclasses.field(default_factory=set)
    link_us: dict[str, float] = dataclasses.field(default_factory=dict)
    overlaps: dict[str, OverlapTimes | None] = dataclasses.field(default_factory=dict)


def time_stages(
    x: jax.Array, params: MoEParams, config: MoEConfig, mesh: Mesh, say: Callable[[str], None]
) -> StageTimes:
    """Times each stage for tokens x [T, H] on `mesh`; compilation left out.

    Returns:
      Times of "gate", "shared" (when there is a shared expert), "dispatch", "routed_gate_up", "routed_down", "combine".
    """
    axes = axes_on(mesh, None, config)
    way = way_of(config, axes)
    math = dataclasses.replace(math_of(config), stays_in_8_bits=config.precision == "w8a8")  # as in serving
    stages = Stages(config, way, math)
    clock = _Clock(mesh, params, param_specs(params, config, axes), say, is_nvidia(mesh.devices.flat[0]))

    def gate(x, p):
        routing = stages.route(x, p, Tokens.on_one_chip(x.shape[0])).routing
        return routing.topk_ids, routing.topk_weights

    x = x.reshape(mesh.shape[EXPERT_AXIS], -1, config.hidden_size)
    topk_ids, topk_weights = clock("gate", gate, x)
    if params.shared_gate_up is not None:
        clock("shared", lambda x, p: shared_mlp(x, p.shared_gate_up, p.shared_down, stages.math, config), x)
    fullest = jax.jit(lambda ids: jax.nn.one_hot(way.placement.rank(ids), way.axes.ep).sum((1, 2)).max())
    stages = dataclasses.replace(stages, way=dataclasses.replace(way, slab=max(1, int(fullest(topk_ids)))))

    def dispatch(x, topk_ids, topk_weights, _):
        plan = stages.plan(topk_ids)
        inputs, weights = stages.inputs(x, topk_weights)
        return plan, stages.send(inputs, plan), weights

    def back(rows, plan, weights, _):
        slots = stages.give_back(rows, plan)
        return stages.combine(slots, plan, weights, preferred_element_type=config.dtype)

    plan, rows, weights = clock("dispatch", dispatch, x, topk_ids, topk_weights)
    h = clock("routed_gate_up", stages.gate_up, rows, plan)
    clock.overlap("routed_gate_up", gate_up_kernel, config, rows, plan)
    rows = clock("routed_down", stages.down, h, plan)
    clock.overlap("routed_down", down_kernel, config, h, plan)
    clock("combine", back, rows, plan, weights)
    return clock.times


@dataclasses.dataclass
class _Clock:
    """Runs a stage on every chip and notes its time. Values between stages have a leading dimension for the chips."""

    mesh: Mesh
    params: MoEParams
    specs: MoEParams
    say: Callable[[str], None]
    has_kernel_times: bool
    times: StageTimes = dataclasses.field(default_factory=StageTimes)

    def __call__(self, name: str, stage: Callable[..., Any], *args: Any) -> Any:
        program = self._program(stage)
        run = functools.partial(program, self.params, *args)
        result = jax.block_until_ready(run())
        if self.has_kernel_times and name in _ON_DEVICE:
            try:
                time = self._kernel_time(program, args)
                self.times.seconds[name] = time.median_us * 1e-6
                self.times.by_kernels.add(name)
                if name in _EXCHANGE:
                    self.times.link_us[name] = link_us(time.kernels)
                return result
            except RuntimeError as error:  # the driver may forbid it
                self.has_kernel_times = False
                self.say(f"wall times in place of kernel times: {error}")
        self.times.seconds[name] = statistics.median(wall_seconds(run) for _ in range(_REPEATS))
        return result

    def overlap(self, name: str, kernel: Callable[..., Any], config: MoEConfig, rows: Any, plan: Any) -> None:
        """Measures one of `bench.expert_parallel.hopper_products` on NVIDIA GPUs: whole, its arithmetic, its copies."""
        if not self.has_kernel_times:
            return

        def ready(rows, _):
            return lhs_of_kernel(rows, config)

        def product(lhs, plan, params, stage):
            return kernel(lhs, plan.group_sizes, params, config, stage)

        args = self._program(ready)(self.params, rows), plan
        try:
            programs = [self._program(functools.partial(product, stage=stage)) for stage in KERNEL_STAGES]
            self.times.overlaps[name] = OverlapTimes(
                *(self._kernel_time(program, args).median_us for program in programs)
            )
        except Unsupported as reason:
            self.times.overlaps[name] = None
            self.say(f"{name}: arithmetic and copies are not measured apart: {reason}")

    def _kernel_time(self, program: Callable[..., Any], args: tuple[Any, ...]) -> CallTime:
        """Device time on a chip: the kernels of all chips of this process, divided by their number."""
        chips = len(self.mesh.local_devices)
        return kernel_times(program, self.params, *args, repeats=_REPEATS, calls=chips)

    def _program(self, stage: Callable[..., Any]) -> Callable[..., Any]:
        return on_every_chip(lambda params, *own: stage(*own, params), self.mesh, self.specs)
