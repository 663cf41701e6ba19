"""Modelled times of a layer's operators: a roofline on real chips, the DS_TPU model on the chips made for it.

The roofline of an operator is what no implementation beats: compute, main memory and links perfectly overlapped, each
at its peak. It reads the weights of the activated experts only, and gives the routed experts the rows of the busiest
chip, as that is the one that the others wait for.

    layer = model_layer(get_chip("h200"), moe_workload(config, batch_size=1536, ep=32))
    layer.elapsed, layer.comm_elapsed
"""

import dataclasses
import functools
from typing import Any, Literal

import jax

from bench.model.ds_tpu import OperatorTime, evaluate_exchange, evaluate_gemm
from bench.model.workloads import GemmShape, Workload, layer_matmuls, operand_dtype
from pallas_kernels.chips import Chip
from pallas_kernels.cost import Cost, grouped_matmul_cost

WGMMA_ROWS = 64  # rows that a GPU's matrix instruction takes at least


@dataclasses.dataclass(frozen=True)
class LayerTime:
    """Modelled times of one Mixture-of-Experts layer on its busiest chip.

    Attributes:
      chip: what was modelled.
      workload: the layer and its batch.
      operators: in order of execution.
    """

    chip: Chip
    workload: Workload
    operators: tuple[OperatorTime, ...]

    @property
    def model(self) -> Literal["ds_tpu", "roofline"]:
        """The model that fits the chip."""
        return "ds_tpu" if self.chip.kind == "ds_tpu" else "roofline"

    def total(self, field: str) -> Any:
        """The sum over the operators of one of their figures."""
        return sum(getattr(operator, field) for operator in self.operators)

    @property
    def elapsed(self) -> float:
        """µs of the layer: operators run one after the other."""
        return self.total("elapsed")

    @property
    def comm_elapsed(self) -> float:
        """µs of dispatch and combine, part of `elapsed`."""
        return sum(operator.elapsed for operator in self.operators if operator.kind != "matmul")


def model_layer(chip: Chip, workload: Workload, *, grad: bool = False) -> LayerTime:
    """Times of every operator of the layer: DS_TPU's model for its chips, the roofline for every other.

    DS_TPU counts the mean rows of a chip; the roofline counts the busiest chip's. With `grad` the operators of the
    gradients, all in BF16, follow each operator.
    """
    is_ds_tpu = chip.kind == "ds_tpu"
    times: list[OperatorTime] = []
    for name, shape in layer_matmuls(workload, None if is_ds_tpu else workload.busiest_rows).items():
        times.append(model_gemm(chip, shape, workload.dtype, name))
        if grad:  # of the rows and of the weights
            backward = GemmShape(shape.G, shape.M, shape.N, shape.K), GemmShape(shape.G, shape.K, shape.M, shape.N)
            times += [model_gemm(chip, gradient, "bf16", f"{name}_grad") for gradient in backward]
    exchange = evaluate_exchange if is_ds_tpu else functools.partial(roofline_exchange, ep=workload.ep)
    # The gradient of dispatch travels as combine does, in BF16, and that of combine as well.
    gradient_bytes = [workload.combine_bytes] if grad else []
    times += [exchange(chip, "dispatch", num_bytes) for num_bytes in (workload.dispatch_bytes, *gradient_bytes)]
    times += [exchange(chip, "combine", num_bytes) for num_bytes in (workload.combine_bytes, *gradient_bytes)]
    return LayerTime(chip, workload, tuple(times))


def model_gemm(chip: Chip, shape: GemmShape, dtype: str, name: str = "gemm") -> OperatorTime:
    """Time of one grouped GEMM with a BF16 output, by the model that fits the chip.

    Raises:
      ValueError: dtype is not "fp8", "int8", "bf16" or "fp16".
    """
    model = evaluate_gemm if chip.kind == "ds_tpu" else roofline_gemm
    return model(chip, shape, dtype, name=name)


def gemm_cost(shape: GemmShape, dtype: jax.typing.DTypeLike) -> Cost:
    """The least work of a grouped GEMM with both operands in `dtype` and a BF16 output; every group has rows."""
    return grouped_matmul_cost(shape.G * shape.M, shape.K, shape.N, shape.G, lhs_dtype=dtype, rhs_dtype=dtype)


def roofline_gemm(chip: Chip, shape: GemmShape, dtype: str, name: str = "gemm") -> OperatorTime:
    """The least time of a grouped GEMM with a BF16 output, whose arithmetic pads each group to `least_rows`.

    A dtype that the chip's matrix unit does not take still saves bytes.

    Raises:
      ValueError: the operands' dtype is not "fp8", "int8", "bf16" or "fp16".
    """
    operand = operand_dtype(dtype)
    block_m = least_rows(chip, dtype)
    real = gemm_cost(shape, operand)
    padded = gemm_cost(dataclasses.replace(shape, M=-(-shape.M // block_m) * block_m), operand)
    comp = padded.compute_seconds(chip, operand) * 1e6
    dma = real.memory_seconds(chip) * 1e6
    elapsed = max(comp, dma)
    return OperatorTime(
        name=name,
        kind="matmul",
        dtype=dtype,
        shape=shape,
        elapsed=elapsed,
        comp_elapsed=comp,
        dma_elapsed=dma,
        flops=real.flops,
        dram_traffic=real.hbm_bytes,
        dram_occupy=shape.weights * operand.itemsize,
        param=shape.weights,
        urate=real.flops / (elapsed * 1e-6 * chip.peak(operand)),
    )


def roofline_exchange(chip: Chip, kind: Literal["dispatch", "combine"], num_bytes: int, ep: int) -> OperatorTime:
    """The least time of an all-to-all over `ep` chips: `num_bytes` are read and written, (ep − 1) / ep of them sent."""
    dma = 2 * num_bytes / chip.hbm_bandwidth * 1e6
    link = num_bytes * (ep - 1) / ep / chip.link_bandwidth * 1e6
    return OperatorTime(
        name=kind,
        kind=kind,
        elapsed=max(dma, link),
        dma_elapsed=dma,
        link_elapsed=link,
        dram_traffic=2 * num_bytes,
        comm_size=num_bytes,
    )


def least_rows(chip: Chip, dtype: str) -> int:
    """Rows to which a group is padded: one wgmma on a GPU, one register tile (8 × 4 bytes) on a TPU."""
    return WGMMA_ROWS if chip.kind == "gpu" else 32 // operand_dtype(dtype).itemsize
