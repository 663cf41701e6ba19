"""Layers as those write them who have no such library: what ours are compared with."""
