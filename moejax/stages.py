"""The seven stages of a token's way, in their order: a function each, for the layer, the benches and the docs.

    route      x [T, H]              -> topk_ids, topk_weights [T, K]
    plan       topk_ids              -> which row goes where
    send       x [T, H]              -> rows [C, H], sorted by local expert
    gate_up    rows [C, H]           -> h [C, I]
    down       h [C, I]              -> rows [C, H]
    give_back  rows [C, H]           -> the slots from which they were sent
    combine    slots, topk_weights   -> y [T, H]

A layer takes the first from its router and all others at once (`routed`): a transport may go in rounds, and overlap
them. Benches take them one by one, which is one round: `Way.slab` can make it hold everything.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from moejax.config import MoEConfig
from moejax.experts import ExpertMath, down_projection, expert_weights, few_tokens, gate_up_projection
from moejax.params import EXPERT_FIELDS, MoEParams
from moejax.routed_experts import routed_experts
from moejax.routers.base import Decision, Given
from pallas_kernels.quantize import Copied, Rows
from sharding.exchange import Transport, Way, Wire, pick_transport
from sharding.partition import Axes
from sharding.placement import Placement
from sharding.tokens import Tokens


@dataclasses.dataclass(frozen=True)
class Stages:
    """The stages of a layer on one chip, inside shard_map where there are several.

    Attributes:
      config: the layer.
      way: how rows travel.
      math: of the routed experts.
    """

    config: MoEConfig
    way: Way
    math: ExpertMath

    @property
    def transport(self) -> Transport:
        """The transport that runs stages 2, 3, 6 and 7."""
        return pick_transport(self.way)

    def route(self, x: jax.Array, params: MoEParams, tokens: Tokens, given: Given | None = None) -> Decision:
        """Stage 1: the router's choice for x [T, H]."""
        return self.config.router.route(x, params.router or {}, self.config, tokens, given or Given())

    def inputs(self, x: jax.Array, topk_weights: jax.Array) -> tuple[Copied, jax.Array]:
        """What stage 3 sends of x [T, H], and what stage 7 weighs it with: scaled inputs have been weighed by then.

        Where rows are multiplied in 8 bits with scales of their own, x is rounded before it is copied to the experts,
        or on the way. The result is the same.
        """
        if self.config.scale_inputs:
            scaled = x.astype(jnp.float32) * topk_weights
            # 8 bits are rounded to from float32, once.
            x = scaled.astype(x.dtype) if self.math.quantization is None else scaled
            topk_weights = jnp.ones_like(topk_weights)
        return self.math.rounded(x, late=self.way.is_on_one_chip), topk_weights

    def plan(self, topk_ids: jax.Array) -> Any:
        """Stage 2: choices int32 [T, K] -> the plan of one round, with `group_sizes` [L], rows of local experts."""
        return self.transport.plan_rows(topk_ids, self.way)

    def send(self, x: Copied, plan: Any) -> Rows:
        """Stage 3: x [T, H], as `inputs` has it -> rows [C, H]."""
        return self.transport.send(x, plan, self.way)

    def gate_up(self, rows: Rows, plan: Any, params: MoEParams) -> Rows:
        """Stage 4, kernel one: rows [C, H] -> h [C, I]."""
        return gate_up_projection(rows, plan.group_sizes, params.gate_up, self.math, bias=params.gate_up_bias)

    def down(self, h: Rows, plan: Any, params: MoEParams) -> jax.Array:
        """Stage 5, kernel two: h [C, I] -> rows [C, H].

        Raises:
          ValueError: each of several chips of a tensor axis would add the bias.
        """
        if params.down_bias is not None and self.way.axes.tp > 1:
            raise ValueError("down_bias must be None where stages run one by one over a tensor axis; use `routed`")
        return down_projection(h, plan.group_sizes, params.down, self.math, bias=params.down_bias)

    def give_back(self, rows: jax.Array, plan: Any) -> jax.Array:
        """Stage 6: rows [C, H] -> slots."""
        return self.transport.give_back(rows, plan, self.way)

    def combine(
        self,
        slots: jax.Array,
        plan: Any,
        topk_weights: jax.Array,
        *,
        preferred_element_type: jax.typing.DTypeLike,
    ) -> jax.Array:
        """Stage 7: slots and float32 weights [T, K], as `inputs` has them -> y [T, H]."""
        return self.transport.combine_slots(
            slots, plan, topk_weights, self.way, preferred_element_type=preferred_element_type
        )

    def routed(
        self,
        x: jax.Array,
        topk_weights: jax.Array,
        topk_ids: jax.Array,
        params: dict[str, Any],
        *,
        residual: jax.Array | None = None,
        preferred_element_type: jax.typing.DTypeLike,
    ) -> jax.Array:
        """Stages 2 to 7: Σ_k topk_weights[t, k] · expert[topk_ids[t, k]](x[t]), [T, H].

        Args:
          x: [T, H] in config.dtype.
          topk_weights: float32 [T, K].
          topk_ids: int32 [T, K], −1 for no choice.
          params: the `EXPERT_FIELDS` of MoEParams by name, of the experts of this chip.
          residual: [T, H], what the sum is added to, or None.
          preferred_element_type: of the sum.
        """
        inputs, topk_weights = self.inputs(x, topk_weights)
        of_experts = {name: params[name] for name in EXPERT_FIELDS}
        if self.way.is_on_one_chip:
            y = few_tokens(
                inputs,
                topk_weights,
                topk_ids,
                of_experts,
                self.math,
                residual=residual,
                preferred_element_type=preferred_element_type,
            )
            if y is not None:
                return y

        return routed_experts(
            self.math,
            inputs,
            topk_weights,
            topk_ids,
            expert_weights(of_experts, self.math),
            self.way,
            residual=residual,
            preferred_element_type=preferred_element_type,
        )


def way_of(
    config: MoEConfig,
    axes: Axes,
    *,
    num_slots: int | None = None,
    max_choices: int | None = None,
    max_rows: int | None = None,
) -> Way:
    """How the rows of a layer with so many slots for its experts travel over `axes`; see `Way` for the rest."""
    return Way(
        Placement(config.num_experts if num_slots is None else num_slots, axes.ep),
        axes,
        Wire(config.quantization.dtype, config.scaling_of_rows) if config.precision == "w8a8" else None,
        config.backend,
        config.transport,
        max_choices,
        max_rows,
        cotangent_dtype=config.wire_gradient_dtype,
    )
