"""The records of `bench.train`: one JSON object a line in train.jsonl, told apart by "kind".

    {"kind": "run", "run": "switch-seed0", "router": "switch", "precision": "w16a16", "seed": 0, "settings": {...}, ...}
    {"kind": "held_out", "run": "switch-seed0", "step": 0, "loss": 5.61, "load": [[...], ...], ...}
    {"kind": "step", "run": "switch-seed0", "step": 10, "loss": 4.2, "tokens_per_second": 30000.0, ...}
    {"kind": "end", "run": "switch-seed0", "step": 300, "held_out_loss": 2.3, "collapsed_layers": [], ...}

"step" counts the steps done. Losses are in nats a byte; a figure that is not finite is null. "run" comes first, with
the command, chip, versions, commit and date; a second one of the same name continues the run from "resumed_from", and
what the first wrote beyond that step is void.

Of a step record, each figure is the mean over the steps since the record before it: loss, aux_loss (the routers'
losses, weighted), gradient_norm, ms_per_step, tokens_per_second, drop_rate (of all assignments), and for each layer
load_cv, load_entropy (normalised to 1) and load_max (of the busiest expert, over the mean). A held_out record holds the
loss over held-out sequences, the same every time, and of all of them together the tokens, the drop_rate, the
unrouted_rate (of a layer's tokens, those that no expert took), for each layer load (assignments of each expert),
load_cv, load_entropy and load_max, and what the model can do (`bench.training.skills`): words, word_accuracy, brackets
and bracket_accuracy. An end record holds what `bench.training.runs.summary` states. Records of before there were
precisions and skills lack them.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from bench.record.fields import Expected
from bench.record.json_files import append_records, read_records
from bench.training.settings import BASELINE_PRECISION, Variant

FILE_NAME = "train.jsonl"

_ENTROPIES = [(float, None)]
_EXPECTED: Mapping[str, Expected] = {
    "run": {
        **{"router": str, "seed": int, "causal": bool, "resumed_from": int, "parameters": int},
        **{"expert_parameters": int, "command": str, "chip": str, "commit": str, "date": str},
        "versions": {str: (str, None)},
        "text": {"sha256": str},
        "settings": {"batch_size": int, "length": int},
    },
    "step": {"step": int, "loss": (float, None), "ms_per_step": float, "drop_rate": float, "load_cv": [float]},
    "held_out": {
        **{"step": int, "loss": (float, None), "tokens": int, "load": [[float]], "load_entropy": _ENTROPIES},
        **{"drop_rate": float, "unrouted_rate": float},
    },
    "end": {
        **{"held_out_loss": (float, None), "ms_per_step": float, "tokens_per_second": float, "drop_rate": float},
        **{"load_cv": float, "unrouted_rate": float, "load_entropy": _ENTROPIES, "collapsed_layers": [int]},
        **{"collapsed": bool, "active_parameters": int, "diverged": bool},
    },
}
"""What those who read the records look at, by kind."""


@dataclasses.dataclass
class Run:
    """The records of one variant with one seed, in order.

    Attributes:
      head: the "run" record, of the last resumption if there was one.
      steps: "step" records.
      held_out: "held_out" records.
      end: the "end" record, or None while the run is unfinished.
    """

    head: dict[str, Any]
    steps: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    held_out: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    end: dict[str, Any] | None = None

    @property
    def variant(self) -> Variant:
        """Router and precision."""
        return Variant(self.head["router"], self.head.get("precision", BASELINE_PRECISION))

    @property
    def last_step(self) -> int:
        """The last step recorded; 0 if the first look at the held-out text is missing."""
        return max((record["step"] for record in self.steps), default=0) if self.held_out else 0

    def resumed(self, head: dict[str, Any]) -> "Run":
        """The run as it stands when it goes on from `head`."""
        kept = head["resumed_from"]
        return Run(
            head,
            [step for step in self.steps if step["step"] <= kept],
            [look for look in self.held_out if look["step"] <= kept] if kept else [],
        )


def run_name(variant: Variant, seed: int) -> str:
    """The name of a run in its records."""
    return f"{variant.name}-seed{seed}"


def append(path: pathlib.Path, record: Mapping[str, Any]) -> None:
    """Adds a line to the file. Numbers are rounded to seven digits; what is not finite becomes null."""
    # Seven digits are what float32 holds; more would double the size of the file.
    plain = json.loads(
        json.dumps(record), parse_float=lambda text: float(f"{float(text):.7g}"), parse_constant=lambda text: None
    )
    append_records(path, [plain])


def read_runs(path: pathlib.Path) -> dict[str, Run]:
    """The runs of a file by name, in the order in which they began; none if there is no file.

    Raises:
      ValueError: a line is no such record.
    """
    runs: dict[str, Run] = {}
    for place, record in read_records(path, _expected):
        name, kind = record["run"], record["kind"]
        if kind == "run":
            runs[name] = runs[name].resumed(record) if name in runs else Run(record)
        elif name not in runs:
            raise ValueError(f"{place}: a record of the kind {kind!r}, but the run {name!r} has not begun")
        elif kind == "end":
            runs[name].end = record
        else:
            (runs[name].steps if kind == "step" else runs[name].held_out).append(record)
    return runs


def _expected(record: Mapping[str, Any]) -> Expected:
    return {"run": str, "kind": set(_EXPECTED), **_EXPECTED.get(str(record.get("kind")), {})}
