import dataclasses
import math

import numpy as np
import pytest

from bench.model.layers import moe_layer
from bench.model.shapes import GemmShape
from bench.model.workloads import Workload, moe_workload


@dataclasses.dataclass(frozen=True)
class Layer:
    hidden_size: int = 7168
    intermediate_size: int = 2048
    shared_intermediate_size: int = 2048
    num_experts: int = 256
    top_k: int = 8


DEEPSEEK = Layer()


def products(workload: Workload, *, as_ds_tpu: bool = True) -> dict[str, GemmShape]:
    """What one chip multiplies for the layer, by name."""
    operators = moe_layer(workload, as_ds_tpu=as_ds_tpu).operators
    return {name: operator for name, operator in operators.items() if isinstance(operator, GemmShape)}


def test_example_of_batch_64():
    workload = moe_workload(DEEPSEEK, batch_size=64, ep=32)
    assert workload.token_per_ep_group == 16
    assert workload.dispatch_bytes == 114_688
    assert workload.combine_bytes == 229_376
    assert (workload.dp, workload.batch_size_local, workload.expert_per_ep_group) == (32, 2, 8)
    assert (workload.activated_expert_per_ep_group, workload.m_per_group, workload.num_chips) == (8, 2, 32)


def test_precision_sets_the_width_of_dispatch_and_not_of_combine():
    workload = moe_workload(DEEPSEEK, batch_size=64, ep=32, precision="w16a16")
    assert workload.dispatch_bytes == workload.combine_bytes == 229_376
    assert workload.dtype == "bf16"
    assert moe_workload(DEEPSEEK, batch_size=64, ep=32, quantized_dtype="int8").dtype == "int8"


def test_products_of_the_v32_run():
    workload = moe_workload(DEEPSEEK, batch_size=1536, ep=32)
    assert list(products(workload).items()) == [
        ("gate", GemmShape(1, 48, 7168, 256)),
        ("shared_gate_proj", GemmShape(1, 48, 7168, 2048)),
        ("shared_up_proj", GemmShape(1, 48, 7168, 2048)),
        ("shared_down_proj", GemmShape(1, 48, 2048, 7168)),
        ("routed_gate_proj", GemmShape(8, 48, 7168, 2048)),
        ("routed_up_proj", GemmShape(8, 48, 7168, 2048)),
        ("routed_down_proj", GemmShape(8, 48, 2048, 7168)),
    ]
    assert (workload.dispatch_bytes, workload.combine_bytes) == (2_752_512, 5_505_024)


def test_no_shared_expert_no_shared_products():
    layer = dataclasses.replace(DEEPSEEK, shared_intermediate_size=0)
    names = list(products(moe_workload(layer, batch_size=64, ep=32)))
    assert names == ["gate", "routed_gate_proj", "routed_up_proj", "routed_down_proj"]


