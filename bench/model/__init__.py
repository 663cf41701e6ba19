"""Modelled cost of a layer: workloads, the DS_TPU model, rooflines, and the evaluation.json that they make."""
