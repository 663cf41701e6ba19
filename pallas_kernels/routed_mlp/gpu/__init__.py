"""The experts of one to eight tokens in one kernel on NVIDIA Hopper GPUs: see `kernel`."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_kernels.activations import Activation
from pallas_kernels.backend import Unsupported
from pallas_kernels.chips import Chip
from pallas_kernels.on_gpu.device import hopper_chip
from pallas_kernels.quantize import QTensor, ToRound
from pallas_kernels.routed_mlp.gpu.kernel import launch
from pallas_kernels.routed_mlp.gpu.scratch import slots_that_fit
from pallas_kernels.routed_mlp.gpu.sizes import BLOCK, CHOICES, TEAMS, TOKENS, Config, Inputs, Sizes
from pallas_kernels.routed_mlp.gpu.tokens import in_tiles
from pallas_kernels.routed_mlp.gpu.walk import Phases
from pallas_kernels.routed_mlp.reference import in_8_bits
from pallas_kernels.stage import Stage

_FP8 = ("float8_e4m3fn", "float8_e5m2")

_ONE_TILE = Config(columns=16, out_columns=16, slots=TEAMS, rows_ahead=TEAMS, blocks=1)
"""For sizes that are asked before their configuration is picked."""


def routed_mlp(
    x: QTensor | ToRound,
    topk_weights: jax.Array,
    topk_ids: jax.Array,
    gate_up: QTensor,
    down: QTensor,
    *,
    gate_up_bias: jax.Array | None,
    down_bias: jax.Array | None,
    residual: jax.Array | None,
    activation: Activation,
    activation_limit: float | None,
    out_dtype: jax.typing.DTypeLike,
    stage: Stage = "full",
    config: Config | None = None,
    in_one_launch: bool = True,
) -> jax.Array:
    """See `pallas_kernels.routed_mlp.routed_mlp`.

    `stage` is that of `pallas_kernels.stage`: of "comp" and "dma" the results mean nothing. `config` is for tuning.
    Unless `in_one_launch`, there are three kernels, and no block waits for another: for interpret mode.
    """
    planned = plan_work(jax.eval_shape(in_8_bits, x), topk_ids, gate_up, down, config=config)
    sizes = dataclasses.replace(planned, activation=activation, activation_limit=activation_limit, stage=stage)
    hidden = sizes.hidden
    if 0 in (x.shape[0], topk_ids.shape[1]):
        return jnp.zeros((x.shape[0], hidden), out_dtype) if residual is None else residual.astype(out_dtype)
    values, scale = in_tiles(x, sizes)
    inputs = Inputs(
        topk_ids.reshape(-1),
        topk_weights.reshape(-1),
        values,
        scale,
        gate_up.values,
        _of_columns(gate_up, sizes),
        down.values,
        _of_columns(down, sizes),
        gate_up_bias,
        down_bias,
        residual,
    )
    launches = [Phases()] if in_one_launch else [Phases(*(i == j for j in range(3))) for i in range(3)]
    return launch(inputs, sizes, jnp.dtype(out_dtype), launches)


def plan_work(
    x: QTensor, topk_ids: jax.Array, gate_up: QTensor, down: QTensor, *, config: Config | None = None
) -> Sizes:
    """How the work is cut, by the shapes and dtypes of the operands.

    Raises:
      Unsupported: the kernel does not take them.
    """
    chip = hopper_chip("routed_mlp")
    by_block = _check(x, topk_ids, gate_up, down)
    hidden, width = down.shape[1:]
    sizes = Sizes(x.shape[0], topk_ids.shape[1], hidden, width, by_block, config or _ONE_TILE)
    return sizes if config is not None else dataclasses.replace(sizes, config=_pick(chip, sizes))


def _check(x: QTensor, topk_ids: jax.Array, gate_up: QTensor, down: QTensor) -> bool:
    """Raises Unsupported, or says whether scales come by block."""
    (tokens, hidden), width = x.shape, down.shape[2]
    if tokens > TOKENS or topk_ids.size > CHOICES:
        raise Unsupported(
            f"routed_mlp: the kernel takes up to {TOKENS} tokens with {CHOICES} choices in all, got {tokens} with "
            f"{topk_ids.size}"
        )
    names = {q.dtype.name for q in (x, gate_up, down)}
    if not names <= set(_FP8):
        raise Unsupported(f"routed_mlp: the kernel multiplies FP8 ({', '.join(_FP8)}), got {', '.join(sorted(names))}")
    if hidden % 16 or width % 16:
        raise Unsupported(f"routed_mlp: the copy engine needs H and I in multiples of 16, got {hidden} and {width}")
    blocks = (
        (x.scale.shape[1], hidden / BLOCK),
        *zip(gate_up.scale.shape[1:], (2 * width / BLOCK, hidden / BLOCK), strict=True),
        *zip(down.scale.shape[1:], (hidden / BLOCK, width / BLOCK), strict=True),
    )
    if all(have == want for have, want in blocks):
        return True
    singles = x.scale.shape[1], gate_up.scale.shape[2], down.scale.shape[2]
    columns = gate_up.scale.shape[1] in (1, 2 * width), down.scale.shape[1] in (1, hidden)
    if singles == (1, 1, 1) and all(columns):
        return False
    raise Unsupported(
        "routed_mlp: the kernel takes scales 1x128 of x with 128x128 of weights, or of rows with those of channels or "
        f"experts, got {list(x.scale.shape)}, {list(gate_up.scale.shape)} and {list(down.scale.shape)}"
    )


def _blocks(chip: Chip) -> int:
    """A block for each multiprocessor: all have to run at once, as they wait for each other."""
    device = jax.devices()[0]
    return min(chip.cores, device.core_count) if device.platform == "gpu" else chip.cores


def _pick(chip: Chip, sizes: Sizes) -> Config:
    """Tiles of y of which each block has one, as narrow as that allows; then as many slots as fit."""
    blocks = _blocks(chip)
    columns, out_columns = min(_tiles(sizes), key=lambda tile: (-(-sizes.hidden // tile[1] // blocks), tile))
    for rows_ahead in (2 * TEAMS, TEAMS):
        config = Config(columns, out_columns, 2 * TEAMS, rows_ahead, blocks)
        slots = slots_that_fit(dataclasses.replace(sizes, config=config), chip.fast_memory_bytes)
        if slots >= 2 * TEAMS:
            return dataclasses.replace(config, slots=slots)
    raise Unsupported(f"routed_mlp: H {sizes.hidden} and I {sizes.width} are too much for the chip's shared memory")


def _tiles(sizes: Sizes) -> Iterator[tuple[int, int]]:
    """Columns of tiles of h and of y that divide these, as scales and biases of columns are read by the tile."""
    for columns in (16, 32, 64):
        if sizes.width % columns == 0:
            for out_columns in range(TOKENS, columns + 1, TOKENS):
                if sizes.hidden % out_columns == 0 and (not sizes.by_block or BLOCK % out_columns == 0):
                    yield columns, out_columns


def _of_columns(weights: QTensor, sizes: Sizes) -> jax.Array:
    if sizes.by_block:
        return weights.scale
    experts, columns = weights.scale.shape[0], weights.shape[1]
    return jnp.broadcast_to(weights.scale[:, :, 0], (experts, columns))
