"""Mixture-of-Experts layers for JAX at the speed of the chip, on TPU and GPU."""

from moejax.config import MoEConfig
from moejax.experts import MoEParams, quantize_params
from moejax.functional import MoEAux, moe, moe_experts, params_spec
from moejax.fused import fused_experts
from moejax.layer import MoE, RouterState
from moejax.losses import LoadStats
from moejax.presets import PRESETS, get_preset
from moejax.reference import dense_moe
from moejax.router import Routing, route
from moejax.routers import ROUTERS, Perft, RoutedMoE, Router, perft_mask
from pallas_kernels.quantize import QTensor, Quantization, dequantize, quantize
from sharding.mesh import make_mesh

__all__ = [
    "PRESETS",
    "ROUTERS",
    "LoadStats",
    "MoE",
    "MoEAux",
    "MoEConfig",
    "MoEParams",
    "Perft",
    "QTensor",
    "Quantization",
    "RoutedMoE",
    "Router",
    "RouterState",
    "Routing",
    "dense_moe",
    "dequantize",
    "fused_experts",
    "get_preset",
    "make_mesh",
    "moe",
    "moe_experts",
    "params_spec",
    "perft_mask",
    "quantize",
    "quantize_params",
    "route",
]
