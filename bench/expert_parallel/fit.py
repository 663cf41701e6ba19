"""How wide a layer the devices can hold, and the reduction that makes a wider one fit."""

import dataclasses
import math

import jax.numpy as jnp

from bench.measure.devices import Devices
from moejax import MoEConfig
from moejax.params import param_shapes
from moejax.stages import way_of
from sharding.exchange import pick_transport
from sharding.exchange.capacity import most_rows
from sharding.partition import expert_axes

SHARE_OF_MEMORY = 0.5
"""Of what the devices have; the rest is for the compiler, the oracle, and other programs."""

MAX_VIRTUAL_WEIGHTS = 1e9
"""Virtual devices have the memory for more, but not the speed: a run should end in a minute or two."""

_REDUCTIONS = (1, 2, 4, 8, 16, 32, 64)


@dataclasses.dataclass(frozen=True)
class Fit:
    """The layer to run in place of the one that was asked for.

    Attributes:
      config: the layer, its hidden and expert widths divided by `reduction`.
      reduction: 1 for the layer as it is.
      needed_bytes: estimate of the memory that all devices together need.
      available_bytes: what they may use.
      is_asked: whether the reduction was asked for.
    """

    config: MoEConfig
    reduction: int
    needed_bytes: int
    available_bytes: int
    is_asked: bool = False

    @property
    def width_note(self) -> str:
        """How wide the layer is, in a few words."""
        return "full width" if self.reduction == 1 else f"hidden and expert widths reduced to 1/{self.reduction}"

    @property
    def note(self) -> str:
        """One sentence on the width and the memory."""
        reason = "" if self.reduction == 1 else " as asked" if self.is_asked else " to fit this machine"
        memory = f"about {self.needed_bytes / 1e9:.1f} GB of {self.available_bytes / 1e9:.1f} GB that may be used"
        return f"{self.width_note}{reason}; {memory}"


def fit(config: MoEConfig, devices: Devices, batch_size: int, reduction: int | None = None) -> Fit:
    """The widest layer of the shape of `config` that fits the devices.

    Args:
      config: the layer that was asked for.
      devices: one expert group of them.
      batch_size: tokens over all devices.
      reduction: divide the widths by this instead of by what memory says.

    Raises:
      ValueError: no reduction fits, or the widths are not divisible by the one that was asked for.
    """
    ep = len(devices.devices)
    available = int(SHARE_OF_MEMORY * devices.memory_bytes)
    for factor in _REDUCTIONS if reduction is None else (reduction,):
        try:
            reduced = reduce_width(config, factor)
        except ValueError:
            if reduction is not None:
                raise
            continue
        needed = memory_bytes(reduced, ep, batch_size)
        weights = math.prod(param_shapes(reduced).gate_up) + math.prod(param_shapes(reduced).down)
        is_quick = not devices.is_virtual or weights <= MAX_VIRTUAL_WEIGHTS
        if reduction is not None or (needed <= available and is_quick):
            return Fit(reduced, factor, needed, available, is_asked=reduction is not None)
    raise ValueError(
        f"a batch of {batch_size} over {ep} devices needs more than the {available / 1e9:.1f} GB that may be used, "
        "however narrow the layer; lower --batch"
    )


def reduce_width(config: MoEConfig, factor: int) -> MoEConfig:
    """`config` with hidden, expert and shared widths divided by `factor`; experts and routing stay.

    Raises:
      ValueError: a width is not divisible, or no longer fits the blocks of its scales.
    """
    widths = {name: getattr(config, name) for name in ("hidden_size", "intermediate_size", "shared_intermediate_size")}
    for name, width in widths.items():
        if width % factor:
            raise ValueError(f"{name}={width} is not divisible by the reduction {factor}; choose another --reduce")
    try:
        return dataclasses.replace(config, **{name: width // factor for name, width in widths.items()})
    except ValueError as error:
        raise ValueError(f"--reduce {factor} divides the widths by {factor}, which do not fit then: {error}") from None


def memory_bytes(config: MoEConfig, ep: int, batch_size: int) -> int:
    """Estimate of what all devices together hold at once: weights, and the buffers of the exchange and the experts."""
    weight_bytes = 1 if config.precision == "w8a8" else jnp.dtype(config.dtype).itemsize
    shapes = param_shapes(config)
    experts = sum(math.prod(shape) for shape in (shapes.gate_up, shapes.down)) * weight_bytes
    shared = sum(math.prod(s) for s in (shapes.shared_gate_up, shapes.shared_down) if s is not None) * weight_bytes
    tokens = -(-batch_size // ep)
    most = None
    if config.capacity_factor is not None:
        sizes = tokens, batch_size, config.top_k, config.num_experts
        most = most_rows(*sizes, config.capacity_factor, config.capacity_of)
    way = way_of(config, expert_axes(ep), max_rows=most)
    rows = pick_transport(way).rows_held(tokens, config.top_k, way)
    # Alive at the peak: rows sent and received, rows in and out of the experts, and the hidden layer in float32.
    buffers = rows * (6 * 2 * config.hidden_size + 4 * config.intermediate_size)
    return experts + ep * (shared + buffers)
