"""Gated activations and their pullback on NVIDIA GPUs: row by row, and with columns in 8 bits."""

from pallas_kernels.gated_activation import reference
from pallas_kernels.gated_activation.gpu.rows import Config, gated_activation, gated_activation_pullback
from pallas_kernels.gated_activation.gpu.with_columns import gated_activation_pullback_with_columns

gated_activation_tangent = reference.gated_activation_tangent
"""What forward mode takes is left to XLA."""

__all__ = [
    "Config",
    "gated_activation",
    "gated_activation_pullback",
    "gated_activation_pullback_with_columns",
    "gated_activation_tangent",
]
