"""Meshes for expert parallelism: axis names, who holds what, and moving arrays there.

    mesh = make_mesh(ep=4, dp=2)                 # 8 devices, axes ("data", "expert")

Tokens are split over every device of both axes; the experts' weights are split over the expert axis and repeated over
the data axis; all else is repeated everywhere.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

DATA_AXIS = "data"
EXPERT_AXIS = "expert"

AnyMesh = Mesh | AbstractMesh


def make_mesh(
    ep: int, dp: int = 1, *, devices: Sequence[jax.Device] | None = None, axis_type: AxisType = AxisType.Auto
) -> Mesh:
    """A mesh of dp × ep devices with the axes ("data", "expert").

    Args:
      ep: devices that share one set of experts.
      dp: copies of that set.
      devices: the first dp·ep of these are taken; default is `jax.devices()`.
      axis_type: Auto lets the compiler place what is not annotated, Explicit makes shardings part of the types.

    Raises:
      ValueError: there are fewer than dp·ep devices, or a size is not positive.
    """
    devices = list(jax.devices() if devices is None else devices)
    if ep < 1 or dp < 1:
        raise ValueError(f"ep and dp must be at least 1, got ep={ep}, dp={dp}")
    if len(devices) < ep * dp:
        platform = devices[0].platform if devices else "none"
        raise ValueError(
            f"a mesh of dp={dp} x ep={ep} needs {ep * dp} devices, {len(devices)} are at hand ({platform}); on a CPU, "
            f"jax.config.update('jax_num_cpu_devices', {ep * dp}) before the first use of JAX makes virtual ones"
        )
    return jax.make_mesh((dp, ep), (DATA_AXIS, EXPERT_AXIS), (axis_type, axis_type), devices=devices[: dp * ep])


def current_mesh() -> AnyMesh | None:
    """The mesh that `jax.set_mesh` put in force here, or None; an abstract one while tracing under jit."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return None
    try:
        return jax.sharding.get_mesh()
    except ValueError:  # Tracing: the devices are not to be seen.
        return mesh


def axis_size(mesh: AnyMesh, axis: str) -> int:
    """The number of devices along `axis`.

    Raises:
      ValueError: the mesh has no such axis.
    """
    if axis not in mesh.shape:
        raise ValueError(
            f"the mesh has no axis {axis!r}, only {tuple(mesh.axis_names)}; make it with "
            "sharding.mesh.make_mesh(ep, dp), or name the mesh's own axes (expert_axis=..., token_axes=...)"
        )
    return mesh.shape[axis]


def has_explicit_axes(mesh: AnyMesh) -> bool:
    """Whether shardings over some axis of `mesh` are part of the types of arrays."""
    return AxisType.Explicit in mesh.axis_types


def with_auto_axes(mesh: AnyMesh) -> AnyMesh:
    """The same devices and axes, with shardings left to the compiler."""
    axis_types = (AxisType.Auto,) * len(mesh.axis_names)
    if isinstance(mesh, AbstractMesh):
        return mesh.update_axis_types(dict(zip(mesh.axis_names, axis_types, strict=True)))
    return Mesh(mesh.devices, mesh.axis_names, axis_types=axis_types)


def sharding_in(x: jax.Array, mesh: AnyMesh) -> NamedSharding:
    """How `x` lies in a mesh of Explicit axes; whole everywhere when it is not in that mesh yet."""
    sharding = jax.typeof(x).sharding
    is_there = sharding.mesh == (mesh if isinstance(mesh, AbstractMesh) else mesh.abstract_mesh)
    return NamedSharding(mesh, sharding.spec if is_there else PartitionSpec())


def tokens_spec(token_axes: Sequence[str]) -> PartitionSpec:
    """Tokens [T, …] split over all of `token_axes`, the other dimensions whole."""
    return PartitionSpec(tuple(token_axes))


def place(tree: Any, mesh: AnyMesh, spec: PartitionSpec) -> Any:
    """Lays every array of `tree` out as `spec`, in a mesh of Auto or Explicit axes, eagerly or while tracing."""
    if has_explicit_axes(mesh):
        return jax.reshard(tree, NamedSharding(mesh, spec))
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, spec))
