import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from moejax import Quantization, fused_experts, make_mesh, pack_experts, quantize
from pallas_kernels.chips import get_chip
from pallas_kernels.quantize import QTensor
from pallas_kernels.tracing.target import targeting
from tests.helpers import LIMIT, float64, normal, raises_saying, relative_error
from tests.pallas_kernels.grouped_matmul.grouped import gated, quantized, values
from tests.sharding.exchange.exchanges import OTHERS

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
    return values(quantized(np.asarray(h, np.float32)[None], scaling="1x128"))[0]


@functools.cache
def jitted(**options):
    return jax.jit(functools.partial(fused_experts, **options))


@pytest.mark.parametrize("activation", ["silu", "gelu", "swigluoai"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.quick("bfloat16-swigluoai")
def test_equals_every_choice_by_itself(rng, dtype, activation):
    x, w1, w2, weights, ids = problem(rng, dtype)
    b1, b2 = normal(rng, E, 2 * WIDTH, dtype=dtype), normal(rng, E, H, dtype=dtype)
    y = jitted(activation=activation)(x, w1, w2, weights, ids, b1=b1, b2=b2)
    assert y.dtype == dtype
    assert relative_error(y, dense(x, w1, w2, weights, ids, b1, b2, activation)) < LIMIT[dtype]


ORDERS = {
    "gate_first": lambda gate, up: np.concatenate([gate, up], axis=1),
    "up_first": lambda gate, up: np.concatenate([up, gate], axis=1),
    "interleaved": lambda gate, up: np.stack([gate, up], axis=2).reshape(E, 2 * WIDTH, *gate.shape[2:]),
}


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.quick("interleaved-out_in", "up_first-in_out")
def test_layouts_of_checkpoints(rng, order, layout):
    """Weights as they lie in a file, and as `pack_experts` makes of them the parameters of a layer."""
    x, w1, w2, weights, ids = problem(rng)
    b1, b2 = normal(rng, E, 2 * WIDTH), normal(rng, E, H)
    expected = dense(x, w1, w2, weights, ids, b1, b2)
    gate_up, bias = (jnp.asarray(ORDERS[order](*np.split(np.asarray(w), 2, axis=1))) for w in (w1, b1))
    stored = (gate_up, w2) if layout == "out_in" else (gate_up.mT, w2.mT)
    y = jitted(layout=layout, gate_up_order=order)(x, *stored, weights, ids, b1=bias, b2=b2)
    assert relative_error(y, expected) < LIMIT["float32"]

    packed, down = pack_experts(*stored, layout=layout, gate_up_order=order)
    np.testing.assert_array_equal(packed, np.stack(np.split(np.asarray(w1.mT), 2, axis=2), axis=2))
    np.testing.assert_array_equal(down, w2.mT)


def test_gate_and_up_that_lie_apart(rng):
    _, w1, w2, *_ = problem(rng)
    gate, up = jnp.split(w1, 2, axis=1)
    expected = pack_experts(w1, w2, layout="out_in")
    for layout, turn in {"out_in": lambda w: w, "in_out": lambda w: w.mT}.items():
        packed = pack_experts(gate=turn(gate), up=turn(up), down=turn(w2), layout=layout)
        for got, want in zip(packed, expected, strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("order", ["up_first", "interleaved"])
def test_weights_in_8_bits_lie_gate_first(rng, order):
    x, w1, w2, weights, ids = problem(rng)
    with pytest.raises(ValueError, match=f"w1 in 8 bits must lie gate first, got gate_up_order='{order}'"):
        fused_experts(x, quantize(w1, scaling="128x128"), w2, weights, ids, gate_up_order=order)


@pytest.mark.slow
def test_weights_in_8_bits_in_the_other_layout(rng):
    x, w1, w2, weights, ids = problem(rng)
    w1_8, w2_8 = (quantized(w, scaling="128x128") for w in (w1, w2))
    q = Quantization()
    y = jitted(quantization=q, layout="in_out")(x, w1_8.mT, w2_8.mT, weights, ids)
    assert relative_error(y, jitted(quantization=q)(x, w1_8, w2_8, weights, ids)) < LIMIT["float32"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"gate_up": (2, 6, 4), "down": (2, 4, 3), "layout": "rows"},
            "layout must be 'out_in' or 'in_out', got 'rows'",
        ),
        ({"gate_up": (2, 6, 4), "layout": "out_in"}, "give down, and either gate_up or both gate and up"),
        ({"down": (2, 4, 3), "gate": (2, 3, 4), "layout": "out_in"}, "give down, and either gate_up or both"),
        (
            {"gate_up": (2, 6, 4), "gate": (2, 3, 4), "up": (2, 3, 4), "down": (2, 4, 3), "layout": "out_in"},
            "give down, and either gate_up or both gate and up",
        ),
        (
            {"gate": (2, 3, 4), "up": (2, 5, 4), "down": (2, 4, 3), "layout": "out_in"},
            r"gate and up must have one shape of three dimensions, got \[2, 3, 4\], \[2, 5, 4\]",
        ),
        ({"gate_up": (2, 5, 4), "down": (2, 4, 3), "layout": "out_in"}, "of equal width, got 5 columns for both"),
        (
            {"gate_up": (2, 6, 4), "down": (2, 3, 4), "layout": "out_in"},
            r"down must be \[2, 4, 3\] to fit gate and up in layout 'out_in', got \[2, 3, 4\]",
        ),
        (
            {"gate_up": (2, 6, 4), "down": (2, 4, 3), "layout": "in_out"},
            r"down must be \[2, 2, 6\] to fit gate and up in layout 'in_out', got \[2, 4, 3\]",
        ),
        (
            {"gate_up": (2, 6, 4), "down": (2, 4, 3), "layout": "out_in", "gate_up_order": "mixed"},
            "gate_up_order must be 'gate_first', 'up_first' or 'interleaved', got 'mixed'",
        ),
    ],
    ids=str,
)
def test_weights_that_cannot_be_packed(arguments, message):
    given = {name: jnp.zeros(value) if isinstance(value, tuple) else value for name, value in arguments.items()}
    with pytest.raises(ValueError, match=message):
        pack_experts(**given)


