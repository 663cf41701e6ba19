"""The operators of a case as steps to time, and their measurements as records.

A case has variants: its layouts on our operators, and the first of them in plain XLA too. A step is called after its
operator and its variant, "pack/compact/auto"; what comes before the layout is shared by all layouts of a backend.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from bench.inputs.loads import Load, load_figures, make_load
from bench.inputs.quick_jit import quick_jit
from bench.measure.samples import paired, summarise
from bench.measure.steps import Measured, Step, StepTimer, device_peak_bytes
from bench.one_chip.cases import Case
from bench.one_chip.layouts import Layout, Sizes, get_layout
from bench.one_chip.records import Record, comparison, measured_record
from bench.one_chip.work import works
from moejax.router_logits import router_logits

OUTSIDE_LAYOUTS = ("top_k", "router")
"""Operators that do not know of layouts."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to run a case.

    Attributes:
      layout: of the rows.
      backend: of the operators.
      is_split: whether its stages are timed one by one.
    """

    layout: Layout
    backend: str
    is_split: bool

    def name(self, operator: str) -> str:
        """What the step of an operator is called."""
        return f"{operator}/{'-' if operator in OUTSIDE_LAYOUTS else self.layout.name}/{self.backend}"

    def sizes(self, case: Case) -> Sizes:
        """What the layout needs to know."""
        sizes = dataclasses.replace(case.sizes, backend=self.backend)
        return sizes if self.layout.drops else dataclasses.replace(sizes, capacity=1)


def variants(case: Case) -> list[Variant]:
    """All variants of a case, the one that the others are compared with first."""
    ours = [Variant(get_layout(name), case.backend, name in case.split) for name in case.layouts]
    return [*ours, Variant(ours[0].layout, "xla", False)] if case.with_xla else ours


def load_of(case: Case) -> Load:
    """Tokens and router of a case."""
    return make_load(
        case.load,
        num_tokens=case.tokens,
        hidden=case.hidden,
        num_experts=case.experts,
        top_k=case.k,
        seed=case.seed,
        dtype=case.jax_dtype,
        zipf_exponent=case.zipf_exponent,
        text=case.text_path,
    )


def logits_of(load: Load) -> jax.Array:
    """The router's logits for a load, float32 [T, E]."""
    return jax.block_until_ready(_router_logits(load.x, load.router))


_router_logits = quick_jit(router_logits)


def distinct(steps: Iterable[Step]) -> list[Step]:
    """The first of each name: what comes before the layout is the same for all layouts."""
    by_name: dict[str, Step] = {}
    for step in steps:
        by_name.setdefault(step.name, step)
    return list(by_name.values())


def measure(case: Case, clock: StepTimer, steps: Sequence[Step], values: dict[str, Any], rounds: int) -> Measured:
    """Times the steps; programs are kept for the next case, if it differs by load and capacity only."""
    return clock.measure(steps, values, scope=case.programs_key, rounds=rounds)


def records_of(
    case: Case,
    clock: StepTimer,
    measured: Measured,
    operators: Sequence[str],
    *,
    ids: jax.Array,
    whole: str,
    errors: Mapping[str, Callable[[Variant], float]] | None = None,
) -> Iterator[Record]:
    """A record for each operator of each variant that was timed.

    Args:
      case: what was measured.
      clock: that measured it.
      measured: what came of it.
      operators: in order.
      ids: topk_ids [T, K].
      whole: the operator that is all of the others, by which variants are compared. Where rows are laid out, its
        value begins with the result and the plan's inverse [T, K].
      errors: of a variant, by their names in the record of the whole.
    """
    tokens_per_expert = np.bincount(np.asarray(ids).ravel(), minlength=case.experts)
    load, peak = load_figures(tokens_per_expert, case.sizes.capacity), device_peak_bytes()
    assignments = case.tokens * case.k
    samples = measured.samples_us
    seen: set[str] = set()
    first = variants(case)[0]
    for variant in variants(case):
        lost = 0 if whole in OUTSIDE_LAYOUTS else int((measured.values[variant.name(whole)][1] < 0).sum())
        work = works(case, assignments - lost, int(np.count_nonzero(tokens_per_expert)))
        for operator in operators:
            name, first_name = variant.name(operator), first.name(operator)
            if name in seen or name not in samples:
                continue
            seen.add(name)
            has_layout = operator not in OUTSIDE_LAYOUTS
            of_the_whole: Record = {}
            if operator == whole:
                if name != first_name:
                    difference = paired(samples[name], samples[first_name])
                    layout = first.layout.name if has_layout else None
                    of_the_whole["paired"] = comparison(layout, first.backend, difference)
                if variant.is_split:
                    parts = [part for part in operators if part != whole]
                    of_the_whole["stages_us"] = {p: summarise(samples[variant.name(p)]).mean for p in parts}
                of_the_whole |= {field: error(variant) for field, error in (errors or {}).items()}
            yield measured_record(
                case,
                operator,
                variant.layout.name if has_layout else None,
                variant.backend,
                clock=clock.name,
                time_us=summarise(samples[name]),
                work=work[operator],
                load=load,
                program_bytes=measured.program_bytes[name],
                peak_bytes=peak,
                drop_rate=lost / assignments if has_layout else None,
                **of_the_whole,
            )
