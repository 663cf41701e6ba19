import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.tracing.unless_differentiated import unless_differentiated, unless_transformed


def fast(x, table, places):
    return x.round() * table[places], places.max()


def differentiable(x, table, places):
    return x * table[places], places.max()


ARGUMENTS = jnp.array([1.25, -2.5]), jnp.array([3.0, 4.0, 5.0]), jnp.array([2, 0])


def test_fast_where_no_gradient_is_asked_for():
    y, largest = jax.jit(lambda *args: unless_differentiated(fast, differentiable, *args))(*ARGUMENTS)
    np.testing.assert_array_equal(y, [5.0, -6.0])
    assert largest == 2


def test_the_other_one_and_its_gradients_elsewhere():
    def loss(x, table, places):
        y, largest = unless_differentiated(fast, differentiable, x, table, places)
        return y.sum(), (y, largest)

    (_, (y, largest)), (dx, dtable) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(*ARGUMENTS)
    np.testing.assert_array_equal(y, [6.25, -7.5])
    assert largest == 2
    np.testing.assert_array_equal(dx, [5.0, 3.0])
    np.testing.assert_array_equal(dtable, [-2.5, 0.0, 1.25])


def test_fast_again_in_what_is_only_recomputed():
    y, _ = jax.jit(jax.checkpoint(lambda *args: unless_differentiated(fast, differentiable, *args)))(*ARGUMENTS)
    np.testing.assert_array_equal(y, [5.0, -6.0])


def test_forward_mode_and_second_derivatives():
    def of(x, table):
        return unless_differentiated(fast, differentiable, x, table, ARGUMENTS[2])[0]

    moved = jnp.array([1.0, -1.0]), jnp.array([0.5, 0.0, 2.0])
    y, dy = jax.jit(lambda *args: jax.jvp(of, args, moved))(*ARGUMENTS[:2])
    np.testing.assert_array_equal(y, [6.25, -7.5])
    np.testing.assert_array_equal(dy, [1.0 * 5.0 + 1.25 * 2.0, -1.0 * 3.0 - 2.5 * 0.5])
    mixed = jax.jacfwd(jax.grad(lambda *args: of(*args).sum(), 0), 1)(*ARGUMENTS[:2])
    np.testing.assert_array_equal(mixed, [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])


def test_what_does_not_move_has_no_derivatives():
    def loss(x):
        return unless_differentiated(fast, differentiable, x, *ARGUMENTS[1:])[0].sum()

    # Of the table, an addition to one of its places would be.
    assert "scatter" not in str(jax.make_jaxpr(jax.grad(loss))(ARGUMENTS[0]))


def test_the_other_one_in_a_batch_too():
    """Of any of the arguments, and of the gradient of a batch and a batch of gradients."""
    x, table, places = ARGUMENTS

    def of(*args):
        return unless_transformed(fast, differentiable, *args)[0]

    np.testing.assert_array_equal(jax.jit(of)(*ARGUMENTS), [5.0, -6.0])
    np.testing.assert_array_equal(jax.grad(lambda x: of(x, table, places).sum())(x), [5.0, 3.0])
    xs, tables = jnp.stack([x, 2 * x]), jnp.stack([table, table + 1])
    np.testing.assert_array_equal(jax.vmap(of, (0, None, None))(xs, table, places), [[6.25, -7.5], [12.5, -15.0]])
    np.testing.assert_array_equal(jax.vmap(of, (None, 0, None))(x, tables, places), [[6.25, -7.5], [7.5, -10.0]])
    of_batch = jax.grad(lambda xs: jax.vmap(of, (0, None, None))(xs, table, places).sum())(xs)
    batch_of = jax.vmap(jax.grad(lambda x: of(x, table, places).sum()))(xs)
    np.testing.assert_array_equal(of_batch, [[5.0, 3.0]] * 2)
    np.testing.assert_array_equal(batch_of, of_batch)
