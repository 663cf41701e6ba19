import dataclasses
import json
import math

import pytest

from bench.model.decoders import get_decoder
from bench.model.evaluation import build_evaluation
from bench.model.times import model_layer, model_step
from bench.model.workloads import Workload
from pallas_kernels.chips import get_chip

DECODE = Workload(7168, 2048, 2048, 256, 8, batch_size=1536, q_len=1, ep=32, dp=32, moe_tp=1)
LAYER = model_layer(get_chip("v32-run"), DECODE)
STEP = model_step(get_chip("v32-run"), DECODE, get_decoder("deepseek-v3.2"), 8192)
SUMS = "total_elapse_us", "comm_elapse_us", "flops", "dram_occupy", "mfu", "mfu_without_lookup", "weight_bytes"
SUMS += "cache_bytes", "fits", "bound", "layers"
RATES = "tps", "tps_per_batch", "tps_per_chip"


def test_field_names():
    evaluation = build_evaluation(LAYER)
    assert set(evaluation) == {"run_info", "config", "performance"}
    performance = evaluation["performance"]
    assert set(performance) == {*SUMS, *(f"layer_{rate}" for rate in RATES)}
    assert set(build_evaluation(STEP)["performance"]) == {*SUMS, *RATES}
    layer = performance["layers"]["MoE"]
    assert {"name", "layer_type", "perf", "arch"} <= set(layer)
    assert set(layer["perf"]) == {
        *("param", "flops", "dram_occupy", "dram_traffic", "elapse"),
        *("comp_elapse", "dma_elapse", "comm_elapse", "comm_size"),
    }
    for operator in layer["comp_operators"]:
        assert set(operator) == {
            *("name", "operator_type", "parallel_params", "param", "flops", "dram_occupy", "dram_traffic"),
            *("elapsed", "comp_elapsed", "dma_elapsed", "best_tile", "best_partition", "urate"),
        }
        assert set(operator["parallel_params"]) == {"G", "M", "K", "N"}
    for operator in layer["comm_operators"]:
        fields = {"name", "operator_type", "comm_kind", "comm_size", "comm_elapse", "parallel_params"}
        assert set(operator) == fields


def test_values():
    performance = build_evaluation(LAYER)["performance"]
    layer = performance["layers"]["MoE"]
    operators = {operator["name"]: operator for operator in layer["comp_operators"]}
    routed = operators["routed_gate_proj"]
    assert routed["operator_type"] == "MatMulOperator"
    assert routed["parallel_params"] == {"G": 8, "M": 48, "K": 7168, "N": 2048}
    assert routed["best_partition"] == {"dims": "GMNK", "procs": [8, 1, 2, 4]}
    assert [operator["comm_kind"] for operator in layer["comm_operators"]] == ["dispatch", "combine"]
    assert [operator["comm_size"] for operator in layer["comm_operators"]] == [2_752_512, 5_505_024]
    communication = sum(operator["comm_elapse"] for operator in layer["comm_operators"])
    arithmetic = sum(operator["elapsed"] for operator in layer["comp_operators"])
    assert layer["perf"]["comm_elapse"] == pytest.approx(communication)
    assert layer["perf"]["elapse"] == pytest.approx(communication + arithmetic)
    assert layer["perf"]["comm_size"] == 8_257_536
    assert layer["perf"]["param"] == 7168 * (256 + 3 * 2048 + 8 * 3 * 2048)
    expected = {
        "batch_size": 1536,
        "batch_size_local": 48,
        "token_per_ep_group": 384,
        "expert_per_ep_group": 8,
        "m_per_group": 48,
        "activated_expert_per_ep_group": 8,
        "mean_rows": 384,
    }
    assert expected.items() <= layer["arch"].items()
    assert layer["arch"]["busiest_rows"] > 384


def test_the_rate_of_a_chip_is_that_of_all_that_hold_the_experts():
    wide = build_evaluation(model_layer(get_chip("v32-run"), dataclasses.replace(DECODE, moe_tp=2)))["performance"]
    assert wide["layer_tps_per_chip"] == pytest.approx(wide["layer_tps"] / 64)


@pytest.mark.parametrize(("precision", "width"), [("w8a8", 1), ("w16a16", 2)])
@pytest.mark.parametrize("chip", ["v32-run", "h200"])
def test_times_are_microseconds_and_sizes_bytes(chip, precision, width):
    layer = model_layer(get_chip(chip), dataclasses.replace(DECODE, precision=precision))
    performance = build_evaluation(layer)["performance"]
    weights = 7168 * (256 + 3 * 2048 + 8 * 3 * 2048)
    assert performance["layers"]["MoE"]["perf"]["param"] == weights
    assert performance["dram_occupy"] == performance["layers"]["MoE"]["perf"]["dram_occupy"] == width * weights
    rows = 384 if chip == "v32-run" else math.ceil(DECODE.busiest_rows)
    sent = rows * 7168 * (width + 2)  # dispatch at the operands' width, combine in BF16
    bandwidth = get_chip(chip).link_bandwidth
    seconds = sent / (0.95 * bandwidth) + 2 * 0.59e-6 if chip == "v32-run" else sent * 31 / 32 / bandwidth
    assert performance["comm_elapse_us"] == pytest.approx(seconds * 1e6)
    assert performance["layers"]["MoE"]["perf"]["comm_elapse"] == pytest.approx(seconds * 1e6)
    assert performance["total_elapse_us"] == pytest.approx(1536 / performance["layer_tps"] * 1e6)


