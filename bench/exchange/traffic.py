"""How many bytes an exchange needs to move, counted from the choices themselves, and how many a transport moves.

Two chips with an expert each, K = 1. Chip 0 has tokens for experts 0, 1, 1 and chip 1 for 1, 1, 0:

    rows_between -> [[1, 2], [1, 2]]     rows of chip 0 for chips 0 and 1; of chip 1 for chips 0 and 1
    needed rows  -> 3                    the others' rows: 2 from chip 0, 1 from chip 1
    busiest rows -> 2                    what one chip sends or receives, at the most: chip 0 sends 2
    dense slabs  -> 4                    a slab for each other chip, each as large as the largest need: 2

Plans (counts of rows, numbers of experts) are small and left out.
"""

import dataclasses

import jax
import numpy as np

from bench.exchange.movements import balanced_slab, on_the_wire
from bench.model.hops import Hop
from bench.model.shapes import up
from moejax import MoEConfig
from pallas_kernels.on_tpu.row_copies import LANES
from sharding.exchange import Way
from sharding.exchange.dense import Dense
from sharding.exchange.exact import Exact
from sharding.exchange.pick import TRANSPORTS

_WORD = 4


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes of one exchange.

    Attributes:
      needed: rows for other chips, over all chips: there, and back.
      busiest: what one chip has to send or to receive at the most, there, and back.
      wire: what is really sent to other chips, over all chips, there, and back; None where that is not known.
    """

    needed: tuple[int, int]
    busiest: tuple[int, int]
    wire: tuple[int, int] | None


def rows_between(topk_ids: np.ndarray, num_experts: int, ep: int) -> np.ndarray:
    """Choices [ep · T, K] -> int [ep, ep]: rows of chip s for chip d."""
    chips = (topk_ids // (num_experts // ep)).reshape(ep, -1)
    return np.stack([np.bincount(of_one, minlength=ep) for of_one in chips])


def row_bytes(config: MoEConfig, way: Way, multiple: int = 1) -> tuple[int, int]:
    """Bytes of a row there (values and scales) and back; each array's row filled up to a multiple of bytes."""
    row = jax.ShapeDtypeStruct((1, config.hidden_size), config.dtype)
    leaves = jax.tree.leaves(jax.eval_shape(lambda x: on_the_wire(x, way), row))
    out = sum(up(leaf.size * leaf.dtype.itemsize, multiple) for leaf in leaves)
    return out, up(row.size * row.dtype.itemsize, multiple)


def traffic_of(name: str, config: MoEConfig, way: Way, topk_ids: np.ndarray, platform: str) -> Traffic:
    """What a movement of `bench.exchange.movements` has to move for choices [ep · T, K], and moves.

    Args:
      name: of the movement; "lax.all_to_all" has a balanced load, whatever the choices.
      config: the layer.
      way: that of the movement.
      topk_ids: numbers of experts.
      platform: of the devices.
    """
    ep, choices = way.axes.ep, topk_ids.size // way.axes.ep
    rows = rows_between(topk_ids, config.num_experts, ep)
    if name == "lax.all_to_all":
        rows = np.full((ep, ep), balanced_slab(choices, ep))
    abroad = Hop(rows * ~np.eye(ep, dtype=bool))
    needed, each = int(abroad.rows.sum()), row_bytes(config, way)
    transport = TRANSPORTS["ragged"] if name == "lax.ragged_all_to_all" else TRANSPORTS.get(name)
    slabs = ep * (ep - 1) * (way.slab or 0)
    wire = None
    if isinstance(transport, Dense):
        wire = _times(slabs, each)
    elif isinstance(transport, Exact) and platform == "cpu":
        # Every chip sees all rows of every other: those that leave it and, back, all that it has room for.
        wire = ep * (ep - 1) * choices * each[0], ep * slabs * each[1]
    elif isinstance(transport, Exact) and platform == "tpu" and transport.backend == "auto":
        wire = _times(needed, row_bytes(config, way, LANES * _WORD))  # remote DMA moves whole tiles
    elif isinstance(transport, Exact) or name == "lax.all_to_all":
        wire = _times(needed, each)
    return Traffic(_times(needed, each), _times(abroad.busiest, each), wire)


def _times(rows: int, each: tuple[int, int]) -> tuple[int, int]:
    return rows * each[0], rows * each[1]
