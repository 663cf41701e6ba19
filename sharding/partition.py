"""Which axes of a mesh the layer is split over: one table from logical axes to mesh axes.

logical axis   what it is                       splits
"expert"       the experts, E                   expert weights; their rows travel
"embed"        the width of a token, H          weights, which are gathered just before use (FSDP)
"mlp"          the width of an expert, I        weights; partial sums are added up (tensor parallelism)
"tokens"       tokens, in the order of a batch  activations

Partition()                                                # axes called data, fsdp, expert and tensor
Partition(expert="ep", embed="zero", tokens=("zero", "ep"))
Partition.from_rules([("expert", "ep"), ("embed", "zero"), ("tokens", ("zero", "ep"))])
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Literal

from jax.sharding import PartitionSpec

from sharding.mesh import DATA_AXIS, EXPERT_AXIS, FSDP_AXIS, TENSOR_AXIS, AnyMesh, free_axes, is_in_order

LogicalAxis = Literal["expert", "embed", "mlp"]
"""The axes that parameters name."""

MeshAxes = str | tuple[str, ...] | None
"""One axis of a mesh, several that act as one, or none."""

DEFAULT = "default"
"""In a `Partition`: the axis of the usual name, where the mesh has it."""

_TOKENS = (DATA_AXIS, FSDP_AXIS, EXPERT_AXIS, TENSOR_AXIS)


@dataclasses.dataclass(frozen=True)
class Partition:
    """The mesh axes of each logical axis.

    Attributes:
      expert: the axis (or axes) that experts are split over; None for experts that every chip holds. The default is
        "expert", which the mesh then must have.
      embed: what weights are split over along H, to be gathered just before use; None for nothing. The default is
        "fsdp", where the mesh has it.
      mlp: what the width of every expert is split over; None for nothing. The default is "tensor", where the mesh has
        it.
      tokens: the axes that tokens are split over, in order. An element that is itself a tuple belongs to one dimension
        of `x`: (("data", "fsdp"), "expert") splits the batch over the first two and the sequence over the third. The
        default is "data", "fsdp", "expert" and "tensor", as far as the mesh has them, and what the roles above name.
      repeated: axes along which every chip may repeat its neighbours' work. An axis longer than 1 that stands neither
        here nor in `tokens` is an error.

    Inside a `jax.shard_map` of one's own, axes of `tokens` and `repeated` that it has split are passed over: there the
    tokens of the layer are those that are left to it.
    """

    expert: MeshAxes = EXPERT_AXIS
    embed: MeshAxes = DEFAULT
    mlp: MeshAxes = DEFAULT
    tokens: str | Sequence[str | tuple[str, ...]] = DEFAULT
    repeated: str | tuple[str, ...] = ()

    def __post_init__(self):
        for role in ("expert", "embed", "mlp", "repeated"):
            if not _names_axes(getattr(self, role)):
                raise ValueError(
                    f"{role} must name axes of the mesh, such as 'x' or ('x', 'y'), got {getattr(self, role)!r}"
                )
        tokens = self.tokens
        if not (isinstance(tokens, str) or (isinstance(tokens, Sequence) and all(map(_names_axes, tokens)))):
            raise ValueError(
                f"tokens must name axes of the mesh, such as ('data', 'expert'), or () for none, got {tokens!r}"
            )
        if self.tokens != DEFAULT:
            tokens = (self.tokens,) if isinstance(self.tokens, str) else tuple(self.tokens)
            object.__setattr__(self, "tokens", tokens)

    @classmethod
    def from_rules(cls, rules: Iterable[tuple[str, str | Sequence[str] | None]]) -> "Partition":
        """The partition that flax's logical axis rules describe: pairs of a logical axis and mesh axes.

        Logical axes that the layer has not are passed over. What has no rule is not split, but tokens as by default.
        """
        found: dict[str, tuple[str, ...]] = {}
        for name, axes in rules:
            found.setdefault(name, () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes))

        expert, embed, mlp = (found.get(name) or None for name in ("expert", "embed", "mlp"))
        return cls(expert, embed, mlp, found.get("tokens", DEFAULT))

    def on(self, mesh: AnyMesh) -> "Axes":
        """The axes of `mesh`, defaults filled in.

        Raises:
          ValueError: the mesh lacks an axis that is named, an axis has two roles, or an axis would repeat work.
        """
        there = free_axes(mesh)
        taken = set(mesh.axis_names) - set(there)

        def left_over(axes: MeshAxes | Sequence[str]) -> tuple[str, ...]:
            return tuple(axis for axis in names_of(axes) if axis not in taken)

        def default(axis: str) -> tuple[str, ...]:
            return (axis,) if axis in there else ()

        named = {
            "expert": names_of(self.expert),
            "embed": default(FSDP_AXIS) if self.embed == DEFAULT else names_of(self.embed),
            "mlp": default(TENSOR_AXIS) if self.mlp == DEFAULT else names_of(self.mlp),
        }
        repeated = left_over(self.repeated)
        by_dimension: tuple[tuple[str, ...], ...] = ()
        if self.tokens == DEFAULT:
            known = [axis for axis in _TOKENS if axis in there]
            tokens = tuple(dict.fromkeys((*known, *(axis for axes in named.values() for axis in axes))))
            tokens = tuple(axis for axis in tokens if axis not in repeated)
        else:
            tokens = tuple(axis for axes in self.tokens for axis in left_over(axes))
            if any(isinstance(axes, tuple) for axes in self.tokens):
                by_dimension = tuple(left_over(axes) for axes in self.tokens)
        for role, axes in {**named, "tokens": tokens, "repeated": repeated}.items():
            for axis in axes:
                if axis in taken:
                    raise ValueError(
                        f"mesh axis {axis!r}, which the partition names for {role!r}, is split by the jax.shard_map "
                        f"around already, so that a chip holds no weights over it; leave it out of axis_names there, "
                        f"or pass partition=Partition({role}=None) to give every chip whole weights"
                    )
                if axis not in there:
                    raise ValueError(_lacks(role, axis, there))
        _refuse_twice(named, tokens)
        left = [a for a in there if mesh.shape[a] > 1 and a not in tokens and a not in repeated]
        if left:
            work = math.prod(mesh.shape[axis] for axis in left)
            raise ValueError(
                f"mesh axes {left} are not among the axes that tokens are split over, {list(tokens)}, so that {work} "
                f"chips would each do the same work; name them, partition=Partition(tokens={(*tokens, *left)!r}), or "
                f"accept that with partition=Partition(repeated={tuple(left)!r})"
            )
        return Axes(
            **named,
            tokens=tokens,
            tokens_by_dimension=by_dimension,
            sizes=tuple((axis, mesh.shape[axis]) for axis in there),
            in_order=is_in_order(mesh),
        )


@dataclasses.dataclass(frozen=True)
class Axes:
    """A `Partition` on a mesh; without arguments, on one chip.

    Attributes:
      expert: the axes of the experts.
      embed: the axes that weights are gathered over.
      mlp: the axes of the experts' width.
      tokens: the axes that tokens are split over.
      tokens_by_dimension: the same for each leading dimension of x, where the partition says so; else empty.
      sizes: (axis, chips along it) of all axes of the mesh.
      in_order: whether the mesh has the devices 0, 1, 2, … in this order; None where its devices are not known.
    """

    expert: tuple[str, ...] = ()
    embed: tuple[str, ...] = ()
    mlp: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    tokens_by_dimension: tuple[tuple[str, ...], ...] = ()
    sizes: tuple[tuple[str, int], ...] = ()
    in_order: bool | None = None

    def size(self, axes: Sequence[str]) -> int:
        """Chips along `axes`."""
        sizes = dict(self.sizes)
        return math.prod(sizes[axis] for axis in axes)

    @property
    def ep(self) -> int:
        """Chips that share one set of experts."""
        return self.size(self.expert)

    @property
    def tp(self) -> int:
        """Chips that share the width of each expert."""
        return self.size(self.mlp)

    def spec(self, logical: Sequence[LogicalAxis | None]) -> PartitionSpec:
        """Where an array lies whose dimensions are these logical axes."""
        mesh_axes = {"expert": self.expert, "embed": self.embed, "mlp": self.mlp}
        return PartitionSpec(*(one_or_all(mesh_axes[name]) if name else None for name in logical))


def expert_axes(ep: int) -> Axes:
    """The axes of a mesh that is nothing but `ep` chips, which share the experts and the tokens."""
    return Axes(expert=(EXPERT_AXIS,), tokens=(EXPERT_AXIS,), sizes=((EXPERT_AXIS, ep),))


ONE_CHIP = Axes()
"""Those of a layer that no mesh splits."""


def one_or_all(axes: tuple[str, ...]) -> str | tuple[str, ...] | None:
    """`axes` as an element of a PartitionSpec."""
    return axes[0] if len(axes) == 1 else axes or None


def names_of(entry: str | Sequence[str] | None) -> tuple[str, ...]:
    """The axes that an element of a PartitionSpec names: the other way of `one_or_all`."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _names_axes(axes: object) -> bool:
    is_sequence = isinstance(axes, Sequence) and all(isinstance(axis, str) for axis in axes)
    return axes is None or is_sequence


def _lacks(role: str, axis: str, there: Sequence[str]) -> str:
    hint = ""
    if role == "expert":
        hint = "; make it with make_mesh(ep, dp), or pass Partition(expert=None) for experts that every chip holds"
    return (
        f"the mesh has no axis {axis!r}, which the partition names for {role!r}, only {tuple(there)}; name the mesh's "
        f"own axes: partition=Partition({'tokens=(...)' if role == 'tokens' else role + '=...'}){hint}"
    )


def _refuse_twice(named: dict[str, tuple[str, ...]], tokens: tuple[str, ...]) -> None:
    roles: dict[str, str] = {}
    for role, axes in named.items():
        for axis in axes:
            if axis in roles:
                raise ValueError(
                    f"mesh axis {axis!r} stands twice in the partition, for {roles[axis]!r} and for {role!r}; a mesh "
                    "axis splits one of them"
                )
            roles[axis] = role
    if twice := [axis for axis in set(tokens) if tokens.count(axis) > 1]:
        raise ValueError(f"mesh axis {twice[0]!r} stands twice among the axes of tokens, {list(tokens)}")
