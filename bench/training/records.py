"""The records of `bench.train`: one JSON object a line in train.jsonl, told apart by "kind".

    {"kind": "run", "run": "switch-seed0", "router": "switch", "seed": 0, "settings": {...}, "resumed_from": 0, ...}
    {"kind": "held_out", "run": "switch-seed0", "step": 0, "loss": 5.61, "load": [[...], ...], ...}
    {"kind": "step", "run": "switch-seed0", "step": 10, "loss": 4.2, "tokens_per_second": 30000.0, ...}
    {"kind": "end", "run": "switch-seed0", "step": 300, "held_out_loss": 2.3, "collapsed_layers": [], ...}

"step" counts the steps done. Losses are in nats a byte; a figure that is not finite is null. "run" comes first, with
the command, chip, versions, commit and date; a second one of the same name continues the run from "resumed_from", and
what the first wrote beyond that step is void.

Of a step record, each figure is the mean over the steps since the record before it: loss, aux_loss (the routers'
losses, weighted), gradient_norm, ms_per_step, tokens_per_second, drop_rate (of all assignments), and for each layer
load_cv and load_entropy (normalised to 1). A held_out record holds the loss over held-out sequences, the same every
time, and of all of them together the tokens, the drop_rate, the unrouted_rate (of a layer's tokens, those that no
expert took), and for each layer load (assignments of each expert), load_cv and load_entropy. An end record holds what
`bench.training.runs.summary` states.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from bench.record.json_files import append_records, read_records

FILE_NAME = "train.jsonl"


@dataclasses.dataclass
class Run:
    """The records of one router with one seed, in order.

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

    def resumed(self, head: dict[str, Any]) -> "Run":
        """The run as it stands when it goes on from `head`."""
        kept = head["resumed_from"]
        return Run(
            head,
            [step for step in self.steps if step["step"] <= kept],
            [look for look in self.held_out if look["step"] <= kept] if kept else [],
        )


def run_name(router: str, seed: int) -> str:
    """The name of a run in its records."""
    return f"{router}-seed{seed}"


def append(path: pathlib.Path, record: Mapping[str, Any]) -> None:
    """Adds a line to the file. Numbers are rounded to seven digits; what is not finite becomes null."""
    append_records(path, [_plain(record)])


def read_runs(path: pathlib.Path) -> dict[str, Run]:
    """The runs of a file by name, in the order in which they began; none if there is no file.

    Raises:
      ValueError: a line is no such record.
    """
    runs: dict[str, Run] = {}
    for number, record in enumerate(read_records(path), 1):
        name, kind = str(record.get("run")), record.get("kind")
        if kind == "run":
            runs[name] = runs[name].resumed(record) if name in runs else Run(record)
        elif name in runs and kind in ("step", "held_out"):
            (runs[name].steps if kind == "step" else runs[name].held_out).append(record)
        elif name in runs and kind == "end":
            runs[name].end = record
        else:
            raise ValueError(
                f"{path}, line {number}: expected a record of bench.train, of the kind run, or step, held_out or end "
                f"of a run that began before; got kind {kind!r} of run {name!r}"
            )
    return runs


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        # Seven digits are what float32 holds; more would double the size of the file.
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value
