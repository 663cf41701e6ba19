"""Top-k alone, ours against that of XLA.

`bench.one_chip.records` lists the fields of what it writes.
"""

import functools
import sys
from collections.abc import Sequence

from bench.command.parser import run
from bench.measure.steps import Step, StepTimer
from bench.one_chip.cases import Case
from bench.one_chip.loads import logits_of, make_load
from bench.one_chip.options import main_of
from bench.one_chip.records import Record
from bench.one_chip.variants import records_of, variants
from pallas_kernels.top_k import top_k

_EXAMPLES = (
    "",
    "--tokens 8192,16384,32768 --experts 32,64,128 --k 1,2,4 --out results",
    "--load zipf --zipf 1.2 --json -",
)


def run_case(case: Case, clock: StepTimer, rounds: int) -> list[Record]:
    """Times the choice of `case.k` among logits of a load."""
    steps = [
        Step(variant.name("top_k"), functools.partial(top_k, k=case.k, backend=variant.backend), ("logits",))
        for variant in variants(case)
    ]
    values = {"logits": logits_of(make_load(case))}
    measured = clock.measure(steps, values, scope=case.programs_key, rounds=rounds)
    return records_of(case, clock, measured, ["top_k"], measured.values[steps[0].name].ids)


def main(argv: Sequence[str]) -> int:
    """Measures, writes and prints."""
    return main_of(
        "topk",
        "Times top-k alone, ours and XLA's, in pairs.",
        _EXAMPLES,
        run_case,
        argv,
        tokens="8192",
        hidden="1024",
        dtype="fp16",
        with_xla=True,
    )


if __name__ == "__main__":
    sys.exit(run(main))
