"""Records of `bench.gpu` from made-up measurements, for the tests of what shows them."""

from bench.gpu import make_record
from bench.hopper.cases import CASES
from bench.hopper.ceilings import Ceilings
from bench.hopper.measure_case import case_record
from pallas_kernels.chips import get_chip

CEILINGS = Ceilings(read_bandwidth=4.65e12, bf16_flops=794e12, fp8_flops=1392e12)


def measurement(microseconds, error=1.6e-3, configuration=""):
    times = {"us": microseconds, "min_us": microseconds - 1, "spread_us": 2.0}
    return {**times, "relative_error": error, "configuration": configuration, "kernels": ["kernel"]}


def record(ours, peers=None, chip="h200", ceilings=CEILINGS):
    """A run in which `ours` maps case names to µs or reasons, and `peers` to outcomes of peers by name, or reasons."""
    made = make_record("NVIDIA H200", ["--md"], "abc1234", ceilings)
    for name, outcome in ours.items():
        outcome = {"error": outcome} if isinstance(outcome, str) else measurement(outcome)
        others = {
            peer: {"error": other} if isinstance(other, str) else other
            for peer, other in (peers or {}).get(name, {}).items()
        }
        made["cases"][name] = case_record(CASES[name], outcome, others, get_chip(chip), ceilings)
    return made
