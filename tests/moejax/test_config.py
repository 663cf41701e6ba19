"""A configuration that makes no sense is refused when it is made, with the field, what it may be, and what it was."""

import dataclasses
import re

import jax.numpy as jnp
import pytest
from flax import nnx

from moejax import ROUTERS, MoE, MoEConfig, Quantization, TopKRouter, with_changes
from tests.helpers import raises_saying

GOOD = {"hidden_size": 256, "intermediate_size": 128, "num_experts": 8, "top_k": 2}

REFUSED = [
    ({"hidden_size": 0}, "hidden_size must be a whole number of at least 1, got 0"),
    ({"intermediate_size": -4}, "intermediate_size must be a whole number of at least 1, got -4"),
    ({"num_experts": 0}, "num_experts must be a whole number of at least 1, got 0"),
    ({"top_k": 0}, "top_k must be a whole number of at least 1, got 0"),
    ({"top_k": 9}, "top_k must be at most num_experts=8, got 9"),
    ({"shared_intermediate_size": -1}, "shared_intermediate_size must be a whole number of at least 0, got -1"),
    ({"load_balance_loss": -0.1}, "load_balance_loss must be at least 0, got -0.1"),
    ({"sequence_balance_loss": -1}, "sequence_balance_loss must be at least 0, got -1"),
    ({"z_loss": -1}, "z_loss must be at least 0, got -1"),
    ({"num_groups": 0}, "num_groups must be a whole number of at least 1, got 0"),
    ({"num_groups": 3}, "num_groups must be a divisor of num_experts=8, got 3"),
    ({"topk_groups": 0}, "topk_groups must be a whole number of at least 1, got 0"),
    ({"num_groups": 2, "topk_groups": 3}, "topk_groups must be at most num_groups=2, got 3"),
    (
        {"num_groups": 4, "topk_groups": 1, "top_k": 3},
        "top_k must be at most the 2 experts of topk_groups=1 groups, got 3",
    ),
    ({"top_k": 2.0}, "top_k must be a whole number of at least 1, got 2.0"),
    ({"top_k": True}, "top_k must be a whole number of at least 1, got True"),
    ({"group_score_k": 0}, "group_score_k must be a whole number of at least 1, got 0"),
    ({"scoring": "tanh"}, "scoring must be 'softmax' or 'sigmoid' or 'sqrt_softplus', got 'tanh'"),
    ({"routed_scaling_factor": float("nan")}, "routed_scaling_factor must be finite, got nan"),
    ({"update_rate": 0.0}, "update_rate must be positive and finite, got 0.0"),
    ({"z_loss": float("inf")}, "z_loss must be at least 0, got inf"),
    ({"precision": "w4a4"}, "precision must be 'w16a16' or 'w8a8', got 'w4a4'"),
    ({"capacity_factor": 0.0}, "capacity_factor must be positive and finite, or None to drop nothing, got 0.0"),
    ({"capacity_factor": -1.0}, "capacity_factor must be positive and finite, or None to drop nothing, got -1.0"),
    (
        {"capacity_factor": float("inf")},
        "capacity_factor must be positive and finite, or None to drop nothing, got inf",
    ),
    ({"capacity_factor": True}, "capacity_factor must be positive and finite, or None to drop nothing, got True"),
    ({"expert_bias": "no"}, "expert_bias must be True or False, got 'no'"),
    ({"dtype": "foo"}, "dtype must be bfloat16, float16 or float32, got 'foo'"),
    (
        {"activation": "swiglu"},
        "unknown activation 'swiglu'; expected one of silu, gelu, gelu_tanh, swigluoai, relu2 (",
    ),
    ({"capacity_of": "mesh"}, "capacity_of must be 'batch' or 'chip', got 'mesh'"),
    ({"shared_gate": True}, "shared_gate must be False where there is no shared expert, got True"),
    ({"shared_activation": "relu"}, "unknown shared_activation 'relu'"),
    ({"shared_activation": "silu", "shared_activation_limit": -1.0}, "shared_activation_limit must be positive"),
    (
        {"shared_activation_limit": 7.0},
        "shared_activation_limit must be None where shared_activation is not given, got 7.0",
    ),
    ({"scale_inputs": True}, "top_k must be 1 with scale_inputs=True, got 2"),
    ({"wire_scaling": "rows"}, "wire_scaling must be of one row, such as '1x128' or 'per_row'"),
    ({"wire_scaling": "per_tensor"}, "wire_scaling must be of one row, such as '1x128' or 'per_row'"),
    ({"wire_scaling": "128x128"}, "wire_scaling must be of one row, such as '1x128' or 'per_row'"),
    ({"wire_gradient_dtype": "e5m2"}, "wire_gradient_dtype must be one of (None, 'float8_e4m3fn', 'float8_e5m2'"),
    ({"dtype": jnp.int32}, "dtype must be bfloat16, float16 or float32, got 'int32'"),
    ({"dtype": jnp.float8_e4m3fn}, "dtype must be bfloat16, float16 or float32, got 'float8_e4m3fn'"),
    ({"dtype": "float64"}, "dtype must be bfloat16, float16 or float32, got 'float64'"),
    ({"param_dtype": jnp.int8}, "param_dtype must be bfloat16, float16 or float32, got 'int8'"),
    ({"activation": "relu"}, "unknown activation 'relu'; expected one of silu, gelu, gelu_tanh, swigluoai, relu2"),
    ({"activation_limit": 0.0}, "activation_limit must be positive, or None for no clamp, got 0.0"),
    ({"backend": "cuda"}, "unknown backend 'cuda'; expected one of 'auto', 'xla', 'pallas_tpu', 'pallas_gpu'"),
    ({"transport": "post"}, "transport must be one of 'auto', 'dense'"),
]

