"""Dispatch on NVIDIA GPUs."""

from pallas_kernels.dispatch.gpu.copies import Config, dispatch, dispatch_rows, dispatch_weighted
from pallas_kernels.dispatch.gpu.planned import plan_and_dispatch
from pallas_kernels.dispatch.gpu.rounded import dispatch_rounded

__all__ = ["Config", "dispatch", "dispatch_rounded", "dispatch_rows", "dispatch_weighted", "plan_and_dispatch"]
