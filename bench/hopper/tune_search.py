"""Which configurations of a product are timed, and which one wins.

`search` times the sizes of tiles that the model does not rule out, then other strips with the best of them, then
shorter rings with the best of those; `exhaustive` times all of these together. The winner is timed once more beside
the model's choice, so that luck among many does not make a winner.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

from bench.hopper.products import Product
from pallas_kernels.chips import Chip
from pallas_kernels.grouped_matmul.gpu.hopper import tiling
from pallas_kernels.grouped_matmul.gpu.hopper.problem import Config

Timer = Callable[[Sequence[Config]], Mapping[Config, float]]
"""µs of each configuration; those that fail are left out."""

MODEL_SLACK = 1.6
"""Tiles that take longer than the least by this factor, as modelled, are not timed in a `search`."""

LEAST_GAIN = 0.02
"""A configuration that is not faster than the model's choice by this share is not worth an entry."""

_STRIPS = (1, 4, 8, 16)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The model's choice for a product and the fastest of those timed, which may be the same, with their µs."""

    model: Config
    model_us: float
    best: Config
    best_us: float
    num_timed: int

    @property
    def gain(self) -> float:
        """The share of the time of the model's choice that the best saves."""
        return 1 - self.best_us / self.model_us

    @property
    def is_worth_it(self) -> bool:
        """Whether the gain exceeds `LEAST_GAIN`."""
        return self.gain > LEAST_GAIN


def search(product: Product, chip: Chip, timer: Timer, *, exhaustive: bool = False) -> Outcome:
    """Finds the fastest configuration.

    Raises:
      ValueError: the model's choice cannot be timed.
    """
    tiles = by_modelled_time(product, chip)
    model, least = next(iter(tiles.items()))
    times: dict[Config, float] = {}

    def time_new(configs: Iterable[Config]) -> None:
        new = [config for config in dict.fromkeys(configs) if config not in times]
        times.update(timer(new) if new else {})
        if model not in times:
            raise ValueError(f"the model's choice {model} cannot be timed")

    def best() -> Config:
        return min(times, key=times.__getitem__)

    if exhaustive:
        time_new(v for tile in tiles for strip in other_strips(product, tile) for v in (strip, *shorter_rings(strip)))
    else:
        time_new(config for config, seconds in tiles.items() if seconds <= MODEL_SLACK * least)
        time_new(other_strips(product, best()))
        time_new(shorter_rings(best()))
    winner = best()
    again = times if winner == model else timer([model, winner])
    return Outcome(model, again[model], winner, again[winner], len(times))


def by_modelled_time(product: Product, chip: Chip) -> dict[Config, float]:
    """Every size of a tile with its modelled time; the model's choice is the first."""
    problem = product.problem
    times = {config: tiling.modelled_seconds(chip, problem, config) for config in tiling.candidates(chip, problem)}
    return dict(sorted(times.items(), key=lambda item: item[1]))


def other_strips(product: Product, config: Config) -> list[Config]:
    """`config` with every other width of a strip; itself alone where a group has one row of tiles, in any order."""
    if config.block_m >= product.shape.M:
        return [config]
    column_tiles = -(-product.shape.N // config.block_n)
    widths = dict.fromkeys(min(strip, column_tiles) for strip in (config.strip, *_STRIPS, column_tiles))
    return [dataclasses.replace(config, strip=strip) for strip in widths]


def shorter_rings(config: Config) -> list[Config]:
    """`config` with one and with two stages fewer, of which a kernel needs two."""
    fewer = (config.num_stages - 1, config.num_stages - 2)
    return [dataclasses.replace(config, num_stages=stages) for stages in fewer if stages >= 2]
