"""Cost models, workloads and command-line benchmarks of a Mixture-of-Experts layer."""
