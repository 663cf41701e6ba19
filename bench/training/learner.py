"""A model, its optimiser, and the two programs that training runs: some steps, and a look at held-out text.

learner = Learner(Variant("switch"), settings)
state = learner.start(seed=0)
state, sums = learner.advance(state, chunks, places, rates)  # a step for each of the rates
metrics, skills = learner.look(state, batches)

The host starts a program and waits for none of its steps: the text lies on the device, which cuts its batches itself.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from bench.inputs.corpus import sequences
from bench.training.settings import Settings, Variant, make_model
from bench.training.skills import Skills, count_skills
from bench.training.transformer import Transformer
from moejax import LoadStats, MoEAux

WEIGHT_DECAY = 0.1
"""Of matrices; vectors are not decayed."""

CLIP = 1.0
"""The largest norm of the gradient of all parameters together."""

FIGURES = ("loss", "aux_loss", "gradient_norm", "drop_rate", "load_cv", "load_entropy", "load_max")
"""What `Metrics.figures` gives; those of the load for each layer."""

MOST_STEPS = 64
"""The most that one call of `Learner.advance` takes."""


def learning_rates(steps: int, peak: float) -> np.ndarray:
    """Float32 [steps]: the peak is reached after a tenth of them; a cosine then brings it down to a tenth."""
    # One step more than the run has, as optax asks that something is left to decay over.
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, max(1, round(0.1 * steps)), steps + 1, 0.1 * peak)
    return np.asarray(schedule(jnp.arange(1, steps + 1)), np.float32)


def make_optimiser() -> optax.GradientTransformation:
    """AdamW without its learning rate, which each step is given: so a program does not depend on the schedule."""
    return optax.chain(
        optax.clip_by_global_norm(CLIP),
        optax.scale_by_adam(b1=0.9, b2=0.95),
        optax.add_decayed_weights(WEIGHT_DECAY, mask=functools.partial(jax.tree.map, lambda x: x.ndim > 1)),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Metrics:
    """What a batch showed.

    Attributes:
      loss: float32 [], cross-entropy in nats a byte.
      aux_loss: float32 [], the routers' losses of all layers together, weighted.
      load: the statistics of every layer: int32 [layers, E] each.
      gradient_norm: float32 [], before clipping; 0 where there is no gradient.
    """

    loss: jax.Array
    aux_loss: jax.Array
    load: LoadStats
    gradient_norm: jax.Array

    @jax.jit
    def figures(self) -> dict[str, jax.Array]:
        """float32: loss, aux_loss, gradient_norm and drop_rate []; load_cv, load_entropy and load_max [layers]."""
        return {
            "loss": self.loss,
            "aux_loss": self.aux_loss,
            "gradient_norm": self.gradient_norm,
            "drop_rate": jax.tree.map(jnp.ravel, self.load).dropped_fraction,
            "load_cv": jax.vmap(lambda load: load.cv)(self.load),
            "load_entropy": jax.vmap(lambda load: load.entropy)(self.load),
            "load_max": self.load.tokens_per_expert.max(1) / jnp.maximum(self.load.tokens_per_expert.mean(1), 1e-6),
        }


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """All that later steps depend on, but for the step's number.

    Attributes:
      params: what gradients train.
      rest: what they do not: random streams, biases that balance.
      optimiser: moments.
      graph: the model without its arrays.
    """

    params: Any
    rest: Any
    optimiser: Any
    graph: Any = dataclasses.field(metadata={"static": True})

    @property
    def model(self) -> Transformer:
        """The model with these arrays in it."""
        return nnx.merge(self.graph, self.params, self.rest, copy=True)


class Learner:
    """The programs of a model; states of several seeds share what is compiled.

    Attributes:
      variant: router and precision of the model.
      compile_seconds: of both programs, beside those of other processes with --jobs; 0 until `compile_learner` is done.
    """

    def __init__(self, variant: Variant, settings: Settings):
        self.variant = variant
        self.compile_seconds = 0.0
        self._settings = settings
        self._make_model = functools.partial(make_model, variant, settings)
        self._optimiser = make_optimiser()
        self._advance = jax.jit(self._traced_steps, donate_argnums=0)
        self._look = jax.jit(_traced_looks)

    def start(self, seed: int) -> State:
        """The state before the first step."""
        graph, params, rest = _split(self._make_model(nnx.Rngs(seed)))
        return State(params, rest, self._optimiser.init(params), graph)

    def advance(
        self, state: State, chunks: jax.Array, places: np.ndarray, rates: np.ndarray
    ) -> tuple[State, dict[str, jax.Array]]:
        """Trains. The old state's memory is used again, so it is gone.

        Args:
          state: before.
          chunks: uint8 [chunks, chunk bytes], the text, on the device.
          places: int32 [n, B, 2], where the sequences of each step begin; n is `MOST_STEPS` at the most.
          rates: float32 [n], learning rates.

        Returns:
          The state after n steps, and the sums of `Metrics.figures` over them.
        """
        steps = len(rates)
        # Of one shape, whatever n is, so that there is one program.
        all_places = np.zeros((MOST_STEPS, *places.shape[1:]), np.int32)
        all_rates = np.zeros(MOST_STEPS, np.float32)
        all_places[:steps], all_rates[:steps] = places, rates
        return self._advance(state, chunks, all_places, all_rates, np.int32(steps))

    def look(self, state: State, batches: jax.Array) -> tuple[Metrics, Skills]:
        """The mean losses over uint8 [batches, B, L + 1], and the sums of load, drops and skills."""
        return self._look(state, batches)

    def _traced_steps(
        self, state: State, chunks: jax.Array, places: jax.Array, rates: jax.Array, steps: jax.Array
    ) -> tuple[State, dict[str, jax.Array]]:
        def step(number: jax.Array, carry: tuple[State, dict[str, jax.Array]]) -> tuple[State, dict[str, jax.Array]]:
            state, sums = carry
            tokens = sequences(chunks, places[number], self._settings.length)
            state, metrics = self._traced_step(state, tokens, rates[number])
            return state, jax.tree.map(jnp.add, sums, metrics.figures())

        layers = self._settings.num_layers
        shapes = {name: (layers,) if name.startswith("load_") else () for name in FIGURES}
        none = {name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items()}
        return jax.lax.fori_loop(0, steps, step, (state, none))

    def _traced_step(self, state: State, tokens: jax.Array, learning_rate: jax.Array) -> tuple[State, Metrics]:
        def objective(params: Any) -> tuple[jax.Array, tuple[Metrics, Any, list[MoEAux]]]:
            model = nnx.merge(state.graph, params, state.rest, copy=True)
            metrics, auxes, _ = _metrics(model, tokens, train=True)
            return metrics.loss + metrics.aux_loss, (metrics, nnx.state(model, nnx.Not(nnx.Param)), auxes)

        gradients, (metrics, rest, auxes) = jax.grad(objective, has_aux=True)(state.params)
        updates, optimiser = self._optimiser.update(gradients, state.optimiser, state.params)
        params = optax.apply_updates(state.params, jax.tree.map(lambda leaf: -learning_rate * leaf, updates))
        model = nnx.merge(state.graph, params, rest, copy=True)
        for block, aux in zip(model.blocks, auxes, strict=True):
            block.feed_forward.update(aux)
        graph, params, rest = _split(model)
        metrics = dataclasses.replace(metrics, gradient_norm=optax.tree.norm(gradients))
        return State(params, rest, optimiser, graph), metrics


def _split(model: Transformer) -> tuple[Any, Any, Any]:
    """Its graph, what gradients train, and the rest."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]
    return graph, params, rest


def _traced_looks(state: State, batches: jax.Array) -> tuple[Metrics, Skills]:
    def look(tokens: jax.Array) -> tuple[Metrics, Skills]:
        metrics, _, logits = _metrics(state.model, tokens, train=False)
        return metrics, count_skills(tokens.astype(jnp.int32), logits.argmax(-1))

    found, skills = jax.tree.map(lambda leaf: leaf.sum(0), jax.lax.map(look, batches))
    count = len(batches)
    return dataclasses.replace(found, loss=found.loss / count, aux_loss=found.aux_loss / count), skills


def _metrics(model: Transformer, tokens: jax.Array, *, train: bool) -> tuple[Metrics, list[MoEAux], jax.Array]:
    """What a batch shows, what each layer's router did, and the logits."""
    tokens = tokens.astype(jnp.int32)
    logits, auxes = model(tokens[:, :-1], train=train)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
    metrics = Metrics(
        loss=loss,
        aux_loss=jnp.stack([aux.loss for aux in auxes]).sum(),
        load=jax.tree.map(lambda *leaves: jnp.stack(leaves), *(aux.load for aux in auxes)),
        gradient_norm=jnp.zeros((), jnp.float32),
    )
    return metrics, auxes, logits