@pytest.mark.parametrize("stored", [False, True], ids=["rounded-inside", "stored"])
@pytest.mark.quick("stored")
def test_in_8_bits(rng, stored):
    x, w1, w2, weights, ids = problem(rng)
    w1_8, w2_8 = (quantized(w, scaling="128x128") for w in (w1, w2))
    run = jitted(quantization=Quantization())
    y = run(x, w1_8, w2_8, weights, ids) if stored else run(x, w1, w2, weights, ids)
    expected = dense(quantized(x, scaling="1x128"), w1_8, w2_8, weights, ids, rounded=rounded_to_8_bits)
    assert relative_error(y, expected) < 3e-3  # a sum that is rounded to 8 bits may fall on the other side
    assert relative_error(y, dense(x, w1, w2, weights, ids)) < 0.1


def test_scales_of_rows_and_channels(rng):
    x, w1, w2, weights, ids = problem(rng)
    q = Quantization("int8", "per_row", "per_channel")
    assert relative_error(jitted(quantization=q)(x, w1, w2, weights, ids), dense(x, w1, w2, weights, ids)) < 0.05


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("top_k", [1, E])
@pytest.mark.quick("8-4", "1-1")
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
@pytest.mark.slow
def test_over_an_axis(rng, quantization, check_vma):
    x, w1, w2, weights, ids = problem(rng, tokens=40)
    mesh = make_mesh(4)
    split = PartitionSpec(mesh.axis_names[-1])
    run = functools.partial(fused_experts, quantization=quantization, ep_axis=mesh.axis_names[-1])
    sharded = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(split,) * 5, out_specs=split, check_vma=check_vma))
    y, alone = sharded(x, w1, w2, weights, ids), jitted(quantization=quantization)(x, w1, w2, weights, ids)
    assert relative_error(y, alone) < (LIMIT["float32"] if quantization is None else LIMIT["bfloat16"])


@pytest.mark.usefixtures("own_transports")
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.quick("routed")
def test_over_another_transport(other, rng):
    arguments = jax.device_get(problem(rng, tokens=40))  # which no program has to slice for the chips
    y, alone = (jax.jit(run)(*arguments) for run in (over_axis(4, transport=other), fused_experts))
    assert relative_error(y, alone) < LIMIT["float32"]
    with pytest.raises(ValueError, match=r"transport must be one of 'auto', .*, got 'post'"):
        fused_experts(*arguments, transport="post")


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("ep", [4, 8])  # 8 take rounds
@pytest.mark.quick("8-True")
def test_gradients_over_an_axis(rng, ep, check_vma):
    *arguments, ids = jax.device_get(problem(rng, tokens=40))  # which no program has to slice for the chips
    over_chips = gradients(over_axis(ep, check_vma), ids)(*arguments)
    for over, alone in zip(over_chips, gradients(fused_experts, ids)(*arguments), strict=True):
        assert relative_error(over, alone) < LIMIT["float32"]


