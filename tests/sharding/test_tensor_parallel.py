"""Moves between chips that share the width of experts: who has what after each, and whole layers of experts of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels.quantize import dequantize, quantize
from sharding.exchange import Way, Wire, exchange
from sharding.partition import Axes, Partition
from sharding.placement import Placement
from sharding.tensor_parallel import gather_columns, gather_tokens, sum_columns, sum_tokens, to_columns, to_tokens
from tests.helpers import LIMIT, normal, relative_error
from tests.sharding.exchange.exchanges import OTHERS

TP, TOKENS, HIDDEN = 4, 3, 8
AXES = ("tensor",)
EACH = PartitionSpec("tensor")


def over_chips(function, *args):
    """function of each chip's [1, …] part of `args`, without that dimension; results stacked."""
    mesh = jax.make_mesh((TP,), AXES, (AxisType.Auto,), devices=jax.devices()[:TP])

    def on_chip(*args):
        args = jax.tree.map(lambda leaf: leaf[0], args)
        return jax.tree.map(lambda leaf: leaf[None], function(*args))

    return jax.jit(jax.shard_map(on_chip, mesh=mesh, in_specs=EACH, out_specs=EACH, check_vma=False))(*args)


@pytest.fixture
def rows(rng):
    """[chips, T, H], whole numbers, so that sums are exact."""
    return jnp.asarray(rng.integers(-50, 50, (TP, TOKENS, HIDDEN)), jnp.float32)


def columns_of(rows):
    """[chips, tp·T, H / tp]: chip c has part c of the columns of every token."""
    return np.stack(np.split(np.asarray(rows).reshape(TP * TOKENS, HIDDEN), TP, axis=1))


def test_gather_tokens(rows):
    everywhere = over_chips(lambda x: gather_tokens(x, AXES), rows)
    np.testing.assert_array_equal(everywhere, np.broadcast_to(rows.reshape(-1, HIDDEN), (TP, TP * TOKENS, HIDDEN)))


def test_sum_tokens(rng):
    partial = jnp.asarray(rng.integers(-50, 50, (TP, TP * TOKENS, HIDDEN)), jnp.float32)
    summed = over_chips(lambda x: sum_tokens(x, AXES), partial)
    np.testing.assert_array_equal(summed, np.asarray(partial).sum(0).reshape(TP, TOKENS, HIDDEN))


def test_to_columns_and_back(rows):
    columns = over_chips(lambda x: to_columns(x, AXES), rows)
    np.testing.assert_array_equal(columns, columns_of(rows))
    np.testing.assert_array_equal(over_chips(lambda x: to_tokens(x, AXES), columns), rows)


def test_gather_columns(rows):
    whole = over_chips(lambda x: gather_columns(x, AXES), columns_of(rows))
    np.testing.assert_array_equal(whole, np.broadcast_to(rows.reshape(-1, HIDDEN), (TP, TP * TOKENS, HIDDEN)))


def test_sum_columns(rng):
    partial = jnp.asarray(rng.integers(-50, 50, (TP, 5, HIDDEN)), jnp.float32)
    summed = over_chips(lambda x: sum_columns(x, AXES), partial)
    np.testing.assert_array_equal(summed, np.stack(np.split(np.asarray(partial).sum(0), TP, axis=1)))


def test_sums_are_made_in_float32():
    """In BF16, 256 + 1 is 256 again."""
    partial = jnp.asarray([256, 1, 1, 1], jnp.bfloat16)[:, None, None] * jnp.ones((TP, TP, TP), jnp.bfloat16)
    for function in (sum_tokens, sum_columns):
        summed = over_chips(lambda x, function=function: function(x, AXES), partial)
        assert summed.dtype == jnp.float32
        np.testing.assert_array_equal(summed, np.full(summed.shape, 259))


@pytest.mark.parametrize(("scaling", "dtype"), [("1x2", "float8_e4m3fn"), ("per_row", "float8_e5m2"), ("1x2", "int8")])
@pytest.mark.quick("per_row-float8_e5m2", "1x2-float8_e4m3fn")
def test_rows_in_8_bits_move_with_their_scales(scaling, dtype, rows):
    """A scale of a whole row goes to every chip, those of blocks go with their columns."""
    loaded = jax.jit(jax.vmap(functools.partial(quantize, dtype=dtype, scaling=scaling)))(rows)
    numbers = jax.jit(jax.vmap(dequantize))
    expected = np.asarray(numbers(loaded))
    everywhere = numbers(over_chips(lambda x: gather_tokens(x, AXES), loaded))
    np.testing.assert_array_equal(everywhere, np.broadcast_to(expected.reshape(-1, HIDDEN), everywhere.shape))
    columns = over_chips(lambda x: to_columns(x, AXES), loaded)
    np.testing.assert_array_equal(numbers(columns), columns_of(expected))
    whole = numbers(over_chips(lambda x: gather_columns(x, AXES), columns))
    np.testing.assert_array_equal(whole, everywhere)


NUM_EXPERTS = 8


