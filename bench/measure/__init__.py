"""Measuring: clocks, errors, statistics of samples, devices, and turns on an accelerator."""
