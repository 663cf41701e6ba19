import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import grouped_gate_up, grouped_matmul
from pallas_kernels.quantize import QTensor
from tests.helpers import raises_saying, relative_error
from tests.pallas_kernels.backends import every_backend

backend = every_backend("grouped_matmul")

LHS, RHS, SIZES = jnp.ones((6, 4)), jnp.ones((2, 4, 8)), jnp.array([2, 4])
MISUSES = [
    ("lhs rank", dict(lhs=LHS[0]), ["lhs", "[M, K]", "[4]"]),
    ("rhs rank", dict(rhs=RHS[0]), ["rhs", "[G, K, N]", "[4, 8]"]),
    ("transposed rhs rank", dict(rhs=RHS[0], transpose_rhs=True), ["rhs", "[G, N, K]", "[4, 8]"]),
    ("no groups", dict(rhs=RHS[:0]), ["rhs", "at least one group", "[0, 4, 8]"]),
    ("lhs integers", dict(lhs=LHS.astype(jnp.int32)), ["lhs", "BF16, FP16 or float32", "QTensor", "int32[6, 4]"]),
    ("rhs fp8", dict(rhs=RHS.astype(jnp.float8_e5m2)), ["rhs", "QTensor", "float8_e5m2[2, 4, 8]"]),
    ("lhs scale", dict(lhs=QTensor(LHS.astype(jnp.int8), jnp.ones((4, 1)))), ["lhs", "scale [4, 1]", "values [6, 4]"]),
    ("rhs scale", dict(rhs=QTensor(RHS.astype(jnp.int8), jnp.ones((2, 1)))), ["rhs", "scale [2, 1]", "same rank"]),
    ("K", dict(rhs=jnp.ones((2, 5, 8))), ["lhs [6, 4]", "rhs [2, 5, 8]", "K: 4 and 5"]),
    ("K, transposed", dict(rhs=jnp.ones((2, 8, 4))), ["[6, 4]", "[2, 8, 4]", "transpose_rhs=True"]),
    ("sizes rank", dict(group_sizes=SIZES[None]), ["group_sizes", "integer vector", "int32[1, 2]"]),
    ("sizes dtype", dict(group_sizes=jnp.ones(2)), ["group_sizes", "integer vector", "float32[2]"]),
    ("too few sizes", dict(group_sizes=SIZES[:1]), ["group_sizes", "1 groups", "rhs has 2"]),
    ("negative size", dict(group_sizes=jnp.array([-1, 4])), ["group_sizes", "at least 0", "[-1, 4]"]),
    ("sum of sizes", dict(group_sizes=jnp.array([4, 3])), ["group_sizes", "M = 6", "[4, 3]", "sum 7"]),
    ("bias", dict(bias=jnp.ones(8)), ["bias", "[G, N] = [2, 8]", "[8]"]),
    ("offset too large", dict(group_offset=1), ["group_offset", "[0, 0]", "got 1"]),
    ("offset negative", dict(group_offset=-1), ["group_offset", "[0, 0]", "got -1"]),
    ("offset vector", dict(group_offset=jnp.zeros(1, int)), ["group_offset", "scalar", "[1]"]),
    ("backend", dict(backend="cuda"), ["backend", "'cuda'", "'auto', 'xla', 'pallas_tpu', 'pallas_gpu'"]),
]


@pytest.mark.parametrize(("changes", "parts"), [case[1:] for case in MISUSES], ids=[case[0] for case in MISUSES])
def test_errors_say_what_was_expected_and_what_came(changes, parts):
    arguments = dict(lhs=LHS, rhs=RHS, group_sizes=SIZES) | changes
    functions = [grouped_matmul] if "transpose_rhs" in changes else [grouped_matmul, grouped_gate_up]
    for function in functions:
        with raises_saying(ValueError, *parts):
            function(**arguments)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (dict(rhs=jnp.ones((2, 4, 7))), ["rhs", "[G, H, 2I]", "[2, 4, 7]", "odd"]),
        (dict(activation="relu"), ["activation", "'relu'", "silu, gelu, gelu_tanh, swigluoai, relu2"]),
        (dict(activation_limit=0.0), ["activation_limit", "positive", "got 0.0"]),
        (dict(activation_limit=float("nan")), ["activation_limit", "positive", "got nan"]),
    ],
)
def test_errors_of_the_fused_product(changes, parts):
    with raises_saying(ValueError, *parts):
        grouped_gate_up(**(dict(lhs=LHS, rhs=RHS, group_sizes=SIZES) | changes))


def test_traced_group_sizes_are_taken_on_trust(backend):
    out = jax.jit(lambda sizes: grouped_matmul(LHS, RHS, sizes, backend=backend))(SIZES)
    assert relative_error(out, np.full((6, 8), 4.0)) == 0
