"""The chip that a program is traced for, where it is not the one at hand: compiling ahead of time on another machine.

    with targeting(get_chip("v6e")):
        jax.jit(layer, ...).lower(*shapes).compile()

Everything that asks for a chip while tracing (`backend="auto"`, the tilings) then answers for the target.
"""

import jax

from pallas_kernels.chips import Chip
from pallas_kernels.tracing.override import Override

targeting = Override[Chip]("target")
"""What is traced inside `with targeting(chip)` is traced for `chip`, whatever devices there are."""

lowering_for = Override[str]("platform")
"""What is traced inside `with lowering_for("tpu")` (or "gpu") is for that platform, of whichever chip is at hand."""


def target_chip() -> Chip | None:
    """The chip of the innermost `targeting`, or None outside of one."""
    return targeting.get()


def target_platform() -> str:
    """The platform that is traced for, as `jax.default_backend` names it: "tpu", "gpu" or "cpu"."""
    return named_platform() or lowering_for.get() or jax.default_backend()


def named_platform() -> str | None:
    """The platform of the target, or None where none is named that has kernels."""
    chip = target_chip()
    return chip.kind if chip is not None and chip.kind != "ds_tpu" else None
