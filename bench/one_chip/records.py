"""Records of the system benches: one JSON object a line, a line for each operator of each case.

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
    hbm_gb_per_s     GB/s of the least traffic that `pallas_kernels.cost` and `work` count for the operator
Load
    load_cv, load_kl, load_entropy, overflow_rate    see `loads.LoadFigures`; overflow against capacity_factor
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
import dataclasses
import datetime
import math
from collections.abc import Sequence
from typing import Any

import jax

from bench.inputs.loads import LoadFigures
from bench.measure.samples import Difference, Summary
from bench.one_chip.cases import Case
from bench.one_chip.work import Work
from bench.record.provenance import chip_name, provenance

_PACKAGES = ("jax", "jaxlib", "flax", "numpy")


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where figures come from, equal for all records of a run.

    Attributes:
      command: what was run.
      chip: as the device calls itself; a CPU's architecture and cores.
      driver: of an NVIDIA GPU, else None.
      versions: of the packages that matter.
      commit: of this repository.
    """

    command: str
    chip: str
    driver: str | None
    versions: dict[str, str | None]
    commit: str

    @classmethod
    def of(cls, module: str, argv: Sequence[str], commit: str | None) -> "Origin":
        """Of the process that runs `module` on the first device."""
        head = provenance(module, argv, chip_name(), _PACKAGES, commit)
        driver = head["driver"] if jax.default_backend() == "gpu" else None
        return cls(head["command"], head["chip"], driver, head["versions"], head["commit"])


@dataclasses.dataclass(frozen=True)
class Paired:
    """A comparison with another variant of the same operator.

    Attributes:
      layout: of the other one.
      backend: of the other one.
      difference: this variant less the other, in µs.
    """

    layout: str | None
    backend: str
    difference: Difference

    def as_dict(self) -> dict[str, Any]:
        """Its JSON object."""
        d = self.difference
        return {
            "layout": self.layout,
            "backend": self.backend,
            "pairs": d.pairs,
            "difference_us": d.mean,
            "ci95_us": list(d.ci95),
            "ratio": d.ratio,
        }


@dataclasses.dataclass(frozen=True)
class Record:
    """One line of a file; the module's page lists its fields.

    Attributes:
      case: what was run.
      operator: of the case.
      layout: of the operator, None before the layout.
      backend: of the operator.
      clock: "kernels" or "wall".
      time_us: its repeats.
      work: what they had to do.
      load: how the assignments fell.
      program_memory_bytes: of the compiled operator.
      device_peak_bytes: of the device, None where the platform does not say.
      drop_rate: share of the assignments dropped.
      paired: against another variant.
      identity_error: of pack and combine.
      agreement_error: of a layer's result with that of the first variant.
      stages_us: means of the stages that the operator is made of.
    """

    case: Case
    operator: str
    layout: str | None
    backend: str
    clock: str
    time_us: Summary
    work: Work
    load: LoadFigures
    program_memory_bytes: int
    device_peak_bytes: int | None = None
    drop_rate: float | None = None
    paired: Paired | None = None
    identity_error: float | None = None
    agreement_error: float | None = None
    stages_us: dict[str, float] | None = None

    @property
    def routing_share(self) -> float | None:
        """What of the stages' time is not the experts'."""
        if self.stages_us is None or "gate_up" not in self.stages_us:
            return None
        experts = self.stages_us["gate_up"] + self.stages_us["down"]
        return 1 - experts / sum(self.stages_us.values())

    def as_dict(self, origin: Origin) -> dict[str, Any]:
        """Its JSON object.

        Raises:
          ValueError: the operator's result is not finite.
        """
        for error in (self.identity_error, self.agreement_error):
            if error is not None and not math.isfinite(error):
                raise ValueError(f"{self.operator}, layout {self.layout}, backend {self.backend}: result is not finite")
        t = self.time_us
        on_device = self.device_peak_bytes is not None

        def rate(amount: float, unit: float) -> float | None:
            return amount / (t.mean * 1e-6) / unit if amount else None

        return {
            **_what(self.case, self.operator, self.layout, self.backend),
            **_where(origin),
            "clock": self.clock,
            "repeats": t.repeats,
            "mean_us": t.mean,
            "std_us": t.std,
            "p50_us": t.p50,
            "p95_us": t.p95,
            "ci95_us": list(t.ci95),
            "paired": None if self.paired is None else self.paired.as_dict(),
            "tokens_per_s": rate(self.case.tokens, 1),
            "tflops": rate(self.work.flops, 1e12),
            "bw_32k": rate(self.work.bytes_32k, 1e9),
            "bw_strict": rate(self.work.bytes_strict, 1e9),
            "hbm_gb_per_s": rate(self.work.hbm_bytes, 1e9),
            "load_cv": self.load.cv,
            "load_kl": self.load.kl,
            "load_entropy": self.load.entropy,
            "overflow_rate": self.load.overflow_rate,
            "drop_rate": self.drop_rate,
            "identity_error": self.identity_error,
            "agreement_error": self.agreement_error,
            "stages_us": self.stages_us,
            "routing_share": self.routing_share,
            "program_memory_bytes": self.program_memory_bytes,
            "peak_memory_bytes": self.device_peak_bytes if on_device else self.program_memory_bytes,
            "peak_memory_source": "device" if on_device else "compiled",
            "error": None,
        }


def lines_of(records: Sequence[Record], origin: Origin) -> list[dict[str, Any]]:
    """The JSON objects of all records of one case."""
    return [{**record.as_dict(origin), "records_of_case": len(records)} for record in records]


def failure(case: Case, origin: Origin, reason: str) -> dict[str, Any]:
    """The line of a case that failed."""
    return {**_what(case, None, None, case.backend), **_where(origin), "records_of_case": 1, "error": reason}


def _what(case: Case, operator: str | None, layout: str | None, backend: str) -> dict[str, Any]:
    fields = {"bench": case.bench, "operator": operator, "layout": layout, "backend": backend}
    names = ("tokens", "hidden", "experts", "k", "intermediate", "capacity_factor", "dtype", "load")
    rest = ("zipf_exponent", "text", "block", "batch", "length", "seed")
    return {**fields, **{name: getattr(case, name) for name in (*names, *rest)}, "case": case.key}


def _where(origin: Origin) -> dict[str, Any]:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"time": now, **dataclasses.asdict(origin)}


def measured_cases(records: Sequence[dict[str, Any]], chip: str) -> set[str]:
    """The keys of the cases of which all records are there, made on `chip`."""
    records = [r for r in records if r["error"] is None and r["chip"] == chip]
    count = collections.Counter(r["case"] for r in records)
    return {r["case"] for r in records if count[r["case"]] >= r["records_of_case"]}
