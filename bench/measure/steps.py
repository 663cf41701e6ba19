"""Times the steps of a case side by side: compiled at once, run one after the other, measured in turn.

A step is a function of named values that makes one more value. All steps are compiled first, several at a time, as
compiling takes longer than measuring; then each runs once, and its result is what later steps work on. Measurements
go round: each round times every step once, in alternating order, so that any two of them are measured in pairs.

On an NVIDIA GPU the clock is device time, the sum of a step's kernels, on several copies of its inputs so that the
cache does not hold them (`bench.measure.clock`). Elsewhere, and where the driver forbids it, it is the wall clock.
"""

import concurrent.futures
import dataclasses
import os
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from bench.measure.clock import copies_of, is_nvidia, kernel_times, num_copies, rotated, wall_seconds
from bench.processes.turns import Turns

ClockName = Literal["kernels", "wall"]

_MOST_COPIES = 2  # of inputs, each with a call to compile: what the other call reads and writes clears the cache


@dataclasses.dataclass(frozen=True)
class Step:
    """One function of a case.

    Attributes:
      name: tells it from the other steps.
      function: what to compile.
      inputs: names of the values that it takes; the value that it makes has its own name.
      key: what tells the function apart from others of the same name on values of the same shapes.
      is_timed: whether it is measured, or only prepares what others need.
    """

    name: str
    function: Callable[..., Any]
    inputs: tuple[str, ...]
    key: Hashable = None
    is_timed: bool = True


@dataclasses.dataclass(frozen=True)
class Measured:
    """What came of the steps.

    Attributes:
      values: the given ones, and one for each step.
      samples_us: of each timed step, one for each round.
      program_bytes: of each step, arguments, results and temporaries of the compiled program.
    """

    values: dict[str, Any]
    samples_us: dict[str, list[float]]
    program_bytes: dict[str, int]


@dataclasses.dataclass(frozen=True)
class _Program:
    run: Callable[[Sequence[Any]], list[Any]]
    num_copies: int
    num_bytes: int
    result: Any
    """Shapes and dtypes of what a call gives."""


class StepTimer:
    """Measures, and keeps compiled programs as long as they are of use.

    Args:
      name: "kernels" or "wall"; None takes the first that works here.
      turns: with other processes on the same accelerator.
    """

    def __init__(self, name: ClockName | None = None, turns: Turns | None = None):
        self.name: ClockName = name or _best_clock()
        self.turns = turns or Turns()
        self._scope: Hashable = None
        self._programs: dict[Hashable, _Program] = {}

    def measure(self, steps: Sequence[Step], values: dict[str, Any], *, scope: Hashable, rounds: int) -> Measured:
        """Compiles, runs and times `steps`.

        Args:
          steps: in an order in which every input is there before it is needed.
          values: arrays (or trees of them) by name.
          scope: programs are kept, and used again for equal steps on values of equal shapes, until it changes.
          rounds: how often each step is timed.
        """
        if scope != self._scope:
            self.forget()
            self._scope = scope
        programs = self._compile(steps, values)
        values = dict(values)
        inputs = {}
        for step in steps:
            program, args = programs[step.name], tuple(values[name] for name in step.inputs)
            values[step.name] = jax.block_until_ready(program.run([args] * program.num_copies))[0]
            if step.is_timed:
                inputs[step.name] = copies_of(args, at_most=program.num_copies)
        samples: dict[str, list[float]] = {name: [] for name in inputs}
        with self.turns.alone():
            for number in range(rounds):
                for name in inputs if number % 2 == 0 else reversed(inputs):
                    samples[name].append(self._sample(programs[name], inputs[name]))
        return Measured(values, samples, {name: program.num_bytes for name, program in programs.items()})

    def forget(self) -> None:
        """Lets go of compiled programs."""
        self._scope, self._programs = None, {}

    def _compile(self, steps: Sequence[Step], values: dict[str, Any]) -> dict[str, _Program]:
        with self.turns.away():
            keys, lowered = self._lower(steps, values)
        # Programs that make what others take first: what the compiler finds out about their products holds for the
        # whole, which consists of the same, too.
        taken = {name for step in steps for name in step.inputs}
        first = {keys[step.name] for step in steps if step.name in taken}
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            for wave in (lowered.keys() & first, lowered.keys() - first):
                compiled = pool.map(lambda key: lowered[key][1].compile(), wave)
                for key, run in zip(wave, compiled, strict=True):
                    copies, program = lowered[key]
                    self._programs[key] = _Program(run, copies, _program_bytes(run, copies), program.out_info[0])
        return {name: self._programs[key] for name, key in keys.items()}

    def _lower(
        self, steps: Sequence[Step], values: dict[str, Any]
    ) -> tuple[dict[str, Hashable], dict[Hashable, tuple[int, Any]]]:
        """The key of each step's program, and those that are new: copies of the inputs, and what is to be compiled."""
        shapes = jax.eval_shape(lambda values: values, values)
        keys: dict[str, Hashable] = {}
        lowered: dict[Hashable, tuple[int, Any]] = {}
        for step in steps:
            args = tuple(shapes[name] for name in step.inputs)
            leaves, tree = jax.tree.flatten(args)
            key: Hashable = (step.name, step.key, tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
            keys[step.name] = key
            if key in self._programs:
                shapes[step.name] = self._programs[key].result
                continue
            copies = 1
            if self.name == "kernels" and step.is_timed:
                copies = min(_MOST_COPIES, num_copies(sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)))
            program = jax.jit(rotated(step.function)).lower([args] * copies)
            shapes[step.name] = program.out_info[0]
            lowered[key] = copies, program
        return keys, lowered

    def _sample(self, program: _Program, inputs: Sequence[Any]) -> float:
        if self.name == "kernels":
            return kernel_times(program.run, inputs, repeats=1, calls=program.num_copies, detach=False).median_us
        return wall_seconds(program.run, inputs) * 1e6


def device_peak_bytes() -> int | None:
    """The most memory that arrays of this process took on the first device, None where the platform does not say."""
    stats = jax.devices()[0].memory_stats()
    return None if stats is None else stats.get("peak_bytes_in_use")


def _best_clock() -> ClockName:
    if not is_nvidia(jax.devices()[0]):
        return "wall"
    try:
        kernel_times(jax.jit(jnp.cumsum), jnp.ones(1024), repeats=1)
    except RuntimeError:  # the driver may forbid it
        return "wall"
    return "kernels"


def _program_bytes(program: Any, copies: int) -> int:
    memory = program.memory_analysis()
    outer = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return outer // copies + memory.temp_size_in_bytes
