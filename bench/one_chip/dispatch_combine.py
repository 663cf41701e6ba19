"""Dispatch and combine without experts between them, which bench.permute and bench.gpu both time."""

from collections.abc import Callable

import jax

from pallas_kernels.combine import combine
from pallas_kernels.dispatch import dispatch
from pallas_kernels.plan import Plan
from pallas_kernels.top_k import top_k as choose


def dispatch_and_combine(
    x: jax.Array, logits: jax.Array, top_k: int, plan_of: Callable[[jax.Array], Plan], backend: str
) -> tuple[jax.Array, Plan]:
    """Routes tokens x [T, H] by logits [T, E], copies each to its experts' rows and sums the copies up.

    Gives x again, as the weights of a token sum to 1, where the plan of topk_ids [T, K] drops nothing; and the plan.
    """
    choice = choose(logits, top_k, backend=backend)
    plan = plan_of(choice.ids)
    # Experts would stand between; without them XLA would gather through both steps at once.
    rows = jax.lax.optimization_barrier(dispatch(x, plan, backend=backend))
    return combine(rows, plan, jax.nn.softmax(choice.weights), backend=backend), plan
