"""Which mesh axes have which role: defaults, names of one's own, flax's rules, and every way to get it wrong."""

import jax
import pytest
from jax.sharding import AxisType, PartitionSpec

from sharding.mesh import make_mesh, mesh_here
from sharding.partition import Axes, Partition, one_or_all
from tests.helpers import raises_saying
from tests.sharding.shard_maps import inside


def mesh_of(**sizes: int) -> jax.sharding.AbstractMesh:
    return jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes))


ALL = mesh_of(tensor=2, data=3, expert=4, fsdp=5)
FOREIGN = mesh_of(a=2, b=3, c=4)


def test_defaults_are_the_axes_of_the_usual_names():
    axes = Partition().on(ALL)
    assert (axes.expert, axes.embed, axes.mlp) == (("expert",), ("fsdp",), ("tensor",))
    assert axes.tokens == ("data", "fsdp", "expert", "tensor")
    assert axes.tokens_by_dimension == ()
    assert (axes.ep, axes.tp, axes.size(axes.embed), axes.size(axes.tokens)) == (4, 2, 5, 120)


def test_defaults_where_the_mesh_has_less():
    axes = Partition().on(make_mesh(ep=4, dp=2))
    assert (axes.expert, axes.embed, axes.mlp, axes.tokens) == (("expert",), (), (), ("data", "expert"))
    assert (axes.ep, axes.tp) == (4, 1)


def test_axes_of_any_name_and_several_in_one_role():
    axes = Partition(expert=("b", "a"), mlp="c").on(FOREIGN)
    assert (axes.expert, axes.mlp, axes.tokens) == (("b", "a"), ("c",), ("b", "a", "c"))
    assert (axes.ep, axes.tp) == (6, 4)
    in_order = Partition(expert="b", embed="a", mlp="c", tokens=("c", "a", "b")).on(FOREIGN)
    assert in_order.tokens == ("c", "a", "b")


def test_a_role_may_be_left_out():
    axes = Partition(expert=None, embed=None, mlp=None).on(ALL)
    assert (axes.expert, axes.embed, axes.mlp) == ((), (), ())
    assert (axes.ep, axes.tp) == (1, 1)
    assert axes.tokens == ("data", "fsdp", "expert", "tensor")


def test_one_axis_of_tokens_need_be_no_tuple():
    assert Partition(tokens="expert") == Partition(tokens=("expert",))
    assert Partition(tokens="expert").on(mesh_of(expert=4)).tokens == ("expert",)


def test_tokens_by_dimension():
    axes = Partition(tokens=(("data", "fsdp"), "expert"), mlp=None, repeated="tensor").on(ALL)
    assert axes.tokens == ("data", "fsdp", "expert")
    assert axes.tokens_by_dimension == (("data", "fsdp"), ("expert",))
    second = Partition(tokens=((), ("data", "fsdp", "expert", "tensor"))).on(ALL)
    assert second.tokens_by_dimension == ((), ("data", "fsdp", "expert", "tensor"))


def test_repeated_axes_split_no_tokens():
    axes = Partition(repeated=("data", "tensor"), mlp=None).on(ALL)
    assert axes.tokens == ("fsdp", "expert")
    assert Partition(expert=None, repeated=("a", "b", "c")).on(FOREIGN).tokens == ()


def test_an_axis_of_length_one_needs_no_role():
    assert Partition(expert="b").on(mesh_of(stage=1, b=4)).tokens == ("b",)


def test_what_a_shard_map_around_has_split_is_not_there():
    """Else the axis of stages would be said to repeat work."""
    mesh = mesh_of(stage=2, expert=4).update_axis_types({"stage": AxisType.Manual})
    axes = Partition().on(mesh)
    assert (axes.expert, axes.tokens, axes.sizes) == (("expert",), ("expert",), (("expert", 4),))


