"""States of training on disk, written with orbax: the latest of a run, whole or not at all.

with open_checkpoints(folder) as checkpoints:
checkpoints.save(100, state)
state = checkpoints.restore(checkpoints.latest, state)
"""

import contextlib
import importlib.util
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from bench.measure.errors import describe


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

        leaves = _without_keys(state)
        self._manager.save(step, args=orbax.args.StandardSave([*leaves, _checksum(leaves)]))
        self._manager.wait_until_finished()

    def restore(self, step: int, like: Any) -> Any:
        """The tree of a step that is on disk; `like` is one of the same structure, shapes, dtypes and placement.

        Raises:
          ValueError: what is on disk is not what was saved.
        """
        import orbax.checkpoint as orbax

        wanted = [*_without_keys(like), np.zeros((), np.uint32)]
        try:
            *leaves, checksum = self._manager.restore(step, args=orbax.args.StandardRestore(wanted))
            reason = "" if checksum == _checksum(leaves) else "its checksum is not that of its arrays"
        except Exception as error:  # of many kinds, as a file may be damaged anywhere
            reason = describe(error, 120)
        if reason:
            raise ValueError(
                f"{self._manager.directory}: the checkpoint of step {step} is damaged: {reason}; remove that folder to "
                "begin its run anew"
            )
        return jax.tree.map(_with_key, like, jax.tree.unflatten(jax.tree.structure(like), leaves))


def latest_step(folder: pathlib.Path) -> int:
    """The step of the newest checkpoint in a folder, 0 if there is none; needs no orbax."""
    return max((int(path.name) for path in folder.glob("*") if path.name.isdecimal()), default=0)


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


def _checksum(leaves: list[Any]) -> np.ndarray:
    """The CRC-32 of all leaves: Orbax notices a missing byte, but not a wrong one."""
    checksum = 0
    for leaf in leaves:
        checksum = zlib.crc32(np.asarray(leaf).tobytes(), checksum)
    return np.asarray(checksum, np.uint32)


def _with_key(like: Any, leaf: jax.Array) -> jax.Array:
    return jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(like)) if _is_key(like) else leaf
