"""The clock of a chain, with programs and a time line that stand in for a GPU's; its programs, as far as they lower."""

import functools
import os
import re

import jax
import jax.numpy as jnp
import pytest

from bench.hopper import norms, prefetch_measure, products
from bench.hopper.norms import Norm
from bench.hopper.prefetch_measure import ChainTimer, leave_out_command_buffers
from bench.hopper.products import Product
from bench.hopper.tune_prefetch import shape_chain
from bench.measure.timeline import Launch
from bench.model.shapes import GemmShape
from pallas_kernels.chips import get_chip
from pallas_kernels.on_gpu.prefetch import PLAIN, Prefetch
from pallas_kernels.tracing.target import targeting

PRODUCTS = [Product(GemmShape(1, 8, 128, 256), "bf16"), Product(GemmShape(2, 4, 256, 128), "bf16")]
PDL, SMEM, L2 = Prefetch("pdl", 1.0), Prefetch("smem", 1.0, 1.0), Prefetch("l2", 1.0, 1.0)
NUM_KERNELS = 16
"""Two products over eight copies of their small inputs."""


@pytest.fixture
def device(monkeypatch):
    """A GPU on which each program takes the µs that are given for its choice; others compute something else or fail."""

    class Device:
        def __init__(self):
            self.us, self.ran, self.said, self.options = {}, [], [], []

        def lower(self, timer, choice):
            assert len(timer._inputs) * len(PRODUCTS) == NUM_KERNELS
            device = self

            class Lowered:
                def compile(self, compiler_options):
                    device.options.append(compiler_options)
                    if choice not in device.us:
                        raise RuntimeError("does not\ncompile")
                    return functools.partial(device.run, choice)

            return Lowered()

        def run(self, choice, inputs):
            self.ran.append(choice)
            return [jnp.float32(device.us[choice] < 0)]

        def recorded(self, run):
            self.ran.clear()
            run()
            launches = []
            for number, choice in enumerate(self.ran):
                begin, step = 1000 * number, self.us[choice] / NUM_KERNELS
                launches.append(Launch("nvjet", begin - 500, begin - 1))
                launches += [
                    Launch("grouped_matmul", begin + i * step, begin + (i + 1) * step) for i in range(NUM_KERNELS)
                ]
            return launches

    device = Device()
    monkeypatch.setattr(prefetch_measure, "_HOLD_WIDTH", 2)
    monkeypatch.setattr(prefetch_measure, "recorded", device.recorded)
    monkeypatch.setattr(ChainTimer, "lower", lambda timer, choice: device.lower(timer, choice))
    return device


def test_all_are_timed_in_turn_and_what_fails_or_differs_is_left_out(device):
    plain, early, wrong, broken = (PLAIN, PLAIN), (PDL, PDL), (PDL, SMEM), (L2, L2)
    device.us = {plain: 200, early: 190, wrong: -1}
    timer = ChainTimer(PRODUCTS, device.said.append)
    assert timer.num_kernels == NUM_KERNELS
    samples = timer.sample([plain, early, wrong, broken], 3)
    assert samples == {plain: [pytest.approx(200)] * 3, early: [pytest.approx(190)] * 3}
    assert device.ran == [plain, early, early, plain, plain, early]
    assert "the results are not those of plain launches" in device.said[0] + device.said[1]
    assert "RuntimeError: does not compile" in device.said[0] + device.said[1]


def test_programs_are_compiled_once_in_either_way(device):
    plain = (PLAIN, PLAIN)
    device.us = {plain: 200}
    timer = ChainTimer(PRODUCTS, device.said.append)
    for in_command_buffers in (False, True, False, True):
        timer.sample([plain], 1, in_command_buffers=in_command_buffers)
    without, with_buffers = device.options
    assert without is None
    assert "CUSTOM_CALL" in with_buffers["xla_gpu_enable_command_buffer"]


def test_options_of_command_buffers_are_known_to_xla():
    jax.jit(jnp.sin).lower(1.0).compile(compiler_options=prefetch_measure._COMMAND_BUFFERS)


def test_a_time_line_without_all_kernels_is_an_error(device, monkeypatch):
    device.us = {(PLAIN, PLAIN): 200}
    monkeypatch.setattr(prefetch_measure, "recorded", lambda run: device.recorded(run)[:-1])
    with pytest.raises(ValueError, match="whole runs of 16 kernels, got 15"):
        ChainTimer(PRODUCTS, print).sample([(PLAIN, PLAIN)], 1)


def test_a_chain_has_its_kernels_in_order_each_lowered_once():
    timer = ChainTimer(PRODUCTS, print)
    with targeting(get_chip("h200")):
        text, other = (timer.lower(choice).as_text() for choice in ((PLAIN, SMEM), (PLAIN, PDL)))
    assert text.count("custom_call @mosaic_gpu") == 2  # a function for each product, called again
    results = re.findall(r"= call @\S+\(.*-> (tensor<\S+>)$", text, re.MULTILINE)
    assert [result for result in results if result in ("tensor<8x256xbf16>", "tensor<8x128xbf16>")] == (
        ["tensor<8x256xbf16>", "tensor<8x128xbf16>"] * 8
    )
    assert text.count("optimization_barrier") == NUM_KERNELS - 1
    assert text != other
    assert set(timer._kernels) == {(PRODUCTS[0], PLAIN), (PRODUCTS[1], SMEM), (PRODUCTS[1], PDL)}


def test_a_norm_comes_before_its_product_and_rounds_as_that_wants_it():
    (product,) = chosen = [Product(GemmShape(1, 16, 1024, 256), "fp8")]
    chain = shape_chain(chosen, normed=True)
    norm, after = chain.values()
    assert (norm, after) == (Norm(16, 1024, "fp8"), product)
    assert shape_chain(chosen, normed=False) == {product.name: product}
    wider = Product(GemmShape(1, 16, 1024, 512), "fp8")  # behind an equal norm
    assert list(shape_chain([product, wider], normed=True).values()) == [norm, product, norm, wider]
    with targeting(get_chip("h200")):
        text = ChainTimer([norm, after], print).lower((PDL, PLAIN)).as_text()
        y = jax.eval_shape(norm.run, *jax.eval_shape(lambda: norms.make_inputs(norm)))
    assert text.count("custom_call @mosaic_gpu") == 2
    lhs = jax.eval_shape(lambda: products.make_inputs(product))[0]
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(y[0])] == [
        (leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(lhs)
    ]


def test_flags_that_are_there_stay(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=0")
    leave_out_command_buffers()
    assert os.environ["XLA_FLAGS"] == "--xla_gpu_autotune_level=0 --xla_gpu_enable_command_buffer="
