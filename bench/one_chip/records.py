"""Records of the benches of one chip: one JSON object a line, a line for each operator of each case.

`bench.sweep`, `bench.layer`, `bench.permute` and `bench.topk` write `sweep.jsonl`, `layer.jsonl`, `permute.jsonl` and
`topk.jsonl` below `--out DIR`. All lines have the same fields; what does not apply is null.

What was measured
    bench            "topk", "permute" or "layer"
    operator         topk: "top_k". permute: "top_k", "plan", "pack", "combine", and "permute", which is all of them.
                     layer: "router", "plan", "dispatch", "gate_up", "down", "combine", and "layer", which is all.
    layout           "compact", "padded" or "block_sparse"; null for operators before the layout ("top_k", "router")
    backend          of our operators, "auto" if they chose; "xla" for the plain XLA variant of the same operator
    tokens, hidden, experts, k, intermediate, capacity_factor, dtype, load, zipf_exponent, text, block, batch, length,
    seed             see `bench.one_chip.cases.Case`
    case             the case as one line; all lines of a case share it
    records_of_case  how many lines it has; a case with fewer was interrupted, and is measured again when the file is
                     resumed. Of two lines on the same operator, layout and backend of a case the later one counts
Where and when
    time             UTC, ISO 8601
    commit, versions, chip, driver, command
Times, µs
    clock            "kernels": device time, the sum of the kernels, inputs out of cache (`bench.measure.clock`);
                     "wall": from the call to the result, launch included
    repeats, mean_us, std_us, p50_us, p95_us
    ci95_us          [low, high], 95 % confidence interval of the mean
    paired           null, or this variant against another one, both measured in each round:
                     {"layout", "backend": of the other one, "pairs", "difference_us": this less the other,
                     "ci95_us": [low, high] of the difference, "ratio": this over the other}
Rates, by the mean time
    tokens_per_s
    tflops           TFLOP/s of the arithmetic that the kept assignments need, padding not counted; null without any
    bw_32k           GB/s if a token moves 2·K·H elements: K·H for pack and K·H for combine
    bw_strict        GB/s if a token moves 2·(K+1)·H elements: (K+1)·H for pack (read once, written K times), the same
                     for combine. Both count elements of `dtype` (2 bytes in 16 bits), and are null for what is
                     neither pack/dispatch, combine, nor both ("permute")
    hbm_gb_per_s     GB/s of the least traffic that `bench.one_chip.work` counts for the operator
Load
    load_cv          coefficient of variation of the experts' assignments; 0 when balanced
    load_kl          Kullback–Leibler divergence from the uniform distribution, in nats; 0 when balanced, ln E at most
    load_entropy     entropy over its maximum ln E; 1 when balanced, 0 when one expert takes all
    overflow_rate    share of the assignments that lie beyond their expert's capacity by the capacity_factor
    drop_rate        share of the assignments that this layout really dropped; null before the layout
    identity_error   "permute" only: largest |y − x| / max(|x|, 1) over the tokens of which nothing was dropped
    agreement_error  "layer" only: ‖y − y₀‖ / ‖y₀‖ over the tokens of which nothing was dropped, y₀ the result of the
                     variant that the others are compared with
Whole ("layer" and "permute" only, for layouts whose stages were timed; null otherwise)
    stages_us        {"router", "plan", "dispatch", "gate_up", "down", "combine"}: mean of each, timed alone; of
                     "permute": {"top_k", "plan", "pack", "combine"}
    routing_share    "layer" only: of their sum, what is not gate_up or down
Memory
    program_memory_bytes  what the compiled operator needs by itself: arguments, results, temporaries
    peak_memory_bytes     the high-water mark of the device so far, in this process; where the platform has none,
                          program_memory_bytes
    peak_memory_source    "device" or "compiled"

A case that failed leaves one line with the fields of "What was measured" (operator null), "Where and when", and
`error`, its reason; it is tried again, after all others, when the file is resumed. `error` is null otherwise.
"""

import collections
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from bench.measure.samples import Difference, Summary
from bench.one_chip.cases import LOADS, Case
from bench.one_chip.work import Work
from bench.record.fields import Expected
from bench.record.json_files import read_records
from bench.record.provenance import chip_name, now, provenance

Record = dict[str, Any]
"""A line of a file, or what there is of it before `lines_of`."""

_PACKAGES = ("jax", "jaxlib", "flax", "numpy")
_OF_CASE = (
    *("tokens", "hidden", "experts", "k", "intermediate", "capacity_factor", "dtype", "load"),
    *("zipf_exponent", "text", "block", "batch", "length", "seed"),
)

