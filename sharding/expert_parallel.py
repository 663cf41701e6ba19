"""The body of an expert-parallel MLP: what one chip does inside shard_map, and the same on a single chip.

Shapes on one chip: T tokens, K choices each, E experts of which L = E / ep are here, H hidden.

    plan -> send rows -> experts (two grouped matmuls) -> return rows -> combine

On one chip sending and returning vanish into the gather before the experts and the sum after them. Over several, all
but the sum goes in rounds (see `sharding.exchange_plan`), whose buffers are sized for a load twice the balanced one.
Chips that share the width of each expert (tp of them) work on the rows of all their tokens (see
`sharding.tensor_parallel`).
"""

import dataclasses
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from pallas_kernels.combine import combine
from pallas_kernels.dispatch import dispatch
from pallas_kernels.plan import Plan, each_choice, make_plan, unsorted_plan
from pallas_kernels.quantize import Operand, QTensor
from sharding.exchange_dense import Route, announce, return_rows, send_rows
from sharding.exchange_plan import local_experts, plan_departure, plan_destinations, slab_size
from sharding.partition import ONE_CHIP, Axes
from sharding.rounds import sum_over_rounds
from sharding.tensor_parallel import gather_tokens, sum_tokens, to_tokens
from sharding.wire import Wire


class Experts(Protocol):
    """The local experts as a function of rows sorted by expert. Closes over nothing that is traced."""

    def __call__(self, params: Any, rows: Any, group_sizes: jax.Array) -> jax.Array:
        """Rows [R, H] (of the kind of x), group_sizes int32 [L] -> [R, H]; rows past their sum hold no token."""


@dataclasses.dataclass(frozen=True)
class Transport:
    """How rows travel.

    Attributes:
      axes: of the mesh; those of a single chip are empty.
      wire: None sends rows in their own dtype, else in 8 bits.
      backend: of dispatch and combine.
      max_choices: choices that all chips' tokens make together at most, where most of topk_ids are −1; None for T·K a
        chip. It bounds the rows in memory on one chip, and sizes the buffers of an exchange over several.
      max_rows: rows that an expert can get from a chip at most; None for all.
    """

    axes: Axes = ONE_CHIP
    wire: Wire | None = None
    backend: str = "auto"
    max_choices: int | None = None
    max_rows: int | None = None


