import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from moejax import Quantization, fused_experts, make_mesh, quantize
from pallas_kernels.chips import get_chip
from pallas_kernels.target import targeting
from tests.helpers import LIMIT, float64, normal, relative_error
from tests.pallas_kernels.grouped import gated, values

E, T, K, H, WIDTH = 8, 37, 3, 128, 256


def problem(rng, dtype="float32", experts=E, tokens=T, top_k=K):
    w1 = (normal(rng, experts, 2 * WIDTH, H) / H**0.5).astype(dtype)
    w2 = (normal(rng, experts, H, WIDTH) / WIDTH**0.5).astype(dtype)
    ids = np.argsort(rng.random((tokens, experts)), axis=1)[:, :top_k]
    weights = jnp.asarray(rng.random((tokens, top_k)), jnp.float32)
    return normal(rng, tokens, H, dtype=dtype), w1, w2, weights, jnp.asarray(ids, jnp.int32)


def dense(x, w1, w2, weights, ids, b1=None, b2=None, activation="silu", rounded=lambda h: h):
    """Every choice of every token by itself, in float64."""
    x, w1, w2, weights, ids = values(x), values(w1), values(w2), float64(weights), np.asarray(ids)
    y = np.zeros((x.shape[0], w2.shape[1]))
    for token, choices in enumerate(ids):
        for k, expert in enumerate(choices):
            if not 0 <= expert < len(w1):
                continue
            h = w1[expert] @ x[token] + (0 if b1 is None else float64(b1)[expert])
            h = rounded(gated(*np.split(h, 2), activation))
            y[token] += weights[token, k] * (w2[expert] @ h + (0 if b2 is None else float64(b2)[expert]))
    return y


def rounded_to_8_bits(h):
    return values(quantize(jnp.asarray(h, jnp.float32)[None], scaling="1x128"))[0]


@functools.cache
def jitted(**options):
    return jax.jit(functools.partial(fused_experts, **options))


@pytest.mark.parametrize("activation", ["silu", "gelu", "swigluoai"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_equals_every_choice_by_itself(rng, dtype, activation):
    x, w1, w2, weights, ids = problem(rng, dtype)
    b1, b2 = normal(rng, E, 2 * WIDTH, dtype=dtype), normal(rng, E, H, dtype=dtype)
    y = jitted(activation=activation)(x, w1, w2, weights, ids, b1=b1, b2=b2)
    assert y.dtype == dtype
    assert relative_error(y, dense(x, w1, w2, weights, ids, b1, b2, activation)) < LIMIT[dtype]


@pytest.mark.parametrize("stored", [False, True], ids=["rounded-inside", "stored"])
def test_in_8_bits(rng, stored):
    x, w1, w2, weights, ids = problem(rng)
    w1_8, w2_8 = (quantize(w, scaling="128x128") for w in (w1, w2))
    run = jitted(quantization=Quantization())
    y = run(x, w1_8, w2_8, weights, ids) if stored else run(x, w1, w2, weights, ids)
    expected = dense(quantize(x, scaling="1x128"), w1_8, w2_8, weights, ids, rounded=rounded_to_8_bits)
    assert relative_error(y, expected) < 3e-3  # a sum that is rounded to 8 bits may fall on the other side
    assert relative_error(y, dense(x, w1, w2, weights, ids)) < 0.1


def test_scales_of_rows_and_channels(rng):
    x, w1, w2, weights, ids = problem(rng)
    q = Quantization("int8", "per_row", "per_channel")
    assert relative_error(jitted(quantization=q)(x, w1, w2, weights, ids), dense(x, w1, w2, weights, ids)) < 0.05


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("top_k", [1, E])
def test_few_tokens_and_any_number_of_choices(rng, tokens, top_k):
    arguments = problem(rng, tokens=tokens, top_k=top_k)
    assert relative_error(jitted()(*arguments), dense(*arguments)) < LIMIT["float32"]


def test_choices_that_are_not_made(rng):
    x, w1, w2, weights, ids = problem(rng)
    ids = ids.at[3].set(-1).at[5, 1].set(E)
    y = jitted()(x, w1, w2, weights, ids)
    assert relative_error(y, dense(x, w1, w2, weights, ids)) < LIMIT["float32"]
    assert not np.asarray(y[3]).any()


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("quantization", [None, Quantization()], ids=["float", "fp8"])
def test_over_an_axis(rng, quantization, check_vma):
    x, w1, w2, weights, ids = problem(rng, tokens=40)
    mesh = make_mesh(4)
    split = PartitionSpec(mesh.axis_names[-1])
    run = functools.partial(fused_experts, quantization=quantization, ep_axis=mesh.axis_names[-1])
    sharded = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(split,) * 5, out_specs=split, check_vma=check_vma))
    y, alone = sharded(x, w1, w2, weights, ids), jitted(quantization=quantization)(x, w1, w2, weights, ids)
    assert relative_error(y, alone) < (LIMIT["float32"] if quantization is None else LIMIT["bfloat16"])


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("ep", [4, 8])  # 8 take rounds
def test_gradients_over_an_axis(rng, ep, check_vma):
    *arguments, ids = problem(rng, tokens=40)
    mesh = make_mesh(ep)
    split = PartitionSpec(mesh.axis_names[-1])
    run = functools.partial(fused_experts, ep_axis=mesh.axis_names[-1])
    sharded = jax.shard_map(run, mesh=mesh, in_specs=(split,) * 5, out_specs=split, check_vma=check_vma)

    def gradients(function):
        return jax.jit(jax.grad(lambda *args: (function(*args, ids) ** 2).sum(), argnums=(0, 1, 2, 3)))

    for over, alone in zip(gradients(sharded)(*arguments), gradients(fused_experts)(*arguments), strict=True):
        assert relative_error(over, alone) < LIMIT["float32"]
    in_bf16 = [argument.astype(jnp.bfloat16) for argument in arguments]
    with targeting(get_chip("h200")):
        lowered = gradients(sharded).trace(*in_bf16).lower(lowering_platforms=("cuda",)).as_text()
    assert all(kernel in lowered for kernel in ("counting_sort", "dispatch", "grouped_matmul", "combine_dweights"))


def test_gradients_without_rounding(rng):
    arguments = problem(rng)

    def loss(x, w1):
        return fused_experts(x, w1, *arguments[2:]).sum()

    dx, dw1 = jax.jit(jax.grad(loss, argnums=(0, 1)))(*arguments[:2])
    step = 1e-2 * normal(rng, T, H)
    change = (loss(arguments[0] + step, arguments[1]) - loss(arguments[0] - step, arguments[1])) / 2
    assert abs(float(change - (dx * step).sum())) < 1e-2 * abs(float(change)) + 1e-3
    assert np.isfinite(np.asarray(dw1)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w1": (E, 2 * WIDTH, H + 1)}, r"w1 must be \[E, 2I, H\] with H = 128"),
        ({"w2": (E, WIDTH, H)}, r"w2 must be \[E, H, I\] = \[8, 128, 256\], got \[8, 256, 128\]"),
        ({"topk_weights": (T, K + 1)}, r"topk_weights must be \[T, K\] as topk_ids"),
        ({"hidden_states": (T, 2, H)}, r"hidden_states must be BF16, FP16 or float32 \[T, H\]"),
    ],
)
def test_errors(rng, change, message):
    names = ("hidden_states", "w1", "w2", "topk_weights", "topk_ids")
    arguments = dict(zip(names, problem(rng), strict=True))
    arguments |= {name: jnp.zeros(shape) for name, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        fused_experts(**arguments)
