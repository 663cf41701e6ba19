"""Decoder blocks beside each other: ours, the same in plain JAX, and torch's."""