def expert_parallel(
    x: Operand,
    topk_weights: jax.Array,
    topk_ids: jax.Array,
    experts: Experts,
    params: Any,
    *,
    num_experts: int,
    transport: Transport,
    preferred_element_type: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
    """Σ_k topk_weights[t, k] · expert[topk_ids[t, k]](x[t]) for this chip's tokens.

    Args:
      x: [T, H], BF16, FP16 or float32; where the experts are not split, also a QTensor in
        which every row has scales of its own.
      topk_weights: [T, K] float32.
      topk_ids: int32 [T, K], numbers of experts over the whole expert axis; −1 for a choice that is not made.
      experts: applies the L local experts; where their width is split, gives partial sums.
      params: their parameters, a pytree that `experts` understands.
      num_experts: E.
      transport: how rows travel.
      preferred_element_type: dtype of the sum, which is made in float32 all the same.

    Returns:
      [T, H].

    Raises:
      ValueError: ep does not divide E.
    """
    if transport.axes.ep == 1:
        rows = x, topk_weights, topk_ids
        return _without_exchange(rows, experts, params, num_experts, transport, preferred_element_type)
    if isinstance(x, QTensor):
        raise ValueError(
            "x must be an array when experts are split over chips; transport.wire sends its rows in 8 bits"
        )
    axes, backend = transport.axes, transport.backend
    num_local = local_experts(num_experts, axes.ep)
    if axes.tp > 1:
        topk_weights, topk_ids = gather_tokens(topk_weights, axes.mlp), gather_tokens(topk_ids, axes.mlp)
    num_tokens, top_k = topk_ids.shape
    max_rows = None if transport.max_rows is None else axes.tp * transport.max_rows
    choices = _choices_per_group(num_tokens * top_k, transport)
    slab, max_rounds = slab_size(num_tokens, top_k, num_local, axes.ep, max_rows, choices=choices)
    route = Route(axes.expert, axes.mlp if axes.tp > 1 else (), transport.wire, backend)
    one = _ExchangeRound(experts, route, num_local, slab)
    destinations, by_rank = plan_destinations(topk_ids, num_local, axes.ep)
    constants, args = (topk_ids, destinations, by_rank), (x, topk_weights, params)
    if max_rounds == 1:
        y = one.sum(0, constants, args)
    else:
        everywhere = tuple(dict.fromkeys((*axes.tokens, *axes.expert, *axes.mlp)))
        rounds = jax.lax.pmax(-(-by_rank.group_sizes.max() // slab), everywhere)
        y = _sum_of_rounds(one, rounds, constants, args)
    if route.tensor:
        y = to_tokens(y.astype(x.dtype), route.tensor)
    return y.astype(preferred_element_type)


@dataclasses.dataclass(frozen=True, eq=False)
class _ExchangeRound:
    """One round of the exchange, of (ids, destinations, plan by rank) and (x, weights, parameters)."""

    experts: Experts
    route: Route
    num_local_experts: int
    slab: int

    def sum(self, index: jax.Array | int, constants: Any, args: Any) -> jax.Array:
        """[T, H] float32: the weighted sum of the choices that travel in this round."""
        _, topk_weights, _ = args
        rows, departure = self._returned(index, constants, args)
        return combine(rows, departure, topk_weights, preferred_element_type=jnp.float32, backend=self.route.backend)

    def rows(self, index: jax.Array | int, constants: Any, args: Any) -> jax.Array:
        """[T·K, H]: what the experts made of each choice that travels in this round, zeros for the others."""
        rows, departure = self._returned(index, constants, args)
        return combine(rows, each_choice(departure), backend=self.route.backend)

    def _returned(self, index: jax.Array | int, constants: Any, args: Any) -> tuple[jax.Array, Plan]:
        """The experts' rows in the slots in which the choices left, and the plan of these slots."""
        ids, destinations, by_rank = constants
        x, _, params = args
        departure, for_experts = plan_departure(ids, destinations, by_rank, self.num_local_experts, self.slab, index)
        exchange = announce(departure, for_experts, self.num_local_experts, self.route.axis)
        arrived = send_rows(x, exchange, self.route)
        made = self.experts(params, arrived, exchange.arrival.group_sizes)
        return return_rows(made, exchange, self.route), departure


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _sum_of_rounds(one: _ExchangeRound, rounds: jax.Array, constants: Any, args: Any) -> jax.Array:
    """[T, H] float32: the weighted sum of all choices, in the order of k whatever round each travels in.

    So its bits do not tell how large the slabs were, as these follow from how many tokens there are, masked or not.
    Its derivatives are those of the sum of each round's sum, which leave no rows behind.
    """
    ids, _, _ = constants
    _, topk_weights, _ = args
    rows = sum_over_rounds(one.rows, rounds, constants, args)
    return combine(
        rows, unsorted_plan(ids), topk_weights, preferred_element_type=jnp.float32, backend=one.route.backend
    )


@_sum_of_rounds.defjvp
def _sum_of_rounds_jvp(one: _ExchangeRound, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    rounds, constants, args = primals
    _, _, dargs = tangents
    _, dy = jax.jvp(functools.partial(sum_over_rounds, one.sum, rounds, constants), (args,), (dargs,))
    return _sum_of_rounds(one, rounds, constants, args), dy


def _without_exchange(
    per_token: tuple[Operand, jax.Array, jax.Array],
    experts: Experts,
    params: Any,
    num_experts: int,
    transport: Transport,
    out_dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """`expert_parallel` where every chip (of a tensor-parallel group) holds all experts."""
    axes, backend = transport.axes, transport.backend
    x, topk_weights, topk_ids = per_token
    if axes.tp > 1:
        x = gather_tokens(x, axes.mlp)
        topk_weights, topk_ids = gather_tokens(topk_weights, axes.mlp), gather_tokens(topk_ids, axes.mlp)
    plan = make_plan(topk_ids, num_experts)
    if (most := _most_choices(transport)) is not None:
        # Rows in use lie first, so that these hold every choice.
        inverse = jnp.where(plan.inverse < most, plan.inverse, -1)
        plan = dataclasses.replace(plan, order=plan.order[:most], inverse=inverse)
    rows = experts(params, dispatch(x, plan, backend=backend), plan.group_sizes)
    if axes.tp == 1:
        return combine(rows, plan, topk_weights, preferred_element_type=out_dtype, backend=backend)
    partial = combine(rows, plan, topk_weights, preferred_element_type=rows.dtype, backend=backend)
    return sum_tokens(partial, axes.mlp).astype(out_dtype)


def _most_choices(transport: Transport) -> int | None:
    """`transport.max_choices` of tokens that a tensor axis which does not split them holds several times."""
    axes = transport.axes
    copies = axes.size(tuple(axis for axis in axes.mlp if axis not in axes.tokens))
    return None if transport.max_choices is None else copies * transport.max_choices


def _choices_per_group(all_of_them: int, transport: Transport) -> int:
    """Choices that the tokens of a tensor-parallel group make when they lie evenly over the groups."""
    axes = transport.axes
    if (most := _most_choices(transport)) is None:
        return all_of_them
    groups = axes.size(tuple(dict.fromkeys((*axes.tokens, *axes.mlp)))) // axes.tp
    return min(all_of_them, max(1, -(-most // groups)))
