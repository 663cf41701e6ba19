"""The evaluation.json of DS_TPU: the same fields under the same names, for tools that read them.

Times are in µs, sizes in bytes, per chip. `param` counts weights; `dram_occupy` is their bytes, of the activated
experts only, as these are what the operators multiply.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from bench.model.ds_tpu import OperatorTime
from bench.model.roofline import LayerTime
from bench.model.workloads import OPERAND_DTYPES

LAYER_NAME = "MoE"
_OPERATOR_TYPES = {"matmul": "MatMulOperator", "dispatch": "DispatchOperator", "combine": "CombineOperator"}
_ARCHITECTURE = (
    *("hidden_size", "intermediate_size", "batch_size", "batch_size_local", "q_len", "token_per_ep_group"),
    *("expert_per_ep_group", "m_per_group", "activated_expert_per_ep_group"),
)


def build_evaluation(
    layer: LayerTime,
    *,
    num_layers: int = 1,
    run_info: Mapping[str, Any] | None = None,
    measured: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of evaluation.json for a model of `num_layers` such layers and nothing else.

    performance.tps is batch_size · q_len tokens over `num_layers` times the layer's time: the rate of a step that is
    these layers only, so an upper bound for a whole model. tps_per_batch is that rate for one sequence, tps_per_chip
    for one of the ep · moe_tp chips. mfu is one chip's unpadded FLOPs over its peak at the operands' dtype.

    Args:
      layer: modelled times.
      num_layers: layers of the model.
      run_info: what to add to "run_info" (a date, a command line).
      measured: results of a real run, stored under "measured"; left out if None.

    Raises:
      ValueError: num_layers is below 1.
    """
    if num_layers < 1:
        raise ValueError(f"num_layers must be at least 1, got {num_layers}")
    workload, chip = layer.workload, layer.chip
    total_us = num_layers * layer.elapsed
    flops = num_layers * layer.total("flops")
    peak = chip.peak(OPERAND_DTYPES[workload.dtype])
    tps = workload.batch_size * workload.q_len / (total_us * 1e-6)
    evaluation: dict[str, Any] = {
        "run_info": {"tool": "moejax bench", "model": layer.model, "chip": chip.name, **(run_info or {})},
        "config": {
            **dataclasses.asdict(workload),
            "num_layers": num_layers,
            "chip": {
                **_fields(chip, "name", "kind", "cores"),
                "peak_flops": peak,
                **_fields(chip, "hbm_bandwidth", "link_bandwidth"),
            },
        },
        "performance": {
            "total_elapse_us": total_us,
            "comm_elapse_us": num_layers * layer.comm_elapsed,
            "flops": flops,
            "dram_occupy": num_layers * layer.total("dram_occupy"),
            "mfu": flops / (total_us * 1e-6 * peak),
            "tps": tps,
            "tps_per_batch": tps / workload.batch_size,
            "tps_per_chip": tps / workload.num_chips,
            "layers": {LAYER_NAME: layer_record(layer)},
        },
    }
    if measured is not None:
        evaluation["measured"] = dict(measured)
    return evaluation


def layer_record(layer: LayerTime) -> dict[str, Any]:
    """One entry of performance.layers: sums, derived sizes, and the operators in order of execution."""
    workload = layer.workload
    return {
        "name": LAYER_NAME,
        "layer_type": LAYER_NAME,
        "total_operators": len(layer.operators),
        "perf": {
            **{name: layer.total(name) for name in ("param", "flops", "dram_occupy", "dram_traffic")},
            "elapse": layer.elapsed,
            "comp_elapse": layer.total("comp_elapsed"),
            "dma_elapse": layer.total("dma_elapsed"),
            "comm_elapse": layer.comm_elapsed,
            "comm_size": layer.total("comm_size"),
        },
        "arch": {
            **_fields(workload, *_ARCHITECTURE),
            "mean_rows": workload.token_per_ep_group,
            "busiest_rows": workload.busiest_rows,
        },
        "comp_operators": [operator_record(op) for op in layer.operators if op.kind == "matmul"],
        "comm_operators": [operator_record(op) for op in layer.operators if op.kind != "matmul"],
    }


def operator_record(operator: OperatorTime) -> dict[str, Any]:
    """One operator: of arithmetic, or of communication."""
    head = {"name": operator.name, "operator_type": _OPERATOR_TYPES[operator.kind]}
    if operator.shape is None:
        return {
            **head,
            "comm_kind": operator.kind,
            "comm_size": operator.comm_size,
            "comm_elapse": operator.elapsed,
            "parallel_params": {"comm_size": operator.comm_size},
        }
    return {
        **head,
        "parallel_params": dataclasses.asdict(operator.shape),
        **_fields(operator, "param", "flops", "dram_occupy", "dram_traffic", "elapsed", "comp_elapsed", "dma_elapsed"),
        "best_tile": operator.best_tile and dataclasses.asdict(operator.best_tile),
        "best_partition": operator.best_partition and {"dims": "GMNK", "procs": list(operator.best_partition)},
        "urate": operator.urate,
    }


def _fields(value: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(value, name) for name in names}
