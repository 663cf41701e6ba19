"""What of a layer to keep for its backward pass under `jax.checkpoint`, so that the exchange is not repeated.

name               what it is                                     a chip with T tokens of K choices holds
moe_plan           which row goes where                           integers, a few for each choice
moe_dispatched     rows as the experts get them                   [R, H]
moe_gate_up        kernel one's product before the activation     [R, 2I]
moe_returned       rows as the experts gave them back             [R, H]
moe_weights        what products take of parameters that          [E, H, 2I] and [E, I, H], in compute dtype or 8 bits
                   they cast or round

R is T·K on one chip, and what the exchange has room for on several. The router, and gathers over FSDP and tensor axes,
run again. So do rounds of an exchange after the first, where the load is so uneven that it takes several.

Without any policy a layer keeps all of it, but on a chip that holds all experts: there rows are weighed before down, so
that the gradient of a weight needs no row that came back, and are sent again, whatever a policy names. What is kept are
x, the plan, and moe_gate_up: 2·H + 4·K·I + 64·K bytes of a token in BF16; and moe_weights, so that these are cast or
rounded once. `remat_policy` leaves moe_weights out, as large as they are.
"""

import jax

from pallas_kernels.grouped_matmul import GATE_UP_NAME
from sharding.exchange import DISPATCHED_NAME, PLAN_NAME, RETURNED_NAME

REMAT_NAMES: tuple[str, ...] = (PLAN_NAME, DISPATCHED_NAME, GATE_UP_NAME, RETURNED_NAME)
"""The names of `jax.ad_checkpoint.checkpoint_name` in a layer, of what is as large as its tokens are many."""

remat_policy = jax.checkpoint_policies.save_only_these_names(*REMAT_NAMES)
"""For `jax.checkpoint(block, policy=remat_policy)`: keeps all of `REMAT_NAMES` of the layers in `block`, nothing else.

`jax.checkpoint_policies.save_from_both_policies` joins it with another; a shorter list keeps less, and repeats more.
"""
