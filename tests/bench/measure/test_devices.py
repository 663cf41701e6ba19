"""What a benchmark says of the devices it runs on."""

import jax
import pytest

from bench.measure.devices import Devices


def test_devices_of_unknown_memory_are_an_error_that_says_what_to_do():
    devices = Devices((jax.devices("cpu")[0],), is_virtual=False, note="1 unknown device")
    with pytest.raises(ValueError, match=r"1 unknown device do not say how much memory .* no row for 'cpu'; add one"):
        _ = devices.memory_bytes


def test_virtual_devices_share_the_memory_of_the_host():
    one, two = (Devices(tuple(jax.devices("cpu")[:n]), is_virtual=True, note="") for n in (1, 2))
    assert one.memory_bytes == two.memory_bytes > 1e9
