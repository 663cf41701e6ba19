"""Tokens as the kernel takes them: 8 rows and 128 columns a tile, tiles of depth one below the other, in 8 bits.

Rounded and laid out in one launch, a block for a strip of each of the 8 rows (`on_gpu.strips.Blocks`): by XLA the zeros
past the tokens and the order of tiles would be two kernels more.

    floor in time = how long a kernel takes to start
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.on_gpu.rounding import is_rounded, rounded_in_blocks
from pallas_kernels.on_gpu.strips import LEAST_COLUMNS, cut_in_blocks, launch, store
from pallas_kernels.on_gpu.wgmma import WGMMA_ROWS
from pallas_kernels.quantize import QTensor, ToRound
from pallas_kernels.quantize_rows import SCALING, rows_in_8_bits
from pallas_kernels.routed_mlp.gpu.sizes import BLOCK, TOKENS, Sizes


def in_tiles(x: QTensor | ToRound, sizes: Sizes) -> tuple[jax.Array, jax.Array]:
    """Tiles of x [x_rows, 128] with zeros where nothing is, and scales: of the rows of a tile, or of the tokens."""
    if isinstance(x, QTensor):
        return _laid_out(x, sizes)
    hidden, dtype = sizes.hidden, jnp.dtype(x.qdtype)
    is_whole = sizes.x_rows * BLOCK == TOKENS * hidden and sizes.x_rows % WGMMA_ROWS == 0
    if not (is_whole and is_rounded(x.dtype, dtype) and hidden >= LEAST_COLUMNS):
        return _laid_out(rows_in_8_bits(x.array, x.qdtype, scaling=SCALING, backend="pallas_gpu"), sizes)

    strips, num_tokens = cut_in_blocks("routed_mlp", hidden), sizes.num_tokens

    def body(x_ref, tiles, scale):
        token, strip = strips.place(lax.axis_index("block"))
        window, is_there = strips.window(strip), token < num_tokens
        value = strips.load(x_ref, jnp.minimum(token, num_tokens - 1), strip).astype(jnp.float32)
        rounded, scales = rounded_in_blocks(jnp.where(is_there, value, 0.0), dtype)
        store(tiles.at[window, token], rounded)
        store(scale.at[window, token], jnp.where(is_there, scales, 0.0))

    depth = hidden // BLOCK
    outs = [
        jax.ShapeDtypeStruct((depth, TOKENS, BLOCK), dtype),
        jax.ShapeDtypeStruct((depth, TOKENS), jnp.float32),
    ]
    tiles, scale = launch(body, outs, strips.view(x.array), name="tiles_in_8_bits", blocks=TOKENS * strips.count)
    return tiles.reshape(-1, BLOCK), scale.reshape(-1)


def _laid_out(x: QTensor, sizes: Sizes) -> tuple[jax.Array, jax.Array]:
    depth = sizes.x_rows // TOKENS
    tokens = (0, TOKENS - sizes.num_tokens)
    values = jnp.pad(x.values, (tokens, (0, depth * BLOCK - sizes.hidden)))
    tiles = values.reshape(TOKENS, depth, BLOCK).transpose(1, 0, 2).reshape(-1, BLOCK)
    if not sizes.by_block:
        return tiles, jnp.pad(x.scale[:, 0], (0, WGMMA_ROWS - sizes.num_tokens))
    scale = jnp.pad(x.scale, (tokens, (0, depth - x.scale.shape[1]))).T.reshape(-1)
    return tiles, jnp.pad(scale, (0, -scale.shape[0] % WGMMA_ROWS))
