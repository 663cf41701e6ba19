"""The rounding of h to 8 bits: 64 rows at a time, those of 8 tokens and 8 · 128 columns of an expert.

With scales of rows it goes by the largest numbers that the tiles of h have left.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.on_gpu.smem import Views
from pallas_kernels.on_gpu.store import store_rows
from pallas_kernels.on_gpu.wgmma import ROWS, WGMMA_ROWS, along_rows, iota, vector_iota
from pallas_kernels.quantize import clipped_to, finite_scale
from pallas_kernels.routed_mlp.gpu.multiply import Multiplier
from pallas_kernels.routed_mlp.gpu.sizes import BLOCK, TOKENS

_GROUPS_AT_ONCE = 8
"""Of tiles, whose largest numbers are loaded together."""


class Rounding(Multiplier):
    """A team at its rows."""

    def round(self, tile) -> None:
        """Rounds the rows of a tile, and writes them and their scales."""
        sizes = self.sizes
        row = tile * WGMMA_ROWS
        tiles = jnp.int32(sizes.h_rows // WGMMA_ROWS)
        h = self._h_of(row, lax.rem(tile, tiles))
        amax = jnp.max(jnp.abs(h), axis=1) if sizes.by_block else self._largest_of_tokens(lax.div(tile, tiles))
        dtype = self.between.rounded.dtype
        scale = finite_scale(amax, dtype)
        values = clipped_to(h * along_rows(1 / scale, BLOCK), dtype)
        staging = Views.of(self.scratch.rounded_staging)
        store_rows(self.between.rounded, staging, self.team, values, row=row, rows=None, column=0)
        buffer = self.scratch.row_numbers.at[self.team]
        buffer[...] = scale  # those of the tile before have left with its rows
        plgpu.commit_smem()
        # By the copy engine, as other blocks read them with theirs.
        plgpu.copy_smem_to_gmem(buffer, self.between.scale.at[pl.ds(row, WGMMA_ROWS)])

    def _h_of(self, row, part):
        """64 rows of h, zeros past its width: what lies there nobody has written."""
        h = plgpu.load(self.between.h.at[pl.ds(row, WGMMA_ROWS)], layout=plgpu.Layout.WGMMA, optimized=False)
        if self.sizes.h_rows // TOKENS * BLOCK == self.sizes.width:
            return h
        depth = part * TOKENS + lax.div(iota(0, BLOCK), jnp.int32(TOKENS))
        return jnp.where(depth * BLOCK + iota(1, BLOCK) < self.sizes.width, h, 0.0)

    def _largest_of_tokens(self, hit):
        """Each token's largest number in its whole row of h, in all rows of a tile that are its own: every eighth."""
        sizes, in_group = self.sizes, WGMMA_ROWS // TOKENS
        tile = lax.div(vector_iota(), jnp.int32(TOKENS))

        def larger(i, amax):
            groups = [jnp.minimum(i * _GROUPS_AT_ONCE + j, sizes.up_groups - 1) for j in range(_GROUPS_AT_ONCE)]
            for group in groups:
                first = pl.multiple_of((hit * sizes.up_groups + group) * WGMMA_ROWS, WGMMA_ROWS)
                window = self.between.largest.at[pl.ds(first, WGMMA_ROWS)]
                values = plgpu.load(window, layout=ROWS, optimized=False)
                # Nobody has written what would belong to tiles past the last one.
                amax = jnp.maximum(amax, jnp.where(group * in_group + tile < sizes.up_tiles, values, 0.0))
            return amax

        none = plgpu.layout_cast(jnp.zeros((WGMMA_ROWS,), jnp.float32), ROWS)
        amax = lax.fori_loop(0, pl.cdiv(sizes.up_groups, _GROUPS_AT_ONCE), larger, none)
        buffer, begin = self.scratch.row_scale, self.team * 2 * WGMMA_ROWS
        for i in range(2):
            buffer[pl.ds(begin + i * WGMMA_ROWS, WGMMA_ROWS)] = amax
        plgpu.commit_smem()
        for i in range(TOKENS, WGMMA_ROWS, TOKENS):
            amax = jnp.maximum(amax, plgpu.load(buffer.at[pl.ds(begin + i, WGMMA_ROWS)], layout=ROWS))
        plgpu.commit_smem()
        return amax
