"""What every transport has: its share of the seven stages of a token's way, and the exchange that is made of them."""

from collections.abc import Callable
from typing import Any, Protocol

import jax

from pallas_kernels.plan import Plan
from pallas_kernels.quantize import Rows
from pallas_kernels.tracing.named import named
from sharding.exchange.way import Way

PLAN_NAME, DISPATCHED_NAME, RETURNED_NAME = "moe_plan", "moe_dispatched", "moe_returned"
"""The names by which policies of `jax.checkpoint` know the plan, and rows before and after the experts."""


class Experts(Protocol):
    """The local experts as a function of rows sorted by expert. Closes over nothing that is traced."""

    def __call__(self, params: Any, rows: Any, group_sizes: jax.Array) -> jax.Array:
        """Rows [R, H] (of the kind of x), group_sizes int32 [L] -> [R, H].

        Rows past the sum of group_sizes hold no token. What is made of them may be anything, NaN too.
        """


class WeighingExperts(Protocol):
    """The experts as a function of tokens, of which they copy, weigh and sum up the rows themselves."""

    def __call__(
        self,
        params: Any,
        x: Any,
        row_weights: jax.Array,
        plan: Plan,
        *,
        preferred_element_type: jax.typing.DTypeLike,
    ) -> jax.Array:
        """Tokens [T, H], and of each row that the plan has a weight, float32 [R], 0 if it has no token -> [T, H]."""


class Exchange(Protocol):
    """As `sharding.exchange.exchange`, which picks it, and itself adds the sum to a residual."""

    def __call__(
        self,
        x: Rows,
        topk_weights: jax.Array,
        topk_ids: jax.Array,
        experts: Experts,
        params: Any,
        way: Way,
        *,
        preferred_element_type: jax.typing.DTypeLike,
    ) -> jax.Array:
        """See `sharding.exchange.exchange`."""


class Transport(Protocol):
    """A way to carry an exchange out: a module of `sharding.exchange`, or anything else with these functions.

    A plan is what the transport likes it to be: a pytree whose `group_sizes`, int32 [L], count the rows that arrive for
    each local expert. C are the rows that a chip holds for its experts.
    """

    @property
    def exchange(self) -> Exchange:
        """All of it, in as many rounds as the load needs, however the transport overlaps them."""

    def rows_held(self, num_tokens: int, top_k: int, way: Way) -> int:
        """C for a chip with T tokens of K choices: the rows that `experts` is given at a time, used or not."""

    def plan_rows(self, topk_ids: jax.Array, way: Way) -> Any:
        """Choices int32 [T, K], −1 for one that is not made -> the plan of one round."""

    def send(self, x: Any, plan: Any, way: Way) -> Any:
        """Rows x [T, H] -> [C, H], sorted by local expert."""

    def give_back(self, rows: jax.Array, plan: Any, way: Way) -> jax.Array:
        """What the experts made of the rows, [C, H] -> the slots from which the rows came."""

    def combine_slots(
        self,
        slots: jax.Array,
        plan: Any,
        topk_weights: jax.Array,
        way: Way,
        *,
        preferred_element_type: jax.typing.DTypeLike,
    ) -> jax.Array:
        """Σ_k topk_weights[t, k] · the slot of choice (t, k), in float32 and in the order of k -> [T, H]."""


def there_and_back(
    send: Callable[..., Any],
    give_back: Callable[..., jax.Array],
    x: Any,
    plan: Any,
    experts: Experts,
    params: Any,
    way: Way,
) -> jax.Array:
    """One round up to its sum: x [T, H] -> the slots in which the experts' rows come back, each step named."""
    plan = named(plan, PLAN_NAME)
    rows = named(send(x, plan, way), DISPATCHED_NAME)
    made = experts(params, rows, plan.group_sizes)
    return named(give_back(made, plan, way), RETURNED_NAME)
