"""The grouped products as primitives: each is linear in either factor, and its transposes are such products again.

    multiplied(lhs, rhs, bias)   [M, N]      transposed: lhs: multiplied by rhs the other way round, rhs: `correlated`
    correlated(lhs, dout, onto)  [G, K, N]   transposed: of lhs and dout: multiplied
    activated(lhs, rhs, bias)    [M, I]      where a gradient is asked for: multiplied, and the activation after it
    pushed(h, terms)             [M, I]      the tangent of that; transposed: the activation's pullback, then the terms'

`pushed` is the activation and the sum of products before it in one, as the pullback of the activation gives in one pass
what the transposes of the products take: an array, and the same in 8 bits.

A factor that was rounded to 8 bits enters all derivatives with its rounded values. Its `_face`, which no implementation
sees, is the array that it was rounded from: tangents and cotangents go to and from the face, past the rounding
(straight-through). A QTensor without a face is a constant. Where the face of lhs holds what the 8 bits say
(`lhs_is_widened`), gradients of rhs, which need that, take the face. Of weights that come in both layouts, `rhs_n_last`
is the one that gradients of lhs take.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.gated_activation import SCALING
from pallas_kernels.gated_activation import gradients as activation
from pallas_kernels.grouped_matmul.group_sizes import bounds
from pallas_kernels.grouped_matmul.of_columns import grouped_matmul_of_columns
from pallas_kernels.grouped_matmul.weights import in_one_pass, rounded, rounded_both_ways
from pallas_kernels.primitive import Operands, Operator, is_asked_for, is_zero, zero_tangent
from pallas_kernels.quantize import (
    Operand,
    QTensor,
    Quantization,
    Rounded,
    RoundedWeights,
    Rows,
    Weights,
    dequantize,
    is_of_one_row,
)
from pallas_kernels.quantize_columns import quantize_columns
from pallas_kernels.quantize_rows import rows_in_8_bits
from pallas_kernels.tracing.gradient_refs import accumulate

_OF_ACTIVATION = ("activation", "activation_limit", "in_8_bits")

_NO_FACES = {"lhs_face": None, "lhs_is_widened": False, "rhs_face": None, "rhs_n_last": None}

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
    k_major, n_last = operands["rhs"], operands["rhs_n_last"]
    if n_last is None:
        k_major, n_last = rounded_both_ways(backend, face, quantization, transposed=operands["face_transposed"])
    return operands | {"rhs": k_major, "transpose_rhs": True}, {"rhs": n_last, "transpose_rhs": False}


def _product_tangent(backend: str, operands: Operands, of_dlhs: Operands, tangents: Operands) -> jax.Array | None:
    """The tangent of `multiplied`, None if it is zero."""
    found = [multiplied(backend, **term) for term in _terms(operands, of_dlhs, tangents)]
    return sum(found[1:], start=found[0]) if found else None


def _terms(operands: Operands, of_dlhs: Operands, tangents: Operands) -> list[Operands]:
    """The products whose sum is the tangent of `multiplied`. The bias goes along with another, which costs nothing."""
    terms: list[Operands] = []
    if (dlhs := _tangent_of("lhs", operands, tangents)) is not None:
        terms.append(of_dlhs | {"lhs": dlhs, "lhs_face": None, "lhs_is_widened": False})
    if (drhs := _tangent_of("rhs", operands, tangents)) is not None:
        transposed = operands["face_transposed" if operands["rhs_face"] is not None else "transpose_rhs"]
        widened: Operands = {}
        if operands["lhs_is_widened"]:
            widened = {"lhs": operands["lhs_face"], "lhs_face": None, "lhs_is_widened": False}
        terms.append(widened | {"rhs": drhs, "rhs_face": None, "rhs_n_last": None, "transpose_rhs": transposed})
    dbias = None if is_zero(tangents["bias"]) else tangents["bias"]
    if dbias is not None and not terms:
        ones = jnp.ones((operands["lhs"].shape[0], 1), dbias.dtype)
        terms.append({"lhs": ones, "rhs": dbias[:, None], "transpose_rhs": False, "bias": None} | _NO_FACES)
        dbias = None
    return [operands | {"bias": None if i else dbias} | term for i, term in enumerate(terms)]


def _multiply_transpose(
    backend: str, dout: jax.Array, operands: Operands, dout_in_8_bits: QTensor | None = None
) -> Operands:
    """`dout_in_8_bits` is what `for_dlhs` would make of dout, where someone has made it."""
    lhs, rhs, bias = (operands[name] for name in ("lhs", "rhs", "bias"))
    groups = {name: operands[name] for name in ("group_sizes", "group_offset")}
    found = {}
    if is_asked_for(lhs):
        found["lhs"] = multiplied(
            backend,
            **for_dlhs(backend, dout, dout_in_8_bits, operands),
            **groups,
            bias=None,
            quantization=None,
            out_dtype=lhs.aval.dtype,
        )
    if is_asked_for(rhs):
        found["rhs"] = accumulate(rhs, functools.partial(_for_drhs, backend, dout, operands))
    if is_asked_for(bias):
        ones = jnp.ones((dout.shape[0], 1), dout.dtype)
        sizes = {"num_groups": bias.aval.shape[0], "out_dtype": bias.aval.dtype}
        sums = correlated(backend, lhs=ones, lhs_face=None, dout=dout, dout_face=None, onto=None, **groups, **sizes)
        found["bias"] = sums[:, 0]
    return found


def _for_drhs(backend: str, dout: jax.Array, operands: Operands, onto: jax.Array | None) -> jax.Array:
    """The gradient of rhs, of which `operands` tell no more than shape and dtype; added to `onto`, if that is given."""
    rows, face, like = operands["lhs"], operands["lhs_face"], operands["rhs"].aval
    sizes, offset, quantization = (operands[name] for name in ("group_sizes", "group_offset", "quantization"))
    if quantization is not None and quantization.weights_gradient_dtype is not None:
        if face is None:
            face = dequantize(rows, dout.dtype) if isinstance(rows, QTensor) else rows
        of_dout = quantize_columns(dout, sizes, dtype=quantization.weights_gradient_dtype, backend=backend)
        of_rows = quantize_columns(face, sizes, dtype=quantization.dtype, backend=backend)
        left, right = (of_dout, of_rows) if operands["transpose_rhs"] else (of_rows, of_dout)
        options: dict[str, Any] = {"preferred_element_type": like.dtype, "backend": backend}
        is_whole = like.shape[0] == sizes.shape[0]
        sums = grouped_matmul_of_columns(left, right, sizes, onto=onto if is_whole else None, **options)
        if is_whole:
            return sums
        sums = jax.lax.dynamic_slice_in_dim(sums, offset, like.shape[0])
        return sums if onto is None else onto + sums
    factors = {"lhs": rows, "lhs_face": face, "dout": dout, "dout_face": None}
    if operands["transpose_rhs"]:
        factors = {"lhs": dout, "lhs_face": None, "dout": rows, "dout_face": face}
    return correlated(
        backend,
        **factors,
        group_sizes=sizes,
        group_offset=offset,
        num_groups=like.shape[0],
        onto=onto,
        out_dtype=like.dtype,
    )


def for_dlhs(backend: str, dout: jax.Array | None, dout_in_8_bits: QTensor | None, operands: Operands) -> Operands:
    """The factors of the gradient of lhs, of dout in either form. In 8 bits, both have N last, as Hopper needs it."""
    rhs, k_major = operands["rhs"], operands["transpose_rhs"]
    face = {
        "rhs_face": operands["rhs_face"],
        "rhs_n_last": None,
        "face_transposed": not operands["face_transposed"],
        "lhs_is_widened": False,
    }
    quantization = operands["quantization"]
    if quantization is None or quantization.gradient_dtype is None:
        return face | {"lhs": dout, "lhs_face": None, "rhs": rhs, "transpose_rhs": not k_major}
    if dout_in_8_bits is None:
        assert dout is not None, "it is here in one form at least"
        group = operands["group_sizes"], operands["group_offset"], rhs.shape[0]
        dout_in_8_bits = rounded_rows(backend, dout, quantization.gradient_dtype, quantization.lhs_scaling, *group)
    return face | {"lhs": dout_in_8_bits, "lhs_face": dout, "rhs": rhs.mT if k_major else rhs, "transpose_rhs": True}


def rounded_rows(
    backend: str,
    x: jax.Array,
    dtype: str,
    scaling: str,
    group_sizes: jax.Array,
    group_offset: jax.Array,
    num_groups: int,
) -> QTensor:
    """Rows [M, K] in 8 bits. Those that no group of the window owns do not enter a scale that rows share."""
    if not is_of_one_row(scaling):
        begins, ends = bounds(group_sizes, x.shape[0])
        row = jnp.arange(x.shape[0])
        is_owned = (row >= begins[group_offset]) & (row < ends[group_offset + num_groups - 1])
        x = jnp.where(is_owned[:, None], x, 0)
    return rows_in_8_bits(x, dtype, scaling=scaling, backend=backend)


def _correlate_jvp(backend: str, operands: Operands, tangents: Operands) -> tuple[Any, Any]:
    result = correlated(backend, **operands)
    found = [
        correlated(backend, **operands | {name: tangent, f"{name}_face": None, "onto": None})
        for name in ("lhs", "dout")
        if (tangent := _tangent_of(name, operands, tangents)) is not None
    ]
    if not is_zero(tangents["onto"]):
        found.append(tangents["onto"])
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
            rhs_n_last=None,
            lhs_is_widened=False,
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
    found = _in_two_steps(backend, operands | {"in_8_bits": None}, tangents)
    if found is None:
        result = activated(backend, **operands)
        return result, zero_tangent(result)
    array, _, tangent = found
    return array, tangent


def _activate_rounded(backend: str, *, in_8_bits: jnp.dtype, out_dtype: jnp.dtype, **operands: Any) -> Any:
    """What is asked for where no gradient is: one kernel."""
    rounded = activated(backend, **operands, out_dtype=in_8_bits)
    return dequantize(rounded, out_dtype), rounded


def _activate_rounded_jvp(backend: str, operands: Operands, tangents: Operands) -> tuple[Any, Any]:
    found = _in_two_steps(backend, operands, tangents)
    if found is None:
        result = activated_and_rounded(backend, **operands)
        return result, jax.tree.map(zero_tangent, result)
    array, rounded, tangent = found
    return (array, rounded), (tangent, jax.tree.map(zero_tangent, rounded))


def _in_two_steps(
    backend: str, operands: Operands, tangents: Operands
) -> tuple[jax.Array, QTensor | None, jax.Array] | None:
    """The product and the activation after it: an array, the same in 8 bits, and its tangent; None if that is zero."""
    in_8_bits = operands["in_8_bits"]
    operands, of_dlhs = _in_both_layouts(backend, operands, tangents)
    terms = _terms(_of_product(operands), _of_product(of_dlhs), _of_product(tangents))
    if not terms:
        return None
    h = checkpoint_name(multiplied(backend, **_of_product(operands)), GATE_UP_NAME)
    options = {
        "h": h,
        "activation": operands["activation"],
        "limit": operands["activation_limit"],
        "out_dtype": operands["out_dtype"],
    }
    array, rounded = activation.gated(
        backend, **options, row_weights=None, in_8_bits=in_8_bits, with_8_bits=in_8_bits is not None
    )
    return array, rounded, pushed(backend, **options, terms=terms)


def _of_product(values: Operands) -> Operands:
    return {name: x for name, x in values.items() if name not in _OF_ACTIVATION}


def _push(backend: str, *, terms: list[Operands], **operands: Any) -> jax.Array:
    """The tangent of the activation of h [M, 2I] for the sum of products `terms`, of each its operands."""
    dh = [multiplied(backend, **term) for term in terms]
    total = sum(dh[1:], start=dh[0])
    return activation.pushed(backend, dh=total, row_weights=None, drow_weights=None, **operands)


def _push_transpose(backend: str, dout: jax.Array, operands: Operands) -> Operands:
    terms = operands["terms"]
    in_8_bits = [_gradient_dtype(operands["h"], term) for term in terms]
    dh, rounded, _, _ = activation.pulled(
        backend,
        **{name: operands[name] for name in ("h", "activation", "limit")},
        row_weights=None,
        dout=dout,
        with_array=True,
        in_8_bits=next((dtype for dtype in in_8_bits if dtype is not None), None),
        with_weights=False,
        with_result=None,
        result_in_8_bits=None,
    )
    return {"terms": [_multiply_transpose(backend, dh, term, rounded) for term in terms]}


def _gradient_dtype(h: jax.Array, term: Operands) -> jnp.dtype | None:
    """The dtype of 8 bits that the gradient of lhs takes the cotangent of h in, if it is rounded with h's pullback."""
    quantization = term["quantization"]
    if not is_asked_for(term["lhs"]) or quantization is None or quantization.gradient_dtype is None:
        return None
    fits = quantization.lhs_scaling == SCALING and h.shape[1] % 256 == 0
    return jnp.dtype(quantization.gradient_dtype) if fits else None


