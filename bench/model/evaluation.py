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
      run_info: entries to add to the top-level "run_info" (a date, a command line).
      measured: results of a real run, stored as they are under the top-level "measured"; left out if None.

    Raises:
      ValueError: num_layers is below 1.
    """
    if num_layers < 1:
        raise ValueError(f"num_layers must be at least 1, got {num_layers}")
    workload, chip = layer.workload, layer.chip
    total_us = num_layers * layer.elapsed
    flops = num_layers * layer.flops
    peak = chip.peak(OPERAND_DTYPES[workload.dtype][0])
    tps = workload.batch_size * workload.q_len / (total_us * 1e-6)
    evaluation: dict[str, Any] = {
        "run_info": {"tool": "moejax bench", "model": layer.model, "chip": chip.name, **(run_info or {})},
        "config": {
            **dataclasses.asdict(workload),
            "num_layers": num_layers,
            "chip": {
                "name": chip.name,
                "kind": chip.kind,
                "cores": chip.cores,
                "peak_flops": peak,
                "hbm_bandwidth": chip.hbm_bandwidth,
                "link_bandwidth": chip.link_bandwidth,
            },
        },
        "performance": {
            "total_elapse_us": total_us,
            "comm_elapse_us": num_layers * layer.comm_elapsed,
            "flops": flops,
            "dram_occupy": num_layers * _sum(layer, "dram_occupy"),
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
            "param": _sum(layer, "param"),
            "flops": layer.flops,
            "dram_occupy": _sum(layer, "dram_occupy"),
            "dram_traffic": _sum(layer, "dram_traffic"),
            "elapse": layer.elapsed,
            "comp_elapse": layer.comp_elapsed,
            "dma_elapse": layer.dma_elapsed,
            "comm_elapse": layer.comm_elapsed,
            "comm_size": _sum(layer, "comm_size"),
        },
        "arch": {
            "hidden_size": workload.hidden_size,
            "intermediate_size": workload.intermediate_size,
            "batch_size": workload.batch_size,
            "batch_size_local": workload.batch_size_local,
            "q_len": workload.q_len,
            "token_per_ep_group": workload.token_per_ep_group,
            "expert_per_ep_group": workload.expert_per_ep_group,
            "m_per_group": workload.m_per_group,
            "activated_expert_per_ep_group": workload.activated_expert_per_ep_group,
            "mean_rows": layer.mean_rows,
            "busiest_rows": layer.busiest_rows,
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
        "param": operator.param,
        "flops": operator.flops,
        "dram_occupy": operator.dram_occupy,
        "dram_traffic": operator.dram_traffic,
        "elapsed": operator.elapsed,
        "comp_elapsed": operator.comp_elapsed,
        "dma_elapsed": operator.dma_elapsed,
        "best_tile": dataclasses.asdict(operator.best_tile) if operator.best_tile else None,
        "best_partition": operator.best_partition.as_dict() if operator.best_partition else None,
        "urate": operator.urate,
    }


def _sum(layer: LayerTime, field: str) -> int:
    return sum(getattr(operator, field) for operator in layer.operators)
