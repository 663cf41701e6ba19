"""What an expert has room for, and which choices get it.

An expert takes ⌈factor · T·K / E⌉ choices of the T tokens that are counted together: those of the whole batch, or
those of one chip (GShard, Switch Transformer). First choices have precedence over second ones, and so on, and among
equals those of earlier tokens of the batch. So a batch loses the same choices on every mesh, unless each chip counts
by itself.
"""

from fractions import Fraction
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.core import max_dim, min_dim

from pallas_kernels.plan import make_plan
from pallas_kernels.tracing.running_sums import running_sums
from sharding.tokens import Tokens

Scope = Literal["batch", "chip"]
"""Which tokens share a capacity."""

_DENOMINATOR = 1000
"""A capacity factor is taken as the nearest fraction with such a denominator at most.

So int32 arithmetic on a traced number of tokens gives what Python gives for a known one.
"""


def expert_capacity(num_tokens: Any, top_k: int, num_experts: int, capacity_factor: float) -> Any:
    """⌈capacity_factor · T·K / E⌉, at least 1: the choices that an expert takes of T tokens.

    Args:
      num_tokens: T, a number, a dimension of a size that is not known, or int32 [].
      top_k: K.
      num_experts: E.
      capacity_factor: positive, to a thousandth.
    """
    factor = Fraction(capacity_factor).limit_denominator(_DENOMINATOR)
    # E is room for every token there can be; more could overflow.
    factor = max(min(factor, Fraction(num_experts)), Fraction(1, _DENOMINATOR))
    if not isinstance(num_tokens, jax.Array):
        choices = factor.numerator * top_k * num_tokens
        return max_dim(1, -(-choices // (factor.denominator * num_experts)))
    # In parts, so that no product leaves 32 bits: T·K = whole · unit + rest.
    unit = factor.denominator * num_experts
    whole, rest = jnp.divmod(num_tokens * top_k, unit)
    return jnp.maximum(whole * factor.numerator + _ceil_of_product(rest, factor.numerator, unit), 1)


def _ceil_of_product(a: jax.Array, b: int, divisor: int) -> jax.Array:
    """⌈a · b / divisor⌉ for 0 ≤ a < divisor < 2³⁰, int32, by doubling from the first bit of `b` on."""
    quotient = remainder = jnp.zeros((), jnp.int32)
    for bit in bin(b)[2:]:
        quotient, remainder = 2 * quotient, 2 * remainder
        quotient, remainder = _carried(quotient, remainder, divisor)
        if bit == "1":
            quotient, remainder = _carried(quotient, remainder + a, divisor)
    return quotient + (remainder > 0)


def _carried(quotient: jax.Array, remainder: jax.Array, divisor: int) -> tuple[jax.Array, jax.Array]:
    carry = (remainder >= divisor).astype(jnp.int32)
    return quotient + carry, remainder - carry * divisor


def limit_to_capacity(
    topk_ids: jax.Array,
    num_experts: int,
    capacity_factor: float,
    tokens: Tokens,
    scope: Scope,
    *,
    backend: str = "auto",
) -> tuple[jax.Array, int]:
    """Takes from each expert what exceeds its capacity.

    Args:
      topk_ids: int32 [T, K] of this chip, −1 for a choice that is not made.
      num_experts: E.
      capacity_factor: see `expert_capacity`.
      tokens: those of this chip.
      scope: whether the capacity is of the whole batch or of each chip.
      backend: of the sort.

    Returns:
      topk_ids with −1 for each choice that is dropped; and the most that an expert can get from this chip.
    """
    num_tokens, top_k = topk_ids.shape
    if scope == "chip":
        real = num_tokens if tokens.real is None else jnp.maximum(tokens.real.sum(dtype=jnp.int32), 1)
        rank = _rank_on_chip(topk_ids, num_experts, backend)
    else:
        real = tokens.count
        rank = _rank_in_batch(topk_ids, num_experts, tokens, backend)
    capacity = expert_capacity(real, top_k, num_experts, capacity_factor)
    most = most_rows(num_tokens, tokens.total, top_k, num_experts, capacity_factor, scope)
    return jnp.where(rank < capacity, topk_ids, -1), most


def most_rows(num_tokens: Any, total: Any, top_k: int, num_experts: int, capacity_factor: float, scope: Scope) -> Any:
    """The most choices that one chip can have for an expert: T tokens on the chip, `total` in the batch, all real."""
    counted = num_tokens if scope == "chip" else total
    return min_dim(expert_capacity(counted, top_k, num_experts, capacity_factor), num_tokens * top_k)


def count_dropped(topk_ids: jax.Array, kept_ids: jax.Array, num_experts: int) -> jax.Array:
    """int32 [E]: of the choices in `topk_ids`, how many of each expert are missing from `kept_ids`."""
    lost = (topk_ids != kept_ids)[..., None] & (topk_ids[..., None] == jnp.arange(num_experts))
    return lost.sum((0, 1), dtype=jnp.int32)


def _rank_on_chip(topk_ids: jax.Array, num_experts: int, backend: str) -> jax.Array:
    """int32 [T, K]: how many choices of the same expert go before each on this chip."""
    num_tokens, top_k = topk_ids.shape
    # All first choices, then all second ones.
    plan = make_plan(topk_ids.T.reshape(-1, 1), num_experts, backend=backend)
    row = plan.inverse.reshape(top_k, num_tokens).T
    return row - plan.offsets[jnp.maximum(topk_ids, 0)]


def _rank_in_batch(topk_ids: jax.Array, num_experts: int, tokens: Tokens, backend: str) -> jax.Array:
    """int32 [T, K]: how many choices of the same expert go before each in the whole batch.

    A run of tokens that are neighbours in the batch goes before or after every other run as a whole. So chips tell
    each other how many choices of each expert every run of theirs makes, and where it begins.
    """
    rank = _rank_on_chip(topk_ids, num_experts, backend)
    if not tokens.axes:
        return rank
    num_tokens, top_k = topk_ids.shape
    runs = topk_ids.reshape(num_tokens // tokens.run, tokens.run, top_k)
    own = (runs[..., None] == jnp.arange(num_experts)).sum(1, dtype=jnp.int32)  # [runs, K, E]
    begin = tokens.index[:: tokens.run]
    every = tokens.gather(own).reshape(-1, top_k, num_experts)
    every_begin = tokens.gather(begin).reshape(-1)
    before_here = _before(own, begin, begin)
    before = _before(every, every_begin, begin)
    shift = before - before_here  # [runs, K, E]
    run = jnp.arange(num_tokens, dtype=jnp.int32)[:, None] // tokens.run
    return rank + shift[run, jnp.arange(top_k, dtype=jnp.int32), jnp.maximum(topk_ids, 0)]


def _before(counts: jax.Array, begins: jax.Array, own_begins: jax.Array) -> jax.Array:
    """int32 [own runs, K, E]: choices that go before the k-th ones of each own run: earlier k's, then earlier runs'.

    Args:
      counts: int32 [runs, K, E].
      begins: int32 [runs], the first token of each.
      own_begins: int32 [own runs].
    """
    of_each_k = counts.sum(0, dtype=jnp.int32)
    of_earlier_k = running_sums(of_each_k) - of_each_k
    earlier = (begins < own_begins[:, None]).astype(jnp.int32)
    return of_earlier_k + jnp.einsum("or,rke->oke", earlier, counts, preferred_element_type=jnp.int32)
