"""Which chip gets which tokens, and that a function of tokens does not notice."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sharding.partition import Axes, Partition
from sharding.per_chip import choose_layout, per_chip
from tests.helpers import mesh_of, normal, relative_error

WIDTH = 3
DEFAULT = Partition()


def axes_of(partition: Partition = DEFAULT, **sizes: int) -> Axes:
    kinds = (AxisType.Auto,) * len(sizes)
    return partition.on(jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes), kinds))


DATA_EXPERT = axes_of(data=2, expert=4)


@pytest.mark.parametrize(
    ("leading", "lies", "layout"),
    [
        ((16, 3), None, (("data", "expert"), ())),
        ((2, 12), None, (("data",), ("expert",))),
        ((4, 2), None, None),  # after two chips for the first dimension, four fit nowhere
        ((3, 8), None, ((), ("data", "expert"))),
        ((6, 20), None, (("data",), ("expert",))),
        ((3, 5), None, None),
        ((8,), None, (("data", "expert"),)),
        ((9,), None, None),
        ((), None, None),
        ((1, 1), None, None),
        # What is split already stays where it is.
        ((8, 8), PartitionSpec("expert", None, None), (("expert", "data"), ())),
        ((4, 8), PartitionSpec("expert", None, None), (("expert",), ("data",))),
        ((8, 8), PartitionSpec(None, "expert", None), (("data",), ("expert",))),
        ((8, 8), PartitionSpec(None, ("data", "expert"), None), ((), ("data", "expert"))),
        ((8, 8), PartitionSpec("data", None, "expert"), (("data", "expert"), ())),  # the last is not a token's
        ((8, 8), PartitionSpec("other", None, None), (("data", "expert"), ())),
    ],
    ids=str,
)
def test_layouts(leading, lies, layout):
    assert choose_layout(leading, lies, DATA_EXPERT) == layout


def test_layouts_that_the_partition_says():
    by_dimension = axes_of(Partition(tokens=(("data", "fsdp"), "expert")), data=2, fsdp=2, expert=2)
    assert choose_layout((4, 6, 5), None, by_dimension) == (("data", "fsdp"), ("expert",), ())
    anywhere = PartitionSpec(None, None, ("data", "expert"))
    assert choose_layout((4, 6, 5), anywhere, by_dimension) == (("data", "fsdp"), ("expert",), ())
    assert choose_layout((4, 5), None, by_dimension) is None
    assert choose_layout((4,), None, by_dimension) is None


def test_layouts_of_whole_sequences():
    assert choose_layout((8, 8), None, DATA_EXPERT, whole_sequences=True) == (("data", "expert"), ())
    assert choose_layout((2, 4, 8), None, DATA_EXPERT, whole_sequences=True) == (("data",), ("expert",), ())
    assert choose_layout((4, 8), None, DATA_EXPERT, whole_sequences=True) is None
    lies = PartitionSpec("data", "expert", None)
    assert choose_layout((8, 8), lies, DATA_EXPERT, whole_sequences=True) == (("data", "expert"), ())
    assert choose_layout((8,), None, DATA_EXPERT, whole_sequences=True) is None
    by_dimension = axes_of(Partition(tokens=(("data",), ("expert",))), data=2, expert=2)
    assert choose_layout((4, 4), None, by_dimension, whole_sequences=True) is None


def test_axes_of_one_chip_are_named_where_there_is_a_dimension():
    """Inside another `jax.shard_map` what is on every chip is told from what varies over an axis of one chip."""
    assert choose_layout((4, 3), None, axes_of(data=1, expert=4)) == (("data", "expert"), ())
    assert choose_layout((), None, axes_of(data=1, expert=1)) is None


def test_every_layout_gives_each_axis_once_to_a_dimension_that_it_divides():
    sizes = (1, 2, 3, 4, 6, 8, 12)
    entries = (None, "data", "expert", ("expert", "data"))
    for leading, lies in itertools.product(itertools.product(sizes, repeat=2), itertools.product(entries, repeat=2)):
        names = [name for entry in lies for name in (entry if isinstance(entry, tuple) else (entry,)) if name]
        if len(set(names)) < len(names):
            continue
        layout = choose_layout(leading, PartitionSpec(*lies, None), DATA_EXPERT)
        if layout is not None:
            assert sorted(itertools.chain(*layout)) == ["data", "expert"]
            assert all(size % DATA_EXPERT.size(axes) == 0 for size, axes in zip(leading, layout, strict=True))
        if math.prod(leading) % 8:
            assert layout is None


def look_at_tokens(rows, params, tokens, axes, static):
    """Weighs each token by its place in the batch; says how tokens lie, and sums over all of them."""
    del axes
    num_tokens = rows.shape[0]
    run = tokens.run or num_tokens
    first_of_run = jnp.repeat(tokens.index[::run], run, total_repeat_length=num_tokens)
    strays = (tokens.index - first_of_run != jnp.arange(num_tokens) % run).sum()
    is_real = tokens.keep(jnp.ones((num_tokens, 1), bool), False)
    y = tokens.keep(rows * tokens.index[:, None] * params["scale"])
    sums = {
        "x": tokens.sum(tokens.keep(rows).sum(0)),
        "count": jnp.int32(tokens.count),
        "of sequences": tokens.per_sequence(jnp.ones((num_tokens, 1))),
        "strays": tokens.sum(strays),
        "static": jnp.int32(static),
    }
    return (y, is_real, tokens.index[:, None]), sums


def in_numpy(x, mask, static):
    """What that gives."""
    leading = x.shape[:-1]
    total, length = math.prod(leading), leading[-1] if leading else 1
    rows, real = np.asarray(x, np.float64).reshape(-1, WIDTH), np.asarray(mask).reshape(-1)
    y = np.where(real[:, None], 2 * rows * np.arange(total)[:, None], 0)
    sums = {
        "x": rows[real].sum(0),
        "count": max(real.sum(), 1),
        "of sequences": real.reshape(-1, length).sum(1)[:, None],
        "strays": 0,
        "static": static,
    }
    return (y.reshape(x.shape), real.reshape(*leading, 1), np.arange(total).reshape(*leading, 1)), sums


def run(x, mask=None, *, mesh=None, partition=DEFAULT, static=7, body=look_at_tokens, **options):
    over = {} if mesh is None else {"mesh": mesh, "axes": partition.on(mesh), "specs": {"scale": PartitionSpec()}}
    params = {"scale": jnp.float32(2)}
    return per_chip(body, x, params, static, leading=x.shape[:-1], mask=mask, **over, **options)


def check(got, x, mask=None, static=7):
    expected = in_numpy(x, np.ones(x.shape[:-1], bool) if mask is None else mask, static)
    for value, reference in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert value.shape == np.shape(reference)
        np.testing.assert_allclose(value, reference, rtol=1e-5, atol=1e-5)


def place(x, mesh, *spec):
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))


SHAPES = [(), (5,), (16,), (8, 6), (2, 12), (3, 8), (3, 5), (2, 3, 4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("is_masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("chips", [1, 8])
@pytest.mark.quick("8-masked-(3, 5)", "8--(5,)", "1-masked-(8, 6)")
def test_any_leading_dimensions(chips, is_masked, shape, rng):
    """Some are split as they are, some have to be cut anew and padded."""
    x, mask = normal(rng, *shape, WIDTH), jnp.asarray(rng.random(shape) < 0.7) if is_masked else None
    check(run(x, mask, mesh=mesh_of(data=2, expert=4) if chips > 1 else None), x, mask)


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("spec", [("expert",), (None, "data"), ("data", "expert"), (None, ("expert", "data"))], ids=str)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.quick(
    "auto-(None, 'data')-jit",
    "auto-(None, ('expert', 'data'))-jit",
    "explicit-('data', 'expert')-eager",
    "explicit-('expert',)-eager",
)
def test_tokens_are_taken_as_they_lie(axis_type, spec, jitted, rng):
    mesh, x = mesh_of(axis_type, data=2, expert=4), normal(rng, 8, 16, WIDTH)
    mask = jnp.asarray(rng.random((8, 16)) < 0.7)
    with jax.set_mesh(mesh):
        call = functools.partial(run, mesh=mesh)
        (y, *others), sums = (jax.jit(call) if jitted else call)(place(x, mesh, *spec), place(mask, mesh))
    check(((y, *others), sums), x, mask)
    if axis_type == AxisType.Explicit:
        assert y.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(*spec)), 3)


def test_tokens_that_have_to_be_cut_anew_in_an_explicit_mesh(rng):
    mesh, x = mesh_of(AxisType.Explicit, data=2, expert=4), normal(rng, 4, 3, WIDTH)
    with jax.set_mesh(mesh):
        (y, *others), sums = jax.jit(functools.partial(run, mesh=mesh))(place(x, mesh, "expert"))
    check(((y, *others), sums), x)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec("expert")), 3)


@pytest.mark.parametrize(
    ("partition", "shape"),
    [
        (Partition(tokens=(("data", "fsdp"), "expert")), (8, 6)),
        (Partition(tokens=((), ("expert", "data", "fsdp"))), (3, 16)),
        (Partition(tokens=(("data", "fsdp"), "expert")), (3, 7)),
        (Partition(repeated="data"), (8, 6)),
        (Partition(expert=None, repeated=("data", "expert", "fsdp")), (5, 3)),
    ],
    ids=str,
)
def test_partitions(partition, shape, rng):
    x = normal(rng, *shape, WIDTH)
    check(run(x, mesh=mesh_of(data=2, fsdp=2, expert=2), partition=partition), x)


def sums_of_whole_sequences(rows, params, tokens, axes, static):
    """For each token the sum of its sequence, which takes all of it, in order."""
    del params, axes, static
    length = tokens.sequence_length
    is_whole = (tokens.index.reshape(-1, length) == tokens.index[::length, None] + jnp.arange(length)).all()
    sums = tokens.keep(rows).reshape(-1, length, rows.shape[1]).sum(1, keepdims=True)
    y = jnp.broadcast_to(sums, (sums.shape[0], length, rows.shape[1])).reshape(rows.shape)
    return y, tokens.sum((~is_whole).astype(jnp.int32))


@pytest.mark.parametrize("spec", [None, ("data",), (None, "expert")], ids=str)
@pytest.mark.parametrize("sequences", [8, 3])
@pytest.mark.quick("3-('data',)", "3-None", "8-(None, 'expert')")
def test_whole_sequences(sequences, spec, rng):
    mesh = mesh_of(data=2, expert=4)
    x, mask = normal(rng, sequences, 4, WIDTH), jnp.asarray(rng.random((sequences, 4)) < 0.7)
    placed = x if spec is None or sequences == 3 else place(x, mesh, *spec)
    y, broken = run(placed, mask, mesh=mesh, body=sums_of_whole_sequences, whole_sequences=True)
    assert not broken
    expected = np.where(mask[..., None], x, 0).sum(1, keepdims=True)
    np.testing.assert_allclose(y, np.broadcast_to(expected, x.shape), rtol=1e-5, atol=1e-5)


def test_a_tree_of_arrays_and_of_parameters_that_are_split(rng):
    """Each chip has the parameters that the specs give it."""
    mesh, x = mesh_of(expert=4), normal(rng, 4, 3, WIDTH)
    per_token, params = {"a": x, "b": (jnp.arange(12).reshape(4, 3, 1), None)}, (jnp.arange(4.0), None)
    specs = (PartitionSpec("expert"), None)
    (a, b), total = per_chip(
        add_own_parameter, per_token, params, None, leading=(4, 3), specs=specs, mesh=mesh, axes=DEFAULT.on(mesh)
    )
    np.testing.assert_allclose(a, x + np.arange(4)[:, None, None])
    np.testing.assert_array_equal(b, per_token["b"][0] + 1)
    assert float(total) == 6


def add_own_parameter(rows, params, tokens, axes, static):
    del static
    assert axes.ep == 4
    (own,) = params[0]
    return (rows["a"] + own, rows["b"][0] + 1), tokens.sum(own)


def test_equal_calls_are_traced_once(rng):
    traced = []

    def body(rows, params, tokens, axes, static):
        traced.append(static)
        return look_at_tokens(rows, params, tokens, axes, static)

    for mesh, static in itertools.product((None, mesh_of(data=2, expert=4)), (1, 2)):
        for _ in range(3):
            x = normal(rng, 8, 6, WIDTH)
            check(run(x, mesh=mesh, static=static, body=body), x, static=static)
    assert traced == [1, 2, 1, 2]


def mix(rows, params, tokens, axes, static):
    """A sum over the experts' axis, a parameter of this chip, and a loss of all tokens."""
    del static
    y = jnp.tanh(tokens.keep(rows) @ params["w"][0])
    if axes.expert:
        y += jax.lax.psum(y, axes.expert) / 4
    return y, tokens.sum((tokens.keep(y) ** 2).sum())


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.quick("auto-False", "explicit-True")
def test_inside_another_shard_map(axis_type, check_vma, rng):
    """As in a pipeline, whose stages are an axis of their own: values and gradients are those of each stage alone."""
    both, alone = mesh_of(axis_type, stage=2, expert=4), mesh_of(expert=4)
    x, w, mask = normal(rng, 2, 8, WIDTH), normal(rng, 2, 4, WIDTH, WIDTH), jnp.asarray(rng.random(8) < 0.7)
    specs = {"w": PartitionSpec("expert")}

    def of_stage(x, w, mesh):
        y, total = per_chip(
            mix, x, {"w": w}, None, leading=(8,), specs=specs, mesh=mesh, axes=DEFAULT.on(mesh), mask=mask
        )
        return (y**4).sum() + total

    def in_stages(x, w):
        def stage(x, w):
            return of_stage(x[0], w[0], jax.sharding.get_abstract_mesh())[None]

        spec = PartitionSpec("stage")
        over = {"in_specs": (spec, spec), "out_specs": spec, "axis_names": {"stage"}, "check_vma": check_vma}
        return jax.shard_map(stage, **over)(x, w).sum()

    expected = jax.value_and_grad(lambda x, w: sum(of_stage(*each, alone) for each in zip(x, w, strict=True)), (0, 1))
    with jax.set_mesh(both):
        operands = (place(operand, both, "stage") for operand in (x, w))
        got = jax.jit(jax.value_and_grad(in_stages, argnums=(0, 1)))(*operands)
    for value, reference in zip(jax.tree.leaves(got), jax.tree.leaves(expected(x, w)), strict=True):
        assert relative_error(value, reference) < 1e-5
