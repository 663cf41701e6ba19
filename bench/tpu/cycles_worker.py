"""Compiles one product of `bench.cycles` for one TPU, as a static twin: the other end of it."""

import dataclasses
import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.model.shapes import GemmShape
from bench.tpu.cycles_cases import ACTIVATION, FUSED, GUESSED, INSTRUCTIONS, MEGABLOX, OURS, TOKAMAX, Choice
from bench.tpu.libtpu import serve
from bench.tpu.pallas_calls import PallasCall, find_kernels
from bench.tpu.slices import parse_slice, share_of
from bench.tpu.static_cycles import compile_alone
from bench.tpu.static_twin import without_copies
from pallas_kernels.activations import gated_halves
from pallas_kernels.grouped_matmul import grouped_gate_up, grouped_matmul
from pallas_kernels.on_tpu.device import cores_of_a_device
from pallas_kernels.tracing.target import targeting

_OURS = {OURS: grouped_matmul, FUSED: grouped_gate_up}
_TOKAMAX = {
    TOKAMAX[0]: ("pallas_mosaic_tpu", "PallasMosaicTpuRaggedDot"),
    TOKAMAX[1]: ("pallas_mosaic_tpu_v2", "PallasMosaicTpuV2RaggedDot"),
}


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Compiles job["choice"] in job["case"] for job["topology"].

    If job["kind"] is "instructions", the kernel's copies are left out.
    """
    logging.getLogger("absl").setLevel(logging.ERROR)  # tokamax tells of shapes that it has not tuned
    choice = Choice(job["choice"]["implementation"], tuple(job["choice"]["tiles"]))
    shape, slice_ = GemmShape(**job["case"]["shape"]), parse_slice(job["topology"])
    # Where two cores act as one device our kernel's share of one is every other column tile, which is half of them: the
    # compiler cannot follow its scalar instructions otherwise. Peers' grids it divides by itself.
    cores = cores_of_a_device(slice_.chip) if choice.implementation in _OURS else 1
    shape = dataclasses.replace(shape, N=shape.N // cores)
    with targeting(share_of(slice_.chip, cores)), jax.sharding.use_abstract_mesh(slice_.one_device.abstract_mesh):
        if choice.implementation == ACTIVATION:
            product = jax.ShapeDtypeStruct((shape.G * shape.M, shape.N), jnp.bfloat16)
            return compile_alone([(_activation, [product])], job)
        kernel = _kernel(choice, shape)
        if job["kind"] == INSTRUCTIONS:
            kernel = dataclasses.replace(kernel, equation=without_copies(kernel.equation))
        return compile_alone([kernel.alone], job)


def _kernel(choice: Choice, shape: GemmShape) -> PallasCall:
    sizes = np.full(shape.G, shape.M, np.int32)
    arguments = (
        jax.ShapeDtypeStruct((shape.G * shape.M, shape.K), jnp.bfloat16),
        jax.ShapeDtypeStruct((shape.G, shape.K, shape.N), jnp.bfloat16),
        jax.ShapeDtypeStruct(sizes.shape, sizes.dtype),
    )
    kernels = find_kernels(jax.jit(_function(choice)).trace(*arguments).jaxpr, known={2: sizes})
    if len(kernels) != 1 or kernels[0].calls != 1:
        raise ValueError(f"expected one kernel, called once; there are {[(k.name, k.calls) for k in kernels]}")
    if not kernels[0].is_static:
        raise ValueError(GUESSED)
    return kernels[0]


def _function(choice: Choice) -> Callable[..., jax.Array]:
    """The product [M, N] of lhs [M, K], rhs [G, K, N] and group sizes."""
    if choice.implementation in _OURS:
        return functools.partial(_OURS[choice.implementation], backend="pallas_tpu")
    if choice.implementation == MEGABLOX:
        megablox = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox")
        return functools.partial(megablox.gmm, preferred_element_type=jnp.bfloat16, tiling=choice.tiles)
    # Through tokamax's own classes: its public function takes no tiles.
    name, made = _TOKAMAX[choice.implementation]
    module = importlib.import_module(f"tokamax._src.ops.ragged_dot.{name}")
    tiles = dict(zip(("tile_m", "tile_k", "tile_n", "bucket_base"), choice.tiles, strict=False))
    product = getattr(module, made)(config=module.Config(**tiles) if tiles else None, bypass_device_check=True)
    return lambda lhs, rhs, sizes: product(lhs, rhs, group_sizes=sizes, preferred_element_type=jnp.bfloat16)


def _activation(product: jax.Array) -> jax.Array:
    return gated_halves(product, "silu", None).astype(product.dtype)


if __name__ == "__main__":
    serve(work)
