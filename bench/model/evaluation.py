"""The evaluation.json of DS_TPU: the same fields under the same names, for tools that read them.

Times are in µs, sizes in bytes, per chip. `param` counts the weights that an operator multiplies, so of the activated
experts only; `dram_occupy` is their bytes, and of an attention what `OperatorTime` says.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from bench.model.operator_time import OperatorTime
from bench.model.shapes import OPERAND_DTYPES
from bench.model.times import LayerTime, StepTime

_OPERATOR_TYPES = {
    "matmul": "MatMulOperator",
    "attention": "FA2Operator",
    "lookup": "EmbeddingOperator",
    "dispatch": "DispatchOperator",
    "combine": "CombineOperator",
}
_SUMS = (
    *("param", "flops", "dram_occupy", "dram_traffic"),
    *("elapsed", "comp_elapsed", "dma_elapsed", "comm_elapsed", "comm_size"),
)
_RATES = ("tps", "tps_per_batch", "tps_per_chip")


def build_evaluation(
    step: StepTime, *, run_info: Mapping[str, Any] | None = None, measured: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The content of evaluation.json.

    performance.tps, tps_per_batch and tps_per_chip are the rates of a whole model: of all tokens, of one sequence, and
    of one of the ep · moe_tp chips. A layer by itself has them under layer_tps, layer_tps_per_batch and
    layer_tps_per_chip, so that nobody takes them for a model's. total_elapse_us and all sums are over
    performance.layers, each times its count. mfu is one chip's unpadded FLOPs over its peak at the operands' dtype,
    with the lookup of the embedding charged like a product, as DS_TPU does; mfu_without_lookup leaves that out. fits
    says whether config.chip.hbm_bytes, null where it is not known, hold weight_bytes and cache_bytes; bound is what
    would take longest by itself: "compute", "memory" or "link".

    Args:
      step: modelled times.
      run_info: what to add to "run_info" (a date, a command line).
      measured: results of a real run, stored under "measured"; left out if None.
    """
    chip, whole = step.chip, step.kv_len is not None
    evaluation: dict[str, Any] = {
        "run_info": {"tool": "moejax bench", "model": step.model, "chip": chip.name, **(run_info or {})},
        "config": {
            **{name: value for name, value in dataclasses.asdict(step.workload).items() if value is not None},
            **({"kv_len": step.kv_len} if whole else {}),
            "num_layers": {time.layer.name: time.layer.count for time in step.layers},
            "chip": {
                **_fields(chip, "name", "kind", "cores"),
                "peak_flops": chip.peak(OPERAND_DTYPES[step.workload.dtype]),
                **_fields(chip, "hbm_bandwidth", "link_bandwidth"),
                "hbm_bytes": None if math.isinf(chip.hbm_bytes) else chip.hbm_bytes,
            },
        },
        "performance": {
            "total_elapse_us": step.elapsed,
            "comm_elapse_us": step.comm_elapsed,
            "flops": step.total("flops"),
            "dram_occupy": step.total("dram_occupy"),
            **_fields(step, "mfu", "mfu_without_lookup", "weight_bytes", "cache_bytes", "fits", "bound"),
            **{name if whole else f"layer_{name}": getattr(step, name) for name in _RATES},
            "layers": {time.layer.name: layer_record(time) for time in step.layers},
        },
    }
    if measured is not None:
        evaluation["measured"] = dict(measured)
    return evaluation


def layer_record(time: LayerTime) -> dict[str, Any]:
    """One entry of performance.layers: sums of one layer, its sizes, and its operators in order of execution."""
    operators = [operator_record(operator) for operator in time.operators]
    return {
        "name": time.layer.name,
        "layer_type": time.layer.name,
        "count": time.layer.count,
        "bound": time.bound,
        "total_operators": len(operators),
        # DS_TPU's layers say "elapse" where its operators say "elapsed".
        "perf": {name.replace("elapsed", "elapse"): time.total(name) for name in _SUMS},
        "arch": dict(time.layer.arch),
        "comp_operators": [record for record in operators if "comm_kind" not in record],
        "comm_operators": [record for record in operators if "comm_kind" in record],
    }


def operator_record(operator: OperatorTime) -> dict[str, Any]:
    """One operator: of arithmetic, or of communication."""
    head = {"name": operator.name, "operator_type": _OPERATOR_TYPES[operator.kind]}
    if operator.kind in ("dispatch", "combine"):
        return {
            **head,
            "comm_kind": operator.kind,
            "comm_size": operator.comm_size,
            "comm_elapse": operator.elapsed,
            "parallel_params": {"comm_size": operator.comm_size},
        }
    dims = "GMNK" if operator.kind == "matmul" else "B"
    return {
        **head,
        "parallel_params": operator.shape.params if operator.shape else {},
        **_fields(operator, "param", "flops", "dram_occupy", "dram_traffic", "elapsed", "comp_elapsed", "dma_elapsed"),
        "best_tile": operator.best_tile and dataclasses.asdict(operator.best_tile),
        "best_partition": operator.best_partition and {"dims": dims, "procs": list(operator.best_partition)},
        "urate": operator.urate,
    }


def _fields(value: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(value, name) for name in names}
