"""Measuring on an NVIDIA Hopper GPU: kernels beside their peers, stage by stage, and tuning."""
