"""The variants of a case, and the measurements of their steps as records.

A case has variants: its layouts on our operators, and the first of them in plain XLA too. A step is called after its
operator and its variant, "pack/compact/auto"; what comes before the layout is shared by all layouts of a backend.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from bench.measure.samples import paired, summarise
from bench.measure.steps import Measured, Step, StepTimer, device_peak_bytes
from bench.one_chip.cases import Case
from bench.one_chip.layouts import OUTSIDE_LAYOUTS, Variant
from bench.one_chip.loads import load_figures
from bench.one_chip.records import Record, comparison, measured_record
from bench.one_chip.work import works


def variants(case: Case) -> list[Variant]:
    """All variants of a case, the one that the others are compared with first."""

    def variant(layout: str, backend: str, is_split: bool) -> Variant:
        capacity = case.capacity if layout == "padded" else None
        return Variant(layout, backend, is_split, case.experts, capacity, case.block)

    ours = [variant(layout, case.backend, layout in case.split) for layout in case.layouts]
    return [*ours, variant(case.layouts[0], "xla", False)] if case.with_xla else ours


def measure(
    case: Case,
    clock: StepTimer,
    rounds: int,
    steps_of: Callable[[Case, Variant], Sequence[Step]],
    values: dict[str, Any],
) -> Measured:
    """Times the steps of all variants; what comes before the layout is the same for all layouts, and timed once."""
    steps = {step.name: step for variant in variants(case) for step in steps_of(case, variant)}
    # Programs are kept for the next case, if it differs by load and capacity only.
    return clock.measure(list(steps.values()), values, scope=case.programs_key, rounds=rounds)


def records_of(
    case: Case,
    clock: StepTimer,
    measured: Measured,
    operators: Sequence[str],
    ids: jax.Array,
    **errors: Callable[[Variant], float],
) -> list[Record]:
    """A record for each operator of each variant that was timed, for topk_ids `ids` [T, K].

    The last of the operators is all of the others together. By it variants are compared, and its record has the
    `errors` of a variant; where rows are laid out, its value begins with the result and the plan's inverse [T, K].
    """
    *stages, whole = operators
    tokens_per_expert = np.bincount(np.asarray(ids).ravel(), minlength=case.experts)
    load, peak = load_figures(tokens_per_expert, case.capacity), device_peak_bytes()
    samples = measured.samples_us
    first, *_ = every = variants(case)
    records: dict[str, Record] = {}
    for variant in every:
        lost = 0 if whole in OUTSIDE_LAYOUTS else int((measured.values[variant.name(whole)][1] < 0).sum())
        work = works(case, ids.size - lost, int(np.count_nonzero(tokens_per_expert)))
        for operator in operators:
            name = variant.name(operator)
            if name in records or name not in samples:
                continue
            of_the_whole: Record = {}
            if operator == whole:
                if name != first.name(whole):
                    difference = paired(samples[name], samples[first.name(whole)])
                    of_the_whole["paired"] = comparison(first.layout_of(whole), first.backend, difference)
                if variant.is_split:
                    of_the_whole["stages_us"] = {each: summarise(samples[variant.name(each)]).mean for each in stages}
                of_the_whole |= {field: error(variant) for field, error in errors.items()}
            records[name] = measured_record(
                case,
                operator,
                variant.layout_of(operator),
                variant.backend,
                clock=clock.name,
                time_us=summarise(samples[name]),
                work=work[operator],
                load=load,
                program_bytes=measured.program_bytes[name],
                peak_bytes=peak,
                drop_rate=None if operator in OUTSIDE_LAYOUTS else lost / ids.size,
                **of_the_whole,
            )
    return list(records.values())
