"""Which GPU kernels are cut for, and that every operator asks for it."""

import types
import warnings

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import backend
from pallas_kernels.backend import Unsupported
from pallas_kernels.chips import CHIPS, get_chip
from pallas_kernels.combine import combine
from pallas_kernels.dispatch import dispatch
from pallas_kernels.grouped_matmul import grouped_gate_up, grouped_matmul
from pallas_kernels.grouped_matmul.gpu.hopper import tiling
from pallas_kernels.on_gpu import device
from pallas_kernels.on_gpu.device import hopper_chip, require_hopper
from pallas_kernels.plan import make_plan
from pallas_kernels.top_k import top_k, top_k_ids
from pallas_kernels.tracing.target import targeting
from tests.helpers import raises_saying, same_bits
from tests.pallas_kernels.kernels_gpu import lower_for_cuda

HOPPERS = [name for name, chip in CHIPS.items() if chip.generation == "hopper"]
OTHERS = [name for name, chip in CHIPS.items() if chip.kind == "gpu" and chip.generation != "hopper"]

IDS = jnp.array([[0, 1], [1, 2], [2, 0]])
PLAN = make_plan(IDS, 3, backend="xla")
ROWS, WEIGHTS = jnp.ones((6, 128), jnp.bfloat16), jnp.ones((3, 128, 128), jnp.bfloat16)

OPERATORS = {
    "grouped_matmul": lambda **kw: grouped_matmul(ROWS, WEIGHTS, PLAN.group_sizes, **kw),
    "grouped_gate_up": lambda **kw: grouped_gate_up(ROWS, WEIGHTS, PLAN.group_sizes, **kw),
    "drhs": lambda **kw: jax.grad(lambda rhs: grouped_matmul(ROWS, rhs, PLAN.group_sizes, **kw).sum())(WEIGHTS),
    "dispatch": lambda **kw: dispatch(ROWS[:3], PLAN, **kw),
    "combine": lambda **kw: combine(ROWS, PLAN, **kw),
    "dweights": lambda **kw: jax.grad(lambda w: combine(ROWS, PLAN, w, **kw).astype("float32").sum())(jnp.ones((3, 2))),
    "plan": lambda **kw: make_plan(IDS, 3, **kw),
    "top_k": lambda **kw: top_k(jnp.ones((64, 8)), 2, **kw),
    "top_k_ids": lambda **kw: top_k_ids(jnp.ones((64, 8)), 2, **kw),
}


@pytest.fixture
def at_hand(monkeypatch):
    """Puts a GPU in the place of the devices."""

    def put(kind: str, capability: str):
        gpu = types.SimpleNamespace(platform="gpu", device_kind=kind, compute_capability=capability)
        monkeypatch.setattr(device.jax, "devices", lambda: [gpu])

    return put


def test_hoppers_and_others():
    assert HOPPERS == ["h100", "h200"]
    assert OTHERS == ["b200"]


@pytest.mark.parametrize("name", HOPPERS)
def test_the_target_is_the_chip_that_kernels_are_cut_for(at_hand, name):
    at_hand("NVIDIA B200", "10.0")
    with targeting(get_chip(name)):
        assert hopper_chip("dispatch") is get_chip(name)
        require_hopper("dispatch")


@pytest.mark.parametrize("name", [*OTHERS, "v6e", "seed"])
def test_another_target_is_refused(at_hand, name):
    at_hand("NVIDIA H200", "9.0")
    for ask in (hopper_chip, require_hopper):
        with targeting(get_chip(name)), raises_saying(Unsupported, "dispatch", "Hopper", name, CHIPS[name].generation):
            ask("dispatch")


@pytest.mark.parametrize(
    ("kind", "name"), [("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H100 NVL", "h100")]
)
def test_a_hopper_at_hand(at_hand, kind, name):
    at_hand(kind, "9.0")
    assert hopper_chip("dispatch") is get_chip(name)


@pytest.mark.parametrize(("kind", "capability"), [("NVIDIA B200", "10.0"), ("NVIDIA A100", "8.0"), ("MI300", "gfx942")])
def test_another_gpu_at_hand_is_refused(at_hand, kind, capability):
    at_hand(kind, capability)
    for ask in (hopper_chip, require_hopper):
        with raises_saying(Unsupported, "dispatch", "Hopper", kind, capability):
            ask("dispatch")


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a GPU is at hand")
def test_without_a_gpu_it_is_an_h200():
    assert hopper_chip("dispatch") is get_chip("h200")


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("operator", list(OPERATORS))
def test_every_operator_falls_back_and_says_so_once(operator, name):
    run = OPERATORS[operator]
    backend._say_once.cache_clear()
    with targeting(get_chip(name)):
        with pytest.warns(UserWarning, match=f"falling back to the XLA reference: .*Hopper.*'{name}'"):
            out = run(backend="auto")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(backend="auto")
        with raises_saying(Unsupported, "Hopper", name):
            run(backend="pallas_gpu")
    assert same_bits(out, run(backend="xla"))


@pytest.mark.parametrize("name", HOPPERS)
@pytest.mark.quick("h100")
def test_grouped_products_are_cut_for_the_target(monkeypatch, name):
    chips = []
    pick = tiling.pick
    monkeypatch.setattr(tiling, "pick", lambda chip, problem: chips.append(chip.name) or pick(chip, problem))
    with targeting(get_chip(name)):
        for run in (OPERATORS["grouped_matmul"], OPERATORS["grouped_gate_up"]):
            lower_for_cuda(lambda run=run: run(backend="pallas_gpu"))
    assert chips == [name, name]