@pytest.mark.slow
@pytest.mark.parametrize("ep", [4, 8])
def test_gradients_over_an_axis_take_the_kernels_of_a_gpu(rng, ep):
    *arguments, ids = problem(rng, tokens=40)
    in_bf16 = [argument.astype(jnp.bfloat16) for argument in arguments]
    with targeting(get_chip("h200")):
        lowered = gradients(over_axis(ep), ids).trace(*in_bf16).lower(lowering_platforms=("cuda",)).as_text()
    kernels = ("counting_sort", "make_routes", "all_to_all", "grouped_matmul", "combine_dweights")
    assert all(kernel in lowered for kernel in kernels)


def over_axis(ep, check_vma=True, **options):
    """`fused_experts` over so many chips."""
    mesh = make_mesh(ep)
    split = PartitionSpec(mesh.axis_names[-1])
    run = functools.partial(fused_experts, ep_axis=mesh.axis_names[-1], **options)
    return jax.shard_map(run, mesh=mesh, in_specs=(split,) * 5, out_specs=split, check_vma=check_vma)


def gradients(function, ids):
    """Those of all arguments in floating point, jitted."""
    return jax.jit(jax.grad(lambda *args: (function(*args, ids) ** 2).sum(), argnums=(0, 1, 2, 3)))


@pytest.mark.parametrize("ep", [1, 2])
@pytest.mark.slow
def test_gradients_pass_the_rounding(rng, ep):
    """Those of all arrays, near to those without rounding."""
    *arguments, ids = problem(rng, tokens=40)
    direction = normal(rng, 40, H)

    def gradients(quantization):
        run = functools.partial(fused_experts, quantization=quantization)
        if ep > 1:
            split = PartitionSpec("expert")
            run = jax.shard_map(
                functools.partial(run, ep_axis="expert"), mesh=make_mesh(ep), in_specs=(split,) * 5, out_specs=split
            )
        return jax.jit(jax.grad(lambda *args: (run(*args, ids) * direction).sum(), argnums=(0, 1, 2, 3)))(*arguments)

    for rounded, plain in zip(gradients(Quantization()), gradients(None), strict=True):
        assert relative_error(rounded, plain) < 0.1


@pytest.mark.slow
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
        ({"b1": (E, WIDTH)}, r"b1 must be \[E, 2I\] = \[8, 512\], got \[8, 256\]"),
        ({"b2": (E, WIDTH)}, r"b2 must be \[E, H\] = \[8, 128\], got \[8, 256\]"),
        ({"hidden_states": (T, 2, H)}, r"hidden_states must be BF16, FP16 or float32 \[T, H\]"),
    ],
)
def test_errors(rng, change, message):
    names = ("hidden_states", "w1", "w2", "topk_weights", "topk_ids")
    arguments = dict(zip(names, problem(rng), strict=True))
    arguments |= {name: jnp.zeros(shape) for name, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        fused_experts(**arguments)


def test_an_axis_that_is_not_there_is_named(rng):
    with raises_saying(ValueError, "ep_axis must be an axis of the jax.shard_map around the call, got 'ep'"):
        fused_experts(*problem(rng), ep_axis="ep")


def test_weights_of_a_dtype_that_is_not_multiplied_are_named(rng):
    x, w1, w2, *choice = problem(rng)
    with raises_saying(ValueError, "w1 must be a BF16, FP16 or float32 array, or a QTensor", "int32[8, 512, 128]"):
        fused_experts(x, w1.astype(jnp.int32), w2, *choice)
    with raises_saying(ValueError, "w2: scale [8, 3, 1] does not fit values [8, 128, 256]"):
        fused_experts(x, w1, QTensor(w2.astype("float8_e4m3fn"), jnp.ones((8, 3, 1))), *choice)


@pytest.mark.parametrize("number", range(5))
def test_a_list_is_not_an_array(rng, number):
    operands = problem(rng)
    names = "hidden_states", "w1", "w2", "topk_weights", "topk_ids"
    with raises_saying(TypeError, f"{names[number]} must be an array, got list"):
        fused_experts(*(each.tolist() if i == number else each for i, each in enumerate(operands)))
