"""Grouped matrix products on NVIDIA GPUs: a folder for each generation that has kernels of its own, chosen here.

Hopper's are the only ones yet; they raise `Unsupported` on other GPUs.
"""

from pallas_kernels.grouped_matmul.gpu.hopper import (
    grouped_gate_up,
    grouped_matmul,
    grouped_matmul_drhs,
    grouped_matmul_of_columns,
)

__all__ = [
    "grouped_gate_up",
    "grouped_matmul",
    "grouped_matmul_drhs",
    "grouped_matmul_of_columns",
]
