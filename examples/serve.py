"""Serving with a layer in 8 bits: requests of different lengths are decoded in a fixed number of slots.

    python examples/serve.py                              # on one device
    python examples/serve.py --ep 4                       # experts split over 4 devices
    python examples/serve.py --slots 64 --requests 256 --hidden 1024 --intermediate 512 --experts 64

Without accelerators, --ep makes virtual CPU devices. A slot that no request occupies is masked: it takes no expert and
is not sent anywhere. At the end every step is repeated with the same layer in BF16, to show what the rounding changed.
The weights are random and there is no attention, so the text means nothing; attention belongs in `Decoder`,
and moejax.models.DecoderBlock has it.
"""

import argparse
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax import MoE, MoEAux, MoEConfig, make_mesh, with_changes

VOCABULARY = 256


class Decoder(nnx.Module):
    """Tokens -> logits of the next ones: an embedding, one layer of experts with a residual, and a head."""

    def __init__(self, layer: MoE, *, rngs: nnx.Rngs):
        hidden, dtype = layer.config.hidden_size, layer.config.dtype
        self.layer = layer
        self.embedding = nnx.Embed(VOCABULARY, hidden, param_dtype=dtype, rngs=rngs)
        self.norm = nnx.RMSNorm(hidden, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(hidden, VOCABULARY, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array, is_busy: jax.Array) -> tuple[jax.Array, jax.Array, MoEAux]:
        """Tokens int32 [B], busy slots bool [B] -> logits [B, V], the layer's output [B, H], what its router did."""
        x = self.norm(self.embedding(tokens))[:, None]  # a sequence of one token in each slot
        y, aux = self.layer(x, mask=is_busy[:, None])
        return self.head(self.norm(x + y))[:, 0], y[:, 0], aux


class Slots(NamedTuple):
    """The state of the batch, [B] each: the last token of every slot, and how many more its request is to get."""

    tokens: jax.Array
    left: jax.Array


class Step(NamedTuple):
    """What one step did: [B] tokens read and written, which slots were busy, and how many choices the router made."""

    read: jax.Array
    written: jax.Array
    is_busy: jax.Array
    choices: jax.Array


@nnx.jit(static_argnames="steps")
def decode(model: Decoder, slots: Slots, steps: int) -> tuple[Slots, Step]:
    """Runs some steps, greedily; a slot is idle once its request has ended. Returns what they did, [steps, B]."""

    def one_step(slots: Slots, _: None) -> tuple[Slots, Step]:
        is_busy = slots.left > 0
        logits, _, aux = model(slots.tokens, is_busy)
        tokens = jnp.where(is_busy, logits.argmax(-1), slots.tokens)
        done = Step(slots.tokens, tokens, is_busy, aux.load.tokens_per_expert.sum())
        return Slots(tokens, jnp.maximum(slots.left - 1, 0)), done

    return jax.lax.scan(one_step, slots, None, steps)


@nnx.jit
def compare(served: Decoder, exact: Decoder, tokens: jax.Array, is_busy: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The relative error of the layer's output, and the share of equal next tokens, both over the busy slots."""
    (logits, y, _), (exact_logits, exact_y, _) = served(tokens, is_busy), exact(tokens, is_busy)
    y, exact_y = y.astype(jnp.float32), exact_y.astype(jnp.float32)  # zeros in idle slots
    is_same = (logits.argmax(-1) == exact_logits.argmax(-1)) & is_busy
    return jnp.linalg.norm(y - exact_y) / jnp.linalg.norm(exact_y), is_same.sum() / is_busy.sum()


def refilled(slots: Slots, waiting: Iterator[tuple[int, int]]) -> Slots:
    """Puts the next requests (first token, number of tokens to generate) into the idle slots."""
    tokens, left = np.array(slots.tokens), np.array(slots.left)
    for slot in np.flatnonzero(left == 0):
        tokens[slot], left[slot] = next(waiting, (0, 0))
    return Slots(jnp.asarray(tokens), jnp.asarray(left))


def serve(model: Decoder, requests: list[tuple[int, int]], num_slots: int, steps: int) -> tuple[list[Step], float]:
    """Decodes all requests, `steps` steps in a call. Returns what each call did, and the seconds they took together."""
    slots = Slots(jnp.zeros(num_slots, jnp.int32), jnp.zeros(num_slots, jnp.int32))
    jax.block_until_ready(decode(model, slots, steps))  # compiles; all slots idle
    waiting, calls = iter(requests), []
    begin = time.perf_counter()
    while True:
        slots = refilled(slots, waiting)
        if not np.any(slots.left):
            return calls, time.perf_counter() - begin
        slots, done = decode(model, slots, steps)
        calls.append(jax.tree.map(np.asarray, done))


def size_of(layer: MoE) -> float:
    """Megabytes of the layer's parameters."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(layer.params())) / 1e6


def main(arguments: list[str] | None = None) -> tuple[float, float, float]:
    """Serves. Returns tokens per second, the relative error against BF16, and the share of equal next tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ep", type=int, default=1, help="devices to split the experts over (default: %(default)s)")
    parser.add_argument("--slots", type=int, default=16, help="requests decoded at a time (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=48, help="requests in all (default: %(default)s)")
    parser.add_argument("--longest", type=int, default=48, help="most tokens of a request (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="steps between refills (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=256, help="multiple of 128 (default: %(default)s)")
    parser.add_argument("--intermediate", type=int, default=128, help="multiple of 128 (default: %(default)s)")
    parser.add_argument("--experts", type=int, default=16, help="multiple of --ep (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=4, help="experts of a token (default: %(default)s)")
    options = parser.parse_args(arguments)
    if min(options.ep, options.slots, options.requests, options.longest, options.steps) < 1:
        parser.error("--ep, --slots, --requests, --longest and --steps must be at least 1")
    if options.hidden % 128 or options.intermediate % 128 or options.experts % options.ep:
        parser.error("--hidden and --intermediate must be multiples of 128, and --experts one of --ep")
    if not 1 <= options.top_k <= options.experts:
        parser.error(f"--top-k must be from 1 to --experts, {options.experts}, got {options.top_k}")
    if options.ep > 1:
        jax.config.update("jax_num_cpu_devices", options.ep)  # of use where the CPU is all there is

    config = MoEConfig(
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_experts=options.experts,
        top_k=options.top_k,
        precision="w8a8",
        param_dtype=jnp.bfloat16,
    )
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, options.longest + 1, options.requests)
    requests = [(int(rng.integers(VOCABULARY)), int(length)) for length in lengths]
    with jax.set_mesh(make_mesh(ep=options.ep)):
        trained = MoE(config, rngs=nnx.Rngs(0))
        served = Decoder(trained.quantized(), rngs=nnx.Rngs(1))
        exact = Decoder(MoE.from_params(trained.params(), with_changes(config, precision="w16a16")), rngs=nnx.Rngs(1))

        calls, seconds = serve(served, requests, options.slots, options.steps)
        done = jax.tree.map(lambda *leaves: np.concatenate(leaves), *calls)
        error, same = map(float, compare(served, exact, done.read.reshape(-1), done.is_busy.reshape(-1)))
    generated = int(done.is_busy.sum())
    speed = generated / seconds
    print(f"layer          {size_of(served.layer):.2f} MB in 8 bits, {size_of(exact.layer):.2f} MB in BF16")
    print(f"served         {options.requests} requests, {generated} tokens, {done.is_busy.mean():.0%} of slots busy")
    print(f"routed         {done.choices.sum()} choices: {options.top_k} for each token, none for an idle slot")
    print(f"speed          {speed:,.0f} tokens/s on {options.ep} {jax.devices()[0].platform} device(s)")
    print(f"against BF16   relative error {error:.3f}, {same:.1%} of next tokens the same")
    return speed, error, same


if __name__ == "__main__":
    main()
