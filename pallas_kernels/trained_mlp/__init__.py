"""The experts of one chip on its tokens, as training takes them: with a backward pass of their own.

    y[t] = Σ_k w[t, k] · down(act(gate(x[t])) · up(x[t]))         by the experts that token t chose

`trained` is dispatch, gate/up, the activation with the rows' weights, down, and the sum. Its tangent is `moved`, which
takes tokens, the plan, the product of gate and up, and weights as products take them: no more is kept for a gradient.

`moved` is transposed as a whole, not operator by operator. So the cotangent of y is rounded to 8 bits once a token
and copied to rows then, tokens in 8 bits are widened before they are copied, and no row is read only to be rounded.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.plan import Plan
from pallas_kernels.quantize import QTensor, Rounded, RoundedWeights, Rows, Weights
from pallas_kernels.trained_mlp.settings import Settings, fits
from pallas_kernels.trained_mlp.tangent import trained


def trained_mlp(
    x: Rows,
    row_weights: jax.Array,
    plan: Plan,
    gate_up: Weights,
    down: Weights,
    *,
    gate_up_bias: jax.Array | None,
    settings: Settings,
    preferred_element_type: jax.typing.DTypeLike,
    backend: str = "auto",
) -> jax.Array:
    """The sum over each token's choices of what the experts make of it, times the choice's weight.

    Args:
      x: tokens [T, H]; a `Rounded` with scales "1x128", or a QTensor, which takes no gradient, with `quantization`.
      row_weights: float32 [R], of the choices in the plan's order; zeros for rows that hold no token.
      plan: of the choices.
      gate_up: [E, H, 2, I], gate first, or that as [E, H, 2I], or [E, 2I, H]; `RoundedWeights` hold an array of one of
        the first two, and layouts of the second. Arrays are cast as `settings` say.
      down: [E, I, H] or [E, H, I], likewise.
      gate_up_bias: [E, 2I] or None.
      settings: see there.
      preferred_element_type: of the result.
      backend: of all operators.

    Returns:
      [T, H].
    """
    array: Any = x
    in_8_bits = None
    if isinstance(x, Rounded):
        array, in_8_bits = x.array, x.in_8_bits
    elif isinstance(x, QTensor):
        array, in_8_bits = None, x
    weights: dict[str, Any] = {}
    for name, w in (("gate_up", gate_up), ("down", down)):
        if isinstance(w, RoundedWeights):
            weights |= {name: w.array, f"{name}_in_8_bits": jax.lax.stop_gradient((w.k_major, w.n_last))}
        else:
            weights |= {name: jax.lax.stop_gradient(w) if isinstance(w, QTensor) else w, f"{name}_in_8_bits": None}
    return trained(
        backend,
        x=array,
        x_in_8_bits=jax.lax.stop_gradient(in_8_bits),
        row_weights=row_weights,
        plan=plan,
        **weights,
        gate_up_bias=gate_up_bias,
        settings=settings,
        out_dtype=jnp.dtype(preferred_element_type),
    )


__all__ = ["Settings", "fits", "trained_mlp"]
