"""Derivatives of the operators in both modes and of higher order, against those of dense formulas in plain jnp."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.activations import gated_halves
from pallas_kernels.combine import combine
from pallas_kernels.dispatch import dispatch
from pallas_kernels.float32_matmul import float32_matmul
from pallas_kernels.grouped_matmul import grouped_gate_up, grouped_matmul
from pallas_kernels.moved_rows import in_order
from pallas_kernels.plan import make_plan
from pallas_kernels.quantize import Quantization, dequantize, quantize
from pallas_kernels.rms_norm import rms_norm
from pallas_kernels.top_k import softmax_top_k, top_k
from tests.helpers import normal, relative_error
from tests.pallas_kernels.backends import every_backend

T, K, G, H, N = 12, 2, 4, 6, 8
LIMIT = 2e-5


class Case(NamedTuple):
    """An operator, the same in plain jnp, and what both are differentiated for."""

    operator: Callable[..., jax.Array]
    plain: Callable[..., jax.Array]
    operands: tuple[jax.Array, ...]


def dispatch_case(rng, backend="auto") -> Case:
    plan = make_plan(jnp.asarray(rng.integers(-1, G + 1, (T, K)), jnp.int32), G, capacity=5)

    def plain(x):
        return jnp.where((plan.order >= 0)[:, None], x[jnp.maximum(plan.order, 0) // K], 0)

    return Case(lambda x: dispatch(x, plan, backend=backend), plain, (normal(rng, T, H),))


def combine_case(rng, backend="auto") -> Case:
    plan = make_plan(jnp.asarray(rng.integers(-1, G + 1, (T, K)), jnp.int32), G, capacity=5)

    def plain(rows, weights):
        chosen = jnp.where((plan.inverse >= 0)[..., None], rows[jnp.maximum(plan.inverse, 0)], 0)
        return jnp.einsum("tk,tkh->th", weights, chosen, precision="highest")

    operands = normal(rng, plan.order.shape[0], H), normal(rng, T, K)
    return Case(lambda rows, weights: combine(rows, plan, weights, backend=backend), plain, operands)


def top_k_case(rng, *, normalize: bool) -> Case:
    def plain(scores):
        largest = jax.lax.top_k(scores, K)[0]
        return largest / largest.sum(1, keepdims=True) if normalize else largest

    scores = jax.nn.softmax(normal(rng, T, G))
    return Case(lambda scores: top_k(scores, K, normalize=normalize).weights, plain, (scores,))


def softmax_top_k_case(rng, *, normalize: bool) -> Case:
    def plain(logits):
        weights = jax.lax.top_k(jax.nn.softmax(logits), K)[0]
        return weights / weights.sum(1, keepdims=True) if normalize else weights

    return Case(lambda logits: softmax_top_k(logits, K, normalize=normalize).weights, plain, (normal(rng, T, G),))


def in_order_case(rng) -> Case:
    plan = make_plan(jnp.asarray(rng.integers(-1, G + 1, (T, K)), jnp.int32), G, capacity=5)

    def plain(weights):
        return jnp.where(plan.order >= 0, weights.reshape(-1)[jnp.maximum(plan.order, 0)], 0)

    return Case(lambda weights: in_order("auto", weights=weights, plan=plan), plain, (normal(rng, T, K),))


def product_case(
    rng,
    backend="auto",
    *,
    function=grouped_matmul,
    transposed=False,
    depth=H,
    columns=N,
    quantization: Quantization | None = None,
    has_bias=True,
) -> Case:
    sizes = np.array([3, 0, 5, 2, 1])  # of five groups, of which the last four are here: the row past them is no one's
    owner = jnp.asarray([*np.repeat(np.eye(5), sizes, 0), np.zeros(5)], jnp.float32)[:, 1:]

    def rounded(x, scaling):
        """Rounded, as if it were not, to a derivative."""
        if quantization is None:
            return x
        q = dequantize(quantize(jax.lax.stop_gradient(x), quantization.dtype, scaling=scaling))
        return x + jax.lax.stop_gradient(q - x)

    def plain(lhs, rhs, *bias):
        if quantization is not None:
            lhs, rhs = rounded(lhs, quantization.lhs_scaling), rounded(rhs, quantization.rhs_scaling)
        order = "mg,mk,gnk->mn" if transposed else "mg,mk,gkn->mn"
        out = jnp.einsum(order, owner, lhs, rhs, precision="highest")
        out = out + owner @ bias[0] if bias else out
        return gated_halves(out, "silu") if function is grouped_gate_up else out

    def operator(lhs, rhs, *bias):
        return function(
            lhs,
            rhs,
            jnp.asarray(sizes, jnp.int32),
            bias=bias[0] if bias else None,
            group_offset=1,
            transpose_rhs=transposed,
            quantization=quantization,
            backend=backend,
        )

    rhs = normal(rng, G, columns, depth) if transposed else normal(rng, G, depth, columns)
    bias = (normal(rng, G, columns),) if has_bias else ()
    return Case(operator, plain, (normal(rng, T, depth), rhs / np.sqrt(depth), *bias))


product_in_8_bits = functools.partial(product_case, depth=128, columns=256, quantization=Quantization())


def float32_matmul_case(rng, backend="auto") -> Case:
    def plain(lhs, rhs):
        return jnp.dot(lhs, rhs, precision="highest")

    return Case(lambda *both: float32_matmul(*both, backend=backend), plain, (normal(rng, T, H), normal(rng, H, N)))


def rms_norm_case(rng, backend="auto", columns=H) -> Case:
    def plain(x, weight, residual):
        x = x + residual
        y = x * jax.lax.rsqrt((x * x).mean(1, keepdims=True) + 1e-6) * weight
        return jnp.concatenate([y, x])

    def operator(x, weight, residual):
        return jnp.concatenate(rms_norm(x, weight, residual=residual, backend=backend))

    return Case(operator, plain, (normal(rng, T, columns), normal(rng, columns), normal(rng, T, columns)))


CASES: dict[str, Callable[..., Case]] = {
    "dispatch": dispatch_case,
    "combine": combine_case,
    "float32_matmul": float32_matmul_case,
    "rms_norm": rms_norm_case,
    "top_k": functools.partial(top_k_case, normalize=False),
    "top_k normalised": functools.partial(top_k_case, normalize=True),
    "softmax_top_k": functools.partial(softmax_top_k_case, normalize=False),
    "softmax_top_k normalised": functools.partial(softmax_top_k_case, normalize=True),
    "weights in order": in_order_case,
    "matmul": product_case,
    "matmul K-major": functools.partial(product_case, transposed=True, has_bias=False),
    "matmul in 8 bits": product_in_8_bits,
    "matmul in 8 bits K-major": functools.partial(product_in_8_bits, transposed=True),
    "gate/up": functools.partial(product_case, function=grouped_gate_up),
    "gate/up in 8 bits": functools.partial(product_in_8_bits, function=grouped_gate_up),
}


@pytest.fixture(params=CASES)
def case(request, rng) -> Case:
    return CASES[request.param](rng)


def loss(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A scalar of it whose second derivatives are none of them zero."""
    return lambda *operands: jnp.sin(function(*operands).astype(jnp.float32)).sum()