DOES_NOT_FIT_8_BITS = [
    ({"hidden_size": 192}, "hidden_size=192: shape (1, 192) cannot be scaled by '1x128'"),
    ({"intermediate_size": 192}, "intermediate_size=192: shape (1, 192) cannot be scaled by '1x128'"),
    ({"shared_intermediate_size": 64}, "shared_intermediate_size=64: shape (1, 64) cannot be scaled by '1x128'"),
    (
        {"hidden_size": 192, "quantization": Quantization(lhs_scaling="per_row")},
        "intermediate_size=128: shape (192, 128) cannot be scaled by '128x128'",
    ),
    (
        {"wire_scaling": "1x100", "quantization": Quantization(lhs_scaling="per_tensor")},
        "hidden_size=256: shape (1, 256) cannot be scaled by '1x100'",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refused(changes, message):
    config = MoEConfig(**GOOD)
    with pytest.raises(ValueError, match=re.escape(message)):
        with_changes(config, **changes)


@pytest.mark.parametrize(("changes", "message"), DOES_NOT_FIT_8_BITS, ids=[m for _, m in DOES_NOT_FIT_8_BITS])
def test_widths_that_do_not_divide_into_scale_blocks(changes, message):
    MoEConfig(**GOOD | changes)  # fine in 16 bits, where nothing is scaled
    with pytest.raises(ValueError, match="precision 'w8a8' does not fit " + re.escape(message)):
        MoEConfig(**GOOD | changes, precision="w8a8")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Quantization(dtype="int4"), "dtype must be one of float8_e4m3fn, float8_e5m2, int8, got int4"),
        (lambda: Quantization(gradient_dtype="fp8"), "gradient_dtype must be one of float8_e4m3fn, float8_e5m2, int8"),
        (
            lambda: Quantization(weights_gradient_dtype="bfloat16"),
            "weights_gradient_dtype must be one of float8_e4m3fn",
        ),
        (lambda: Quantization(lhs_scaling="0x128"), "unknown lhs_scaling '0x128'"),
        (lambda: Quantization(lhs_scaling=128), "unknown lhs_scaling 128"),
        (lambda: Quantization(rhs_scaling="blocks"), "unknown rhs_scaling 'blocks'"),
        (lambda: MoEConfig(**GOOD, quantization="int8"), "quantization must be a Quantization"),
    ],
)
def test_quantization_is_checked(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_dtypes_are_kept_by_name():
    assert Quantization(dtype=jnp.int8, gradient_dtype=jnp.dtype("float8_e5m2")) == Quantization(
        "int8", gradient_dtype="float8_e5m2"
    )


def test_replacing_a_field_checks_again():
    config = MoEConfig(**GOOD)
    assert dataclasses.replace(config, top_k=8).top_k == 8
    with pytest.raises(ValueError, match="top_k must be at most num_experts=8, got 9"):
        dataclasses.replace(config, top_k=9)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.top_k = 3


def test_a_router_that_is_none():
    with raises_saying(ValueError, "router must be a router of moejax.routers, such as TopKRouter()", "got 'softmax'"):
        MoEConfig(**GOOD, router="softmax")
    with raises_saying(ValueError, "an entry of ROUTERS takes a config and makes one of it", "got <function softmax"):
        MoEConfig(**GOOD, router=ROUTERS["softmax"])
    with raises_saying(TypeError, "config must be a MoEConfig, got MoE; of a layer, layer.config"):
        ROUTERS["loss_free"](MoE(MoEConfig(**GOOD), rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("field", ["gradient_dtype", "weights_gradient_dtype"])
def test_gradients_in_8_bits_need_weights_in_8_bits(field):
    quantization = Quantization(**{field: "float8_e5m2"})
    with raises_saying(
        ValueError, "precision must be 'w8a8' where quantization has a dtype of gradients, got 'w16a16'"
    ):
        MoEConfig(**GOOD, quantization=quantization)
    assert MoEConfig(256, 128, 8, 2, precision="w8a8", quantization=quantization).quantization == quantization


def test_fields_that_nothing_has():
    message = "scorings, width: no field of MoEConfig or TopKRouter; did you mean scoring?; they have activation, "
    with raises_saying(ValueError, message):
        with_changes(MoEConfig(**GOOD), width=3, scorings="sigmoid")
    with pytest.raises(TypeError, match="scoring"):
        MoEConfig(**GOOD, scoring="sigmoid")


def test_changes_reach_the_router_and_the_layer():
    config = with_changes(MoEConfig(**GOOD), top_k=3, scoring="sigmoid")
    assert config == MoEConfig(**GOOD | {"top_k": 3}, router=TopKRouter(scoring="sigmoid"))
    other = with_changes(config, router=TopKRouter(z_loss=0.1), router_bias=True)
    assert other.router == TopKRouter(z_loss=0.1, router_bias=True)


def test_a_capacity_factor_of_experts_that_choose_is_their_routers():
    config = ROUTERS["expert_choice"](MoEConfig(**GOOD), capacity_factor=2.0)
    changed = with_changes(config, capacity_factor=3.0)
    assert (changed.capacity_factor, changed.router.capacity_factor) == (None, 3.0)


def test_the_shared_expert_may_have_an_activation_of_its_own():
    config = MoEConfig(**GOOD, shared_intermediate_size=128, activation="swigluoai", activation_limit=7.0)
    assert config.of_shared_expert == ("swigluoai", 7.0)
    assert dataclasses.replace(config, shared_activation="silu").of_shared_expert == ("silu", None)
    limited = dataclasses.replace(config, shared_activation="gelu", shared_activation_limit=2.0)
    assert limited.of_shared_expert == ("gelu", 2.0)


@pytest.mark.parametrize(
    ("lhs_scaling", "of_rows"), [("1x128", "1x128"), ("1x64", "1x64"), ("per_row", "per_row"), ("per_tensor", "1x32")]
)
def test_rows_travel_with_the_scales_of_their_product_if_these_are_of_one_row(lhs_scaling, of_rows):
    quantization = Quantization(lhs_scaling=lhs_scaling)
    assert MoEConfig(**GOOD, quantization=quantization, wire_scaling="1x32").scaling_of_rows == of_rows


def test_a_configuration_is_a_static_argument():
    assert MoEConfig(**GOOD) == MoEConfig(**GOOD)
    assert hash(MoEConfig(**GOOD)) == hash(MoEConfig(**GOOD))
    assert MoEConfig(**GOOD) != MoEConfig(**GOOD, precision="w8a8")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", jnp.bfloat16])
def test_dtypes_by_name_or_type(dtype):
    assert jnp.dtype(MoEConfig(**GOOD, dtype=dtype, param_dtype=dtype).dtype) == jnp.dtype(dtype)
