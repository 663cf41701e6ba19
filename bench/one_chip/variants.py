"""The operators of a case as steps to time, and their measurements as records.

A case has variants: its layouts on our operators, and the first of them in plain XLA too. A step is called after its
operator and its variant, "pack/compact/auto"; what comes before the layout is shared by all layouts of a backend.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from bench.inputs.loads import Load, LoadFigures, load_figures, make_load
from bench.inputs.quick_jit import prepared
from bench.measure.samples import paired, summarise
from bench.measure.steps import Clock, Measured, Step, device_peak_bytes
from bench.one_chip.cases import Case
from bench.one_chip.layouts import Layout, Sizes, get_layout
from bench.one_chip.records import Paired, Record
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
    """What the router says of a load: [T, E] in float32."""
    return jax.block_until_ready(_router_logits(load.x, load.router))


_router_logits = prepared(router_logits)


def distinct(steps: Iterable[Step]) -> list[Step]:
    """The first of each name: what comes before the layout is the same for all layouts."""
    by_name: dict[str, Step] = {}
    for step in steps:
        by_name.setdefault(step.name, step)
    return list(by_name.values())


def measure(case: Case, clock: Clock, steps: Sequence[Step], values: dict[str, Any], rounds: int) -> Measured:
    """Times the steps; programs are kept for the next case, if it differs by load and capacity only."""
    return clock.measure(steps, values, scope=case.programs_key, rounds=rounds)


def figures_of(ids: jax.Array, case: Case) -> LoadFigures:
    """How the choice topk_ids [T, K] falls on the experts."""
    counts = np.bincount(np.asarray(ids).ravel(), minlength=case.experts)
    return load_figures(counts, case.sizes.capacity)


def records_of(
    case: Case,
    clock: Clock,
    measured: Measured,
    operators: Sequence[str],
    *,
    ids: jax.Array,
    whole: str,
    identity_error: Callable[[Variant], float] | None = None,
    agreement_error: Callable[[Variant], float] | None = None,
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
      identity_error: of a variant, for the record of the whole.
      agreement_error: likewise.
    """
    load, peak = figures_of(ids, case), device_peak_bytes()
    touched = int(np.unique(np.asarray(ids)).size)
    assignments = case.tokens * case.k
    samples = measured.samples_us
    seen: set[str] = set()
    first = variants(case)[0]
    for variant in variants(case):
        lost = 0 if whole in OUTSIDE_LAYOUTS else num_dropped(measured.values[variant.name(whole)][1])
        work = works(case, assignments - lost, touched)
        for operator in operators:
            name = variant.name(operator)
            if name in seen or name not in samples:
                continue
            seen.add(name)
            has_layout = operator not in OUTSIDE_LAYOUTS
            against = None
            if operator == whole and name != first.name(operator):
                difference = paired(samples[name], samples[first.name(operator)])
                against = Paired(first.layout.name if has_layout else None, first.backend, difference)
            is_whole = operator == whole
            yield Record(
                case,
                operator,
                variant.layout.name if has_layout else None,
                variant.backend,
                clock.name,
                summarise(samples[name]),
                work[operator],
                load,
                measured.program_bytes[name],
                peak,
                drop_rate=lost / assignments if has_layout else None,
                paired=against,
                identity_error=identity_error(variant) if is_whole and identity_error else None,
                agreement_error=agreement_error(variant) if is_whole and agreement_error else None,
                stages_us=_stages(samples, variant, operators, whole) if is_whole and variant.is_split else None,
            )


def _stages(
    samples: dict[str, list[float]], variant: Variant, operators: Sequence[str], whole: str
) -> dict[str, float]:
    return {o: summarise(samples[variant.name(o)]).mean for o in operators if o != whole}


def num_dropped(inverse: jax.Array) -> int:
    """Assignments that a plan with this inverse [T, K] gives no row."""
    return int((inverse < 0).sum())
