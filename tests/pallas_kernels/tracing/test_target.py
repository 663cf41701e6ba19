import jax
import pytest

from pallas_kernels.backend import Unsupported
from pallas_kernels.chips import get_chip
from pallas_kernels.on_tpu.device import tpu_chip
from pallas_kernels.tracing import target
from pallas_kernels.tracing.target import target_chip, target_platform, targeting
from tests.helpers import raises_saying


@pytest.mark.parametrize("name", ["v5e", "v5p", "v6e", "v7x"])
def test_the_target_is_the_chip_that_kernels_are_cut_for(name):
    assert target_chip() is None
    with targeting(get_chip(name)):
        assert tpu_chip() == target_chip() == get_chip(name)
        assert target_platform() == "tpu"
        with targeting(get_chip("h200")):
            assert target_platform() == "gpu"
        assert tpu_chip() == get_chip(name)
    assert target_chip() is None
    assert target_platform() == jax.default_backend()


def test_the_target_is_forgotten_after_an_error():
    def fail():
        with targeting(get_chip("v5e")):
            raise RuntimeError("inside")

    with raises_saying(RuntimeError, "inside"):
        fail()
    assert target_chip() is None


def test_a_modelled_chip_has_no_kernels(monkeypatch):
    monkeypatch.setattr(target.jax, "default_backend", lambda: "cpu")
    with targeting(get_chip("seed")):
        assert target_platform() == "cpu"


def test_kernels_for_tpus_refuse_another_target():
    with targeting(get_chip("h200")), raises_saying(Unsupported, "h200", "need a TPU"):
        tpu_chip()
