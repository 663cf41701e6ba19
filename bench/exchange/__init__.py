"""Moving tokens between chips, measured by itself: what is moved, how, in what time, in how many bytes."""
