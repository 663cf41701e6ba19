"""What the trace of a program carries beside arrays: target chip, forced values, varying mesh axes, known values."""
