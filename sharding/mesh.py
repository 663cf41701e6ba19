"""Meshes for expert parallelism: axis names, who holds what, and moving arrays there.

    mesh = make_mesh(ep=4, dp=2)                 # 8 devices, axes ("data", "expert")

Tokens are split over every device of both axes; the experts' weights are split over the expert axis and repeated over
the data axis; all else is repeated everywhere. `sharding.partition` says what other axes do.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

DATA_AXIS = "data"
FSDP_AXIS = "fsdp"
EXPERT_AXIS = "expert"
TENSOR_AXIS = "tensor"

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
    if not all(isinstance(size, int | np.integer) and size >= 1 for size in (ep, dp)):
        raise ValueError(f"ep and dp must be whole numbers of at least 1, got ep={ep!r}, dp={dp!r}")
    if len(devices) < ep * dp:
        platform = devices[0].platform if devices else "none"
        raise ValueError(
            f"a mesh of dp={dp} x ep={ep} needs {ep * dp} devices, {len(devices)} are at hand ({platform}); on a CPU, "
            f"jax.config.update('jax_num_cpu_devices', {ep * dp}) before the first use of JAX makes virtual ones"
        )
    return jax.make_mesh((dp, ep), (DATA_AXIS, EXPERT_AXIS), (axis_type, axis_type), devices=devices[: dp * ep])


def current_mesh() -> AnyMesh | None:
    """The mesh that `jax.set_mesh` put in force here, or None; an abstract one while tracing under jit.

    Inside `jax.shard_map` and `jax.pmap` it is what they leave to be split: None where that is nothing.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not free_axes(mesh):
        return None
    try:
        return jax.sharding.get_mesh()
    except ValueError:  # Tracing: the devices are not to be seen.
        return mesh


def split_by_type(x: jax.Array) -> NamedSharding | None:
    """How the type of x says that a mesh of Explicit axes splits it; None where it does not."""
    over = jax.typeof(x).sharding
    return over if any(axes is not None for axes in over.spec) else None


def mesh_here(mesh: AnyMesh | None) -> AnyMesh | None:
    """`mesh` as it is to be used here: that of `jax.set_mesh` if None, and without what is split already.

    Raises:
      ValueError: `mesh` is another one than that of `jax.set_mesh` or the `jax.shard_map` around.
      TypeError: it is no mesh.
    """
    if mesh is not None and not isinstance(mesh, Mesh | AbstractMesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, such as make_mesh(ep=4), got {type(mesh).__name__}")
    around = jax.sharding.get_abstract_mesh()
    if around.empty:
        return mesh
    is_inside = AxisType.Manual in around.axis_types
    if mesh is not None and dict(mesh.shape) != dict(around.shape):
        raise ValueError(
            f"mesh has the axes {dict(mesh.shape)}, and that of the {'jax.shard_map' if is_inside else 'jax.set_mesh'} "
            f"around has {dict(around.shape)}; leave mesh out to use that one"
        )
    if not is_inside:
        return current_mesh() if mesh is None else mesh
    return around if free_axes(around) else None


def mesh_at_call(mesh: AnyMesh | None, made_on: AnyMesh | None, what: str) -> AnyMesh | None:
    """The mesh that a module was given; else None for the one in force, or where there is none, that it was made on.

    Args:
      mesh: what it was given.
      made_on: `mesh_here` where it was made, None where it was given one.
      what: it is, for a warning: the devices of a mesh under `jax.jit` are not to be seen.
    """
    if mesh is not None or made_on is None or not jax.sharding.get_abstract_mesh().empty:
        return mesh
    if isinstance(made_on, Mesh):
        return made_on
    warnings.warn(
        f"{what} that was made under jit over the mesh {dict(made_on.shape)} is called without a mesh, so its tokens "
        "are not spread over chips: call it within jax.set_mesh, or make it with mesh=",
        stacklevel=4,
    )
    return None


def free_axes(mesh: AnyMesh) -> tuple[str, ...]:
    """The axes of `mesh` that no `jax.shard_map` around has split already."""
    pairs = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in pairs if kind != AxisType.Manual)


def is_split_here(made_on: AnyMesh | None, *arrays: jax.Array | None) -> bool:
    """Whether XLA spreads `arrays` over chips here, where it would gather them for a kernel.

    By their types, or by the mesh in force, or where there is none, by the one that a module was made on.
    """
    around = jax.sharding.get_abstract_mesh()
    mesh = made_on if around.empty else around
    is_spread = mesh is not None and any(mesh.shape[name] > 1 for name in free_axes(mesh))
    return is_spread or any(x is not None and split_by_type(x) is not None for x in arrays)


def is_in_order(mesh: AnyMesh) -> bool | None:
    """Whether `mesh` has the devices 0, 1, 2, … in this order, its last axis fastest; None for an abstract mesh."""
    return [device.id for device in mesh.devices.flat] == list(range(mesh.size)) if isinstance(mesh, Mesh) else None


def has_explicit_axes(mesh: AnyMesh) -> bool:
    """Whether shardings over some axis of `mesh` are part of the types of arrays."""
    return AxisType.Explicit in mesh.axis_types


def spec_in(x: jax.Array, mesh: AnyMesh) -> PartitionSpec | None:
    """How `x` lies in `mesh`, one entry a dimension; None where that is not known or it does not lie there."""
    if has_explicit_axes(mesh):
        sharding = jax.typeof(x).sharding
    elif isinstance(x, jax.core.Tracer):
        return None
    else:
        sharding = getattr(x, "sharding", None)
    abstract = mesh if isinstance(mesh, AbstractMesh) else mesh.abstract_mesh
    if not isinstance(sharding, NamedSharding) or sharding.mesh.shape != abstract.shape:
        return None
    return PartitionSpec(*sharding.spec, *(None,) * (x.ndim - len(sharding.spec)))


def place(tree: Any, mesh: AnyMesh, specs: Any) -> Any:
    """Lays every array of `tree` out as its PartitionSpec in `specs` says, wherever it was.

    While tracing over a mesh of Auto axes nothing is done, as `jax.shard_map` says the same to the compiler.
    """
    return jax.tree.map(lambda leaf, spec: _place(leaf, mesh, spec), tree, specs)


def _place(x: jax.Array, mesh: AnyMesh, spec: PartitionSpec) -> jax.Array:
    if not isinstance(x, jax.core.Tracer) and isinstance(mesh, Mesh):
        return jax.device_put(x, NamedSharding(mesh, spec))
    return jax.reshard(x, NamedSharding(mesh, spec)) if has_explicit_axes(mesh) else x
