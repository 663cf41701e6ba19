"""The grids of `bench.sweep`, most wanted cases first, so that an interrupted sweep has what says most.

Two grids: tokens × hidden × experts × k, and batch × length with few experts and two capacity factors. Cases that run
the same programs on other loads stand next to one another, as compiling takes most of the time on an accelerator.
"""

import dataclasses
import itertools
from collections.abc import Sequence

from bench.one_chip.cases import LOADS, Case
from bench.one_chip.layouts import LAYOUTS

TOKENS, HIDDEN, EXPERTS, KS = (8192, 16384, 32768), (2048, 4096), (32, 64, 128), (1, 2, 4)
BATCHES = ((32, 128), (64, 256), (128, 512))
BATCH_EXPERTS, BATCH_HIDDEN, CAPACITIES, BATCH_K = (4, 8, 16), (1024, 2048), (1.0, 1.25), 2


def full_grid() -> list[Case]:
    """Everything, in this order.

    1. permute at the middle of the grid, every load: time and bandwidth against experts and k
    2. the layer with all layouts split into stages, every load, at the least tokens and k = 2
    3. the rest of permute, balanced
    4. the layer over batch × length, under the skew of real text, for which the capacity factors differ
    5. top-k alone
    6. the rest of the layer, balanced: compact split, the other layouts whole
    """
    grid = list(itertools.product(TOKENS, HIDDEN, EXPERTS, KS))
    permutes = [_permute(*sizes) for sizes in grid]
    layers = [dataclasses.replace(_layer(*sizes), split=("compact",)) for sizes in grid]
    first = [case for case in permutes if (case.tokens, case.hidden) == (TOKENS[1], HIDDEN[1])]
    split = [_layer(TOKENS[0], HIDDEN[0], experts, 2) for experts in EXPERTS]
    of_batches = [
        dataclasses.replace(
            _layer(batch * length, hidden, experts, BATCH_K),
            batch=batch,
            length=length,
            capacity_factor=capacity,
            load="text",
        )
        for (batch, length), hidden, experts, capacity in itertools.product(
            BATCHES, BATCH_HIDDEN, BATCH_EXPERTS, CAPACITIES
        )
    ]
    topks = [
        Case("topk", tokens=t, experts=e, k=k, hidden=1024, dtype="fp16", with_xla=True)
        for t, e, k in itertools.product(TOKENS, EXPERTS, KS)
    ]
    wanted = [*_with_every_load(first), *_with_every_load(split), *permutes, *of_batches, *topks, *layers]
    return list(dict.fromkeys(wanted))


def quick_grid() -> list[Case]:
    """A few small cases that give every kind of record: a minute or so on two CPU cores."""
    permutes = [_permute(2048, 256, experts, k) for experts, k in itertools.product((8, 16, 32), (1, 2, 4))]
    split = dataclasses.replace(_layer(1024, 256, 8, 2), block=32)
    of_batches = [
        dataclasses.replace(
            split, experts=experts, tokens=8 * 64, batch=8, length=64, capacity_factor=capacity, load="text"
        )
        for experts, capacity in itertools.product((4, 16), CAPACITIES)
    ]
    in_all_layouts = dataclasses.replace(split, bench="permute", intermediate=0, dtype="fp16")
    topks = [Case("topk", tokens=2048, experts=e, k=2, hidden=256, dtype="fp16", with_xla=True) for e in (8, 32)]
    return [*_with_every_load([split]), *permutes, *of_batches, *topks, *_with_every_load([in_all_layouts])]


def _with_every_load(cases: Sequence[Case]) -> list[Case]:
    return [dataclasses.replace(case, load=load) for case in cases for load in LOADS]


def _permute(tokens: int, hidden: int, experts: int, k: int) -> Case:
    return Case("permute", tokens, experts, k, hidden, dtype="fp16", with_xla=True)


def _layer(tokens: int, hidden: int, experts: int, k: int) -> Case:
    return Case("layer", tokens, experts, k, hidden, intermediate=hidden // 2, layouts=LAYOUTS, split=LAYOUTS)
