"""What the operators of one chip have to do at the least, for rates.

Bytes of moving rows are also counted by two conventions that papers and programs use, for T tokens and R rows (R = T·K
when nothing is dropped) of H elements:

    bytes_32k     R·H for pack, R·H for combine: the copies alone, 2·K·H elements a token for both
    bytes_strict  (T + R)·H for pack, the same for combine: each token is read (written) as well
"""

import dataclasses

from bench.one_chip.cases import Case
from pallas_kernels.cost import Cost, combine_cost, dispatch_cost, grouped_gate_up_cost, grouped_matmul_cost, plan_cost

_MOVES = {"pack": 1, "dispatch": 1, "combine": 1, "permute": 2}
"""How often an operator moves the rows; the others are not counted by these conventions."""


@dataclasses.dataclass(frozen=True)
class Work(Cost):
    """What an operator has to do at the least, and the two counts of its bytes; 0 where they do not apply."""

    bytes_32k: int = 0
    bytes_strict: int = 0


def works(case: Case, rows: int, touched_experts: int) -> dict[str, Work]:
    """Work of every operator by name, for `rows` assignments that are kept, on experts of which some have rows."""
    t, h, e, k, i = case.tokens, case.hidden, case.experts, case.k, case.intermediate
    dtype = case.jax_dtype
    size = dtype.itemsize
    operands = {"lhs_dtype": dtype, "rhs_dtype": dtype, "out_dtype": dtype}
    pack = dispatch_cost(t, rows, h, in_dtype=dtype, out_dtype=dtype)
    costs = {
        # Weights and ids of the choice are written, four bytes each.
        "top_k": Cost(hbm_bytes=4 * t * (e + 2 * k)),
        "router": Cost(flops=2 * t * h * e, hbm_bytes=(t + e) * h * size + 8 * t * k),
        "plan": plan_cost(t, k, e),
        "pack": pack,
        "dispatch": pack,
        "gate_up": grouped_gate_up_cost(rows, h, i, touched_experts, **operands),
        "down": grouped_matmul_cost(rows, i, h, touched_experts, **operands),
        "combine": combine_cost(t, rows, h, dtype=dtype),
    }

    def together(*names: str) -> Cost:
        return Cost(sum(costs[name].flops for name in names), sum(costs[name].hbm_bytes for name in names))

    costs["permute"] = together("top_k", "plan", "pack", "combine")
    costs["layer"] = together("router", "plan", "dispatch", "gate_up", "down", "combine")
    moved = {name: _MOVES.get(name, 0) * h * size for name in costs}
    return {
        name: Work(cost.flops, cost.hbm_bytes, moved[name] * rows, moved[name] * (t + rows))
        for name, cost in costs.items()
    }
