"""Top-k alone, ours against that of XLA.

`bench.one_chip.records` lists the fields of what it writes.
"""

import functools
import sys
from collections.abc import Sequence

from bench.command.parser import run
from bench.measure.steps import Step, StepTimer
from bench.one_chip.cases import Case
from bench.one_chip.layouts import Variant
from bench.one_chip.loads import logits_of, make_load
from bench.one_chip.options import main_of
from bench.one_chip.records import Record
from bench.one_chip.variants import measure, records_of, variants
from pallas_kernels.top_k import top_k

_EXAMPLES = (
    "",
    "--tokens 8192,16384,32768 --experts 32,64,128 --k 1,2,4 --out results",
    "--load zipf --zipf 1.2 --json -",
)


def run_case(case: Case, clock: StepTimer, rounds: int) -> list[Record]:
    """Times the choice of `case.k` among logits of a load."""
    measured = measure(case, clock, rounds, _steps, {"logits": logits_of(make_load(case))})
    ids = measured.values[variants(case)[0].name("top_k")].ids
    return records_of(case, clock, measured, ["top_k"], ids)


def _steps(case: Case, variant: Variant) -> list[Step]:
    choose = functools.partial(top_k, k=case.k, backend=variant.backend)
    return [Step(variant.name("top_k"), choose, ("logits",))]


def main(argv: Sequence[str]) -> int:
    """Measures, writes and prints."""
    return main_of(
        "topk",
        "Times top-k alone, ours and XLA's, in pairs.",
        _EXAMPLES,
        run_case,
        argv,
        {"tokens": "8192", "hidden": "1024", "dtype": "fp16", "with_xla": True},
    )


if __name__ == "__main__":
    sys.exit(run(main))
