"""What the operators of one chip have to do at the least, for rates.

Bytes of moving rows are also counted by two conventions that papers and programs use, for T tokens and R rows (R = T·K
when nothing is dropped) of H elements:

    bytes_32k     R·H for pack, R·H for combine: the copies alone, 2·K·H elements a token for both
    bytes_strict  (T + R)·H for pack, the same for combine: each token is read (written) as well
"""

import dataclasses

from bench.one_chip.cases import Case
from pallas_kernels.cost import Cost, combine_cost, dispatch_cost, grouped_gate_up_cost, grouped_matmul_cost, plan_cost


@dataclasses.dataclass(frozen=True)
class Work:
    """What an operator has to do at the least.

    Attributes:
      flops: a multiply-add is two.
      hbm_bytes: to and from main memory.
      bytes_32k: see the module's page; 0 where it does not apply.
      bytes_strict: likewise.
    """

    flops: int = 0
    hbm_bytes: int = 0
    bytes_32k: int = 0
    bytes_strict: int = 0

    def __add__(self, other: "Work") -> "Work":
        sums = (a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True))
        return Work(*sums)


def works(case: Case, rows: int, touched_experts: int) -> dict[str, Work]:
    """Work of every operator by name, for `rows` assignments that are kept, on experts of which some have rows."""
    t, h, e, k, i = case.tokens, case.hidden, case.experts, case.k, case.intermediate
    dtype = case.jax_dtype
    size = dtype.itemsize
    moved = {"bytes_32k": rows * h * size, "bytes_strict": (t + rows) * h * size}
    operands = {"lhs_dtype": dtype, "rhs_dtype": dtype, "out_dtype": dtype}
    pack = _work(dispatch_cost(t, rows, h, in_dtype=dtype, out_dtype=dtype), **moved)
    combine = _work(combine_cost(t, rows, h, dtype=dtype), **moved)
    # Weights and ids of the choice are written, four bytes each.
    top_k = Work(hbm_bytes=4 * t * (e + 2 * k))
    plan = _work(plan_cost(t, k, e))
    router = Work(flops=2 * t * h * e, hbm_bytes=(t + e) * h * size + 8 * t * k)
    gate_up = _work(grouped_gate_up_cost(rows, h, i, touched_experts, **operands))
    down = _work(grouped_matmul_cost(rows, i, h, touched_experts, **operands))
    whole = router + plan + pack + gate_up + down + combine
    return {
        "top_k": top_k,
        "plan": plan,
        "pack": pack,
        "dispatch": pack,
        "combine": combine,
        "permute": top_k + plan + pack + combine,
        "router": router,
        "gate_up": gate_up,
        "down": down,
        "layer": dataclasses.replace(whole, bytes_32k=0, bytes_strict=0),
    }


def _work(cost: Cost, *, bytes_32k: int = 0, bytes_strict: int = 0) -> Work:
    return Work(cost.flops, cost.hbm_bytes, bytes_32k, bytes_strict)
