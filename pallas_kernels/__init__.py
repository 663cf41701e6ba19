"""Operators of a Mixture-of-Experts layer on one device, each with a plain XLA reference and kernels per platform."""
