"""What moving tokens between chips costs by itself, for every transport, beside bare collectives."""

import argparse
import contextlib
import functools
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax

from bench.command.parser import run
from bench.exchange.measure import STEPS, Watch, measure
from bench.exchange.movements import BARE
from bench.exchange.options import check_ep, layer_of, parse
from bench.exchange.records import FILE_NAME, LAYER_FIELDS, Record, step_records, table
from bench.exchange.tokens import Tokens, check_memory
from bench.exchange.whole_layer import time_on_one_chip, time_over_chips
from bench.expert_parallel.fit import reduce_width
from bench.measure.devices import Devices, start
from bench.measure.errors import describe
from bench.one_chip.cases import Case
from bench.one_chip.records import origin_of
from bench.processes.watchdog import Watchdog
from bench.record.files import holding
from bench.record.json_files import append_records, write_json
from bench.record.progress import Progress
from bench.record.provenance import chip_name, now
from moejax import MoEConfig
from pallas_kernels.chips import Chip, chip_of
from sharding.mesh import make_mesh

_CHAIN, _VIRTUAL_CHAIN = 16, 2
_VIRTUAL_REDUCTION = 8


def main(argv: Sequence[str]) -> int:
    """Measures, checks, prints and writes; returns 1 when something was wrong or failed."""
    args = parse(argv)
    devices = start(
        args.ep,
        say=lambda line: print(line, file=sys.stderr, flush=True),
        coordinator=args.coordinator,
        num_processes=args.num_processes,
        process_id=args.process_id,
    )
    args.reduce = args.reduce or (_VIRTUAL_REDUCTION if devices.is_virtual and args.hidden is None else 1)
    args.chain = args.chain or (_VIRTUAL_CHAIN if devices.is_virtual else _CHAIN)
    config = reduce_width(layer_of(args), args.reduce)
    check_ep(len(devices.devices), config, devices.note)
    check_memory(config, max(args.tokens), devices)
    cases = _cases(config, len(devices.devices), args)
    origin = {**origin_of("bench.comm", argv, args.commit), "chip": chip_name(devices.devices[0])}
    is_first = jax.process_index() == 0
    if not is_first:  # the first speaks and writes for all
        args.json = args.out = None
    with contextlib.ExitStack() as stack:
        if args.out is not None:
            stack.enter_context(holding(args.out))
        stream = None if is_first else stack.enter_context(open(os.devnull, "w"))
        progress = Progress(len(cases) * (len(args.transport) + len(BARE)), stream)
        records = _run(args, config, devices, cases, origin, progress)
        if args.json == "-":
            write_json(records, "-")
        elif is_first:
            print(table(records))
        failed = [record for record in records if record["error"] is not None]
        for record in failed:
            what = f"{record['movement']}, load {record['load']}, {record['tokens']} tokens"
            progress.say(f"FAILED: {what}: {record['error']}")
    return 1 if failed else 0


def _cases(config: MoEConfig, ep: int, args: argparse.Namespace) -> list[Case]:
    """The loads that the options ask for."""
    common: dict[str, Any] = {"experts": config.num_experts, "k": config.top_k, "hidden": config.hidden_size}
    common |= {name: getattr(args, name) for name in ("zipf_exponent", "text", "seed")}
    grid = itertools.product(args.tokens, args.load)
    return [Case("topk", tokens=ep * tokens, load=load, **common) for tokens, load in grid]


def _run(
    args: argparse.Namespace,
    config: MoEConfig,
    devices: Devices,
    cases: Sequence[Case],
    origin: Record,
    progress: Progress,
) -> list[Record]:
    """A record for each movement of each case, written as soon as it is there: a watchdog leaves those before it."""
    ep, watchdog = len(devices.devices), Watchdog(args.timeout)
    mesh = make_mesh(ep, devices=devices.devices)
    chip = None if devices.is_virtual else chip_of(devices.devices[0])
    head = {
        **{"ep": ep, "hidden": config.hidden_size, "experts": config.num_experts, "k": config.top_k},
        **{"precision": config.precision, "reduction": args.reduce, "is_virtual": devices.is_virtual},
        **{"chain": args.chain, "repeats": args.repeats},
    }
    records: list[Record] = []
    progress.say(f"{devices.note}; wall time, {args.chain} calls in a program, {args.repeats} repeats")
    for case in cases:
        place = f"load {case.load}, ep {ep}, {case.tokens // ep} tokens"
        with watchdog.watching(place, "making the load"):
            tokens = Tokens.of(case, config, mesh)
        watch_one = functools.partial(watchdog.watching, place)
        # No transport changes it, so it is timed once.
        on_one_chip = functools.cache(
            functools.partial(time_on_one_chip, case, config, ep, **_of_layers(args), watch=watch_one)
        )
        for name in (*args.transport, *BARE):
            progress.show(len(records), f"{name}, {place}")
            watch = functools.partial(watchdog.watching, f"{name}, {place}")
            what = {"movement": name, "tokens": case.tokens // ep, "load": case.load}
            figures = _figures(name, tokens, on_one_chip, chip, args, watch)
            records.append({**what, **head, **figures, "time": now(), **origin})
            if args.json not in (None, "-"):
                write_json(records, args.json)
            if args.out is not None:
                append_records(args.out / FILE_NAME, records[-1:])
    return records


def _figures(
    name: str,
    tokens: Tokens,
    on_one_chip: Callable[[], float | None],
    chip: Chip | None,
    args: argparse.Namespace,
    watch: Watch,
) -> Record:
    """What was measured of a movement, and of the layer where that is asked for; or what went wrong."""
    layer = dict.fromkeys(LAYER_FIELDS)
    try:
        steps = step_records(measure(name, tokens, length=args.chain, repeats=args.repeats, watch=watch), chip)
        if args.with_layer and name not in BARE:
            one_chip = on_one_chip()
            layer_us = time_over_chips(tokens, name, **_of_layers(args), watch=watch)
            exposed = None if one_chip is None else layer_us - one_chip
            layer = dict(zip(LAYER_FIELDS, (layer_us, one_chip, exposed), strict=True))
    except Exception as error:  # what one transport cannot do says nothing of the others
        return {**dict.fromkeys((*STEPS, *LAYER_FIELDS)), "error": describe(error)}
    return {**steps, **layer, "error": None}


def _of_layers(args: argparse.Namespace) -> dict[str, int]:
    """How the whole layer is timed."""
    return {"length": args.chain, "repeats": args.repeats, "seed": args.seed}


if __name__ == "__main__":
    sys.exit(run(main))
