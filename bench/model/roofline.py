"""Modelled times of a layer's operators: a roofline on real chips, the DS_TPU model on the chips made for it.

The roofline of an operator is what no implementation beats: compute, main memory and links perfectly overlapped, each
at its peak. It reads the weights of the activated experts only, and gives the routed experts the rows of the busiest
chip, as that is the one that the others wait for.

    layer = model_layer(get_chip("h200"), moe_workload(config, batch_size=1536, ep=32))
    layer.elapsed, layer.mean_rows, layer.busiest_rows
"""

import dataclasses
from typing import Any, Literal

from bench.model.ds_tpu import OperatorTime, evaluate_exchange, evaluate_gemm
from bench.model.workloads import GemmShape, Matmul, Workload, layer_operators, operand_dtype
from pallas_kernels.chips import Chip
from pallas_kernels.cost import grouped_matmul_cost

WGMMA_ROWS = 64  # rows that a GPU's matrix instruction takes at least


@dataclasses.dataclass(frozen=True)
class LayerTime:
    """Modelled times of one Mixture-of-Experts layer on its busiest chip.

    Attributes:
      chip: what was modelled.
      workload: the layer and its batch.
      model: "ds_tpu" or "roofline".
      operators: one record an operator, in order of execution.
      mean_rows: rows (token–expert assignments) of a chip when all have the same, rounded up.
      busiest_rows: expected rows of the chip that has the most.
    """

    chip: Chip
    workload: Workload
    model: Literal["ds_tpu", "roofline"]
    operators: tuple[OperatorTime, ...]
    mean_rows: int
    busiest_rows: float

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
    busiest_rows = workload.busiest_rows
    times: list[OperatorTime] = []
    for operator in layer_operators(workload, None if is_ds_tpu else busiest_rows):
        if isinstance(operator, Matmul):
            times.append(model_gemm(chip, operator.shape, workload.dtype, operator.name))
            backward = _backward(operator.shape) if grad else ()
            times += [model_gemm(chip, shape, "bf16", f"{operator.name}_grad") for shape in backward]
            continue
        # The gradient of dispatch travels as combine does, in BF16, and that of combine as well.
        for num_bytes in (operator.num_bytes, *([workload.combine_bytes] if grad else ())):
            if is_ds_tpu:
                times.append(evaluate_exchange(chip, operator.name, num_bytes))
            else:
                times.append(roofline_exchange(chip, operator.name, num_bytes, workload.ep))
    return LayerTime(
        chip=chip,
        workload=workload,
        model="ds_tpu" if is_ds_tpu else "roofline",
        operators=tuple(times),
        mean_rows=workload.token_per_ep_group,
        busiest_rows=busiest_rows,
    )


def _backward(shape: GemmShape) -> tuple[GemmShape, GemmShape]:
    """The products that give the gradients of the rows and of the weights."""
    return GemmShape(shape.G, shape.M, shape.N, shape.K), GemmShape(shape.G, shape.K, shape.M, shape.N)


def model_gemm(chip: Chip, shape: GemmShape, dtype: str, name: str = "gemm") -> OperatorTime:
    """Time of one grouped GEMM with a BF16 output, by the model that fits the chip.

    Raises:
      ValueError: dtype is not "fp8", "int8", "bf16" or "fp16".
    """
    model = evaluate_gemm if chip.kind == "ds_tpu" else roofline_gemm
    return model(chip, shape, dtype, name=name)


def roofline_gemm(
    chip: Chip, shape: GemmShape, dtype: str, name: str = "gemm", block_m: int | None = None
) -> OperatorTime:
    """The least time of a grouped GEMM with a BF16 output.

    Args:
      chip: gives the peak and the memory bandwidth. A dtype that its matrix unit does not take still saves bytes.
      shape: the product; every group counts as touched.
      dtype: of both operands: "fp8", "int8", "bf16" or "fp16".
      name: copied into the result.
      block_m: the arithmetic pads each group's rows to this many, `default_block_m` if None.

    Raises:
      ValueError: unknown dtype, or block_m below 1.
    """
    full_name, operand_bytes = operand_dtype(dtype)
    block_m = default_block_m(chip, dtype) if block_m is None else block_m
    if block_m < 1:
        raise ValueError(f"block_m must be at least 1, got {block_m}")

    def cost(rows_per_group: int):
        rows = shape.G * rows_per_group
        return grouped_matmul_cost(rows, shape.K, shape.N, shape.G, lhs_dtype=full_name, rhs_dtype=full_name)

    padded = cost(-(-shape.M // block_m) * block_m)
    real = cost(shape.M)
    comp = padded.compute_seconds(chip, full_name) * 1e6
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
        dram_occupy=shape.weights * operand_bytes,
        param=shape.weights,
        urate=real.flops / (elapsed * 1e-6 * chip.peak(full_name)),
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


def default_block_m(chip: Chip, dtype: str) -> int:
    """Rows to which a group is padded at the least: one wgmma on a GPU, one register tile (8 × 4 bytes) on a TPU."""
    return WGMMA_ROWS if chip.kind == "gpu" else 32 // operand_dtype(dtype)[1]
