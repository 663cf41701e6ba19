"""What `bench.train` prints of its runs and writes as JSON: the table of the ends, and tables over time."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from bench.plot import say_report
from bench.record.json_files import write_json
from bench.record.tables import format_table
from bench.training.over_time import (
    balance_table,
    difference_table,
    loss_table,
    precision_differences,
    router_differences,
)
from bench.training.records import FILE_NAME, Run
from bench.training.settings import BASELINE_PRECISION, BASELINE_ROUTER
from bench.training.table import HEADERS, summaries, table_rows, warnings_of


def report(folder: pathlib.Path, runs: Sequence[Run], json_path: str | None) -> bool:
    """Prints and writes what came of the runs in a folder, and draws its page; returns whether one diverged.

    Raises:
      ValueError: there are no runs.
    """
    if not runs:
        raise ValueError(f"{folder / FILE_NAME} has no runs: python -m bench.train --out {folder} makes some")
    shown = summaries(runs)
    tables = {
        "held-out loss after so many steps, and its rank among causal routers in the same precision": loss_table(runs),
        f"held-out loss less that of {BASELINE_ROUTER} in the same precision with the same seed": difference_table(
            runs, router_differences(runs)
        ),
        f"held-out loss less that in {BASELINE_PRECISION} with the same seed": difference_table(
            runs, precision_differences(runs)
        ),
        "least entropy of a layer's load / load of its busiest expert over the mean": balance_table(runs),
    }
    head = runs[0].head
    if json_path != "-":
        print(_budget(head))
        print(format_table(HEADERS, table_rows(shown)))
        for line in warnings_of(shown):
            print(line)
        for title, (headers, rows) in tables.items():
            if rows:
                print(f"\n{title}\n{format_table(headers, rows)}")
    if json_path is not None:
        over_time = {
            title: [dict(zip(headers, row, strict=True)) for row in rows] for title, (headers, rows) in tables.items()
        }
        routers = [dataclasses.asdict(row) for row in shown]
        write_json({"settings": head["settings"], "routers": routers, "over_time": over_time}, json_path)
    say_report(folder)
    return any(row.diverged for row in shown)


def _budget(head: Mapping[str, Any]) -> str:
    sizes = head["settings"]
    model = f"{sizes['num_layers']} layers, hidden {sizes['hidden_size']}, {sizes['num_experts']} experts"
    tokens = sizes["steps"] * sizes["batch_size"] * sizes["length"]
    budget = f"{sizes['steps']:,} steps, {tokens:,} bytes a run of {head['text']['source']}"
    return f"{head['chip']}, commit {head['commit']}; {model}, {budget}"
