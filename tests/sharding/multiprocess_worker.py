"""One of several processes that hold four virtual chips each: runs the layer over all of them, checks it against the
dense oracle. `python -m tests.sharding.multiprocess_worker <address> <processes> <process>`; exit status 0 is success.
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moejax import MoEConfig, MoEParams, Partition, TopKRouter, dense_moe, make_mesh, moe, param_specs
from moejax.axes import axes_on
from tests.moejax.layers import random_params

CHIPS_OF_A_PROCESS = 4
NUM_TOKENS = 45  # eight chips do not divide them

CONFIGS = {
    "w16a16": MoEConfig(
        hidden_size=64,
        intermediate_size=32,
        num_experts=8,
        top_k=2,
        shared_intermediate_size=32,
        router=TopKRouter(load_balance_loss=0.1),
        dtype=jnp.float32,
    ),
    "w8a8": MoEConfig(
        hidden_size=128,
        intermediate_size=128,
        num_experts=8,
        top_k=2,
        router=TopKRouter(z_loss=0.1),
        precision="w8a8",
        dtype=jnp.float32,
    ),
}
NODES = Partition(expert=("node", "local"))
LIMITS = {"w16a16": 1e-5, "w8a8": 1e-2}


def main(address: str, num_processes: int, process: int) -> None:
    jax.config.update("jax_num_cpu_devices", CHIPS_OF_A_PROCESS)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, num_processes, process, initialization_timeout=60)
    assert jax.device_count() == num_processes * CHIPS_OF_A_PROCESS
    assert jax.local_device_count() == CHIPS_OF_A_PROCESS
    for ep in (8, 4):
        mesh = make_mesh(ep, jax.device_count() // ep)
        for precision, check in (("w16a16", check_values_and_gradients), ("w8a8", check_values)):
            check(mesh, CONFIGS[precision], LIMITS[precision])
            print(f"process {process}: {precision}, ep={ep}: right", flush=True)
    # A process is a node.
    mesh = jax.make_mesh((num_processes, CHIPS_OF_A_PROCESS), NODES.expert, (AxisType.Auto,) * 2)
    for precision, check in (("w16a16", check_values_and_gradients), ("w8a8", check_values)):
        check(mesh, dataclasses.replace(CONFIGS[precision], transport="hierarchical"), LIMITS[precision], NODES)
        print(f"process {process}: {precision}, in two hops: right", flush=True)


def check_values_and_gradients(mesh, config: MoEConfig, limit: float, partition: Partition | None = None) -> None:
    """Tokens come split over all chips."""
    x, params = local_problem(config)
    x = x[: NUM_TOKENS // 8 * 8]

    def loss(x, params):
        y, aux = moe(x, params, config, mesh=mesh, partition=partition)
        return (y**2).sum(), (y, aux)

    def oracle(x, params):
        y = dense_moe(x, params, config)
        return (y**2).sum(), y

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, (y, aux)), gradients = run(*spread(x, params, config, mesh, PartitionSpec(mesh.axis_names), partition))
    (_, expected), expected_gradients = jax.jit(jax.value_and_grad(oracle, argnums=(0, 1), has_aux=True))(x, params)
    compare(x, config, aux, (y, gradients), (expected, expected_gradients), limit)


def check_values(mesh, config: MoEConfig, limit: float, partition: Partition | None = None) -> None:
    """Tokens come whole to every process, in a number that the chips do not divide, and outside jit."""
    x, params = local_problem(config)
    y, aux = moe(*spread(x, params, config, mesh, PartitionSpec(), partition), config, mesh=mesh, partition=partition)
    expected = dense_moe(x, params, config, quantized=True)
    compare(x, config, aux, y, expected, limit)


def compare(x, config: MoEConfig, aux, got, expected, limit: float) -> None:
    assert int(aux.load.tokens_per_expert.sum()) == len(x) * config.top_k
    assert int(aux.load.dropped) == 0
    assert np.isfinite(float(aux.loss))
    assert not any(leaf.is_fully_addressable for leaf in jax.tree.leaves(got))
    whole = multihost_utils.process_allgather(got, tiled=True)
    errors = jax.tree.map(relative_error, whole, jax.tree.map(np.asarray, expected))
    assert max(jax.tree.leaves(errors)) < limit, errors


def local_problem(config: MoEConfig):
    """The same numbers in every process, on its first chip."""
    rng = np.random.default_rng(11)
    params = random_params(config, rng)
    return jnp.asarray(rng.standard_normal((NUM_TOKENS, config.hidden_size)), jnp.float32), params


def spread(
    x: jax.Array, params: MoEParams, config: MoEConfig, mesh, spec: PartitionSpec, partition: Partition | None
) -> tuple[jax.Array, MoEParams]:
    """Local arrays as ones that lie over all processes, each of which gives its own parts."""

    def one(array: jax.Array, spec: PartitionSpec) -> jax.Array:
        values = np.asarray(array)
        return jax.make_array_from_callback(values.shape, NamedSharding(mesh, spec), lambda index: values[index])

    return one(x, spec), jax.tree.map(one, params, param_specs(params, config, axes_on(mesh, partition, config)))


def relative_error(out: np.ndarray, ref: np.ndarray) -> float:
    return float(np.linalg.norm(out - ref) / np.linalg.norm(ref))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
