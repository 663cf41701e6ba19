"""Under jax's stricter modes: 64 bits, strict promotion of dtypes, and debugging of NaN and infinities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental import checkify

from pallas_kernels.combine import combine
from pallas_kernels.debug import debug_checks
from pallas_kernels.dispatch import dispatch
from pallas_kernels.grouped_matmul import grouped_gate_up, grouped_gate_up_in_8_bits, grouped_matmul
from pallas_kernels.plan import as_ids, make_plan, take_slots
from pallas_kernels.plan.counting_sort import counting_sort
from pallas_kernels.quantize import Quantization, quantize
from pallas_kernels.top_k import top_k, top_k_ids, weights_at
from tests.helpers import LIMIT, normal, relative_error

T, E, K, H, WIDTH = 12, 4, 2, 128, 128

MODES = {
    "64 bits": lambda: jax.enable_x64(True),
    "strict promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "infinities": lambda: jax.debug_infs(True),
    "nan": lambda: jax.debug_nans(True),
}


def with_gradients(function):
    """The value of `function`, and its gradients for all arguments."""

    def run(*args):
        value, pull = jax.vjp(function, *args)
        return value, pull(jnp.ones_like(value))

    return run


def products(x, w, bias, sizes, offset):
    """Grouped products with operands of one dtype and of two, rounded and constant in 8 bits, whole and by window."""
    quantization = Quantization(lhs_scaling="per_tensor", gradient_dtype="float8_e5m2")
    product = functools.partial(grouped_matmul, group_sizes=sizes, group_offset=offset, backend="xla")
    rounded = quantize(w, scaling="per_channel")
    return (
        with_gradients(lambda x, w, bias: product(x, w, bias=bias))(x, w, bias),
        with_gradients(lambda x, w, bias: product(x, w, bias=bias))(x, w.astype("bfloat16"), bias.astype("float32")),
        with_gradients(lambda x, w: product(x, w, quantization=quantization))(x, w[:2]),
        with_gradients(lambda x: product(x, rounded))(x),
        product(quantize(x, scaling="1x128"), rounded),
    )


def gates(x, w, bias, sizes):
    """The fused product with every activation, and with a result in 8 bits."""

    def gate_up(activation):
        limit = 1.0 if activation == "swigluoai" else None
        options = dict(activation=activation, activation_limit=limit, backend="xla")
        return with_gradients(lambda x, w, bias: grouped_gate_up(x, w, sizes, bias=bias, **options))(x, w, bias)

    in_8_bits = [grouped_gate_up_in_8_bits(x, w, sizes, dtype=d, backend="xla") for d in ("float8_e4m3fn", "int8")]
    return [gate_up(name) for name in ("silu", "gelu", "gelu_tanh", "swigluoai", "relu2")], in_8_bits


def plans(ids, begin):
    plan = make_plan(ids, E, backend="xla")
    return (
        plan,
        make_plan(ids, E, capacity=3, backend="xla"),
        take_slots(plan, ids, 3, begin),
        counting_sort(ids.reshape(-1), E, backend="xla"),
        as_ids(ids, E),
    )


def choices(scores):
    def weights(scores):
        return top_k(scores, K, normalize=True, backend="xla").weights

    ids = top_k_ids(scores, K, backend="xla")
    return with_gradients(weights)(scores), ids, weights_at(scores, ids, normalize=False)


def rows(x, weights, ids):
    plan = make_plan(ids, E, backend="xla")
    rows = dispatch(x, plan, backend="xla")
    return (
        with_gradients(lambda x: dispatch(x, plan, backend="xla"))(x),
        dispatch(quantize(x, scaling="1x128"), plan, backend="xla"),
        with_gradients(lambda rows, weights: combine(rows, plan, weights, backend="xla"))(rows, weights),
        with_gradients(lambda rows: combine(rows, plan, backend="xla"))(rows),
    )


def everything(rng, dtype="float32", integer="int32"):
    """Functions of all operators, with arguments of the given types."""
    x, w, bias = normal(rng, T, H), normal(rng, E, H, 2 * WIDTH) / H**0.5, normal(rng, E, 2 * WIDTH)
    x, w, bias = (a.astype(dtype) for a in (x, w, bias))
    ids = jnp.asarray(rng.integers(0, E, (T, K)), integer)
    sizes, offset = jnp.array([5, 0, 3, 2], integer), jnp.zeros((), integer)
    return {
        "choices": (choices, jax.nn.softmax(normal(rng, T, E))),
        "plans": (plans, ids, offset),
        "rows": (rows, x, jnp.ones((T, K), dtype), ids),
        "products": (products, x, w, bias, sizes, offset),
        "gates": (gates, x, w, bias, sizes),
    }


def dtypes(function, *args):
    """Of all results, by tracing alone."""
    return [leaf.dtype.name for leaf in jax.tree.leaves(jax.eval_shape(function, *args))]


GROUPS = ["choices", "plans", "rows", "products", "gates"]


@pytest.mark.parametrize(
    ("mode", "integer"), [("64 bits", "int32"), ("64 bits", "int64"), ("strict promotion", "uint8")]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.quick(
    "choices-float32-64 bits-int64",
    "gates-bfloat16-strict promotion-uint8",
    "plans-bfloat16-strict promotion-uint8",
    "products-bfloat16-strict promotion-uint8",
    "rows-bfloat16-strict promotion-uint8",
)
def test_results_have_the_dtypes_that_they_have_elsewhere(rng, group, dtype, mode, integer):
    expected = dtypes(*everything(rng, dtype)[group])
    with MODES[mode]():
        out = dtypes(*everything(rng, dtype, integer)[group])
    assert out == expected
    assert not [name for name in expected if "64" in name]


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.quick("products-strict promotion")
def test_results_are_what_they_are_elsewhere(rng, group, mode):
    function, *args = everything(rng)[group]
    expected = jax.jit(function)(*args)
    with MODES[mode]():
        out = jax.jit(function)(*args)
    for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(b.dtype, jnp.floating):
            assert relative_error(a, b) < LIMIT["float32"]
        else:
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("scores", ["float64", "bfloat16"])
def test_weights_are_float32_whatever_the_scores(scores):
    with jax.enable_x64(True):
        shape = jax.ShapeDtypeStruct((T, E), scores)
        assert dtypes(lambda scores: top_k(scores, K, normalize=True, backend="xla"), shape) == ["float32", "int32"]
        gradient = jax.grad(lambda scores: top_k(scores, K, backend="xla").weights.sum())
        assert dtypes(gradient, shape) == [scores]


@pytest.mark.parametrize("mode", ["64 bits", "strict promotion"])
def test_symbols_and_checks(mode):
    """Of which jax makes 64 bits where there are such."""
    (t,) = export.symbolic_shape("t")
    sizes = jnp.zeros(E, jnp.int32)
    with MODES[mode]():
        function = jax.jit(lambda x, w, sizes: grouped_matmul(x, w, sizes, backend="xla"))
        shapes = [((t, H), "float32"), ((E, H, WIDTH), "float32"), ((E,), "int32")]
        (out,) = export.export(function)(*(jax.ShapeDtypeStruct(*each) for each in shapes)).out_avals
        plans = jax.jit(lambda ids: make_plan(ids, E, capacity=3, backend="xla"))
        fields = export.export(plans)(jax.ShapeDtypeStruct((t, K), "int32")).out_avals
        with debug_checks():
            jax.eval_shape(checkify.checkify(function), jnp.ones((T, H)), jnp.ones((E, H, WIDTH)), sizes)
    assert out.dtype == jnp.float32
    assert {field.dtype.name for field in fields} == {"int32"}
