"""Prefill and decoding with a cache: what they give is what whole sequences give at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import MoEConfig
from moejax.models import AttentionConfig, BlockConfig, DecoderBlock, KVCache, MLPConfig
from tests.helpers import LIMIT, normal, raises_saying, relative_error

ATTENTION = AttentionConfig(32, 4, 2, 8, qk_norm=True, dtype=jnp.float32)
FEED_FORWARDS = {
    "experts": MoEConfig(32, 16, 4, 2, dtype=jnp.float32),
    "dense": MLPConfig(32, 16, dtype=jnp.float32),
}
SLOTS, LONGEST = 3, 9


def block_of(name: str) -> DecoderBlock:
    return DecoderBlock(BlockConfig(ATTENTION, FEED_FORWARDS[name]), rngs=nnx.Rngs(0))


def empty() -> KVCache:
    return KVCache.empty(ATTENTION, num_slots=SLOTS, max_length=LONGEST)


@nnx.jit
def whole(block, x):
    return block(x)[0]


@nnx.jit
def prefill(block, x, cache, slots, lengths):
    y, _, cache = block.prefill(x, cache, slots=slots, lengths=lengths)
    return y, cache


@nnx.jit(donate_argnames="cache")
def decode(block, x, cache, active):
    y, _, cache = block.decode(x, cache, active=active)
    return y, cache


@pytest.mark.parametrize("name", FEED_FORWARDS)
@pytest.mark.quick("dense")
def test_slots_that_come_and_go_give_what_whole_sequences_give(rng, name):
    """Five sequences of any lengths in three slots: prompts start wherever a slot is idle, and end one by one."""
    block, cache = block_of(name), empty()
    ends = [LONGEST, 4, 6, 5, 3]
    sequences = normal(rng, len(ends), LONGEST, 32)
    expected = np.asarray(whole(block, sequences))
    waiting, running, checked = list(range(len(ends))), {}, 0
    while waiting or running:
        slots, lengths, prompts = np.full(2, -1, np.int32), np.zeros(2, np.int32), np.zeros((2, 4, 32), np.float32)
        idle = [slot for slot in range(SLOTS) if slot not in running]
        for place, slot in enumerate(idle[:2]):
            if waiting:
                number = waiting.pop(0)
                length = int(rng.integers(1, min(4, ends[number])))
                slots[place], lengths[place], prompts[place, :length] = slot, length, sequences[number, :length]
                running[slot] = (number, length)
        y, cache = prefill(block, jnp.asarray(prompts), cache, jnp.asarray(slots), jnp.asarray(lengths))
        for place, slot in enumerate(slots):
            if slot >= 0:
                number, length = running[int(slot)]
                assert relative_error(y[place, :length], expected[number, :length]) < 1e-5
        active = np.array([slot in running for slot in range(SLOTS)])
        x = rng.standard_normal((SLOTS, 1, 32), np.float32)
        for slot, (number, length) in running.items():
            x[slot, 0] = sequences[number, length]
        before = np.asarray(cache.lengths)
        y, cache = decode(block, jnp.asarray(x), cache, jnp.asarray(active))
        np.testing.assert_array_equal(cache.lengths, before + active)
        np.testing.assert_array_equal(y[~active], x[~active])
        for slot, (number, length) in list(running.items()):
            assert relative_error(y[slot, 0], expected[number, length]) < 1e-5
            checked += 1
            running[slot] = (number, length + 1)
            if length + 1 == ends[number]:
                del running[slot]
    assert checked >= sum(ends) - 3 * len(ends)


def test_a_donated_cache_is_changed_in_place(rng):
    block, cache = block_of("dense"), empty()
    _, after = decode(block, normal(rng, SLOTS, 1, 32), cache, jnp.ones(SLOTS, bool))
    assert cache.keys.is_deleted()
    assert (after.lengths == 1).all()


def test_a_full_slot_shows(rng):
    block, x = block_of("dense"), normal(rng, SLOTS, 1, 32)
    full = jnp.array([LONGEST, LONGEST, 2], jnp.int32)
    cache = KVCache(*(normal(rng, SLOTS, LONGEST, 2, 8) for _ in range(2)), full)
    active = jnp.array([True, False, True])
    with raises_saying(ValueError, "active must be false for slots that are full, got [0]"):
        block.decode(x, cache, active=active)
    before = jax.tree.map(np.asarray, cache)
    y, after = decode(block, x, cache, active)
    assert np.isnan(y[0]).all()
    assert np.isfinite(y[1:]).all()
    np.testing.assert_array_equal(after.keys[:2], before.keys[:2])
    np.testing.assert_array_equal(after.lengths, [LONGEST, LONGEST, 3])


def test_what_does_not_fit_is_refused():
    block, cache, x = block_of("dense"), empty(), jnp.zeros((2, 4, 32))
    with raises_saying(ValueError, "slots must be integer [2], got", "int32[3]"):
        block.prefill(x, cache, slots=jnp.arange(3))
    with raises_saying(ValueError, "slots must be from 0 to 2, or −1 for a sequence that is not kept, got [0, 3]"):
        block.prefill(x, cache, slots=jnp.array([0, 3]))
    with raises_saying(ValueError, "slots must be another one for each sequence, got [1, 1]"):
        block.prefill(x, cache, slots=jnp.array([1, 1]))
    with raises_saying(ValueError, "lengths must be from 0 to 4", "got [5, 1]"):
        block.prefill(x, cache, slots=jnp.arange(2), lengths=jnp.array([5, 1]))
    with raises_saying(TypeError, "lengths must be an array, got list"):
        block.prefill(x, cache, slots=jnp.arange(2), lengths=[3, 4])
    with raises_saying(ValueError, "lengths must be integer [2], got", "int32[3]"):
        block.prefill(x, cache, slots=jnp.arange(2), lengths=jnp.arange(3))
    with raises_saying(ValueError, "x must be sequences of at most max_length=9 tokens of the cache, got 10"):
        block.prefill(jnp.zeros((2, 10, 32)), cache, slots=jnp.arange(2))
    with raises_saying(ValueError, "x must be [3, 1, H], a token for each slot of the cache, got [2, 4, 32]"):
        block.decode(x, cache)
    with raises_saying(ValueError, "x must be [3, 1, H], a token for each slot of the cache, got [2, 1, 32]"):
        block.decode(jnp.zeros((2, 1, 32)), cache, active=jnp.ones(3, bool))
    with raises_saying(TypeError, "slots must be an array, got None"):
        block.prefill(x, cache, slots=None)
    with raises_saying(ValueError, "active must be bool [3], got", "int32[3]"):
        block.decode(jnp.zeros((3, 1, 32)), cache, active=jnp.arange(3))
    other = KVCache.empty(AttentionConfig(32, 4, 4, 8), num_slots=3, max_length=9)
    with raises_saying(ValueError, "cache.keys must be float32[S, M, 2, 8], got 'bfloat16[3, 9, 4, 8]'"):
        block.decode(jnp.zeros((3, 1, 32)), other)
    with raises_saying(TypeError, "cache must be a KVCache"):
        block.decode(jnp.zeros((3, 1, 32)), None)
    with raises_saying(TypeError, "config must be the AttentionConfig of the block, got str"):
        KVCache.empty("attention", num_slots=1, max_length=9)
    with raises_saying(ValueError, "num_slots must be a whole number of at least 1, got 0"):
        KVCache.empty(ATTENTION, num_slots=0, max_length=9)


@pytest.mark.parametrize("name", FEED_FORWARDS)
def test_padding_behind_a_prompt_comes_out_as_it_came_in(rng, name):
    x = normal(rng, 2, 4, 32)
    y, _ = prefill(block_of(name), x, empty(), jnp.arange(2), jnp.array([3, 1]))
    np.testing.assert_array_equal(y[0, 3:], x[0, 3:])
    np.testing.assert_array_equal(y[1, 1:], x[1, 1:])


def test_lengths_that_are_not_known_are_kept_within_the_prompt(rng):
    _, cache = prefill(block_of("dense"), normal(rng, 2, 4, 32), empty(), jnp.arange(2), jnp.array([-3, 99]))
    np.testing.assert_array_equal(cache.lengths[:2], [0, 4])


def test_a_slot_forgets_a_fault_of_its_last_sequence(rng):
    block, x, token, slots = block_of("dense"), normal(rng, 1, 4, 32), normal(rng, 3, 1, 32), jnp.array([0])
    _, _, broken = block.prefill(x.at[0, 3].set(jnp.nan), empty(), slots=slots)
    y, expected = (block.decode(token, block.prefill(x[:, :2], c, slots=slots)[2])[0] for c in (broken, empty()))
    np.testing.assert_array_equal(y[0], expected[0])


def test_an_adapter_in_float32_in_the_place_of_a_linear_in_bf16(rng):
    """The cache, and what is attended to, stay in the dtype of the configuration."""
    config = AttentionConfig(32, 4, 2, 8)
    block = DecoderBlock(BlockConfig(config, MLPConfig(32, 16)), rngs=nnx.Rngs(0))
    block.attention.qkv = nnx.LoRA(32, 4, 64, base_module=block.attention.qkv, rngs=nnx.Rngs(1))
    x = normal(rng, 1, 3, 32, dtype="bfloat16")
    cache = KVCache.empty(config, num_slots=1, max_length=4)
    _, _, cache = block.prefill(x[:, :2], cache, slots=jnp.array([0]))
    y, _, cache = block.decode(x[:, 2:], cache)
    assert y.dtype == cache.keys.dtype == jnp.bfloat16
    assert relative_error(y, block(x)[0][:, 2:]) < LIMIT["bfloat16"]
