"""Our block as something to run: as many blocks one after the other as the cache does not hold, as in a model.

inputs = make_inputs(case)
run = runner(case, inputs)
y, topk_ids = run()
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bench.blocks.cases import Case
from bench.inputs.weights import normal
from bench.measure.clock import MAX_COPIES, copies_of
from moejax import MoE
from moejax.models import DecoderBlock, KVCache
from moejax.models.config import BlockConfig

Run = Callable[[], tuple[Any, Any]]
"""A pass through all blocks: the last one's y [B, L, H], and its topk_ids [B, L, K] or None."""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What every contender works on.

    Attributes:
      x: [B, L, H].
      states: parameters of each block.
      cache: that of each block, None for whole sequences.
    """

    x: jax.Array
    states: list[nnx.State]
    cache: KVCache | None

    @property
    def first(self) -> "Inputs":
        """The same with one block only."""
        return dataclasses.replace(self, states=self.states[:1])


def make_inputs(case: Case, *, at_most: int = MAX_COPIES) -> Inputs:
    """Random inputs of a case, with parameters of `at_most` so many blocks."""
    a = case.block.attention
    _, state = nnx.split(jax.jit(_make, static_argnums=0)(case.block))
    cache = None
    if case.kv_len is not None:
        shape = (case.batch, case.kv_len, a.num_key_value_heads, a.head_dim)
        lengths = jnp.full(case.batch, case.kv_len - 1, jnp.int32)
        cache = KVCache(normal(2, shape, dtype=a.dtype), normal(3, shape, dtype=a.dtype), lengths)
    x = normal(1, (case.batch, case.length, a.hidden_size), dtype=a.dtype)
    return Inputs(x, copies_of(state, at_most=at_most), cache)


def runner(case: Case, inputs: Inputs) -> Run:
    """Our block. A decode step writes its token into the cache in place; the next pass writes the same one again."""
    graph, _ = nnx.split(jax.eval_shape(functools.partial(_make, case.block)))
    structure = jax.tree.structure(inputs.states[0])
    caches = [jax.tree.map(jnp.copy, inputs.cache) for _ in inputs.states]

    @jax.jit
    def one(leaves: list[jax.Array], x: jax.Array, cache: KVCache | None) -> tuple[jax.Array, Any, KVCache | None]:
        block, after = nnx.merge(graph, jax.tree.unflatten(structure, leaves)), None
        if cache is None:
            y, aux = block(x)
        else:
            y, aux, after = block.decode(x, cache)
            after = dataclasses.replace(after, lengths=cache.lengths)
        return y, None if aux is None else aux.topk_ids, after

    # A call has a State taken apart in Python, which takes longer than a small block does.
    return in_a_row(one, [jax.tree.leaves(state) for state in inputs.states], inputs.x, caches)


def in_a_row(one: Callable[..., tuple[jax.Array, Any, Any]], blocks: list[Any], x: jax.Array, caches: list[Any]) -> Run:
    """A pass through blocks one after the other, each one(block, x, cache) -> (x, topk_ids, cache), in one program.

    The caches are given away: each pass writes into those of the one before.
    """

    @functools.partial(jax.jit, donate_argnums=2)
    def all_of(blocks: list[Any], x: jax.Array, caches: list[Any]) -> Any:
        ids, after = None, []
        for block, cache in zip(blocks, caches, strict=True):
            x, ids, changed = one(block, x, cache)
            after.append(changed)
        return x, ids, after

    def run() -> tuple[Any, Any]:
        nonlocal caches
        y, ids, caches = all_of(blocks, x, caches)
        return y, ids

    return run


def _make(config: BlockConfig) -> DecoderBlock:
    block = DecoderBlock(config, rngs=nnx.Rngs(0))
    if isinstance(block.feed_forward, MoE) and block.feed_forward.config.precision == "w8a8":
        block.feed_forward = block.feed_forward.quantized()
    return block
