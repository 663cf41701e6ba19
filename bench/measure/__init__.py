"""Measuring: clocks, errors, statistics of samples, devices."""