def directions(rng, operands: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return tuple(normal(rng, *x.shape, dtype=x.dtype) for x in operands)


def assert_alike(got: Any, expected: Any, limit: float = LIMIT) -> None:
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        assert relative_error(one, other) < limit


def hvps(function: Callable[..., jax.Array], operands: Any, direction: Any) -> tuple[Any, Any]:
    """The Hessian times `direction`: forward over reverse, and reverse over reverse."""
    gradient = jax.grad(loss(function), tuple(range(len(operands))))

    def along(*operands):
        return sum((g * d).sum() for g, d in zip(gradient(*operands), direction, strict=True))

    return (
        jax.jit(lambda *operands: jax.jvp(gradient, operands, direction)[1])(*operands),
        jax.jit(jax.grad(along, tuple(range(len(operands)))))(*operands),
    )


@pytest.mark.quick("dispatch", "matmul in 8 bits K-major")
def test_forward_mode(case, rng):
    direction = directions(rng, case.operands)
    run, expect = (jax.jit(functools.partial(jax.jvp, f)) for f in (case.operator, case.plain))
    assert_alike(run(case.operands, direction), expect(case.operands, direction))


def test_forward_mode_is_the_limit_of_differences(rng):
    case = product_case(rng, function=grouped_gate_up)
    direction = directions(rng, case.operands)
    step = 1e-2
    ahead, behind = (
        case.operator(*(x + sign * step * d for x, d in zip(case.operands, direction, strict=True))) for sign in (1, -1)
    )
    assert relative_error(jax.jvp(case.operator, case.operands, direction)[1], (ahead - behind) / (2 * step)) < 1e-2


@pytest.mark.quick("gate/up", "combine", "rms_norm")
def test_forward_mode_for_each_operand_alone(case, rng):
    for i, direction in enumerate(directions(rng, case.operands)):

        def of_one(function, i=i):
            return lambda x: function(*case.operands[:i], x, *case.operands[i + 1 :])

        got, expected = (
            jax.jit(functools.partial(jax.jvp, of_one(f)))([case.operands[i]], [direction])
            for f in (case.operator, case.plain)
        )
        assert_alike(got, expected)


@pytest.mark.quick("gate/up", "combine", "top_k")
def test_reverse_mode(case):
    numbers = tuple(range(len(case.operands)))
    got, expected = (jax.jit(jax.grad(loss(f), numbers))(*case.operands) for f in (case.operator, case.plain))
    assert_alike(got, expected)


@pytest.mark.quick("combine", "rms_norm")
def test_hessians_times_a_vector(case, rng):
    direction = directions(rng, case.operands)
    forward, reverse = hvps(case.operator, case.operands, direction)
    expected, _ = hvps(case.plain, case.operands, direction)
    assert_alike(forward, expected, 1e-4)
    assert_alike(reverse, expected, 1e-4)


@pytest.mark.parametrize("name", ["dispatch", "combine", "matmul", "gate/up", "rms_norm"])
@pytest.mark.slow
def test_third_derivatives(name, rng):
    case = CASES[name](rng)
    direction = directions(rng, case.operands)

    def third(function):
        def along(times):
            return loss(function)(*(x + times * d for x, d in zip(case.operands, direction, strict=True)))

        return jax.jit(jax.grad(jax.jacfwd(jax.grad(along))))(1.0)

    assert relative_error(third(case.operator), third(case.plain)) < 1e-3


@pytest.mark.slow
def test_jacobians_and_hessians(rng):
    case = combine_case(rng)
    assert_alike(jax.jacfwd(case.operator, (0, 1))(*case.operands), jax.jacrev(case.plain, (0, 1))(*case.operands))
    got, expected = (jax.hessian(loss(f), (0, 1))(*case.operands) for f in (case.operator, case.plain))
    assert_alike(got[0][1], expected[0][1], 1e-4)
    assert_alike(got[1][1], expected[1][1], 1e-4)


@pytest.mark.slow
def test_cotangents_in_8_bits_have_derivatives(rng):
    case = product_in_8_bits(rng, quantization=Quantization(gradient_dtype="float8_e5m2"))
    direction = directions(rng, case.operands)
    expected, _ = hvps(case.plain, case.operands, direction)
    for got in hvps(case.operator, case.operands, direction):
        for one, other in zip(got, expected, strict=True):
            assert relative_error(one, other) < 0.1


@pytest.mark.quick("combine")
def test_mapped(case, rng):
    several = [
        tuple(x + 0.1 * d for x, d in zip(case.operands, directions(rng, case.operands), strict=True)) for _ in range(3)
    ]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *several)
    numbers = tuple(range(len(case.operands)))
    got = jax.jit(jax.vmap(jax.grad(loss(case.operator), numbers)))(*stacked)
    expected = jax.jit(jax.vmap(jax.grad(loss(case.plain), numbers)))(*stacked)
    assert_alike(got, expected)


