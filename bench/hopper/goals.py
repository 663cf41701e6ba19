"""A case of `bench.gpu`: a grouped product of a Mixture-of-Experts layer with a time or a rate to reach."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from bench.hopper.peers import Implementation
from bench.model.workloads import OPERAND_DTYPES, GemmShape
from pallas_kernels.chips import Chip
from pallas_kernels.cost import Cost


@dataclasses.dataclass(frozen=True)
class Goal:
    """What is to be reached on an H200: at most `bar` µs, or at least `bar` TFLOP/s; `aim` is what we are after."""

    unit: Literal["µs", "TFLOP/s"]
    bar: float
    aim: float | None = None

    def is_met(self, microseconds: float, flops: int) -> bool:
        """Whether an operator of `flops` that takes `microseconds` reaches the bar."""
        if self.unit == "µs":
            return microseconds <= self.bar
        return flops / microseconds / 1e6 >= self.bar


@dataclasses.dataclass(frozen=True)
class Problem:
    """A case with its data.

    Attributes:
      inputs: what each implementation's `prepare` takes.
      ours: our implementation.
      peers: the others', whether installed or not.
      reference: the right answer in float32, from the inputs; a tree like each implementation's result.
      checked: the inputs to check results with where those that are timed would not do.
    """

    inputs: tuple[Any, ...]
    ours: Implementation
    peers: tuple[Implementation, ...]
    reference: Callable[..., Any]
    checked: tuple[Any, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
      name: what --cases takes.
      shape: G groups of M rows, K -> N; of a layer K is the hidden and N the expert width.
      dtype: of the operands, "fp8" or "bf16".
      goal: what is to be reached.
      costs: the least work of each of its kernels, which run one after the other.
      build: makes the problem.
      note: what the name does not say, for people.
      clock: "kernels" sums up the kernels on the device, "wall" also counts what lies between them.
      calls: how often what is measured is done in one run; the time is of one.
      tolerance: the largest relative error of a result that counts as right.
    """

    name: str
    shape: GemmShape
    dtype: Literal["fp8", "bf16"]
    goal: Goal
    costs: Callable[["Case"], tuple[Cost, ...]]
    build: Callable[["Case"], Problem]
    note: str = ""
    clock: Literal["kernels", "wall"] = "kernels"
    calls: int = 1
    tolerance: float = 2e-2

    @property
    def flops(self) -> int:
        """FLOPs of all its kernels."""
        return sum(cost.flops for cost in self.costs(self))

    @property
    def hbm_bytes(self) -> int:
        """Bytes of main memory that all its kernels move at the least."""
        return sum(cost.hbm_bytes for cost in self.costs(self))

    def floor_us(self, chip: Chip) -> float:
        """µs that no implementation beats on `chip`."""
        dtype = OPERAND_DTYPES[self.dtype]
        return sum(cost.floor_seconds(chip, dtype) for cost in self.costs(self)) * 1e6
