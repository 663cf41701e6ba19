"""Training a small language model whose feed-forward layers are Mixtures of Experts, over a mesh with any axes.

    python examples/train.py --steps 50                              # on the devices at hand
    python examples/train.py --devices 8 --mesh fsdp=2,expert=2,tensor=2 --parts 2

Sequences of different lengths are padded, and the padding is masked: it takes no expert and counts in no loss.
"""

import argparse
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moejax import ROUTERS, MoE, MoEAux, MoEConfig, Partition

VOCABULARY, HIDDEN, LENGTH = 64, 64, 32


class Model(nnx.Module):
    """Tokens -> logits of the next ones, by two layers of experts with a residual."""

    def __init__(self, config: MoEConfig, partition: Partition, *, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(VOCABULARY, HIDDEN, rngs=rngs)
        self.layers = nnx.List([MoE(config, partition=partition, rngs=rngs) for _ in range(2)])
        self.norm = nnx.RMSNorm(HIDDEN, rngs=rngs)
        self.head = nnx.Linear(HIDDEN, VOCABULARY, rngs=rngs)

    def __call__(self, tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, list[MoEAux]]:
        """Tokens int32 [B, L], mask bool [B, L] -> logits [B, L, V], and what each layer's router did."""
        x, auxes = self.embedding(tokens), []
        for layer in self.layers:
            y, aux = layer(self.norm(x), mask=mask)
            x, auxes = x + y, [*auxes, aux]
        return self.head(self.norm(x)), auxes


def batch_of(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Sequences that count up from a random start, of random lengths: tokens [B, L + 1] and which of them are real."""
    tokens = (rng.integers(0, VOCABULARY, (size, 1)) + np.arange(LENGTH + 1)) % VOCABULARY
    mask = np.arange(LENGTH + 1) < rng.integers(LENGTH // 2, LENGTH + 2, (size, 1))
    return tokens.astype(np.int32), mask


@nnx.jit
def step(model: Model, optimizer: nnx.Optimizer, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """One step, whose gradients are added up over micro-batches [parts, B, L + 1]; the loss of the task."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss_of(params: nnx.State, rest: nnx.State, tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, Any]:
        model = nnx.merge(graph, params, rest, copy=True)  # its state may change inside the gradient
        logits, auxes = model(tokens[:, :-1], mask[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        task = jnp.where(mask[:, 1:], losses, 0).sum() / mask[:, 1:].sum()
        return task + sum(aux.loss for aux in auxes), (task, auxes, nnx.state(model, nnx.Not(nnx.Param)))

    def add_part(carry: tuple[nnx.State, nnx.State], part: tuple[jax.Array, jax.Array]) -> tuple[Any, Any]:
        total, rest = carry
        gradients, (task, auxes, rest) = jax.grad(loss_of, has_aux=True)(params, rest, *part)
        return (jax.tree.map(jnp.add, total, gradients), rest), (task, auxes)

    zeros = jax.tree.map(jnp.zeros_like, params)
    (total, rest), (tasks, auxes) = jax.lax.scan(add_part, (zeros, rest), (tokens, mask))
    nnx.update(model, rest)
    optimizer.update(model, jax.tree.map(lambda leaf: leaf / len(tokens), total))
    for layer, aux in zip(model.layers, auxes, strict=True):
        layer.update(jax.tree.map(lambda leaf: leaf.sum(0), aux))  # moves the bias that balances the load
    return tasks.mean()


def main(arguments: list[str] | None = None) -> list[float]:
    """Trains, and returns the loss of every step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--parts", type=int, default=1, help="micro-batches of a step, of --batch sequences each")
    parser.add_argument("--devices", type=int, help="virtual CPU devices to make")
    parser.add_argument("--mesh", help="axes and their sizes, as fsdp=2,expert=2,tensor=2; default: expert, then data")
    options = parser.parse_args(arguments)
    if options.devices:
        jax.config.update("jax_num_cpu_devices", options.devices)
    experts = math.gcd(jax.device_count(), 8)
    axes = options.mesh or f"data={jax.device_count() // experts},expert={experts}"
    try:
        sizes = {name: int(size) for name, size in (axis.split("=") for axis in axes.split(","))}
    except ValueError:
        parser.error(f"--mesh must be axes and their sizes, as fsdp=2,expert=2, got {axes!r}")
    if math.prod(sizes.values()) > jax.device_count():
        parser.error(f"--mesh must be of at most the {jax.device_count()} devices that there are, got {axes}")
    if options.batch % math.prod(sizes.values()):
        parser.error(f"--batch must be a multiple of the {math.prod(sizes.values())} devices, got {options.batch}")
    # Sequences lie over all axes, and the layer is told so.
    partition = Partition(expert="expert" if "expert" in sizes else None, tokens=(tuple(sizes),))
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes))
    place = NamedSharding(mesh, PartitionSpec(None, tuple(sizes)))

    config = ROUTERS["loss_free"](
        MoEConfig(hidden_size=HIDDEN, intermediate_size=64, num_experts=8, top_k=2, dtype=jnp.float32)
    )
    rng = np.random.default_rng(0)
    with jax.set_mesh(mesh):
        model = Model(config, partition, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.adamw(3e-3), wrt=nnx.Param)
        losses = []
        for number in range(options.steps):
            parts = [batch_of(rng, options.batch) for _ in range(options.parts)]
            batch = [jax.device_put(np.stack(arrays), place) for arrays in zip(*parts, strict=True)]
            losses.append(float(step(model, optimizer, *batch)))
            if number % 10 == 0 or number == options.steps - 1:
                print(f"step {number:4d}  loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
