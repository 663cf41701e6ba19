"""The exchange over `lax.all_to_all`: equal slabs to every peer, filled or not, rows out as they are or in 8 bits.

Runs wherever XLA runs. Everything but the final sum runs in rounds (see `plan`), as many as the fullest pair of chips
needs, so that nothing is dropped however uneven the load is. Rows come back in the dtype that the experts give them.
Chips that share the width of each expert (tp of them) work on the rows of all their tokens, each with a part of the
columns (see `sharding.tensor_parallel`): T then counts the tokens of all of them, and H is H / tp.
"""

import dataclasses
import functools
from typing import Any

import jax
from jax import lax

from pallas_kernels.combine import combine
from pallas_kernels.dispatch import dispatch
from pallas_kernels.plan import Plan, each_choice, unsorted_plan
from pallas_kernels.quantize import Operand, QTensor, dequantize
from sharding.collectives import as_bytes
from sharding.exchange.plan import (
    ExchangePlan,
    SortedByRank,
    fit_slab,
    plan_arrival,
    plan_departure,
    sort_by_rank,
)
from sharding.exchange.rounds import sum_over_rounds
from sharding.exchange.transport import Experts, in_one_round, there_and_back
from sharding.exchange.way import Way
from sharding.tensor_parallel import gather_columns, gather_tokens, sum_columns, to_columns, to_tokens


