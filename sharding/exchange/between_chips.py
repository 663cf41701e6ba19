"""What all transports between chips have in common: everything but how rows are planned and carried.

Everything but the final sum runs in rounds (see `room`), as many as the load needs, so that nothing is dropped however
uneven it is. Rows come back in the dtype that the experts give them. Chips that share the width of each expert (tp of
them) work on the rows of all their tokens, each with a part of the columns (see `sharding.tensor_parallel`): T then
counts the tokens of all of them, and H is H / tp.
"""

import abc
import dataclasses
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.combine import combine
from pallas_kernels.plan import Plan, each_choice, unsorted_plan
from pallas_kernels.quantize import Operand, QTensor, Rounded, Rows, dequantize
from sharding.exchange.parcel import Parcel
from sharding.exchange.room import slab_and_rounds
from sharding.exchange.rounds import sum_over_rounds
from sharding.exchange.transport import Experts, there_and_back
from sharding.exchange.way import Way
from sharding.tensor_parallel import gather_columns, gather_tokens, sum_columns, to_columns, to_tokens

LATER_ROUNDS = "later_rounds"
"""The scope, in the names of a program's operations, of what runs only where one round does not carry everything."""


class RoundPlan(Protocol):
    """The plan of one round, as one chip sees it; a pytree."""

    @property
    def departure(self) -> Plan:
        """[T, K] choices -> the rows in which they leave; choices that leave in other rounds have none."""

    @property
    def group_sizes(self) -> jax.Array:
        """int32 [L], the rows that arrive for each local expert."""


class BetweenChips(abc.ABC):
    """A transport (see `sharding.exchange.transport.Transport`) that lacks only what is abstract here."""

    @abc.abstractmethod
    def prepare(self, topk_ids: jax.Array, way: Way) -> Any:
        """What is known of the choices int32 [T, K] once for all rounds: a pytree with `topk_ids`."""

    @abc.abstractmethod
    def rounds_of(self, choices: Any, slab: int, way: Way) -> jax.Array:
        """The rounds, int32 [], that the rows of this chip, or those it is sent, need with slabs of S rows."""

    @abc.abstractmethod
    def plan_round(self, choices: Any, slab: int, index: jax.Array | int, way: Way) -> RoundPlan:
        """What leaves and arrives in round `index`, with slabs of S rows."""

    @abc.abstractmethod
    def carry[Kind: Operand](self, x: Kind, plan: Any, way: Way) -> Kind:
        """The rows that `dispatch` makes of tokens x by plan.departure -> those that arrive, [ep·S, H], by expert."""

    @abc.abstractmethod
    def carry_back(self, rows: jax.Array, plan: Any, way: Way) -> jax.Array:
        """Rows as `carry` gave them -> those of plan.departure, where they were."""

    def rows_held(self, num_tokens: int, top_k: int, way: Way) -> int:
        """See `Transport`."""
        return way.axes.ep * slab_and_rounds((num_tokens, top_k), way)[0]

    def plan_rows(self, topk_ids: jax.Array, way: Way) -> RoundPlan:
        """The plan of the first round, the only one if a chip has room for everything that it can be sent."""
        slab, _ = slab_and_rounds(topk_ids.shape, way)
        return self.plan_round(self._prepared(topk_ids, way), slab, 0, way)

    def send(self, x: Rows | Parcel, plan: RoundPlan, way: Way) -> Any:
        """Brings every token's row to the ranks of its experts.

        Quantising, exchanging and dequantising are one step to autodiff, with faces in the dtype of `x`: an 8-bit
        payload between two differentiated functions would round its gradient to 8 bits. The gradient travels back
        in its own dtype, or as `way.cotangent_dtype` says.

        Args:
          x: [T, H], BF16, FP16 or float32; or a QTensor in which every row has scales of its own, without a gradient;
            or a `Rounded` with such scales; or a `Parcel` of any of these.
          plan: from `plan_rows` or `plan_round`; with `way.columns_over`, of the tokens of all chips of that group.
          way: how rows travel.

        Returns:
          [ep·S, H] of the kind of `x`, sorted by local expert; rows past plan.group_sizes may be anything.
        """
        if isinstance(x, Parcel):
            return Parcel(self.send(x.rows, plan, way), self.send_beside(x.beside, plan, way))
        if isinstance(x, Rounded):
            return _rounded_sent(self, x, plan, way)
        if isinstance(x, QTensor) or way.wire is None:
            return _sent(self, x, plan, way)
        return _rounded_sent(self, way.wire.rounded(x, backend=way.backend), plan, way).array

    def send_beside(self, beside: jax.Array, plan: RoundPlan, way: Way) -> jax.Array:
        """A few numbers of every token, [T, B] -> those of each row that arrives, as they are."""
        # Too narrow for a kernel to pay; and the gradients of weights are not those of rows.
        return _sent(self, beside, plan, dataclasses.replace(way, backend="xla", cotangent_dtype=None))

    def give_back(self, rows: jax.Array, plan: RoundPlan, way: Way) -> jax.Array:
        """Sends what the experts made of each row back to where the row came from, never below BF16.

        Args:
          rows: [ep·S, H] in the order in which `send` gave them; with `way.columns_over`, partial sums.
          plan: the same plan.
          way: how rows travel.

        Returns:
          The rows of plan.departure, for `combine(…, plan.departure, weights)`; with `way.columns_over` this chip's
          columns of them, H / tp.
        """
        if way.columns_over:
            rows = sum_columns(rows, way.columns_over).astype(rows.dtype)
        return self.carry_back(rows, plan, way)

    def combine_slots(
        self,
        slots: jax.Array,
        plan: RoundPlan,
        topk_weights: jax.Array,
        way: Way,
        *,
        preferred_element_type: jax.typing.DTypeLike,
    ) -> jax.Array:
        """Rows as `give_back` had them -> the weighted sums [T, H] of this chip's tokens."""
        weights = gather_tokens(topk_weights, way.columns_over)
        y = combine(slots, plan.departure, weights, preferred_element_type="float32", backend=way.backend)
        return _own_tokens(y, slots.dtype, way).astype(preferred_element_type)

    def exchange(
        self,
        x: Rows | Parcel,
        topk_weights: jax.Array,
        topk_ids: jax.Array,
        experts: Experts,
        params: Any,
        way: Way,
        *,
        preferred_element_type: jax.typing.DTypeLike,
    ) -> jax.Array:
        """See `sharding.exchange.exchange`. Of a `Parcel`, `experts` get one too."""
        slab, max_rounds = slab_and_rounds(topk_ids.shape, way)
        if max_rounds == 1:
            plan = self.plan_rows(topk_ids, way)
            slots = there_and_back(self.send, self.give_back, x, plan, experts, params, way)
            return self.combine_slots(slots, plan, topk_weights, way, preferred_element_type=preferred_element_type)
        axes = way.axes
        choices = self._prepared(topk_ids, way)
        everywhere = tuple(dict.fromkeys((*axes.tokens, *axes.expert, *axes.mlp)))
        rounds = lax.pmax(self.rounds_of(choices, slab, way), everywhere)
        args = x, gather_tokens(topk_weights, way.columns_over), params
        y = _sum_of_rounds(_Rounds(self, experts, way, slab), rounds, choices, args)
        return _own_tokens(y, result_dtype(experts, params, x, way), way).astype(preferred_element_type)

    def _prepared(self, topk_ids: jax.Array, way: Way) -> Any:
        """`prepare` for this chip, and the chips that share the width of its experts."""
        return self.prepare(gather_tokens(topk_ids, way.columns_over), way)


