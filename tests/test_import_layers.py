"""Imports go down only: bench → moejax → sharding → pallas_kernels, and no operator imports another.

But for what they share: the plan, and what is `quantize` or an activation with a kernel of its own; and what is made of
them.
"""

import ast
import pathlib
from collections.abc import Sequence

import pytest

from sharding.exchange.pick import TRANSPORTS as PICKED

ROOT = pathlib.Path(__file__).parent.parent
LAYERS = ["pallas_kernels", "sharding", "moejax", "bench"]
SHARED = {"plan", "quantize_transpose", "quantize_columns", "quantize_rows", "gated_activation"}
MADE_OF_OPERATORS = {"trained_mlp"}
OPERATORS = sorted({p.parent.name for p in ROOT.glob("pallas_kernels/*/reference.py")} - SHARED)
TRANSPORTS = ("one_chip", *sorted({type(transport).__module__.rpartition(".")[2] for transport in PICKED.values()}))
FAMILIES = {"gpu": ("gpu", "on_gpu"), "tpu": ("tpu", "on_tpu")}
MODULES = sorted(p.relative_to(ROOT) for layer in LAYERS for p in (ROOT / layer).rglob("*.py"))


def imported(source: str, package: str) -> set[str]:
    """The full dotted names that a module of `package` imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = parts[: len(parts) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{prefix}.{alias.name}" for alias in node.names}
    return names


def violations(source: str, path: pathlib.PurePath) -> list[str]:
    """The imports of the module at `path` that go up or sideways."""
    layer = path.parts[0]
    above = LAYERS[LAYERS.index(layer) + 1 :]
    wrong = []
    for name in sorted(imported(source, ".".join(path.parts[:-1]))):
        parts = name.split(".")
        goes_up = parts[0] in above or parts[0] == "tests"
        is_kernel = layer == parts[0] == "pallas_kernels"
        operator = parts[1] if is_kernel and len(parts) > 1 and parts[1] in OPERATORS else None
        to_another_operator = operator is not None and path.parts[1] not in {operator, *MADE_OF_OPERATORS}
        families = family_of(path.with_suffix("").parts), family_of(parts)
        to_another_family = is_kernel and None not in families and families[0] != families[1]
        transports = transport_of(path.with_suffix("").parts), transport_of(parts)
        to_another_transport = None not in transports and transports[0] != transports[1]
        if goes_up or to_another_operator or to_another_family or to_another_transport:
            wrong.append(f"{path} imports {name}")
    return wrong


def family_of(parts: Sequence[str]) -> str | None:
    """The platform whose kernels a module in these folders belongs to."""
    return next((family for family, names in FAMILIES.items() if set(names) & set(parts)), None)


def transport_of(parts: Sequence[str]) -> str | None:
    """The transport of the exchange that a module is, or holds."""
    is_there = tuple(parts[:2]) == ("sharding", "exchange") and len(parts) > 2 and parts[2] in TRANSPORTS
    return parts[2] if is_there else None


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_go_down(path):
    assert violations((ROOT / path).read_text(), path) == []


def test_every_layer_and_operator_is_looked_at():
    assert {path.parts[0] for path in MODULES} == set(LAYERS)
    assert "dense" in TRANSPORTS
    assert set(OPERATORS) == {
        "all_to_all",
        "combine",
        "dense_matmul",
        "dispatch",
        "float32_matmul",
        "grouped_matmul",
        "rms_norm",
        "routed_mlp",
        "top_k",
    }


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("pallas_kernels/plan/__init__.py", "import sharding.mesh"),
        ("pallas_kernels/plan/__init__.py", "from pallas_kernels.combine import combine"),
        ("pallas_kernels/quantize.py", "from .combine import combine"),
        ("pallas_kernels/quantize.py", "from . import combine"),
        ("pallas_kernels/dispatch/tpu.py", "def f():\n    from pallas_kernels.combine.tpu import kernel"),
        ("pallas_kernels/dispatch/tpu.py", "from ..combine import reference"),
        ("pallas_kernels/dispatch/tpu.py", "from pallas_kernels import grouped_matmul"),
        ("pallas_kernels/dispatch/tpu.py", "from pallas_kernels.on_gpu.strips import Strip"),
        ("pallas_kernels/grouped_matmul/gpu/hopper/drhs.py", "from pallas_kernels.grouped_matmul.tpu import tiling"),
        ("sharding/exchange/dense.py", "from sharding.exchange import one_chip"),
        ("sharding/exchange/one_chip.py", "from sharding.exchange.dense import Dense"),
        ("sharding/mesh.py", "from moejax import MoE"),
        ("moejax/layer.py", "try:\n    import bench.measure.clock as t\nexcept ImportError:\n    pass"),
        ("bench/decode.py", "from tests import helpers"),
    ],
)
def test_finds_imports_that_go_up_or_sideways(path, source):
    assert violations(source, pathlib.PurePath(path))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("pallas_kernels/dispatch/tpu.py", "from pallas_kernels.dispatch.tiling import Config"),
        ("pallas_kernels/dispatch/tpu.py", "from .tiling import Config\nfrom ..plan import Plan"),
        ("pallas_kernels/dispatch/tpu.py", "import jax\nfrom pallas_kernels import chips"),
        ("pallas_kernels/dispatch/tpu.py", "from pallas_kernels.on_tpu.row_copies import Copy"),
        ("sharding/mesh.py", "from pallas_kernels.combine import combine"),
        ("sharding/exchange/dense.py", "from sharding.exchange.slabs import sort_by_rank"),
        ("sharding/exchange/dense.py", "from sharding import exchange"),
        ("sharding/exchange/pick.py", "from sharding.exchange.dense import Dense"),
        ("bench/decode.py", "import moejax, sharding.mesh"),
    ],
)
def test_lets_imports_that_go_down_pass(path, source):
    assert not violations(source, pathlib.PurePath(path))
