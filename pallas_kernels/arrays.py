"""Checks that arguments are arrays, by what arrays have: traced ones and those of other libraries are as good."""


def require_arrays(**arrays: object) -> None:
    """Raises TypeError, naming the argument, for what is neither an array nor None."""
    for name, value in arrays.items():
        if value is not None and not (hasattr(value, "shape") and hasattr(value, "dtype")):
            raise TypeError(f"{name} must be an array, got {type(value).__name__}")


def require_given_arrays(**arrays: object) -> None:
    """`require_arrays` for what cannot be left out."""
    for name, value in arrays.items():
        if value is None:
            raise TypeError(f"{name} must be an array, got None")
    require_arrays(**arrays)