def scale_by_part(parts, rows, group_sizes):
    """Experts that multiply by the sum of numbers, of which each chip has a part; NaN in the rows of nobody."""
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(rows.shape[0])
    expert = jnp.minimum(jnp.searchsorted(ends, row, side="right"), parts.shape[0] - 1)
    scaled = rows * parts.sum(1)[expert][:, None].astype(rows.dtype)
    return jnp.where((row < ends[-1])[:, None], scaled, jnp.nan)


@functools.cache
def tensor_parallel(sizes: tuple[int, int, int], partition: Partition, wire: Wire | None, transport: str = "auto"):
    """(x, weights, ids, parts [E, 4]) -> Σ_k weights · Σ parts[expert] · x over (data, expert, tensor) chips."""
    names = ("data", "expert", "tensor")
    mesh = jax.make_mesh(sizes, names, (AxisType.Auto,) * 3, devices=jax.devices()[: np.prod(sizes)])
    axes: Axes = partition.on(mesh)
    way = Way(Placement(NUM_EXPERTS, axes.ep), axes, wire, transport=transport)
    by_token, of_parts = PartitionSpec(axes.tokens), axes.spec(("expert", "mlp"))

    def on_chip(x, weights, ids, parts):
        return exchange(x, weights, ids, scale_by_part, parts, way)

    specs = (by_token, by_token, by_token, of_parts)
    return jax.jit(jax.shard_map(on_chip, mesh=mesh, in_specs=specs, out_specs=by_token, check_vma=False))


MESHES = {
    "tp4": ((1, 1, 4), Partition()),
    "tp4, every chip with all experts": ((1, 2, 4), Partition(expert=None)),
    "ep2 tp2": ((1, 2, 2), Partition()),
    "dp2 ep2 tp2": ((2, 2, 2), Partition()),
    "ep4 tp2": ((1, 4, 2), Partition()),
    "ep8 tp2": ((1, 8, 2), Partition()),  # takes rounds
    "tp of two axes": ((2, 2, 2), Partition(mlp=("data", "tensor"))),
    "tokens in another order": ((2, 2, 2), Partition(tokens=("tensor", "expert", "data"))),
}
every_mesh = pytest.mark.parametrize(("sizes", "partition"), MESHES.values(), ids=MESHES)


def problem(rng, hidden: int = 8, one_sided: bool = False):
    """384 tokens with choices that are not made; if `one_sided`, of which most want the same two experts."""
    ids = rng.integers(-1, 2 if one_sided else NUM_EXPERTS, (384, 2)).astype(np.int32)
    weights = np.where(ids < 0, np.nan, rng.choice([0.25, 0.5, 1, 2], ids.shape)).astype(np.float32)
    x = rng.integers(-8, 9, (384, hidden)).astype(np.float32)
    return x, weights, ids, rng.integers(1, 9, (NUM_EXPERTS, 4)).astype(np.float32)


def plain_sum(x, weights, ids, parts):
    total = jnp.where(ids >= 0, weights * parts.sum(1)[ids], 0).sum(1)
    return x * total[:, None]


@every_mesh
@pytest.mark.parametrize("one_sided", [False, True], ids=["", "one-sided"])
@pytest.mark.quick("-tokens in another order")
def test_experts_of_which_each_chip_has_a_part(one_sided, sizes, partition, rng):
    args = problem(rng, one_sided=one_sided)
    np.testing.assert_array_equal(tensor_parallel(sizes, partition, None)(*args), plain_sum(*args))


@pytest.mark.usefixtures("own_transports")
@pytest.mark.parametrize("transport", OTHERS)
@pytest.mark.quick("routed")
def test_every_transport_carries_parts_too(transport, rng):
    args = problem(rng, one_sided=True)
    np.testing.assert_array_equal(tensor_parallel((2, 2, 2), Partition(), None, transport)(*args), plain_sum(*args))


@every_mesh
@pytest.mark.quick("ep8 tp2")
def test_gradients(sizes, partition, rng):
    _, _, ids, parts = problem(rng, one_sided=True)
    # Positive, so that no sum cancels out and leaves rounding only.
    x, weights, direction = (abs(normal(rng, *shape)) for shape in ((384, 8), ids.shape, (384, 8)))

    def gradients(function):
        def loss(x, weights, parts):
            return (function(x, weights, ids, parts) * direction).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, weights, jnp.asarray(parts))

    got, expected = gradients(tensor_parallel(sizes, partition, None)), gradients(plain_sum)
    for gradient, reference in zip(got, expected, strict=True):
        assert relative_error(gradient, reference) < LIMIT["float32"]


@pytest.mark.parametrize("wire", [Wire(), Wire("int8", "per_row"), Wire("float8_e5m2", "1x64")], ids=str)
@pytest.mark.quick("*float8_e4m3fn*")
def test_rows_that_travel_in_8_bits_are_rounded_once(wire, rng):
    hidden = 256
    _, weights, ids, parts = problem(rng, hidden)
    x = normal(rng, 384, hidden)
    y = tensor_parallel((2, 2, 2), Partition(), wire)(x, weights, ids, parts)
    rounded = dequantize(wire.rounded(x).in_8_bits)
    assert relative_error(y, plain_sum(rounded, weights, ids, parts)) < LIMIT["float32"]
