"""How a layer is made to fit: memory of every preset, and reductions."""

import dataclasses

import pytest

from bench.expert_parallel.fit import fit, memory_bytes, reduce_width
from bench.measure.devices import Devices
from moejax import PRESETS, get_preset


@dataclasses.dataclass(frozen=True)
class Machine(Devices):
    """32 devices of so many bytes in all."""

    memory: int = 0

    @property
    def memory_bytes(self) -> int:
        return self.memory


def machine(gigabytes: float) -> Machine:
    return Machine(devices=(None,) * 32, is_virtual=False, note="", memory=int(gigabytes * 1e9))


def test_weights_are_most_of_what_a_large_layer_needs():
    config = get_preset("deepseek-v3", precision="w8a8")
    weights = 256 * 3 * 7168 * 2048
    needed = memory_bytes(config, ep=32, batch_size=1536)
    assert weights < needed < 1.6 * weights
    assert memory_bytes(get_preset("deepseek-v3"), ep=32, batch_size=1536) > 1.5 * needed


@pytest.mark.parametrize(("gigabytes", "reduction"), [(100, 1), (20, 2), (8, 4)])
def test_the_widest_layer_that_fits_is_taken(gigabytes, reduction):
    config = get_preset("deepseek-v3", precision="w8a8")
    fitted = fit(config, machine(gigabytes), 1536)
    assert fitted.reduction == reduction
    assert fitted.config.hidden_size == 7168 // reduction
    assert fitted.config.num_experts == 256
    assert fitted.needed_bytes <= fitted.available_bytes


def test_nothing_fits():
    with pytest.raises(ValueError, match=r"needs more than the 0\.0 GB .* lower --batch"):
        fit(get_preset("deepseek-v3"), machine(0.001), 1536)


@pytest.mark.parametrize("name", [name for name in PRESETS if PRESETS[name].num_experts % 32 == 0])
@pytest.mark.parametrize("precision", ["w8a8", "w16a16"])
def test_every_preset_has_a_reduction_for_a_small_machine(name, precision):
    assert fit(get_preset(name, precision=precision), machine(16), 1536).reduction <= 16


def test_a_reduction_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="hidden_size=7168 is not divisible by the reduction 3"):
        reduce_width(get_preset("deepseek-v3"), 3)
