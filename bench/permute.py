"""Top-k, plan, pack and combine on one chip, alone and together.

Together they copy each token to the rows of its experts and sum the copies up again, with weights that sum to 1: the
tokens as they were, which every run checks. `bench.one_chip.records` lists the fields of what it writes.
"""

import functools
import sys
from collections.abc import Sequence

import jax

from bench.command.parser import run
from bench.measure.errors import largest_error
from bench.measure.steps import Step, StepTimer
from bench.one_chip.cases import Case
from bench.one_chip.dispatch_combine import dispatch_and_combine
from bench.one_chip.layouts import Variant
from bench.one_chip.loads import logits_of, make_load
from bench.one_chip.options import main_of
from bench.one_chip.records import Record
from bench.one_chip.variants import measure, records_of
from pallas_kernels.combine import combine
from pallas_kernels.dispatch import dispatch
from pallas_kernels.plan import Plan
from pallas_kernels.top_k import TopK, top_k, top_k_ids

OPERATORS = ("top_k", "plan", "pack", "combine", "permute")

_EXAMPLES = (
    "",
    "--tokens 8192,16384,32768 --hidden 2048,4096 --experts 32,64,128 --k 1,2,4 --out results",
    "--layout compact,padded,block_sparse --capacity 1.0 --load zipf --json -",
)


def run_case(case: Case, clock: StepTimer, rounds: int) -> list[Record]:
    """Times the operators one by one and together, and checks that they give the tokens back."""
    load = make_load(case)
    logits = logits_of(load)
    ids = top_k_ids(logits, case.k, backend="xla")
    measured = measure(case, clock, rounds, steps_of, {"x": load.x, "logits": logits})

    def error(variant: Variant) -> float:
        y, inverse = measured.values[variant.name("permute")]
        return largest_error(y, load.x, (inverse >= 0).all(1))

    return records_of(case, clock, measured, OPERATORS, ids, identity_error=error)


def steps_of(case: Case, variant: Variant) -> list[Step]:
    """What is timed, from the values x [T, H] and logits float32 [T, E]."""
    name, backend = variant.name, variant.backend

    def permute(x: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        """X again, and the plan's inverse [T, K]."""
        y, plan = dispatch_and_combine(x, logits, case.k, variant.plan, backend)
        return y, plan.inverse

    together = Step(name("permute"), permute, ("x", "logits"), key=variant)
    if not variant.is_split:
        return [together]

    def plan(choice: TopK) -> Plan:
        return variant.plan(choice.ids)

    def unpack(rows: jax.Array, plan: Plan, weights: jax.Array) -> jax.Array:
        return combine(rows, plan, weights, backend=backend)

    choose = functools.partial(top_k, k=case.k, backend=backend)
    return [
        Step(name("top_k"), choose, ("logits",)),
        Step("weights", _softmax, (name("top_k"),), is_timed=False),
        Step(name("plan"), plan, (name("top_k"),), key=variant),
        Step(name("pack"), functools.partial(dispatch, backend=backend), ("x", name("plan"))),
        Step(name("combine"), unpack, (name("pack"), name("plan"), "weights")),
        together,
    ]


def _softmax(choice: TopK) -> jax.Array:
    return jax.nn.softmax(choice.weights)


def main(argv: Sequence[str]) -> int:
    """Measures, checks, writes and prints; returns 1 when tokens do not come back as they were."""
    return main_of(
        "permute",
        "Times top-k, plan, pack and combine alone and together, against plain XLA in pairs, and checks that packing "
        "and combining give the tokens back. The exit status is 1 if they do not.",
        _EXAMPLES,
        run_case,
        argv,
        {"tokens": "8192", "hidden": "2048", "dtype": "fp16", "with_xla": True},
    )


if __name__ == "__main__":
    sys.exit(run(main))