def test_moe_tp_cuts_the_routed_experts_and_the_wire():
    whole = moe_workload(DEEPSEEK, batch_size=64, ep=16)
    cut = moe_workload(DEEPSEEK, batch_size=64, ep=16, moe_tp=4)
    shapes = products(cut)
    assert shapes["routed_gate_proj"].N == shapes["routed_down_proj"].K == 512
    assert shapes["shared_gate_proj"].N == 2048
    assert (cut.dispatch_bytes, cut.num_chips) == (whole.dispatch_bytes // 4, 64)


@pytest.mark.parametrize(("rounding", "shape"), [("round", (3, 1, 7168, 2048)), ("ceil", (4, 1, 7168, 2048))])
def test_both_evaluators_roundings_of_config_a(rounding, shape):
    shapes = products(moe_workload(DEEPSEEK, batch_size=4, ep=32, dp=1, rounding=rounding))
    assert shapes["routed_gate_proj"] == GemmShape(*shape)
    assert shapes["gate"].M == 4


def test_rows_can_be_those_of_the_busiest_chip():
    workload = moe_workload(DEEPSEEK, batch_size=1536, ep=32)
    assert workload.busiest_rows > workload.token_per_ep_group
    rows = math.ceil(workload.busiest_rows / 8)
    assert products(workload, as_ds_tpu=False)["routed_up_proj"] == GemmShape(8, rows, 7168, 2048)


def test_a_measured_load_and_replicas_say_which_chip_is_busiest():
    load = (80, *range(1, 256))
    skewed = moe_workload(DEEPSEEK, batch_size=64, ep=32, load=load)
    total = sum(load)
    assert skewed.busiest_rows == pytest.approx(sum(range(248, 256)) / total * 64 * 8)
    assert skewed.busiest_experts == 8
    slots = (*range(256), *range(255, 223, -1))  # nine on a chip, and the hot experts at the end in two slots
    spread = dataclasses.replace(skewed, slots=slots)
    assert (spread.expert_per_ep_group, spread.busiest_experts) == (9, 9)
    shares = np.array(load) / np.bincount(slots)
    assert spread.busiest_rows == pytest.approx(shares[np.array(slots).reshape(32, 9)].sum(1).max() / total * 64 * 8)
    assert products(spread, as_ds_tpu=False)["routed_up_proj"].G == 9
    idle = moe_workload(DEEPSEEK, batch_size=64, ep=32, load=(1, *[0] * 255))
    assert (idle.busiest_experts, idle.busiest_rows) == (1, 64 * 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"load": (1, 2)}, r"load must hold the rows of 256 experts, .* got \(1, 2\)"),
        ({"load": (0,) * 256}, "load must hold the rows of 256 experts, some of them at least"),
        ({"slots": tuple(range(256))}, "slots are planned for a load: give load as well"),
        ({"load": (1,) * 256, "slots": (*range(255), 0)}, "got 256 slots of 255 experts"),
        ({"load": (1,) * 256, "slots": (*range(256), 0)}, "in a multiple of ep=32, got 257 slots of 256 experts"),
    ],
)
def test_loads_and_slots_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        moe_workload(DEEPSEEK, batch_size=64, ep=32, **changes)


def test_q_len_multiplies_tokens_but_not_sequences():
    workload = moe_workload(DEEPSEEK, batch_size=64, ep=32, q_len=3)
    assert workload.token_per_ep_group == 48
    assert workload.batch_size_local == 2
    assert products(workload)["gate"].M == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"batch_size": 48},
            "batch_size must be a multiple of dp, got batch_size=48 for dp=32; pass dp=16 or batch_size=64",
        ),
        ({"ep": 48, "dp": 1}, "num_experts must be a multiple of ep, got num_experts=256 for ep=48; pass ep=16"),
        ({"moe_tp": 3}, "intermediate_size must be a multiple of moe_tp, got intermediate_size=2048 for moe_tp=3"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"ep": -1}, "ep must be at least 1, got -1"),
        ({"dp": 0}, "dp must be at least 1, got 0"),
        ({"dp": 64}, "dp must divide the ep · moe_tp = 32 chips, got 64"),
        ({"dp": 24}, "dp must divide the ep · moe_tp = 32 chips, got 24"),
        ({"q_len": 0}, "q_len must be at least 1, got 0"),
        ({"precision": "w4a8"}, "precision must be 'w8a8' or 'w16a16', got 'w4a8'"),
        ({"quantized_dtype": "fp4"}, "quantized_dtype must be 'fp8' or 'int8', got 'fp4'"),
        ({"rounding": "floor"}, r"rounding must be 'round' \(DS_TPU\) or 'ceil' \(Tier6\), got 'floor'"),
    ],
)
def test_errors_say_what_to_pass(changes, message):
    with pytest.raises(ValueError, match=message):
        moe_workload(DEEPSEEK, **({"batch_size": 64, "ep": 32} | changes))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"top_k": 300}, "top_k must be at most num_experts=256, got 300"),
        ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        ({"shared_intermediate_size": -1}, "shared_intermediate_size must be 0"),
    ],
)
def test_errors_of_the_layer(layer, message):
    with pytest.raises(ValueError, match=message):
        moe_workload(dataclasses.replace(DEEPSEEK, **layer), batch_size=64, ep=32)


def test_a_shape_has_no_empty_side():
    with pytest.raises(ValueError, match="M must be at least 1"):
        GemmShape(8, 0, 7168, 2048)


def test_workload_is_a_plain_value():
    workload = moe_workload(DEEPSEEK, batch_size=64, ep=32)
    assert workload == Workload(**dataclasses.asdict(workload))
