"""Exported once for any number of tokens, every operator gives what it gives when it is traced for that number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from pallas_kernels.backend import Unsupported
from pallas_kernels.chips import get_chip
from pallas_kernels.combine import combine
from pallas_kernels.dispatch import dispatch, plan_and_dispatch
from pallas_kernels.grouped_matmul import grouped_gate_up, grouped_gate_up_in_8_bits, grouped_matmul
from pallas_kernels.plan import make_plan, take_slots
from pallas_kernels.plan.counting_sort import counting_sort
from pallas_kernels.quantize import Quantization, ToRound, quantize
from pallas_kernels.top_k import Groups, ranked_top_k, top_k, top_k_ids
from pallas_kernels.tracing.target import targeting
from tests.helpers import LIMIT, normal, raises_saying, relative_error

E, K, H, WIDTH = 4, 2, 128, 128
NUMBERS = [1, 70]
"""Of tokens: fewer than a block has rows, and more."""

(T,) = export.symbolic_shape("t")


def layer(x, scores, w1, w2):
    """The operators one after the other, for tokens [b, 16, H]."""
    tokens, scores = x.reshape(-1, H), scores.reshape(-1, E)
    weights, ids = top_k(scores, K, normalize=True, backend="xla")
    plan = make_plan(ids, E, backend="xla")
    rows = dispatch(tokens, plan, backend="xla")
    h = grouped_gate_up(rows, w1, plan.group_sizes, backend="xla")
    y = grouped_matmul(h, w2, plan.group_sizes, backend="xla")
    return combine(y, plan, weights, backend="xla").reshape(x.shape)


def training_step(*args):
    value, pull = jax.vjp(layer, *args)
    return value, pull(jnp.cos(value))


def product_of_rounded(x, w, sizes):
    """Rounded inside, with one scale for all rows; and its gradients."""
    quantization = Quantization(lhs_scaling="per_tensor", rhs_scaling="per_channel", gradient_dtype="float8_e5m2")
    value, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, quantization=quantization, backend="xla"), x, w)
    return value, pull(jnp.ones_like(value))


def product_with_bias(x, w, bias, sizes):
    value, pull = jax.vjp(lambda *args: grouped_matmul(*args[:2], sizes, bias=args[2], backend="xla"), x, w, bias)
    return value, pull(jnp.cos(value))


FLOATS, IDS = (lambda t: ("float32", t, H)), (lambda t: ("int32", t, K))
SIZES, WEIGHTS = (lambda _: ("int32", E)), (lambda _: ("float32", E, H, 2 * WIDTH))
CASES = {
    "top_k_ids": (lambda scores: top_k_ids(scores, K, backend="xla"), lambda t: ("float32", t, E)),
    "ranked_top_k": (
        lambda scores: ranked_top_k(scores, -scores, K, groups=Groups(2, 1, 1), backend="xla"),
        lambda t: ("float32", t, E),
    ),
    "counting_sort": (lambda keys: counting_sort(keys, E, backend="xla"), lambda t: ("int32", 3 * t + 1)),
    "plan": (lambda ids: make_plan(ids, E, backend="xla"), lambda t: ("uint8", t, K)),
    "plan with a capacity": (lambda ids: make_plan(ids, E, capacity=3, backend="xla"), IDS),
    "plan with room for all": (lambda ids: make_plan(ids, E, capacity=ids.shape[0], backend="xla"), IDS),
    "slots": (lambda ids: take_slots(make_plan(ids, E, backend="xla"), ids, 3, begin=1), IDS),
    "dispatch in 8 bits": (
        lambda x, ids: dispatch(quantize(x, scaling="1x128"), make_plan(ids, E, backend="xla"), backend="xla"),
        FLOATS,
        IDS,
    ),
    "plan and dispatch": (
        lambda x, ids: plan_and_dispatch(ToRound(x, "float8_e4m3fn"), ids, E, backend="xla"),
        FLOATS,
        IDS,
    ),
    "dispatch with a capacity": (
        lambda x, ids: dispatch(x, make_plan(ids, E, capacity=3, backend="xla"), backend="xla"),
        FLOATS,
        IDS,
    ),
    "product with bias": (product_with_bias, FLOATS, WEIGHTS, lambda _: ("float32", E, 2 * WIDTH), SIZES),
    "product rounded inside": (product_of_rounded, FLOATS, WEIGHTS, SIZES),
    "product of rows with scales": (
        lambda x, w, sizes: grouped_matmul(quantize(x, scaling="per_row"), w, sizes, backend="xla"),
        FLOATS,
        WEIGHTS,
        SIZES,
    ),
    "product of known sizes": (
        lambda x, w: grouped_matmul(x, w, jnp.array([1, 0, 50, 3]), backend="xla"),
        FLOATS,
        WEIGHTS,
    ),
    "result in 8 bits": (
        lambda *args: grouped_gate_up_in_8_bits(*args, quantization=Quantization(), backend="xla"),
        FLOATS,
        WEIGHTS,
        SIZES,
    ),
}


def check(function, shapes, numbers, arguments):
    """Compares the exported function with the function itself, for each number of tokens."""
    exported = export.export(jax.jit(function))(*shapes)
    for number in numbers:
        args = arguments(number)
        out, direct = exported.call(*args), jax.jit(function)(*args)
        for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(direct), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            if jnp.issubdtype(a.dtype, jnp.integer):
                np.testing.assert_array_equal(a, b)
            else:
                assert relative_error(a, b) < LIMIT["float32"]


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.quick("dispatch in 8 bits")
def test_operators(rng, name):
    function, *inputs = CASES[name]

    def argument(number, dtype, *shape):
        if shape == (E,):
            return jnp.asarray(rng.multinomial(number - number // 8, np.full(E, 1 / E)), dtype)
        if jnp.issubdtype(dtype, jnp.integer):
            return jnp.asarray(rng.integers(0, E, shape, endpoint=True), dtype)
        return normal(rng, *shape)

    shapes = [jax.ShapeDtypeStruct(shape, dtype) for dtype, *shape in (each(T) for each in inputs)]
    check(function, shapes, NUMBERS, lambda number: [argument(number, *each(number)) for each in inputs])


@pytest.mark.slow
def test_a_layer_and_its_gradients(rng):
    sizes = export.symbolic_shape(f"b, 16, {H}")
    weights = normal(rng, E, H, 2 * WIDTH) / H**0.5, normal(rng, E, WIDTH, H) / WIDTH**0.5
    shapes = [sizes, (*sizes[:2], E), *(w.shape for w in weights)]

    def arguments(batch):
        return normal(rng, batch, 16, H), jax.nn.softmax(normal(rng, batch, 16, E)), *weights

    check(training_step, [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes], [1, 5], arguments)


def test_group_sizes_end_with_the_rows(rng):
    x, w = normal(rng, 40, H), normal(rng, E, H, WIDTH)
    function = jax.jit(lambda *args: grouped_matmul(*args, backend="xla"))
    shapes = [jax.ShapeDtypeStruct(*each) for each in (((T, H), "float32"), (w.shape, "float32"), ((E,), "int32"))]
    out = export.export(function)(*shapes).call(x, w, jnp.array([30, -1, 2**31 - 1, 2**31 - 1], jnp.int32))
    assert relative_error(out, function(x, w, jnp.array([30, 0, 10, 0]))) < LIMIT["float32"]


def test_kernels_leave_it_to_xla():
    def run(backend):
        function = jax.jit(lambda x, ids: dispatch(x, make_plan(ids, E, backend=backend), backend=backend))
        with targeting(get_chip("h200")):
            export.export(function)(jax.ShapeDtypeStruct((T, H), "float32"), jax.ShapeDtypeStruct((T, K), "int32"))

    with pytest.warns(UserWarning, match="falling back to the XLA reference: .*sizes that are numbers, got an operand"):
        run("auto")
    with raises_saying(Unsupported, "plan", "sizes that are numbers", "[2*t]"):
        run("pallas_gpu")


def test_what_is_known_is_still_checked():
    def trace(k):
        return export.export(jax.jit(lambda scores: top_k(scores, k)))(jax.ShapeDtypeStruct((T, E), "float32"))

    with raises_saying(ValueError, "k must be 1 to E = 4", "got 5"):
        trace(5)