def result_dtype(experts: Experts, params: Any, x: Rows | Parcel, way: Way) -> jnp.dtype:
    """The dtype of what the experts make of rows x: that of the rows, unless they are in 8 bits."""
    rows = x.rows if isinstance(x, Parcel) else x
    if not isinstance(rows, QTensor):
        return jnp.dtype(rows.dtype)
    sizes = jax.ShapeDtypeStruct((way.placement.num_local,), jnp.int32)
    return jax.eval_shape(experts, params, x, sizes).dtype


def _rounded_sent(transport: BetweenChips, x: Rounded, plan: RoundPlan, way: Way) -> Rounded:
    """The 8 bits travel; the array is made of them there, should anyone take it."""
    in_8_bits = lax.stop_gradient(_sent(transport, lax.stop_gradient(x.in_8_bits), plan, way))
    return Rounded(_unpacked(transport, x.array, in_8_bits, plan, way), in_8_bits)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 4))
def _unpacked(transport: BetweenChips, x: jax.Array, arrived: QTensor, plan: RoundPlan, way: Way) -> jax.Array:
    """The rows of x that arrived in 8 bits, with the derivatives of rows that travel as they are."""
    del transport, plan, way
    return dequantize(arrived, x.dtype)


@_unpacked.defjvp
def _unpacked_jvp(transport, way, primals, tangents):
    x, arrived, plan = primals
    dx, _, _ = tangents
    return _unpacked(transport, x, arrived, plan, way), _sent(transport, dx, plan, way)