@pytest.mark.parametrize(("time", "prefix"), [(LAYER, "layer_"), (STEP, "")], ids=["a layer", "a model"])
def test_rates(time, prefix):
    performance = build_evaluation(time)["performance"]
    seconds = time.elapsed * 1e-6
    assert performance["total_elapse_us"] == time.elapsed
    assert performance[f"{prefix}tps"] == pytest.approx(1536 / seconds)
    assert performance[f"{prefix}tps_per_batch"] == pytest.approx(1 / seconds)
    assert performance[f"{prefix}tps_per_chip"] == pytest.approx(48 / seconds)
    assert performance["mfu"] == pytest.approx(time.total("flops") / (768e12 * seconds))


def test_layers_of_a_model_add_up():
    performance = build_evaluation(STEP)["performance"]
    layers = performance["layers"]
    assert {name: layer["count"] for name, layer in layers.items()} == {
        "Embedding": 1, "MLA": 61, "DSA": 61, "MLP": 3, "MoE": 58, "LMHead": 1,
    }  # fmt: skip
    for total, part in (("total_elapse_us", "elapse"), ("comm_elapse_us", "comm_elapse"), ("flops", "flops")):
        assert sum(x["count"] * x["perf"][part] for x in layers.values()) == pytest.approx(performance[total])
    for layer in layers.values():
        operators = [*layer["comp_operators"], *layer["comm_operators"]]
        assert layer["total_operators"] == len(operators)
        times = [operator["elapsed" if "elapsed" in operator else "comm_elapse"] for operator in operators]
        assert sum(times) == pytest.approx(layer["perf"]["elapse"])
        assert layer["arch"]["kv_len"] == 8192
    attention = next(x for x in layers["MLA"]["comp_operators"] if x["name"] == "attention")
    assert attention["operator_type"] == "FA2Operator"
    assert attention["parallel_params"] == {"B": 48, "QS": 128, "KS": 2048, "QD": 576, "VD": 512}
    assert attention["best_partition"] == {"dims": "B", "procs": [64]}
    assert set(attention["best_tile"]) == {"Q", "K"}
    assert layers["Embedding"]["comp_operators"][0]["operator_type"] == "EmbeddingOperator"


def test_what_was_modelled_on_which_chip():
    config = build_evaluation(STEP)["config"]
    assert config["num_layers"] == {"Embedding": 1, "MLA": 61, "DSA": 61, "MLP": 3, "MoE": 58, "LMHead": 1}
    assert config["kv_len"] == 8192
    assert config["chip"] == {
        **{"name": "v32-run", "kind": "ds_tpu", "cores": 64, "peak_flops": 768e12},
        **{"hbm_bandwidth": 8601.6e9, "link_bandwidth": 448e9, "hbm_bytes": None},
    }
    h200 = build_evaluation(model_step(get_chip("h200"), DECODE, get_decoder("deepseek-v3.2"), 8192))
    assert (h200["config"]["chip"]["peak_flops"], h200["config"]["chip"]["hbm_bytes"]) == (1978.9e12, 141e9)
    assert h200["performance"]["fits"] is True
    assert h200["performance"]["bound"] == h200["performance"]["layers"]["MLA"]["bound"] == "memory"


def test_sums_of_a_layer_are_those_of_its_operators():
    for layer in build_evaluation(STEP)["performance"]["layers"].values():
        for field, part in (("comp_elapse", "comp_elapsed"), ("dma_elapse", "dma_elapsed"), ("flops", "flops")):
            assert layer["perf"][field] == pytest.approx(sum(op[part] for op in layer["comp_operators"]))
    performance = build_evaluation(STEP)["performance"]
    occupied = sum(x["count"] * x["perf"]["dram_occupy"] for x in performance["layers"].values())
    assert performance["dram_occupy"] == occupied


def test_extra_entries():
    evaluation = build_evaluation(LAYER, run_info={"command": "decode"}, measured={"elapsed": 1.5})
    assert evaluation["run_info"]["command"] == "decode"
    assert evaluation["run_info"]["chip"] == "v32-run"
    assert evaluation["measured"] == {"elapsed": 1.5}


@pytest.mark.parametrize("chip", ["v32-run", "v5e", "h200"])
@pytest.mark.parametrize("precision", ["w8a8", "w16a16"])
def test_every_chip_gives_plain_json(chip, precision):
    workload = dataclasses.replace(DECODE, precision=precision)
    for time in (
        model_layer(get_chip(chip), workload),
        model_step(get_chip(chip), workload, get_decoder("deepseek-v3.2"), 8192),
    ):
        evaluation = build_evaluation(time)
        assert json.loads(json.dumps(evaluation, allow_nan=False)) == evaluation
        assert evaluation["config"]["precision"] == precision