@pytest.mark.parametrize(
    ("partition", "mesh", "parts"),
    [
        (
            Partition(),
            FOREIGN,
            (
                "the mesh has no axis 'expert', which the partition names for 'expert', only ('a', 'b', 'c')",
                "partition=Partition(expert=...)",
                "make it with make_mesh(ep, dp), or pass Partition(expert=None)",
            ),
        ),
        (
            Partition(expert="a", embed="fsdp"),
            FOREIGN,
            ("no axis 'fsdp', which the partition names for 'embed'", "partition=Partition(embed=...)"),
        ),
        (
            Partition(expert="a", mlp=("b", "d")),
            FOREIGN,
            ("no axis 'd', which the partition names for 'mlp'", "partition=Partition(mlp=...)"),
        ),
        (
            Partition(expert="a", tokens=("a", "z")),
            FOREIGN,
            ("no axis 'z', which the partition names for 'tokens'", "partition=Partition(tokens=(...))"),
        ),
        (
            Partition(expert="a", repeated="y"),
            FOREIGN,
            ("no axis 'y', which the partition names for 'repeated'", "partition=Partition(repeated=...)"),
        ),
        (
            Partition(expert="a", mlp="a"),
            FOREIGN,
            ("mesh axis 'a' stands twice in the partition, for 'expert' and for 'mlp'", "splits one of them"),
        ),
        (
            Partition(expert=("a", "b", "a")),
            FOREIGN,
            ("mesh axis 'a' stands twice in the partition, for 'expert' and for 'expert'",),
        ),
        (
            Partition(expert="a", tokens=("a", ("b", "c", "a"))),
            FOREIGN,
            ("mesh axis 'a' stands twice among the axes of tokens, ['a', 'b', 'c', 'a']",),
        ),
        (
            Partition(expert="a"),
            FOREIGN,
            (
                "mesh axes ['b', 'c'] are not among the axes that tokens are split over, ['a'], so that 12 chips",
                "partition=Partition(tokens=('a', 'b', 'c'))",
                "partition=Partition(repeated=('b', 'c'))",
            ),
        ),
        (
            Partition(tokens=("data", "expert")),
            mesh_of(data=2, expert=4, tensor=3),
            ("mesh axes ['tensor'] are not among", "so that 3 chips", "Partition(repeated=('tensor',))"),
        ),
    ],
)
def test_partitions_that_do_not_fit(partition, mesh, parts):
    with raises_saying(ValueError, *parts):
        partition.on(mesh)


RULES = [
    ("batch", "data"),
    ("tokens", ["zero", "ep"]),
    ("expert", "ep"),
    ("embed", ("zero",)),
    ("mlp", None),
    ("embed", "data"),
]


def test_flax_rules():
    """The first rule of a name counts, and names that the layer has not are passed over."""
    expected = Partition(expert="ep", embed="zero", mlp=None, tokens=("zero", "ep"))
    assert Partition.from_rules(RULES).on(mesh_of(zero=2, ep=4)) == expected.on(mesh_of(zero=2, ep=4))


def test_flax_rules_that_leave_something_out():
    """What has no rule is not split, though the mesh has an axis of the usual name."""
    axes = Partition.from_rules([("expert", ("data", "expert"))]).on(mesh_of(data=2, expert=4))
    assert (axes.expert, axes.embed, axes.mlp) == (("data", "expert"), (), ())
    assert axes.tokens == ("data", "expert")
    none = Partition.from_rules([]).on(mesh_of(fsdp=2, tensor=4))
    assert (none.expert, none.embed, none.mlp, none.tokens) == ((), (), (), ("fsdp", "tensor"))


def test_flax_rules_that_split_two_dimensions_over_one_axis():
    with raises_saying(ValueError, "mesh axis 'ep' stands twice in the partition, for 'expert' and for 'embed'"):
        Partition.from_rules([("expert", "ep"), ("embed", "ep")]).on(mesh_of(ep=4))


def test_specs():
    axes = Partition(expert=("expert", "data"), tokens=("data", "fsdp", "expert", "tensor")).on(ALL)
    assert axes.spec(("expert", "embed", None, "mlp")) == PartitionSpec(("expert", "data"), "fsdp", None, "tensor")
    assert Axes().spec(("expert", "embed", None, "mlp")) == PartitionSpec(None, None, None, None)
    assert (Axes().ep, Axes().tp, Axes().size(())) == (1, 1, 1)
    assert [one_or_all(names) for names in ((), ("a",), ("a", "b"))] == [None, "a", ("a", "b")]


def on_inside(partition, mesh, split):
    """The axes of the partition inside a shard_map over the axes `split`."""
    return inside(split, mesh, lambda: partition.on(mesh_here(None)))


def test_axes_that_a_shard_map_around_has_split_are_passed_over():
    mesh = jax.make_mesh((1, 2, 2), ("stage", "data", "expert"), (AxisType.Auto,) * 3, devices=jax.devices()[:4])
    partition = Partition(tokens=("data", "expert"), repeated="stage")
    assert on_inside(partition, mesh, ["stage"]).tokens == ("data", "expert")
    assert on_inside(partition, mesh, ["stage", "data"]).tokens == ("expert",)
    by_dimension = Partition(tokens=(("data",), ("expert",)), repeated=("stage",))
    assert on_inside(by_dimension, mesh, ["stage", "data"]).tokens_by_dimension == ((), ("expert",))
    with raises_saying(ValueError, "'expert', which the partition names for 'expert', is split by the jax.shard_map"):
        on_inside(partition, mesh, ["stage", "expert"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"expert": 0}, "expert must name axes of the mesh, such as 'x' or ('x', 'y'), got 0"),
        ({"mlp": ("a", 1)}, "mlp must name axes of the mesh, such as 'x' or ('x', 'y'), got ('a', 1)"),
        ({"tokens": None}, "tokens must name axes of the mesh, such as ('data', 'expert'), or () for none, got None"),
    ],
)
def test_what_is_no_name_of_axes(settings, message):
    with raises_saying(ValueError, message):
        Partition(**settings)
