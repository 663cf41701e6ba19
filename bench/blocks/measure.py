"""Measures a case: every contender is checked against our block by XLA; those that are right are timed in turns."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bench.blocks import in_jax, in_torch, ours
from bench.blocks.cases import Case, sizes_of, with_backend
from bench.blocks.ours import Inputs, Run, make_inputs
from bench.hopper.peers import from_torch
from bench.measure.clock import CallTime, torch_wait, wall_times
from bench.measure.errors import check, describe, relative_error

OURS, JAX = "ours", "plain jax"
EAGER, COMPILED = "torch eager", "torch.compile"
CONTENDERS = OURS, JAX, EAGER, COMPILED

_IN_TORCH = EAGER, COMPILED

_TOLERANCE = 3e-2
"""Of what a block adds to BF16 tokens, over the tokens that all sent to the same experts."""


def measure_case(case: Case, *, rounds: int, at_most: int, with_torch: bool) -> dict[str, Any]:
    """The record of a case; under "contenders", figures of each, or "error", the reason why there are none.

    Args:
      case: the block and its tokens.
      rounds: how often each contender is timed.
      at_most: blocks in a row.
      with_torch: whether torch's are contenders.
    """
    inputs = make_inputs(case, at_most=at_most)
    reference = ours.runner(with_backend(case, "xla"), inputs.first)()
    outcomes: dict[str, dict[str, Any]] = {}
    samplers: dict[str, Callable[[], float]] = {}
    for name in CONTENDERS:
        if (reason := _why_not(name, case, with_torch)) is not None:
            outcomes[name] = {"error": reason}
            continue
        try:
            first = _runner(name, case, inputs.first)
            error = _error(_as_jax(name, first()), reference, inputs.x)
            check(error, _TOLERANCE)
            sampler = _sampler(name, first if len(inputs.states) == 1 else _runner(name, case, inputs), inputs)
            sampler()  # what all blocks need may not be there
            samplers[name], outcomes[name] = sampler, {"relative_error": error}
        except Exception as error:  # of memory, say; the other contenders still count
            outcomes[name] = {"error": describe(error)}
    for name, time in _in_turns(samplers, rounds).items():
        outcomes[name] |= {
            "us": time.median_us,
            "min_us": time.min_us,
            "spread_us": time.spread_us,
            "tokens_per_s": case.tokens / time.median_us * 1e6,
            "tflops": case.flops / time.median_us / 1e6,
        }
    sizes = {"shape": case.shape, **sizes_of(case)}
    figures = {"tokens": case.tokens, "flops": case.flops, "blocks": len(inputs.states)}
    return {**sizes, **figures, "note": case.note, "contenders": outcomes}


def _why_not(name: str, case: Case, with_torch: bool) -> str | None:
    """Why a contender cannot run a case, or None."""
    if name in _IN_TORCH:
        return in_torch.why_not(case) if with_torch else "not asked for"
    return in_jax.why_not(case) if name == JAX else None


def _runner(name: str, case: Case, inputs: Inputs) -> Run:
    """A contender on the blocks of `inputs`."""
    if name in _IN_TORCH:
        return in_torch.runner(case, inputs, compiled=name == COMPILED)
    return in_jax.runner(case, inputs) if name == JAX else ours.runner(case, inputs)


def _as_jax(name: str, result: tuple[Any, Any]) -> tuple[Any, Any]:
    return from_torch(result) if name in _IN_TORCH else result


def _sampler(name: str, run: Run, inputs: Inputs) -> Callable[[], float]:
    """What times a contender once, in µs a block."""
    wait = torch_wait if name in _IN_TORCH else jax.block_until_ready
    return lambda: wall_times(run, repeats=1, calls=len(inputs.states), wait=wait).median_us


def _error(result: tuple[Any, Any], reference: tuple[Any, Any], x: jax.Array) -> float:
    """Of what the block added to x [B, L, H], where the experts are the same: rounding can change a close choice."""
    (y, ids), (right, right_ids) = result, reference
    is_same = jnp.ones(x.shape[:-1], bool)
    if right_ids is not None:
        is_same = (jnp.sort(ids, -1) == jnp.sort(right_ids, -1)).all(-1)
    added, expected = (each.astype(jnp.float32) - x.astype(jnp.float32) for each in (y, right))
    flat = (added.reshape(-1, x.shape[-1]), expected.reshape(-1, x.shape[-1]), is_same.ravel())
    return relative_error(*flat) if is_same.any() else float("nan")


def _in_turns(samplers: dict[str, Callable[[], float]], rounds: int) -> dict[str, CallTime]:
    """Each is timed once a round, in alternating order, so that what drifts falls on all of them."""
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    for number in range(rounds):
        for name in samplers if number % 2 == 0 else reversed(samplers):
            samples[name].append(samplers[name]())
    return {name: CallTime.of(times) for name, times in samples.items()}
