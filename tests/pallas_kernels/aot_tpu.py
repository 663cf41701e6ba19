"""Compiles a few kernels for one TPU generation, on any machine with libtpu.

    python -m tests.pallas_kernels.aot_tpu v6e

A process for each generation and no pytest around it, as libtpu reads its environment once.
"""

import os
import sys

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
}
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "v7x": "tpu7x:2x2x1"}


def main(name: str) -> None:
    """Prints the name of each kernel that compiles for the chip called `name`."""
    import jax
    import numpy as np
    from jax.experimental import topologies

    from pallas_kernels.chips import get_chip
    from pallas_kernels.target import targeting

    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[name]).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    mesh = jax.sharding.Mesh(np.array([device]), ("x",)).abstract_mesh
    for case, (function, *shapes) in _cases().items():
        placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
        with targeting(get_chip(name)), jax.sharding.use_abstract_mesh(mesh):
            jax.jit(function).lower(*placed).compile()
        print(case, flush=True)


def _cases() -> dict:
    import functools

    import jax
    import jax.numpy as jnp

    from pallas_kernels.grouped_matmul import grouped_gate_up, grouped_matmul
    from pallas_kernels.quantize import QTensor

    def array(*shape, dtype="bfloat16"):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    def quantised(dtype, values, scale):
        return QTensor(array(*values, dtype=dtype), array(*scale, dtype="float32"))

    def gradients(lhs, rhs, sizes):
        def loss(lhs, rhs):
            return grouped_gate_up(lhs, rhs, sizes, backend="pallas_tpu").astype(jnp.float32).sum()

        return jax.grad(loss, argnums=(0, 1))(lhs, rhs)

    matmul = functools.partial(grouped_matmul, backend="pallas_tpu")
    gate_up = functools.partial(grouped_gate_up, backend="pallas_tpu")
    k_major = functools.partial(gate_up, transpose_rhs=True)
    m, k, n, g = 512, 1024, 768, 8
    sizes = array(g, dtype="int32")
    fp8, int8 = "float8_e4m3fn", "int8"
    return {
        "bf16": (matmul, array(m, k), array(g, k, n), sizes),
        "bf16 fused, K-major": (k_major, array(m, k), array(g, n, k), sizes),
        "float32": (matmul, array(m, k, dtype="float32"), array(g, k, n, dtype="float32"), sizes),
        "no whole tiles": (matmul, array(301, 200), array(3, 200, 450), sizes),
        "2880 columns": (matmul, array(m, 2880), array(4, 2880, 2880), sizes),
        "fp8 fused, blocks": (
            gate_up,
            quantised(fp8, (m, k), (m, k // 128)),
            quantised(fp8, (g, k, n), (g, k // 128, n // 128)),
            sizes,
        ),
        "fp8 fused, blocks, K-major": (
            k_major,
            quantised(fp8, (m, k), (m, k // 128)),
            quantised(fp8, (g, n, k), (g, n // 128, k // 128)),
            sizes,
        ),
        "e5m2 by e4m3": (matmul, quantised("float8_e5m2", (m, k), (1, 1)), quantised(fp8, (g, k, n), (g, 1, n)), sizes),
        "int8": (matmul, quantised(int8, (m, k), (m, 1)), quantised(int8, (g, k, n), (g, 1, n)), sizes),
        "int8 weights only": (gate_up, array(m, k), quantised(int8, (g, k, n), (g, 1, n)), sizes),
        "gradients": (gradients, array(m, k), array(g, k, n), sizes),
    }


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    main(sys.argv[1])
