"""Modelled times of a layer on a slice, forward or of a training step, to stand beside what the compiler says."""

import dataclasses

from bench.model.ds_tpu import OperatorTime, evaluate_exchange
from bench.model.roofline import model_gemm, roofline_exchange
from bench.model.workloads import GemmShape, Matmul, Workload, layer_operators, operand_dtype
from bench.tpu.slices import Slice
from pallas_kernels.chips import Chip, ds_tpu_chip

DS_TPU_CORES = 64


def roofline_us(slice_: Slice, workload: Workload, grad: bool) -> float:
    """The least time of the layer on the busiest device: each operator bound by what it needs most of."""
    return _sum(slice_.device, workload, grad, workload.busiest_rows)


def ds_tpu_us(slice_: Slice, workload: Workload, grad: bool) -> float:
    """The DS_TPU model's time on a chip of its kind with this device's peak, bandwidth and links."""
    device = slice_.device
    peak = device.peak(operand_dtype(workload.dtype)[0])
    chip = ds_tpu_chip(device.name, DS_TPU_CORES, peak / 1e12, device.hbm_bandwidth / 1e9, "this device, as DS_TPU's")
    return _sum(dataclasses.replace(chip, link_bandwidth=device.link_bandwidth), workload, grad, None)


def _sum(chip: Chip, workload: Workload, grad: bool, rows: float | None) -> float:
    times: list[OperatorTime] = []
    for operator in layer_operators(workload, rows):
        if isinstance(operator, Matmul):
            shapes = [operator.shape, *(_backward(operator.shape) if grad else ())]
            times += [model_gemm(chip, shape, workload.dtype if i == 0 else "bf16") for i, shape in enumerate(shapes)]
        else:
            # The gradient of dispatch travels as combine does, in BF16, and that of combine as well.
            sizes = [operator.num_bytes, *([workload.combine_bytes] if grad else ())]
            for size in sizes:
                if chip.kind == "ds_tpu":
                    times.append(evaluate_exchange(chip, operator.name, size))
                else:
                    times.append(roofline_exchange(chip, operator.name, size, workload.ep))
    return sum(time.elapsed for time in times)


def _backward(shape: GemmShape) -> tuple[GemmShape, GemmShape]:
    """The products that give the gradients of the rows and of the weights."""
    return GemmShape(shape.G, shape.M, shape.N, shape.K), GemmShape(shape.G, shape.K, shape.M, shape.N)
