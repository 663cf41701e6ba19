"""The grouped products as primitives: each is linear in either factor, and its transposes are such products again.

    multiplied(lhs, rhs, bias)   [M, N]      transposed: lhs: multiplied by rhs the other way round, rhs: `correlated`
    correlated(lhs, dout)        [G, K, N]   transposed: both: multiplied
    activated(lhs, rhs, bias)    [M, I]      where a gradient is asked for: multiplied, and the activation in XLA

A factor that was rounded to 8 bits enters all derivatives with its rounded values. Its `_face`, which no implementation
sees, is the array that it was rounded from: tangents and cotangents go to and from the face, past the rounding
(straight-through). A QTensor without a face is a constant.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.activations import Activation, gated_halves
from pallas_kernels.grouped_matmul.group_sizes import bounds
from pallas_kernels.grouped_matmul.weights import in_one_pass, rounded, rounded_both_ways
from pallas_kernels.primitive import Operands, Operator, is_asked_for, is_zero, zero_tangent
from pallas_kernels.quantize import Operand, QTensor, Quantization, Rounded, Rows, is_of_one_row, quantize

GATE_UP_NAME = "moe_gate_up"
"""What `jax.checkpoint` knows the product of gate and up as, before the activation, where a gradient is asked for."""


def _tangent_of(name: str, operands: Operands, tangents: Operands) -> Any:
    """The tangent of a factor, None if it has none: that of its face, if it has one."""
    if operands[f"{name}_face"] is not None:
        tangent = tangents[f"{name}_face"]
    else:
        tangent = None if isinstance(operands[name], QTensor) else tangents[name]
    return None if is_zero(tangent) else tangent


def _multiply_jvp(backend: str, operands: Operands, tangents: Operands) -> tuple[Any, Any]:
    operands, of_dlhs = _in_both_layouts(backend, operands, tangents)
    result = multiplied(backend, **operands)
    tangent = _product_tangent(backend, operands, of_dlhs, tangents)
    return result, zero_tangent(result) if tangent is None else tangent


def _in_both_layouts(backend: str, operands: Operands, tangents: Operands) -> tuple[Operands, Operands]:
    """The operands, and what changes of them for the term of the tangent that is linear in that of lhs.

    A product in 8 bits for the gradient of lhs takes rhs as [G, K, N]. What rounds the weights in one pass writes both
    layouts then, in place of the one that `factors` had it write, of which nobody takes anything now.
    """
    face, quantization = operands["rhs_face"], operands["quantization"]
    if face is None or quantization is None or quantization.gradient_dtype is None:
        return operands, {}
    if _tangent_of("lhs", operands, tangents) is None or not in_one_pass(face, quantization):
        return operands, {}
    k_major, n_last = rounded_both_ways(backend, face, quantization, transposed=operands["face_transposed"])
    return operands | {"rhs": k_major, "transpose_rhs": True}, {"rhs": n_last, "transpose_rhs": False}


def _product_tangent(backend: str, operands: Operands, of_dlhs: Operands, tangents: Operands) -> jax.Array | None:
    """The tangent of `multiplied`, None if it is zero. The bias goes along with another term, which costs nothing."""
    terms: list[Operands] = []
    if (dlhs := _tangent_of("lhs", operands, tangents)) is not None:
        terms.append(of_dlhs | {"lhs": dlhs, "lhs_face": None})
    if (drhs := _tangent_of("rhs", operands, tangents)) is not None:
        transposed = operands["face_transposed" if operands["rhs_face"] is not None else "transpose_rhs"]
        terms.append({"rhs": drhs, "rhs_face": None, "transpose_rhs": transposed})
    dbias = None if is_zero(tangents["bias"]) else tangents["bias"]
    if dbias is not None and not terms:
        ones = jnp.ones((operands["lhs"].shape[0], 1), dbias.dtype)
        rest = {"lhs_face": None, "rhs_face": None, "transpose_rhs": False, "bias": None}
        return multiplied(backend, **operands | rest | {"lhs": ones, "rhs": dbias[:, None]})
    found = [multiplied(backend, **operands | {"bias": None if i else dbias} | term) for i, term in enumerate(terms)]
    return sum(found[1:], start=found[0]) if found else None


def _multiply_transpose(backend: str, dout: jax.Array, operands: Operands) -> Operands:
    lhs, rhs, bias = (operands[name] for name in ("lhs", "rhs", "bias"))
    groups = {name: operands[name] for name in ("group_sizes", "group_offset")}
    found = {}
    if is_asked_for(lhs):
        found["lhs"] = multiplied(
            backend, **_for_dlhs(dout, operands), **groups, bias=None, quantization=None, out_dtype=lhs.aval.dtype
        )
    if is_asked_for(rhs):
        left, right = (dout, None), (lhs, operands["lhs_face"])
        if not operands["transpose_rhs"]:
            left, right = right, left
        found["rhs"] = correlated(
            backend,
            lhs=left[0],
            lhs_face=left[1],
            dout=right[0],
            dout_face=right[1],
            **groups,
            num_groups=rhs.aval.shape[0],
            out_dtype=rhs.aval.dtype,
        )
    if is_asked_for(bias):
        ones = jnp.ones((dout.shape[0], 1), dout.dtype)
        sizes = {"num_groups": bias.aval.shape[0], "out_dtype": bias.aval.dtype}
        sums = correlated(backend, lhs=ones, lhs_face=None, dout=dout, dout_face=None, **groups, **sizes)
        found["bias"] = sums[:, 0]
    return found


def _for_dlhs(dout: jax.Array, operands: Operands) -> Operands:
    """The factors of the gradient of lhs. In 8 bits, both have N last, as Hopper needs it."""
    rhs, k_major = operands["rhs"], operands["transpose_rhs"]
    face = {"rhs_face": operands["rhs_face"], "face_transposed": not operands["face_transposed"]}
    quantization = operands["quantization"]
    if quantization is None or quantization.gradient_dtype is None:
        return face | {"lhs": dout, "lhs_face": None, "rhs": rhs, "transpose_rhs": not k_major}
    group = operands["group_sizes"], operands["group_offset"], rhs.shape[0]
    rows = rounded_rows(dout, quantization.gradient_dtype, quantization.lhs_scaling, *group)
    return face | {"lhs": rows, "lhs_face": dout, "rhs": rhs.mT if k_major else rhs, "transpose_rhs": True}


def rounded_rows(
    x: jax.Array, dtype: str, scaling: str, group_sizes: jax.Array, group_offset: jax.Array, num_groups: int
) -> QTensor:
    """Rows [M, K] in 8 bits. Those that no group of the window owns do not enter a scale that rows share."""
    x = jax.lax.stop_gradient(x)
    if not is_of_one_row(scaling):
        begins, ends = bounds(group_sizes, x.shape[0])
        row = jnp.arange(x.shape[0])
        is_owned = (row >= begins[group_offset]) & (row < ends[group_offset + num_groups - 1])
        x = jnp.where(is_owned[:, None], x, 0)
    return quantize(x, dtype, scaling=scaling)


def _correlate_jvp(backend: str, operands: Operands, tangents: Operands) -> tuple[Any, Any]:
    result = correlated(backend, **operands)
    found = [
        correlated(backend, **operands | {name: tangent, f"{name}_face": None})
        for name in ("lhs", "dout")
        if (tangent := _tangent_of(name, operands, tangents)) is not None
    ]
    return result, sum(found[1:], start=found[0]) if found else zero_tangent(result)


def _correlate_transpose(backend: str, drhs: jax.Array, operands: Operands) -> Operands:
    name, other = ("lhs", "dout") if is_asked_for(operands["lhs"]) else ("dout", "lhs")
    return {
        name: multiplied(
            backend,
            lhs=operands[other],
            lhs_face=operands[f"{other}_face"],
            rhs=drhs,
            rhs_face=None,
            group_sizes=operands["group_sizes"],
            group_offset=operands["group_offset"],
            bias=None,
            transpose_rhs=name == "lhs",
            face_transposed=False,
            quantization=None,
            out_dtype=operands[name].aval.dtype,
        )
    }


def _activate_jvp(backend: str, operands: Operands, tangents: Operands) -> tuple[Any, Any]:
    """Keeps the pre-activations, in the dtype of the result, and nothing else of them."""

    def product(values: Operands) -> Operands:
        return {name: x for name, x in values.items() if name not in ("activation", "activation_limit")}

    operands, of_dlhs = _in_both_layouts(backend, operands, tangents)
    dh = _product_tangent(backend, product(operands), of_dlhs, product(tangents))
    if dh is None:
        result = activated(backend, **operands)
        return result, zero_tangent(result)
    h = checkpoint_name(multiplied(backend, **product(operands)), GATE_UP_NAME)
    activate = functools.partial(
        _activation,
        activation=operands["activation"],
        limit=operands["activation_limit"],
        out_dtype=operands["out_dtype"],
    )
    return jax.jvp(jax.checkpoint(activate, prevent_cse=False), (h,), (dh,))


def _activation(h: jax.Array, *, activation: Activation, limit: float | None, out_dtype: jnp.dtype) -> jax.Array:
    return gated_halves(h.astype(jnp.float32), activation, limit).astype(out_dtype)


def weighed_activation(
    h: jax.Array, row_weights: jax.Array, *, activation: Activation, limit: float | None, out_dtype: jnp.dtype
) -> jax.Array:
    """Pre-activations [M, 2I], and weights float32 [M] -> [M, I]; nothing but these is kept for a gradient."""

    def activate(h: jax.Array, row_weights: jax.Array) -> jax.Array:
        return (gated_halves(h.astype(jnp.float32), activation, limit) * row_weights[:, None]).astype(out_dtype)

    return jax.checkpoint(activate, prevent_cse=False)(h, row_weights)


_HIDDEN = frozenset({"lhs_face", "rhs_face", "face_transposed", "quantization"})

multiplied = Operator(
    "grouped_matmul", "grouped_matmul", jvp=_multiply_jvp, transpose=_multiply_transpose, hidden=_HIDDEN
)
"""See `pallas_kernels.grouped_matmul.grouped_matmul`; `factors` makes its operands."""

activated = Operator("grouped_matmul", "grouped_gate_up", jvp=_activate_jvp, hidden=_HIDDEN)
"""See `pallas_kernels.grouped_matmul.grouped_gate_up`; `factors` makes its operands."""

correlated = Operator(
    "grouped_matmul",
    "grouped_matmul_drhs",
    jvp=_correlate_jvp,
    transpose=_correlate_transpose,
    hidden=frozenset({"lhs_face", "dout_face"}),
)
"""See `pallas_kernels.grouped_matmul.reference.grouped_matmul_drhs`."""


def factors(
    backend: str,
    lhs: Rows,
    rhs: Operand,
    group_sizes: jax.Array,
    group_offset: jax.Array,
    *,
    transpose_rhs: bool,
    quantization: Quantization | None,
) -> Operands:
    """The factors of a product and where their groups lie, rounded if `quantization` says so.

    What is rounded here has K last in rhs, as that is what Hopper needs.
    """
    lhs_face = rhs_face = None
    face_transposed = transpose_rhs
    if isinstance(lhs, Rounded):
        lhs_face, lhs = lhs.array, lhs.in_8_bits
    lhs, rhs = _constant(lhs), _constant(rhs)
    if quantization is not None and not isinstance(lhs, QTensor):
        lhs_face = lhs
        lhs = rounded_rows(lhs, quantization.dtype, quantization.lhs_scaling, group_sizes, group_offset, rhs.shape[0])
    if quantization is not None and not isinstance(rhs, QTensor):
        rhs_face, rhs = rhs, rounded(backend, rhs, quantization, transposed=transpose_rhs)
        transpose_rhs = True
    return {
        "lhs": lhs,
        "lhs_face": lhs_face,
        "rhs": rhs,
        "rhs_face": rhs_face,
        "group_sizes": group_sizes,
        "group_offset": group_offset,
        "transpose_rhs": transpose_rhs,
        "face_transposed": face_transposed,
        "quantization": quantization,
    }


def _constant(operand: Operand) -> Operand:
    """`operand`, which takes no gradient if it is a QTensor."""
    return jax.lax.stop_gradient(operand) if isinstance(operand, QTensor) else operand
