"""Compiling for TPUs on any machine: the layer for a slice, and the compiler's own estimates of kernels."""