def test_mapped_over_groups_alone(rng):
    lhs, rhs = normal(rng, T, H), normal(rng, G, H, N)
    sizes = jnp.array([[3, 0, 5, 4], [12, 0, 0, 0], [0, 1, 2, 3]], jnp.int32)
    got = jax.vmap(lambda sizes: grouped_matmul(lhs, rhs, sizes))(sizes)
    assert_alike(list(got), [grouped_matmul(lhs, rhs, row) for row in sizes])


@pytest.mark.slow
def test_in_a_loop_with_checkpoints(rng):
    case = product_case(rng, columns=H, has_bias=False)

    def model(function, wrap=lambda f: f):
        def layers(x, weights):
            return jax.lax.scan(wrap(lambda x, w: (jnp.tanh(function(x, w)), None)), x, weights)[0]

        return layers

    operands = case.operands[0], jnp.stack([case.operands[1]] * 3)
    for wrap in (lambda f: f, jax.checkpoint):
        got, expected = (
            jax.jit(jax.grad(loss(model(f, wrap)), (0, 1)))(*operands) for f in (case.operator, case.plain)
        )
        assert_alike(got, expected)
        assert_alike(
            hvps(model(case.operator, wrap), operands, operands),
            hvps(model(case.plain, wrap), operands, operands),
            1e-3,
        )


backend = every_backend("grouped_matmul")


@pytest.mark.parametrize(
    "make",
    [
        dispatch_case,
        combine_case,
        functools.partial(rms_norm_case, columns=128),
        functools.partial(product_case, depth=128, columns=128, has_bias=False),
        functools.partial(product_case, function=grouped_gate_up, depth=128, columns=256, has_bias=False),
    ],
    ids=["dispatch", "combine", "rms_norm", "matmul", "gate/up"],
)
@pytest.mark.quick("*-combine")
def test_kernels(backend, make, rng):
    case = make(rng, backend)
    direction = directions(rng, case.operands)
    numbers = tuple(range(len(case.operands)))

    def derivatives(function):
        """The forward-mode one, and that of the gradient."""
        forward = functools.partial(jax.jvp, function)
        of_gradient = functools.partial(jax.jvp, jax.grad(loss(function), numbers))
        return jax.jit(lambda *args: (forward(*args), of_gradient(*args)[1]))(case.operands, direction)

    (got, got_twice), (expected, expected_twice) = (derivatives(f) for f in (case.operator, case.plain))
    assert_alike(got, expected, 1e-4)
    assert_alike(got_twice, expected_twice, 1e-4)