_OF_EVERY_LINE: Mapping[str, Expected] = {
    **{"case": str, "error": (str, None), "chip": str, "commit": str, "command": str, "time": str},
    "versions": {str: (str, None)},
}
_OF_A_MEASURED_LINE: Mapping[str, Expected] = {
    **_OF_EVERY_LINE,
    **{"records_of_case": int, "operator": str, "layout": (str, None), "backend": str, "tokens": int, "hidden": int},
    **{"experts": int, "k": int, "intermediate": int, "capacity_factor": float, "dtype": str, "load": set(LOADS)},
    **{"batch": (int, None), "length": (int, None), "seed": int, "clock": str, "mean_us": float, "p95_us": float},
    **{"ci95_us": [float], "tflops": (float, None), "bw_32k": (float, None), "bw_strict": (float, None)},
    **{"drop_rate": (float, None), "routing_share": (float, None), "stages_us": ({str: float}, None)},
    "paired": (
        {"layout": (str, None), "backend": str, "ratio": float, "difference_us": float, "ci95_us": [float]},
        None,
    ),
}
"""What those who read the records look at."""


def read_lines(path: pathlib.Path) -> list[Record]:
    """The records of a file; none if there is no file.

    Raises:
      ValueError: a line is no such record.
    """

    def expected(record: Record) -> Expected:
        return _OF_EVERY_LINE if record.get("error") is not None else _OF_A_MEASURED_LINE

    return [record for _, record in read_records(path, expected)]


def origin_of(module: str, argv: Sequence[str], commit: str | None) -> Record:
    """Where the figures of a run of `module` come from: command, chip, driver, versions and commit."""
    head = provenance(module, argv, chip_name(), _PACKAGES, commit)
    del head["date"]  # each line has its own time
    return head if jax.default_backend() == "gpu" else {**head, "driver": None}


def comparison(layout: str | None, backend: str, difference: Difference) -> Record:
    """A variant less the one with another layout and backend, in µs."""
    return {
        "layout": layout,
        "backend": backend,
        "pairs": difference.pairs,
        "difference_us": difference.mean,
        "ci95_us": list(difference.ci95),
        "ratio": difference.ratio,
    }


def measured_record(
    case: Case,
    operator: str,
    layout: str | None,
    backend: str,
    *,
    clock: str,
    time_us: Summary,
    work: Work,
    load: Mapping[str, float],
    program_bytes: int,
    peak_bytes: int | None = None,
    drop_rate: float | None = None,
    paired: Record | None = None,
    identity_error: float | None = None,
    agreement_error: float | None = None,
    stages_us: dict[str, float] | None = None,
) -> Record:
    """What was measured of one operator; the module's page tells the fields.

    Raises:
      ValueError: the operator's result is not finite.
    """
    for error in (identity_error, agreement_error):
        if error is not None and not math.isfinite(error):
            raise ValueError(f"{operator}, layout {layout}, backend {backend}: result is not finite")

    def rate(amount: float, unit: float) -> float | None:
        return amount / (time_us.mean * 1e-6) / unit if amount else None

    return {
        **_what(case, operator, layout, backend),
        "clock": clock,
        "repeats": time_us.repeats,
        "mean_us": time_us.mean,
        "std_us": time_us.std,
        "p50_us": time_us.p50,
        "p95_us": time_us.p95,
        "ci95_us": list(time_us.ci95),
        "paired": paired,
        "tokens_per_s": rate(case.tokens, 1),
        "tflops": rate(work.flops, 1e12),
        "bw_32k": rate(work.bytes_32k, 1e9),
        "bw_strict": rate(work.bytes_strict, 1e9),
        "hbm_gb_per_s": rate(work.hbm_bytes, 1e9),
        **load,
        "drop_rate": drop_rate,
        "identity_error": identity_error,
        "agreement_error": agreement_error,
        "stages_us": stages_us,
        "routing_share": _routing_share(stages_us),
        "program_memory_bytes": program_bytes,
        "peak_memory_bytes": program_bytes if peak_bytes is None else peak_bytes,
        "peak_memory_source": "compiled" if peak_bytes is None else "device",
        "error": None,
    }


def lines_of(records: Sequence[Record], origin: Record) -> list[Record]:
    """The lines of all records of one case."""
    return [{**record, "time": now(), **origin, "records_of_case": len(records)} for record in records]


def failure(case: Case, origin: Record, reason: str) -> Record:
    """The line of a case that failed."""
    return lines_of([{**_what(case, None, None, case.backend), "error": reason}], origin)[0]


def _what(case: Case, operator: str | None, layout: str | None, backend: str) -> Record:
    fields = {"bench": case.bench, "operator": operator, "layout": layout, "backend": backend}
    return {**fields, **{name: getattr(case, name) for name in _OF_CASE}, "case": case.key}


def _routing_share(stages_us: dict[str, float] | None) -> float | None:
    """What of the stages' time is not the experts'."""
    if stages_us is None or "gate_up" not in stages_us:
        return None
    return 1 - (stages_us["gate_up"] + stages_us["down"]) / sum(stages_us.values())


def measured_cases(records: Sequence[Record], chip: str) -> set[str]:
    """The keys of the cases of which all records are there, made on `chip`."""
    records = [r for r in records if r["error"] is None and r["chip"] == chip]
    count = collections.Counter(r["case"] for r in records)
    return {r["case"] for r in records if count[r["case"]] >= r["records_of_case"]}
