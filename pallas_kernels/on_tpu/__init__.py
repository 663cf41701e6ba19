"""What kernels for TPUs share: the TPU at hand or named, and rows copied by index."""
