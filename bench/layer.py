"""The layer on one chip, whole and split into router, plan, dispatch, gate-up, down and combine.

Forward, on one chip, for three ways to lay the rows of experts out (`bench.one_chip.layouts`), which are compared in
pairs. `bench.one_chip.records` lists the fields of what it writes.
"""

import functools
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bench.command.parser import run
from bench.inputs.weights import normal
from bench.measure.errors import relative_error
from bench.measure.steps import Step, StepTimer
from bench.one_chip.cases import Case
from bench.one_chip.layouts import LAYOUTS, Variant
from bench.one_chip.loads import make_load
from bench.one_chip.options import main_of
from bench.one_chip.records import Record
from bench.one_chip.variants import measure, records_of, variants
from moejax import MoEConfig, route
from pallas_kernels.combine import combine
from pallas_kernels.dispatch import dispatch
from pallas_kernels.plan import Plan

OPERATORS = ("router", "plan", "dispatch", "gate_up", "down", "combine", "layer")

_EXAMPLES = (
    "",
    "--tokens 8192 --hidden 2048 --experts 32,64,128 --k 2 --capacity 1.0,1.25 --load balanced,zipf,text --out results",
    "--batch-length 32x128,64x256 --hidden 1024 --experts 4,8,16 --layout compact,padded --json -",
)

Choice = tuple[jax.Array, jax.Array]
"""topk_ids int32 [T, K] and topk_weights float32 [T, K]."""


def run_case(case: Case, clock: StepTimer, rounds: int) -> list[Record]:
    """Times every layout, whole and those of `case.split` stage by stage too."""
    load = make_load(case)
    gate_up, down = expert_weights(case.experts, case.hidden, case.intermediate, case.jax_dtype)
    values: dict[str, Any] = {"x": load.x, "router": load.router, "gate_up": gate_up, "down": down}
    measured = measure(case, clock, rounds, _steps, values)
    first_y, first_inverse, ids = measured.values[variants(case)[0].name("layer")]

    def error(variant: Variant) -> float:
        y, inverse, _ = measured.values[variant.name("layer")]
        is_whole = ((inverse >= 0) & (first_inverse >= 0)).all(1)
        return relative_error(y, first_y, is_whole)

    return records_of(case, clock, measured, OPERATORS, ids, agreement_error=error)


# Cases that follow one another often have the same experts.
@functools.lru_cache(maxsize=1)
def expert_weights(num_experts: int, hidden: int, intermediate: int, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Random gate_up [E, H, 2, I] and down [E, I, H], which keep the size of what they multiply."""
    gate_up = normal(0, (num_experts, hidden, 2, intermediate), scale=hidden**-0.5, dtype=dtype)
    return gate_up, normal(1, (num_experts, intermediate, hidden), scale=intermediate**-0.5, dtype=dtype)


def _config(case: Case, backend: str) -> MoEConfig:
    return MoEConfig(
        hidden_size=case.hidden,
        intermediate_size=case.intermediate,
        num_experts=case.experts,
        top_k=case.k,
        dtype=case.jax_dtype,
        param_dtype=case.jax_dtype,
        backend=backend,
    )


def _steps(case: Case, variant: Variant) -> list[Step]:
    """What is timed, from the values x [T, H], router [H, E], gate_up [E, H, 2, I] and down [E, I, H]."""
    name = variant.name
    config = _config(case, variant.backend)
    send = functools.partial(dispatch, backend=variant.backend)
    gate_up = functools.partial(variant.gate_up, config=config)
    down = functools.partial(variant.down, config=config)

    def choose(x: jax.Array, router: jax.Array) -> Choice:
        routing = route(x, router, config)
        return routing.topk_ids, routing.topk_weights

    def plan_of(choice: Choice) -> Plan:
        return variant.plan(choice[0])

    def back(rows: jax.Array, plan: Plan, choice: Choice) -> jax.Array:
        return combine(rows, plan, choice[1], backend=variant.backend)

    def layer(x: jax.Array, router: jax.Array, w1: jax.Array, w2: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """All of them: y [T, H], and how: the plan's inverse and topk_ids, both [T, K]."""
        choice = choose(x, router)
        plan = plan_of(choice)
        rows = down(gate_up(send(x, plan), plan, w1), plan, w2)
        return back(rows, plan, choice), plan.inverse, choice[0]

    together = Step(name("layer"), layer, ("x", "router", "gate_up", "down"), key=variant)
    if not variant.is_split:
        return [together]
    return [
        Step(name("router"), choose, ("x", "router")),
        Step(name("plan"), plan_of, (name("router"),), key=variant),
        Step(name("dispatch"), send, ("x", name("plan"))),
        Step(name("gate_up"), gate_up, (name("dispatch"), name("plan"), "gate_up")),
        Step(name("down"), down, (name("gate_up"), name("plan"), "down")),
        Step(name("combine"), back, (name("down"), name("plan"), name("router"))),
        together,
    ]


def main(argv: Sequence[str]) -> int:
    """Measures, writes and prints; returns 1 when layouts disagree."""
    return main_of(
        "layer",
        "Times the MoE-FFN layer whole and split into router, plan, dispatch, gate-up, down and combine, for three "
        "ways to lay out the rows of experts. The exit status is 1 if their results differ.",
        _EXAMPLES,
        run_case,
        argv,
        {"tokens": "4096", "hidden": "1024", "dtype": "bf16", "layouts": ",".join(LAYOUTS)},
    )


if __name__ == "__main__":
    sys.exit(run(main))
