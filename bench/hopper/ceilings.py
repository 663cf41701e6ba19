"""What the chip at hand really reaches in this run: reading memory, and the largest products of cuBLAS.

A data sheet's bandwidth and peak are reached by nothing; a kernel is measured against these as well.
"""

import dataclasses

import jax
import jax.numpy as jnp

from bench.hopper.peers import why_not_torch
from bench.measure.clock import kernel_times, torch_times
from pallas_kernels.chips import Chip

_ROWS, _COLUMNS = 1 << 15, 1 << 14  # 2.1 GB of float32
_SIZE = 8192


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """The most that was reached.

    Attributes:
      read_bandwidth: bytes/s of summing the rows of a matrix of 2.1 GB.
      bf16_flops: FLOP/s of a BF16 product of 8192³.
      fp8_flops: FLOP/s of an FP8 product of 8192³ in torch, None without torch.
    """

    read_bandwidth: float
    bf16_flops: float
    fp8_flops: float | None

    def applied_to(self, chip: Chip) -> Chip:
        """`chip` with these figures in place of its data sheet's, which stays where there is none."""
        peaks = {**chip.peak_flops, "bfloat16": self.bf16_flops}
        if self.fp8_flops is not None:
            peaks["float8_e4m3fn"] = self.fp8_flops
        name = f"{chip.name}, as measured"
        return dataclasses.replace(chip, name=name, hbm_bandwidth=self.read_bandwidth, peak_flops=peaks)


def measure_ceilings(repeats: int) -> Ceilings:
    """Measures them on jax's first device.

    Raises:
      ValueError: jax does not run on NVIDIA GPUs.
    """
    key = jax.random.key(0)
    x = jax.random.normal(key, (_ROWS, _COLUMNS), jnp.float32)
    read = kernel_times(jax.jit(lambda x: x.sum(axis=1)), x, repeats=repeats)
    a, b = (jax.random.normal(k, (_SIZE, _SIZE), jnp.bfloat16) for k in jax.random.split(key))
    product = kernel_times(jax.jit(jnp.dot), a, b, repeats=repeats)
    return Ceilings(
        read_bandwidth=x.nbytes / (read.median_us * 1e-6),
        bf16_flops=_flops(product.median_us),
        fp8_flops=_torch_fp8_flops(repeats) if why_not_torch() is None else None,
    )


def _torch_fp8_flops(repeats: int) -> float:
    import torch

    a, b = (torch.randn(_SIZE, _SIZE, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device="cuda")

    def product(a, b):
        return torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)

    return _flops(torch_times(product, [(a, b)], repeats=repeats).median_us)


def _flops(microseconds: float) -> float:
    return 2 * _SIZE**3 / (microseconds * 1e-6)
