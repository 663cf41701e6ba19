"""Checks of what the parts of a block are called with, whose errors say what was expected and what came."""

import jax
import jax.numpy as jnp
import numpy as np

from moejax.checks import require
from pallas_kernels.arrays import require_arrays, require_given_arrays
from pallas_kernels.dtypes import is_float
from pallas_kernels.tracing.concrete import is_known
from sharding.mesh import split_by_type


def check_tokens(x: jax.Array, hidden_size: int, mask: jax.Array | None = None) -> None:
    """Raises ValueError unless `x` are sequences [B, L, H] of activations, and `mask` is bool [B, L] or None."""
    require_given_arrays(x=x)
    require_arrays(mask=mask)
    is_fit = x.ndim == 3 and x.shape[-1] == hidden_size and 0 not in x.shape
    require(is_fit, "x", f"[B, L, H] with hidden_size={hidden_size} and at least one token", list(x.shape))
    require(is_float(x.dtype), "x", "BF16, FP16 or float32 activations", str(x.dtype))
    if mask is not None:
        _check_array("mask", mask, "bool", x.shape[:-1])


def check_prompts(
    x: jax.Array, slots: jax.Array, lengths: jax.Array | None, *, num_slots: int, max_length: int
) -> None:
    """Raises ValueError unless sequences x [B, L, H] can go into slots; of slots and lengths as far as known."""
    require_given_arrays(slots=slots)
    require_arrays(lengths=lengths)
    batch, length, _ = x.shape
    require(length <= max_length, "x", f"sequences of at most max_length={max_length} tokens of the cache", length)
    _check_array("slots", slots, "integer", (batch,))
    if is_known(slots):
        known = np.asarray(slots)
        wanted = f"from 0 to {num_slots - 1}, or −1 for a sequence that is not kept"
        require(bool(((known >= -1) & (known < num_slots)).all()), "slots", wanted, known.tolist())
        taken = known[known >= 0]
        require(np.unique(taken).size == taken.size, "slots", "another one for each sequence", known.tolist())
    if lengths is not None:
        _check_array("lengths", lengths, "integer", (batch,))
        if is_known(lengths):
            known = np.asarray(lengths)
            is_within = bool(((known >= 0) & (known <= length)).all())
            require(is_within, "lengths", f"from 0 to {length}, the tokens of a sequence of x", known.tolist())


def check_auto_axes(arrays: dict[str, jax.Array]) -> None:
    """Raises ValueError, with its name, for an array whose type says that a mesh of Explicit axes splits it."""
    for name, array in arrays.items():
        over = split_by_type(array)
        got = over and f"{over.spec} on {dict(over.mesh.shape)}"
        require(over is None, name, "whole, or split over a mesh of Auto axes (jax.device_put brings it there)", got)


def check_step(x: jax.Array, active: jax.Array | None, *, is_full: jax.Array) -> None:
    """Raises ValueError unless x [S, 1, H] has a token a slot, `active` is bool [S] or None, and there is room."""
    (num_slots,) = is_full.shape
    wanted = f"[{num_slots}, 1, H], a token for each slot of the cache"
    require(x.shape[:2] == (num_slots, 1), "x", wanted, list(x.shape))
    check_active(active, num_slots)
    if is_known((is_full, active)):
        full = np.flatnonzero(np.asarray(is_full) & (True if active is None else np.asarray(active)))
        require(full.size == 0, "active", "false for slots that are full", full.tolist())


def check_active(active: jax.Array | None, num_slots: int) -> None:
    """Raises ValueError unless `active` is bool [S] or None."""
    require_arrays(active=active)
    if active is not None:
        _check_array("active", active, "bool", (num_slots,))


def _check_array(name: str, array: jax.Array, kind: str, shape: tuple[int, ...]) -> None:
    is_kind = array.dtype == jnp.bool_ if kind == "bool" else jnp.issubdtype(array.dtype, jnp.integer)
    got = f"{array.dtype}{list(array.shape)}"
    require(is_kind and array.shape == shape, name, f"{kind} {list(shape)}", got)