def _sent[Kind: Operand](transport: BetweenChips, x: Kind, plan: RoundPlan, way: Way) -> Kind:
    """The rows as they are. Their gradient travels as `give_back` has it, and is summed as `combine` does."""
    has_row_scales = isinstance(x, QTensor) and x.scale.shape[1] == 1
    if way.columns_over:
        x = to_columns(x, way.columns_over)
    rows = transport.carry(x, plan, way)
    return gather_columns(rows, way.columns_over, has_row_scales=has_row_scales) if way.columns_over else rows


def _own_tokens(y: jax.Array, dtype: jax.typing.DTypeLike, way: Way) -> jax.Array:
    """The sums of this chip's tokens, where chips had sums for a part of the columns of others' tokens too."""
    return to_tokens(y.astype(dtype), way.columns_over) if way.columns_over else y


@dataclasses.dataclass(frozen=True, eq=False)
class _Rounds:
    """The rounds of the exchange, of the choices and of (x, weights, parameters)."""

    transport: BetweenChips
    experts: Experts
    way: Way
    slab: int

    def returned(self, index: jax.Array | int, choices: Any, args: Any) -> tuple[jax.Array, Plan]:
        """The experts' rows of a round in the order in which the choices left, and the plan of that."""
        x, _, params = args
        transport, way = self.transport, self.way
        plan = transport.plan_round(choices, self.slab, index, way)
        slots = there_and_back(transport.send, transport.give_back, x, plan, self.experts, params, way)
        return slots, plan.departure

    def summed(self, slots: jax.Array, departure: Plan, args: Any) -> jax.Array:
        """[T, H] float32: the weighted sum of the choices that travelled in a round."""
        _, topk_weights, _ = args
        return combine(slots, departure, topk_weights, preferred_element_type="float32", backend=self.way.backend)

    def by_choice(self, slots: jax.Array, departure: Plan) -> jax.Array:
        """[T·K, H]: what the experts made of each choice that travelled in a round, zeros for the others."""
        return combine(slots, each_choice(departure), backend=self.way.backend)

    def later_rows(self, index: jax.Array, choices: Any, args: Any) -> jax.Array:
        """`by_choice` of the round after round `index`."""
        return self.by_choice(*self.returned(index + 1, choices, args))

    def later_sum(self, index: jax.Array, choices: Any, args: Any) -> jax.Array:
        """`summed` of the round after round `index`."""
        return self.summed(*self.returned(index + 1, choices, args), args)


class _DifferentiatedRounds(_Rounds):
    """The same with the roundings that experts make where they are differentiated, as in the first round then."""

    def later_rows(self, index: jax.Array, choices: Any, args: Any) -> jax.Array:
        """See `_Rounds`."""
        return jax.vjp(functools.partial(super().later_rows, index, choices), args)[0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _sum_of_rounds(run: _Rounds, rounds: jax.Array, choices: Any, args: Any) -> jax.Array:
    """[T, H] float32: the weighted sum of all choices, in the order of k whatever round each travels in.

    So its bits do not tell how large the slabs were, as these follow from how many tokens there are, masked or not. The
    first round is usually the only one, and is differentiated like anything else. Derivatives of the others are those
    of the sum of each round's sum, which leave no rows behind.
    """
    return _in_order(run, rounds, choices, args, *run.returned(0, choices, args))


def _in_order(run: _Rounds, rounds: jax.Array, choices: Any, args: Any, slots: jax.Array, departure: Plan) -> jax.Array:
    """The sum, given what the first round brought."""

    def of_several_rounds() -> jax.Array:
        rows = run.by_choice(slots, departure)
        rows += sum_over_rounds(run.later_rows, rounds - 1, choices, args)
        return run.summed(rows, unsorted_plan(choices.topk_ids), args)

    with jax.named_scope(LATER_ROUNDS):
        return lax.cond(rounds > 1, of_several_rounds, lambda: run.summed(slots, departure, args))


@_sum_of_rounds.defjvp
def _sum_of_rounds_jvp(run: _Rounds, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    rounds, choices, args = primals
    _, _, dargs = tangents

    def first(args: Any) -> tuple[jax.Array, Any]:
        returned = run.returned(0, choices, args)
        return run.summed(*returned, args), returned

    # No `lax.cond` around the later ones: under `jax.vmap` JAX could not transpose it. A sum over no round runs none.
    later = functools.partial(sum_over_rounds, run.later_sum, rounds - 1, choices)
    _, dfirst, returned = jax.jvp(first, (args,), (dargs,), has_aux=True)
    with jax.named_scope(LATER_ROUNDS):
        _, dlater = jax.jvp(later, (args,), (dargs,))
    in_order = _DifferentiatedRounds(run.transport, run.experts, run.way, run.slab)
    return _in_order(in_order, rounds, choices, args, *returned), dfirst + dlater
