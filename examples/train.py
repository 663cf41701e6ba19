"""Training a small language model whose feed-forward layers are Mixtures of Experts, over a mesh with any axes.

    python examples/train.py --steps 50                              # on the devices at hand
    python examples/train.py --devices 8 --mesh fsdp=2,expert=2,tensor=2

Sequences of different lengths are padded, and the padding is masked: it takes no expert and counts in no loss.
"""

import argparse
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import PartitionSpec

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
    """One step; the loss of the task."""

    def loss_of(model: Model) -> tuple[jax.Array, tuple[jax.Array, list[MoEAux]]]:
        logits, auxes = model(tokens[:, :-1], mask[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        task = jnp.where(mask[:, 1:], losses, 0).sum() / mask[:, 1:].sum()
        return task + sum(aux.loss for aux in auxes), (task, auxes)

    (_, (task, auxes)), gradients = nnx.value_and_grad(loss_of, has_aux=True)(model)
    optimizer.update(model, gradients)
    for layer, aux in zip(model.layers, auxes, strict=True):
        layer.update(aux)  # moves the bias that balances the load
    return task


def main(arguments: list[str] | None = None) -> list[float]:
    """Trains, and returns the loss of every step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--devices", type=int, help="virtual CPU devices to make")
    parser.add_argument("--mesh", help="axes and their sizes, as fsdp=2,expert=2,tensor=2; default: expert, then data")
    options = parser.parse_args(arguments)
    if options.devices:
        jax.config.update("jax_num_cpu_devices", options.devices)
    experts = math.gcd(jax.device_count(), 8)
    axes = options.mesh or f"data={jax.device_count() // experts},expert={experts}"
    sizes = dict(part.split("=") for part in axes.split(","))
    partition = Partition(expert="expert" if "expert" in sizes else None)
    mesh = jax.make_mesh(tuple(map(int, sizes.values())), tuple(sizes))

    config = ROUTERS["loss_free"](
        MoEConfig(hidden_size=HIDDEN, intermediate_size=64, num_experts=8, top_k=2, dtype=jnp.float32)
    )
    rng = np.random.default_rng(0)
    with jax.set_mesh(mesh):
        model = Model(config, partition, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.adamw(3e-3), wrt=nnx.Param)
        losses = []
        for number in range(options.steps):
            batch = [jax.device_put(array, PartitionSpec()) for array in batch_of(rng, options.batch)]
            losses.append(float(step(model, optimizer, *batch)))
            if number % 10 == 0 or number == options.steps - 1:
                print(f"step {number:4d}  loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
