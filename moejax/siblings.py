"""The packages that moejax stands on, which a user's own file of the same name would shadow."""

import importlib.util
from pathlib import Path

_PROOF = {"pallas_kernels": "chips.py", "sharding": "partition.py"}
"""A file that tells each package from another one of its name."""


def check_siblings() -> None:
    """Raises ImportError, naming the file, if another module shadows one of moejax's own packages."""
    for name, proof in _PROOF.items():
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise ImportError(f"moejax needs its package {name!r}, which is not there; install moejax again")
        places = [Path(place) for place in spec.submodule_search_locations or ()]
        if not any((place / proof).exists() for place in places):
            found = spec.origin or ", ".join(map(str, places))
            raise ImportError(
                f"{found} shadows the package {name!r} that moejax needs; rename it, or run Python from another folder "
                "(python -P leaves the script's own folder out)"
            )
