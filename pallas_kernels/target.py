"""The chip that a program is traced for, where it is not the one at hand: compiling ahead of time on another machine.

    with targeting(get_chip("v6e")):
        jax.jit(layer, ...).lower(*shapes).compile()

Everything that asks for a chip while tracing (`backend="auto"`, the tilings) then answers for the target.
"""

import jax

from pallas_kernels.chips import Chip
from pallas_kernels.override import Override

targeting = Override[Chip]("target")
"""What is traced inside `with targeting(chip)` is traced for `chip`, whatever devices there are."""


def target_chip() -> Chip | None:
    """The chip of the innermost `targeting`, or None outside of one."""
    return targeting.get()


def target_platform() -> str:
    """The platform that is traced for, as `jax.default_backend` names it: "tpu", "gpu" or "cpu"."""
    chip = target_chip()
    return chip.kind if chip is not None and chip.kind != "ds_tpu" else jax.default_backend()
