"""The presets against the figures of the models' published configuration files and parameter counts."""

import dataclasses
import math

import jax
import pytest

from moejax import PRESETS, get_preset
from moejax.param import Param
from moejax.params import param_table

FIGURES = {
    # name: hidden, width of an expert, experts, top-k, width of the shared expert
    "deepseek-v3": (7168, 2048, 256, 8, 2048),
    "deepseek-v3.2": (7168, 2048, 256, 8, 2048),
    "mixtral-8x7b": (4096, 14336, 8, 2, 0),
    "qwen3-30b-a3b": (2048, 768, 128, 8, 0),
    "qwen3-235b-a22b": (4096, 1536, 128, 8, 0),
    "gpt-oss-120b": (2880, 2880, 128, 4, 0),
    "kimi-k2": (7168, 2048, 384, 8, 2048),
    "llama-4-maverick": (5120, 8192, 128, 1, 8192),
}

# Layers with experts, and all parameters of the model in billions; the experts hold nearly all of them.
TOTALS = {
    "deepseek-v3": (58, 671),
    "deepseek-v3.2": (58, 671),
    "mixtral-8x7b": (32, 46.7),
    "qwen3-30b-a3b": (48, 30.5),
    "qwen3-235b-a22b": (94, 235),
    "gpt-oss-120b": (36, 116.8),
    "kimi-k2": (60, 1043),
    "llama-4-maverick": (24, 400.7),
}

ROUTING = {
    # name: scoring, groups, groups kept, scaling, correction bias, router bias
    "deepseek-v3": ("sigmoid", 8, 4, 2.5, True, False),
    "deepseek-v3.2": ("sigmoid", 8, 4, 2.5, True, False),
    "mixtral-8x7b": ("softmax", 1, 1, 1.0, False, False),
    "qwen3-30b-a3b": ("softmax", 1, 1, 1.0, False, False),
    "qwen3-235b-a22b": ("softmax", 1, 1, 1.0, False, False),
    "gpt-oss-120b": ("softmax", 1, 1, 1.0, False, True),
    "kimi-k2": ("sigmoid", 1, 1, 2.827, True, False),
    "llama-4-maverick": ("sigmoid", 1, 1, 1.0, False, False),
}

every_preset = pytest.mark.parametrize("name", PRESETS)


def test_every_preset_is_tested():
    assert set(PRESETS) == set(FIGURES) == set(TOTALS) == set(ROUTING)


@every_preset
def test_sizes(name):
    c = PRESETS[name]
    assert (c.hidden_size, c.intermediate_size, c.num_experts, c.top_k, c.shared_intermediate_size) == FIGURES[name]


@every_preset
def test_routing(name):
    r = PRESETS[name].router
    assert (
        r.scoring,
        r.num_groups,
        r.topk_groups,
        r.routed_scaling_factor,
        r.correction_bias,
        r.router_bias,
    ) == ROUTING[name]


@every_preset
def test_experts_hold_nearly_all_parameters_of_the_model(name):
    layers, billions = TOTALS[name]
    rows = jax.tree.leaves(param_table(PRESETS[name]), is_leaf=lambda leaf: isinstance(leaf, Param))
    experts = layers * sum(math.prod(row.shape) for row in rows) / 1e9
    assert 0.93 * billions < experts < billions


def test_activations():
    gpt_oss = PRESETS["gpt-oss-120b"]
    assert (gpt_oss.activation, gpt_oss.activation_limit, gpt_oss.expert_bias) == ("swigluoai", 7.0, True)
    others = [config for name, config in PRESETS.items() if name != "gpt-oss-120b"]
    assert {(c.activation, c.activation_limit, c.expert_bias) for c in others} == {("silu", None, False)}


def test_only_llama_scales_inputs():
    assert [name for name, config in PRESETS.items() if config.scale_inputs] == ["llama-4-maverick"]


@every_preset
def test_every_preset_fits_8_bits_at_full_size(name):
    assert get_preset(name, precision="w8a8").precision == "w8a8"


@every_preset
def test_every_preset_drops_nothing_by_default(name):
    assert PRESETS[name].capacity_factor is None


def test_changes_and_case():
    mixtral = PRESETS["mixtral-8x7b"]
    assert get_preset("Mixtral-8x7B", hidden_size=256) == dataclasses.replace(mixtral, hidden_size=256)
    changed = get_preset("mixtral-8x7b", z_loss=0.1)
    assert changed == dataclasses.replace(mixtral, router=dataclasses.replace(mixtral.router, z_loss=0.1))
    with pytest.raises(ValueError, match="top_k must be at most num_experts=8, got 9"):
        get_preset("mixtral-8x7b", top_k=9)


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="unknown model 'gpt-5'; expected one of deepseek-v3") as error:
        get_preset("gpt-5")
    assert all(name in str(error.value) for name in PRESETS)


def test_presets_cannot_be_changed():
    with pytest.raises(TypeError):
        PRESETS["mine"] = PRESETS["kimi-k2"]
