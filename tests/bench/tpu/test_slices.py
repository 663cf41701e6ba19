import pytest

from bench.tpu.slices import parse_slice, slices_for
from pallas_kernels.chips import get_chip
from tests.helpers import raises_saying


@pytest.mark.parametrize(
    ("name", "chips", "devices", "chip"),
    [
        ("v5e:4x8", 32, 32, "v5e"),
        ("V6E:2x2", 4, 4, "v6e"),
        ("v5p:2x4x4", 32, 32, "v5p"),
        ("tpu7x:2x2x4", 16, 32, "v7x"),
        ("v7x:2x2x4", 16, 32, "v7x"),
    ],
)
def test_a_name_says_what_the_slice_has(name, chips, devices, chip):
    slice_ = parse_slice(name)
    assert (slice_.num_chips, slice_.num_devices, slice_.chip.name) == (chips, devices, chip)


def test_the_devices_of_a_chip_share_it():
    chip, device = get_chip("v7x"), parse_slice("tpu7x:2x2x4").device
    assert 2 * device.hbm_bytes == chip.hbm_bytes
    assert 2 * device.hbm_bandwidth == chip.hbm_bandwidth
    assert 2 * device.peak("bfloat16") == chip.peak("bfloat16")
    assert device.fast_memory_bytes == chip.fast_memory_bytes  # of a core already
    assert parse_slice("v5p:2x4x4").device == get_chip("v5p")


@pytest.mark.parametrize(("devices", "shapes"), [(1, "2x2x4"), (32, "2x2x4"), (64, "2x4x4")])
def test_the_smallest_slice_that_has_the_devices(devices, shapes):
    assert f"tpu7x:{shapes}" in [slice_.name for slice_ in slices_for(devices)]
    assert all(slice_.num_devices >= max(32, devices) for slice_ in slices_for(devices))


@pytest.mark.parametrize("name", ["v9:4x8", "v6e", "v6e:", "v6e:4by8", "v6e:0x8", "h200:4x8"])
def test_unknown_topologies(name):
    with raises_saying(ValueError, f"unknown topology {name!r}", "v6e:4x8", "tpu7x:2x2x4"):
        parse_slice(name)


def test_a_shape_has_as_many_sizes_as_the_network():
    with raises_saying(ValueError, "v5p:4x8", "3 dimensions", "v5p:2x2x4", "got 2"):
        parse_slice("v5p:4x8")
    with raises_saying(ValueError, "1000 devices", "--topology"):
        slices_for(1000)
