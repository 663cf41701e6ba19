"""Times configurations of one product on the device, after a look at their results."""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from bench.hopper.products import Product, make_inputs
from bench.measure.clock import copies_of, kernel_times, rotated
from bench.measure.errors import check, describe, relative_error
from pallas_kernels.grouped_matmul.gpu.hopper import tiling
from pallas_kernels.grouped_matmul.gpu.hopper.problem import Config
from pallas_kernels.quantize import QTensor, dequantize

_TOLERANCE = 2e-2  # between two configurations, which sum in different orders


class ConfigTimer:
    """Gives the kernel time of each configuration in µs; those that fail, or differ from the first, are left out.

    Configurations are compiled side by side and timed one after the other; `say` takes a line on each that failed.
    """

    def __init__(self, product: Product, repeats: int, say: Callable[[str], None]):
        self._product, self._repeats, self._say = product, repeats, say
        self._inputs = copies_of(jax.block_until_ready(make_inputs(product)))
        self._programs: dict[Config, Future[Any]] = {}
        self._reference: jax.Array | None = None

    def __call__(self, configs: Sequence[Config]) -> Mapping[Config, float]:
        """The first configuration of the first call gives the result that all others must have."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for config in configs:
                if config not in self._programs:
                    self._programs[config] = pool.submit(self._compiled, config)
        times = {}
        for config in configs:
            try:
                program = self._programs[config].result()
                self._check(program)
                time = kernel_times(program, self._inputs, repeats=self._repeats, calls=len(self._inputs))
                times[config] = time.median_us
            except Exception as error:  # one that does not compile must not end the others
                self._say(f"{self._product.name}, {config}: {describe(error)}")
        return times

    def _compiled(self, config: Config) -> Any:
        return self._lower(config).compile()

    def _lower(self, config: Config) -> Any:
        def call(*operands):  # a function of its own, as jax remembers what it traced
            return self._product.run(*operands)

        program: Any = rotated(call)
        with tiling.forced(config):
            return program.lower(self._inputs)

    def _check(self, program: Callable[..., list[jax.Array]]) -> None:
        result = program(self._inputs)[0]
        if isinstance(result, QTensor):
            result = dequantize(result)
        if self._reference is None:
            if not jnp.isfinite(result).all():
                raise ValueError("the result is not finite")
            self._reference = result.astype(jnp.float32)
        check(relative_error(result, self._reference), _TOLERANCE)