_HIDDEN = frozenset({"lhs_face", "lhs_is_widened", "rhs_face", "rhs_n_last", "face_transposed", "quantization"})

multiplied = Operator(
    "grouped_matmul", "grouped_matmul", jvp=_multiply_jvp, transpose=_multiply_transpose, hidden=_HIDDEN
)
"""See `pallas_kernels.grouped_matmul.grouped_matmul`; `factors` makes its operands."""

activated = Operator("grouped_matmul", "grouped_gate_up", jvp=_activate_jvp, hidden=_HIDDEN)
"""See `pallas_kernels.grouped_matmul.grouped_gate_up`; `factors` makes its operands."""

activated_and_rounded = Operator(_activate_rounded, "grouped_gate_up_rounded", jvp=_activate_rounded_jvp)
"""The same, as an array and as the 8 bits `in_8_bits` that it says."""

pushed = Operator(_push, "grouped_gate_up_tangent", transpose=_push_transpose)
"""The tangent of both; each of its terms has the operands of `multiplied`."""

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
    rhs: Weights,
    group_sizes: jax.Array,
    group_offset: jax.Array,
    *,
    transpose_rhs: bool,
    quantization: Quantization | None,
) -> Operands:
    """The factors of a product and where their groups lie, rounded if `quantization` says so.

    What is rounded here has K last in rhs, as that is what Hopper needs.
    """
    lhs_face = rhs_face = rhs_n_last = None
    lhs_is_widened = False
    face_transposed = transpose_rhs
    if isinstance(lhs, Rounded):
        lhs_is_widened = lhs.is_widened
        lhs_face, lhs = lhs.array, lhs.in_8_bits
    if isinstance(rhs, RoundedWeights):
        if transpose_rhs:
            raise ValueError("rhs that are RoundedWeights lie as [G, K, N], got transpose_rhs=True")
        if quantization is None:
            raise ValueError("rhs that are RoundedWeights are multiplied with a quantization, got None")
        rhs_face, rhs_n_last, rhs, transpose_rhs = rhs.array, jax.lax.stop_gradient(rhs.n_last), rhs.k_major, True
    lhs, rhs = _constant(lhs), _constant(rhs)
    if quantization is not None and not isinstance(lhs, QTensor):
        lhs_face = lhs
        group = group_sizes, group_offset, rhs.shape[0]
        lhs = rounded_rows(backend, lhs, quantization.dtype, quantization.lhs_scaling, *group)
    if quantization is not None and not isinstance(rhs, QTensor):
        rhs_face, rhs = rhs, rounded(backend, rhs, quantization, transposed=transpose_rhs)
        transpose_rhs = True
    return {
        "lhs": lhs,
        "lhs_face": lhs_face,
        "lhs_is_widened": lhs_is_widened,
        "rhs": rhs,
        "rhs_face": rhs_face,
        "rhs_n_last": rhs_n_last,
        "group_sizes": group_sizes,
        "group_offset": group_offset,
        "transpose_rhs": transpose_rhs,
        "face_transposed": face_transposed,
        "quantization": quantization,
    }


def _constant(operand: Operand) -> Operand:
    """`operand`, which takes no gradient if it is a QTensor."""
    return jax.lax.stop_gradient(operand) if isinstance(operand, QTensor) else operand
