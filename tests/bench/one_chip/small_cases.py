"""Small cases of the benches of one chip, and what their files hold."""

import json

from bench.one_chip.cases import Case
from bench.one_chip.layouts import LAYOUTS


def small(bench, **changes) -> Case:
    """A case of 64 tokens and four experts that runs in a blink."""
    sizes = {"tokens": 64, "experts": 4, "k": 2, "hidden": 32, "block": 8}
    if bench == "layer":
        sizes |= {"intermediate": 16, "layouts": LAYOUTS, "split": LAYOUTS, "dtype": "fp32"}
    return Case(bench, **(sizes | changes))


def lines(path) -> list[dict]:
    """The records of a file, each line of which must be one."""
    return [json.loads(line) for line in path.read_text().splitlines()]
