"""The all-to-all on NVIDIA GPUs: rows, and before them where each of them belongs, by stores over NVLink."""

from pallas_kernels.all_to_all.gpu.make_routes import make_routes
from pallas_kernels.all_to_all.gpu.move import all_to_all

__all__ = ["all_to_all", "make_routes"]
