"""Which experts to hold more than once, and where, so that every rank has as much to do: planned from a measured load.

    experts = balance(load, num_slots=288, ep=32)     # of 256 experts the hottest have replicas in 32 spare slots
    rank_loads(load, experts, ep=32).max()

Plain numpy, between steps: a plan costs milliseconds, and moving the weights costs more. It goes the way of DeepSeek's
expert-parallel load balancer: groups of experts to nodes, replicas to the hottest experts, replicas to ranks, the
heaviest first; and then swaps slots for as long as that relieves the busiest rank.
"""

import heapq
from typing import Any

import numpy as np


def balance(
    load: np.ndarray, num_slots: int, ep: int, *, num_nodes: int = 1, num_groups: int | None = None
) -> np.ndarray:
    """The expert of each slot, int32 [P]; rank r holds the slots [r·P/ep, (r+1)·P/ep).

    Every expert has a slot at the least, and none has two on a rank.

    Args:
      load: [E], rows of each expert in what was measured; of several batches their sum.
      num_slots: P, slots of all ranks: E, and as many more as there are to be replicas.
      ep: ranks, in order of the nodes.
      num_nodes: nodes that share the ranks evenly. Replicas of an expert stay on one of them.
      num_groups: groups of experts that follow each other, which stay together on a node, as routers that choose among
        groups first want it; None for one a node.

    Raises:
      ValueError: the load is negative, not finite, or no vector; or the numbers do not divide.
    """
    load = _numbers(load)
    num_groups = num_nodes if num_groups is None else num_groups
    _check(load, num_slots, ep, num_nodes, num_groups)
    groups = np.arange(load.size).reshape(num_groups, -1)
    nodes = _pack(load[groups].sum(1), np.arange(num_groups), num_nodes)
    ranks, slots = ep // num_nodes, num_slots // num_nodes
    return np.concatenate([_within_node(load, groups[node].reshape(-1), slots, ranks) for node in nodes])


def rank_loads(load: np.ndarray, experts: np.ndarray, ep: int) -> np.ndarray:
    """Rows of each rank, [ep], where the rows [E] of every expert are spread evenly over its slots.

    Args:
      load: [E].
      experts: int [P], the expert of each slot.
      ep: ranks.

    Raises:
      ValueError: an expert has no slot, or the ranks cannot share the slots evenly.
    """
    load, experts = _numbers(load), np.asarray(experts)
    if experts.size % ep or set(experts.tolist()) != set(range(load.size)):
        raise ValueError(
            f"experts must fill a multiple of ep={ep} slots with each of {load.size} experts, got {experts.size} slots "
            f"of {len(set(experts.tolist()))}"
        )
    shares = load / np.bincount(experts)
    return shares[experts].reshape(ep, -1).sum(1)


def _within_node(load: np.ndarray, experts: np.ndarray, num_slots: int, num_ranks: int) -> np.ndarray:
    """The experts of the slots of one node, which holds `experts`."""
    counts = _replicate(load[experts], num_slots, most=num_ranks)
    copies = np.repeat(np.arange(experts.size), counts)
    ranks = _pack((load[experts] / counts)[copies], copies, num_ranks)
    return experts[copies[np.concatenate(ranks)]].astype(np.int32)


def _replicate(load: np.ndarray, num_slots: int, most: int) -> np.ndarray:
    """How many slots each expert gets, `most` at the most: one after the other goes to whose slots have most to do."""
    counts = np.ones(load.size, int)
    hottest = [(-rows, expert) for expert, rows in enumerate(load)]
    heapq.heapify(hottest)
    for _ in range(num_slots - load.size):
        while counts[expert := hottest[0][1]] == most:
            heapq.heappop(hottest)
        counts[expert] += 1
        heapq.heapreplace(hottest, (-load[expert] / counts[expert], expert))
    return counts


def _pack(weights: np.ndarray, kinds: np.ndarray, num_bins: int) -> list[np.ndarray]:
    """The items of each bin: as many in every one, about as heavy, and none with two items of a kind.

    No kind has more items than there are bins.
    """
    room = weights.size // num_bins
    bins = np.full((num_bins, room), -1)
    total, taken = np.zeros(num_bins), np.zeros(num_bins, int)
    copies = np.bincount(kinds)[kinds]
    for kind in dict.fromkeys(kinds[np.lexsort((kinds, -weights, -copies))]):
        items = np.flatnonzero(kinds == kind)
        # Several go where most room is, as this leaves room in enough bins for all to come; one goes where least is.
        emptiest = taken if items.size > 1 else np.where(taken == room, np.inf, 0)
        chosen = np.lexsort((total, emptiest))[: items.size]
        bins[chosen, taken[chosen]] = items
        total[chosen] += weights[items]
        taken[chosen] += 1
    _relieve(bins, weights, kinds)
    return [np.sort(items) for items in bins]


def _relieve(bins: np.ndarray, weights: np.ndarray, kinds: np.ndarray) -> None:
    """Swaps an item of the heaviest bin for one of another, in place, for as long as both are lighter than it was."""
    while True:
        total = weights[bins].sum(1)
        heaviest = int(total.argmax())
        own = bins[heaviest]
        # [own item, bin, item]: what the heavier of the two bins would weigh.
        change = weights[own][:, None, None] - weights[bins]
        after = np.maximum(total[heaviest] - change, total[:, None] + change)
        is_there = (kinds[own][:, None, None] == kinds[bins]).any(2)  # [own item, bin]
        is_here = (kinds[bins][..., None] == kinds[own]).any(2)  # [bin, item]
        after[is_there] = np.inf
        after[:, is_here] = np.inf
        item, other, place = np.unravel_index(after.argmin(), after.shape)
        if not after[item, other, place] < total[heaviest] * (1 - 1e-12):
            return
        bins[heaviest, item], bins[other, place] = bins[other, place], bins[heaviest, item]


def _numbers(load: Any) -> np.ndarray:
    try:
        return np.asarray(load, np.float64)
    except (TypeError, ValueError):
        raise ValueError(
            f"load must be numbers [E], such as aux.load.tokens_per_expert, got {type(load).__name__}"
        ) from None


def _check(load: np.ndarray, num_slots: int, ep: int, num_nodes: int, num_groups: int) -> None:
    if load.ndim != 1 or not load.size:
        raise ValueError(f"load must be [E], rows of every expert, got {list(load.shape)}")
    if not (np.isfinite(load) & (load >= 0)).all():
        raise ValueError(f"load must be finite and not negative, got {load.min()} to {load.max()}")
    for name, number in (("num_slots", num_slots), ("ep", ep), ("num_nodes", num_nodes), ("num_groups", num_groups)):
        if not isinstance(number, int | np.integer) or isinstance(number, bool) or number < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {number!r}")
    for whole, part, names in (
        (num_slots, ep, "num_slots must be a multiple of ep"),
        (ep, num_nodes, "ep must be a multiple of num_nodes"),
        (load.size, num_groups, "num_groups must divide the experts"),
        (num_groups, num_nodes, "num_groups must be a multiple of num_nodes"),
    ):
        if whole % part:
            raise ValueError(f"{names}, got {whole} and {part}")
    if num_slots < load.size:
        raise ValueError(f"num_slots must be at least the {load.size} experts, got {num_slots}")
    ranks = ep // num_nodes
    if num_slots > load.size * ranks:
        raise ValueError(
            f"num_slots must be at most {load.size * ranks}, each of the {load.size} experts once on each of the "
            f"{ranks} ranks of a node, got {num_slots}"
        )
