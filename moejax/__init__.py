"""Mixture-of-Experts layers for JAX at the speed of the chip, on TPU and GPU."""

# ruff: noqa: E402
from moejax.siblings import check_siblings

check_siblings()

from moejax.aux_output import MoEAux
from moejax.config import MoEConfig
from moejax.functional import moe, moe_experts
from moejax.fused import fused_experts
from moejax.layer import ExpertSlots, MoE, PlacedParam, QuantizedParam, RouterState
from moejax.losses import LoadStats
from moejax.packing import pack_experts, split_gate_up
from moejax.params import MoEParams, param_specs, quantize_params
from moejax.perft import AdapterParam, Perft, perft_mask
from moejax.placing import add_up_replicas, place
from moejax.presets import PRESETS, get_preset, with_changes
from moejax.reference import dense_moe
from moejax.remat import REMAT_NAMES, remat_policy
from moejax.rounded_experts import RoundedExperts, quantize_for_training
from moejax.router import Routing
from moejax.routers import ROUTERS, Router, TopKRouter
from moejax.routers.top_k import route
from moejax.version import __version__
from pallas_kernels.quantize import QTensor, Quantization, dequantize, quantize
from sharding.balance import balance, rank_loads
from sharding.mesh import make_mesh
from sharding.partition import Partition

__all__ = [
    "PRESETS",
    "REMAT_NAMES",
    "ROUTERS",
    "AdapterParam",
    "ExpertSlots",
    "LoadStats",
    "MoE",
    "MoEAux",
    "MoEConfig",
    "MoEParams",
    "Partition",
    "Perft",
    "PlacedParam",
    "QTensor",
    "Quantization",
    "QuantizedParam",
    "RoundedExperts",
    "Router",
    "RouterState",
    "Routing",
    "TopKRouter",
    "__version__",
    "add_up_replicas",
    "balance",
    "dense_moe",
    "dequantize",
    "fused_experts",
    "get_preset",
    "make_mesh",
    "moe",
    "moe_experts",
    "pack_experts",
    "param_specs",
    "perft_mask",
    "place",
    "quantize",
    "quantize_for_training",
    "quantize_params",
    "rank_loads",
    "remat_policy",
    "route",
    "split_gate_up",
    "with_changes",
]
