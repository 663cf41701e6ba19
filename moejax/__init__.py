"""Mixture-of-Experts layers for JAX at the speed of the chip, on TPU and GPU."""

from moejax.config import MoEConfig
from moejax.experts import MoEParams, quantize_params
from moejax.functional import MoEAux, moe, params_spec
from moejax.fused import fused_experts
from moejax.layer import MoE, RouterState
from moejax.losses import LoadStats
from moejax.presets import PRESETS, get_preset
from moejax.reference import dense_moe
from moejax.router import Routing, route
from pallas_kernels.quantize import QTensor, Quantization, dequantize, quantize
from sharding.mesh import make_mesh

__all__ = [
    "PRESETS",
    "LoadStats",
    "MoE",
    "MoEAux",
    "MoEConfig",
    "MoEParams",
    "QTensor",
    "Quantization",
    "RouterState",
    "Routing",
    "dense_moe",
    "dequantize",
    "fused_experts",
    "get_preset",
    "make_mesh",
    "moe",
    "params_spec",
    "quantize",
    "quantize_params",
    "route",
]
