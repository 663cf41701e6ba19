"""Records of `bench.gpu` from made-up measurements, for the tests of what shows them."""

from bench.gpu import make_record
from bench.hopper.cases import CASES
from bench.hopper.ceilings import Ceilings
from bench.hopper.measure_case import Measurement, case_record
from bench.measure.clock import CallTime
from pallas_kernels.chips import get_chip

CEILINGS = Ceilings(read_bandwidth=4.65e12, bf16_flops=794e12, fp8_flops=1392e12)


def measurement(microseconds, error=1.6e-3, configuration=""):
    return Measurement(CallTime(microseconds, microseconds - 1, 2.0, ("kernel",)), error, configuration)


def record(ours, peers=None, chip="h200", ceilings=CEILINGS):
    """A run in which `ours` maps case names to µs or reasons, and `peers` to outcomes of peers by name."""
    made = make_record("NVIDIA H200", ["--md"], "abc1234", ceilings)
    for name, outcome in ours.items():
        outcome = outcome if isinstance(outcome, str) else measurement(outcome)
        made["cases"][name] = case_record(CASES[name], outcome, (peers or {}).get(name, {}), get_chip(chip), ceilings)
    return made
