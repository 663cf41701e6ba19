"""The other end of `test_meshes`: a training step of a layer compiled for a TPU slice, and its collectives."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bench.tpu.libtpu import serve
from moejax import MoEConfig, TopKRouter, moe
from moejax.axes import axes_on
from moejax.params import map_table
from pallas_kernels.chips import get_chip
from pallas_kernels.tracing.target import targeting

COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|reduce-scatter)(?:-start)?\(")
ARRAY = re.compile(r"\b([a-z]+[0-9]+)\[([0-9,]*)\]")


def work(job: dict) -> dict:
    config = MoEConfig(job["hidden_size"], 512, 8, 2, 512, router=TopKRouter(load_balance_loss=0.01))
    devices = topologies.get_topology_desc(platform="tpu", topology_name=job["topology"]).devices
    names, sizes = tuple(job["mesh"]), tuple(job["mesh"].values())
    mesh = Mesh(np.array(devices).reshape(sizes), names, axis_types=(AxisType.Auto,) * len(names))
    axes = axes_on(mesh, None, config)

    def array(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    params = map_table(lambda row: array(row.shape, jnp.float32, axes.spec(row.axes)), config)
    x = array((8, 128, config.hidden_size), jnp.bfloat16, P(names))

    def loss(x, params):
        y, aux = moe(x, params, config, mesh=mesh)
        return jnp.square(y.astype(jnp.float32)).mean() + aux.loss

    shardings = jax.tree.map(lambda leaf: leaf.sharding, (x, params))
    with targeting(get_chip("v6e")):
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1)), out_shardings=shardings).lower(x, params).compile()
    found = COLLECTIVE.findall(compiled.as_text())
    arrays = [(kind, f"{dtype}[{sizes}]") for result, kind in found for dtype, sizes in ARRAY.findall(result)]
    summed = [shape for kind, shape in arrays if kind == "all-reduce"]
    hidden, width = config.hidden_size, config.intermediate_size // axes.tp
    whole = [[hidden, 2, width], [hidden, 2 * width], [width, hidden]]
    return {
        "collectives": arrays,
        "router": [f"f32[{config.hidden_size},{config.num_experts}]", "f32[256,2]"],
        "summed": [[int(size) for size in shape.split("[")[1][:-1].split(",") if size] for shape in summed],
        "whole": [shape for matrix in whole for shape in (matrix, [config.num_experts // axes.ep, *matrix])],
    }


if __name__ == "__main__":
    serve(work)
