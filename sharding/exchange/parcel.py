"""Rows with what travels beside them, for exchanges that are made of exchanges."""

import dataclasses
from typing import final

import jax

from pallas_kernels.quantize import Rows


@final
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Parcel:
    """What `BetweenChips` takes in place of rows, and then gives in place of them.

    Attributes:
      rows: [T, H], as an exchange takes them.
      beside: [T, B], a few numbers of each, which travel as they are.
    """

    rows: Rows
    beside: jax.Array