def exchange(
    x: Operand,
    topk_weights: jax.Array,
    topk_ids: jax.Array,
    experts: Experts,
    params: Any,
    way: Way,
    *,
    preferred_element_type: jax.typing.DTypeLike,
) -> jax.Array:
    """See `sharding.exchange.exchange`.

    Raises:
      ValueError: x is in 8 bits.
    """
    if isinstance(x, QTensor):
        raise ValueError("x must be an array when experts are split over chips; way.wire sends its rows in 8 bits")
    slab, max_rounds = slab_and_rounds(topk_ids.shape, way)
    if max_rounds == 1:
        return _in_one_round(
            x, topk_weights, topk_ids, experts, params, way, preferred_element_type=preferred_element_type
        )
    axes = way.axes
    choices = _choices(topk_ids, way)
    everywhere = tuple(dict.fromkeys((*axes.tokens, *axes.expert, *axes.mlp)))
    rounds = lax.pmax(-(-choices.by_rank.group_sizes.max() // slab), everywhere)
    args = x, gather_tokens(topk_weights, way.columns_over), params
    y = _sum_of_rounds(_Round(experts, way, slab), rounds, choices, args)
    return _own_tokens(y, x.dtype, way).astype(preferred_element_type)


def rows_held(num_tokens: int, top_k: int, way: Way) -> int:
    """See `sharding.exchange.transport.Transport`."""
    return way.axes.ep * slab_and_rounds((num_tokens, top_k), way)[0]


def slab_and_rounds(shape: tuple[int, ...], way: Way) -> tuple[int, int]:
    """`fit_slab` for the [T, K] choices of a chip, and those of the chips that share the width of its experts."""
    axes, (num_tokens, top_k) = way.axes, shape
    max_rows = None if way.max_rows is None else axes.tp * way.max_rows
    choices = axes.tp * num_tokens * top_k
    if (most := way.counted_choices) is not None:  # evenly over the groups
        groups = axes.size(tuple(dict.fromkeys((*axes.tokens, *axes.mlp)))) // axes.tp
        choices = min(choices, max(1, -(-most // groups)))
    num_local = way.placement.num_local
    return fit_slab(axes.tp * num_tokens, top_k, num_local, axes.ep, max_rows, choices=choices, slab=way.slab)


def plan_rows(topk_ids: jax.Array, way: Way) -> ExchangePlan:
    """The plan of the first round, the only one if a slab holds everything that a chip can have for another."""
    slab, _ = slab_and_rounds(topk_ids.shape, way)
    return plan_round(_choices(topk_ids, way), slab, 0, way)


def plan_round(choices: SortedByRank, slab: int, index: jax.Array | int, way: Way) -> ExchangePlan:
    """What leaves in one round, in slabs of S rows; peers tell each other what for, and so learn what arrives."""
    departure, for_experts = plan_departure(choices, way.placement, slab, index)
    arrived = _all_to_all(for_experts, way.axes.expert)
    return ExchangePlan(departure, plan_arrival(arrived, way.placement, backend=way.backend))


def _choices(topk_ids: jax.Array, way: Way) -> SortedByRank:
    """Those of this chip, and of the chips that share the width of its experts."""
    return sort_by_rank(gather_tokens(topk_ids, way.columns_over), way.placement, backend=way.backend)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def send(x: jax.Array, plan: ExchangePlan, way: Way) -> jax.Array:
    """Brings every token's row to the ranks of its experts.

    Quantising, exchanging and dequantising are one step to autodiff, with faces in the dtype of `x`: an 8-bit payload
    between two differentiated functions would round its gradient to 8 bits. The gradient travels back unquantised.

    Args:
      x: [T, H], BF16, FP16 or float32.
      plan: from `plan_round`; with `way.columns_over`, of the tokens of all chips of that group.
      way: how rows travel.

    Returns:
      [ep·S, H] in the dtype of `x`, sorted by local expert; rows past plan.group_sizes are zeros.
    """
    rows = _sent(x if way.wire is None else way.wire.rounded(x), plan, way)
    return dequantize(rows, x.dtype) if isinstance(rows, QTensor) else rows


@send.defjvp
def _send_jvp(way, primals, tangents):
    x, plan = primals
    dx, _ = tangents
    return send(x, plan, way), _sent(dx, plan, way)


def _sent[Rows: jax.Array | QTensor](x: Rows, plan: ExchangePlan, way: Way) -> Rows:
    """The rows as they are. Their gradient travels as `give_back` has it, and is summed as `combine` does."""
    has_row_scales = isinstance(x, QTensor) and x.scale.shape[1] == 1
    if way.columns_over:
        x = to_columns(x, way.columns_over)
    slots = dispatch(x, plan.departure, backend=way.backend)
    arrived = jax.tree.map(lambda leaf: _all_to_all(leaf, way.axes.expert), slots)
    rows = dispatch(arrived, plan.arrival, backend=way.backend)
    return gather_columns(rows, way.columns_over, has_row_scales=has_row_scales) if way.columns_over else rows


def give_back(rows: jax.Array, plan: ExchangePlan, way: Way) -> jax.Array:
    """Sends what the experts made of each row back to where the row came from, never below BF16.

    Args:
      rows: [ep·S, H] in the order in which `send` gave them; with `way.columns_over`, partial sums.
      plan: the same plan.
      way: how rows travel.

    Returns:
      [ep·S, H], the slots of plan.departure, for `combine(…, plan.departure, weights)`; with `way.columns_over` this
      chip's columns of them, [ep·S, H / tp].
    """
    if way.columns_over:
        rows = sum_columns(rows, way.columns_over).astype(rows.dtype)
    return _all_to_all(combine(rows, plan.arrival, backend=way.backend), way.axes.expert)


def combine_slots(
    slots: jax.Array,
    plan: ExchangePlan,
    topk_weights: jax.Array,
    way: Way,
    *,
    preferred_element_type: jax.typing.DTypeLike,
) -> jax.Array:
    """[ep·S, H], as `give_back` had them -> the weighted sums [T, H] of this chip's tokens."""
    weights = gather_tokens(topk_weights, way.columns_over)
    y = combine(slots, plan.departure, weights, preferred_element_type="float32", backend=way.backend)
    return _own_tokens(y, slots.dtype, way).astype(preferred_element_type)


_in_one_round = in_one_round(plan_rows, send, give_back, combine_slots)


def _own_tokens(y: jax.Array, dtype: jax.typing.DTypeLike, way: Way) -> jax.Array:
    """The sums of this chip's tokens, where chips had sums for a part of the columns of others' tokens too."""
    return to_tokens(y.astype(dtype), way.columns_over) if way.columns_over else y


def _all_to_all(slots: jax.Array, axis: tuple[str, ...]) -> jax.Array:
    """Slab d of [ep·S, …] goes to rank d; slab s of the result came from rank s."""
    return as_bytes(lambda x: lax.all_to_all(x, axis, 0, 0, tiled=True), slots)


@dataclasses.dataclass(frozen=True, eq=False)
class _Round:
    """One round of the exchange, of the choices and of (x, weights, parameters)."""

    experts: Experts
    way: Way
    slab: int

    def sum(self, index: jax.Array | int, choices: SortedByRank, args: Any) -> jax.Array:
        """[T, H] float32: the weighted sum of the choices that travel in this round."""
        _, topk_weights, _ = args
        rows, departure = self._returned(index, choices, args)
        return combine(rows, departure, topk_weights, preferred_element_type="float32", backend=self.way.backend)

    def rows(self, index: jax.Array | int, choices: SortedByRank, args: Any) -> jax.Array:
        """[T·K, H]: what the experts made of each choice that travels in this round, zeros for the others."""
        rows, departure = self._returned(index, choices, args)
        return combine(rows, each_choice(departure), backend=self.way.backend)

    def _returned(self, index: jax.Array | int, choices: SortedByRank, args: Any) -> tuple[jax.Array, Plan]:
        """The experts' rows in the slots in which the choices left, and the plan of these slots."""
        x, _, params = args
        plan = plan_round(choices, self.slab, index, self.way)
        return there_and_back(send, give_back, x, plan, self.experts, params, self.way), plan.departure


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _sum_of_rounds(one: _Round, rounds: jax.Array, choices: SortedByRank, args: Any) -> jax.Array:
    """[T, H] float32: the weighted sum of all choices, in the order of k whatever round each travels in.

    So its bits do not tell how large the slabs were, as these follow from how many tokens there are, masked or not.
    Its derivatives are those of the sum of each round's sum, which leave no rows behind.
    """
    _, topk_weights, _ = args
    rows = sum_over_rounds(one.rows, rounds, choices, args)
    return combine(
        rows,
        unsorted_plan(choices.topk_ids),
        topk_weights,
        preferred_element_type="float32",
        backend=one.way.backend,
    )


@_sum_of_rounds.defjvp
def _sum_of_rounds_jvp(one: _Round, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    rounds, choices, args = primals
    _, _, dargs = tangents
    _, dy = jax.jvp(functools.partial(sum_over_rounds, one.sum, rounds, choices), (args,), (dargs,))
    return _sum_of_rounds(one, rounds, choices, args), dy
