"""A chip with what it reached in place of its data sheet's figures."""

import dataclasses

from pallas_kernels.chips import get_chip
from tests.bench.hopper.gpu_records import CEILINGS

H200 = get_chip("h200")


def test_measured_figures_replace_the_data_sheets():
    measured = CEILINGS.applied_to(H200)
    assert (measured.name, measured.hbm_bandwidth) == ("h200, as measured", 4.65e12)
    assert (measured.peak("bfloat16"), measured.peak("float8_e4m3fn")) == (794e12, 1392e12)
    assert measured.peak("int8") == H200.peak("int8")


def test_what_was_not_measured_stays():
    measured = dataclasses.replace(CEILINGS, fp8_flops=None).applied_to(H200)
    assert measured.peak("float8_e4m3fn") == H200.peak("float8_e4m3fn")
