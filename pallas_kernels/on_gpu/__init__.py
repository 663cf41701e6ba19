"""What kernels for NVIDIA GPUs share: the GPU at hand or named, and rows held in registers."""
