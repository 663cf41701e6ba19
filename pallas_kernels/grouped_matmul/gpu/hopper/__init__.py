"""The grouped products on Hopper GPUs: one kernel, in a loading and a multiplying half, and the weights' gradient."""
