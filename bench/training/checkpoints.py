"""States of training on disk, written with orbax: the latest of a run, whole or not at all.

with open_checkpoints(folder) as checkpoints:
checkpoints.save(100, state)
state = checkpoints.restore(checkpoints.latest, state)
"""

import contextlib
import importlib.util
import pathlib
from collections.abc import Iterator
from typing import Any

import jax


def require_orbax() -> None:
    """Raises ValueError when orbax is not installed, saying how to install it."""
    if importlib.util.find_spec("orbax") is None or importlib.util.find_spec("orbax.checkpoint") is None:
        raise ValueError(
            "checkpoints need orbax-checkpoint, which is not installed: pip install -e '.[train]', or leave out "
            "--checkpoint-every"
        )


class Checkpoints:
    """The checkpoints of one run; made by `open_checkpoints`."""

    def __init__(self, manager: Any):
        self._manager = manager

    @property
    def latest(self) -> int | None:
        """Steps that had been done at the newest checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Writes a tree of arrays, and removes the checkpoints before it when it is complete."""
        import orbax.checkpoint as orbax

        self._manager.save(step, args=orbax.args.StandardSave(_without_keys(state)))
        self._manager.wait_until_finished()

    def restore(self, step: int, like: Any) -> Any:
        """The tree of `step`.

        Args:
          step: one that is on disk.
          like: a tree of the same structure, shapes, dtypes and placement.
        """
        import orbax.checkpoint as orbax

        plain = _without_keys(like)
        found = self._manager.restore(step, args=orbax.args.StandardRestore(jax.tree.map(_shape, plain)))
        # Orbax gives back plain containers; what is wanted are the leaves, in the order that both have.
        return jax.tree.map(_with_key, like, jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(found)))


@contextlib.contextmanager
def open_checkpoints(folder: pathlib.Path) -> Iterator[Checkpoints]:
    """The checkpoints in a folder, which is made if need be.

    Raises:
      ValueError: orbax is not installed.
    """
    require_orbax()
    import orbax.checkpoint as orbax

    options = orbax.CheckpointManagerOptions(max_to_keep=1)
    with orbax.CheckpointManager(folder.resolve(), options=options) as manager:
        yield Checkpoints(manager)


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _without_keys(tree: Any) -> list[Any]:
    """The leaves, random keys as the integers that they consist of."""
    return [jax.random.key_data(leaf) if _is_key(leaf) else leaf for leaf in jax.tree.leaves(tree)]


def _with_key(like: Any, leaf: jax.Array) -> jax.Array:
    return jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(like)) if _is_key(like) else leaf


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
