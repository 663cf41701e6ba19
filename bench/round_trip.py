"""Tokens to the rows of their experts and back, which the benches of routing and of Hopper kernels both time."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.combine import combine
from pallas_kernels.dispatch import dispatch
from pallas_kernels.plan import Plan
from pallas_kernels.top_k import top_k_ids


def there_and_back(
    x: jax.Array, logits: jax.Array, top_k: int, plan_of: Callable[[jax.Array], Plan], backend: str
) -> tuple[jax.Array, Plan]:
    """Routes tokens x [T, H] by logits [T, E], copies each to its experts' rows and sums the copies up.

    Args:
      x: tokens.
      logits: of the router.
      top_k: experts of a token.
      plan_of: makes the plan of topk_ids [T, K].
      backend: of the operators.

    Returns:
      x again, as the weights of a token sum to 1, where the plan drops nothing; and the plan.
    """
    ids = top_k_ids(logits, top_k, backend=backend)
    plan = plan_of(ids)
    # Experts would stand between; without them XLA would gather through both steps at once.
    rows = jax.lax.optimization_barrier(dispatch(x, plan, backend=backend))
    return combine(rows, plan, softmax_weights(logits, ids), backend=backend), plan


def softmax_weights(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """float32 [T, K]: weights of the choice topk_ids [T, K] among logits [T, E], which sum to 1."""
    return jax.nn.softmax(jnp.take_along_axis(logits, ids, axis=1))
