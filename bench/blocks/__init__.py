"""Decoder blocks beside each other: ours, the same by XLA alone, and torch's."""
