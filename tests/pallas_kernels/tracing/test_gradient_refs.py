"""Rules of transposes that see where a cotangent goes."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.hijax import RefAccum, ValAccum
from jax.extend import core
from jax.interpreters import ad, mlir

from pallas_kernels.tracing import gradient_refs
from pallas_kernels.tracing.gradient_refs import AskedInRef, accumulate, define_transpose
from tests.helpers import added_in_refs, additions_to_refs


@pytest.fixture
def tripled():
    """3·x as a primitive, whose transpose adds 3·dy, and 100 where it adds to a ref itself."""

    def transpose(dy, x):
        return [accumulate(x, lambda onto: 3 * dy if onto is None else onto + 3 * dy + 100)]

    primitive = core.Primitive("triple")
    primitive.def_impl(lambda x: 3 * x)
    primitive.def_abstract_eval(lambda x: x)
    mlir.register_lowering(primitive, mlir.lower_fun(lambda x: 3 * x, multiple_results=False))
    ad.primitive_jvps[primitive] = lambda x, dx: (primitive.bind(*x), primitive.bind(*dx))
    define_transpose(primitive, transpose)
    return primitive.bind


ONES = jnp.ones(4)


def test_a_rule_adds_to_a_ref(tripled):
    run = functools.partial(added_in_refs, tripled)
    assert (jax.jit(run)(ONES, ONES, 10 * ONES) == 113).all()
    assert (run(ONES, ONES, 10 * ONES) == 113).all()  # outside of jit
    assert not additions_to_refs(run, ONES, ONES, ONES)


def test_what_goes_to_no_ref_is_returned(tripled):
    assert (jax.grad(lambda x: tripled(x).sum())(ONES) == 3).all()


def test_a_ref_of_what_comes_before_is_left_to_jax(tripled):
    assert (added_in_refs(lambda x: tripled(2 * x), ONES, ONES, 10 * ONES) == 16).all()


def test_without_the_table_jax_adds(monkeypatch, request):
    monkeypatch.setattr(gradient_refs, "_RULES", {})
    run = functools.partial(added_in_refs, request.getfixturevalue("tripled"))
    assert (run(ONES, ONES, 10 * ONES) == 13).all()
    assert additions_to_refs(run, ONES, ONES, ONES) == 1


def test_refs_that_are_none_of_its_own():
    """One that JAX has not made yet, and one that it made of a cotangent of another dtype."""
    aval = jax.typeof(ONES)
    assert type(gradient_refs._asked(RefAccum(aval))) is ad.UndefinedPrimal
    assert type(gradient_refs._asked(RefAccum(aval, jax.new_ref(ONES.astype("bfloat16"))))) is ad.UndefinedPrimal
    assert type(gradient_refs._asked(ValAccum(aval))) is ad.UndefinedPrimal
    assert type(gradient_refs._asked(RefAccum(aval, jax.new_ref(ONES)))) is AskedInRef
