"""A model, its optimiser, and the two programs that training runs: a step, and a look at held-out text.

learner = Learner("switch", settings)
state = learner.start(seed=0)
state, metrics = learner.step(state, batch, learning_rate)
held_out = learner.evaluate(state, batches)
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from bench.training.settings import Settings, make_model
from bench.training.transformer import Transformer
from moejax import LoadStats, MoEAux

WEIGHT_DECAY = 0.1
"""Of matrices; vectors are not decayed."""

CLIP = 1.0
"""The largest norm of the gradient of all parameters together."""


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
        """float32: loss, aux_loss, gradient_norm and drop_rate []; load_cv and load_entropy [layers]."""
        return {
            "loss": self.loss,
            "aux_loss": self.aux_loss,
            "gradient_norm": self.gradient_norm,
            "drop_rate": jax.tree.map(jnp.ravel, self.load).dropped_fraction,
            "load_cv": jax.vmap(lambda load: load.cv)(self.load),
            "load_entropy": jax.vmap(lambda load: load.entropy)(self.load),
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
    """The programs of the model with one router; states of several seeds share what is compiled.

    Attributes:
      router: its name in `ROUTERS`.
      compile_seconds: of both programs, beside those of other processes with --jobs; 0 until `compile_learner` is done.
    """

    def __init__(self, router: str, settings: Settings):
        self.router = router
        self.compile_seconds = 0.0
        self._make_model = functools.partial(make_model, router, settings)
        self._optimiser = make_optimiser()
        self._step = jax.jit(self._traced_step, donate_argnums=0)
        self._evaluate = jax.jit(lambda state, tokens: _metrics(state.model, tokens, train=False)[0])

    def start(self, seed: int) -> State:
        """The state before the first step."""
        graph, params, rest = _split(self._make_model(nnx.Rngs(seed)))
        return State(params, rest, self._optimiser.init(params), graph)

    def step(self, state: State, tokens: np.ndarray, learning_rate: float) -> tuple[State, Metrics]:
        """Trains on uint8 [B, L + 1]. The old state's memory is used again, so it is gone."""
        return self._step(state, tokens, np.float32(learning_rate))

    def evaluate(self, state: State, batches: np.ndarray) -> Metrics:
        """The mean losses over uint8 [batches, B, L + 1], and the sums of load and drops."""
        found = [self._evaluate(state, tokens) for tokens in batches]
        total = jax.tree.map(lambda *leaves: sum(leaves), *found)
        return dataclasses.replace(total, loss=total.loss / len(batches), aux_loss=total.aux_loss / len(batches))

    def _traced_step(self, state: State, tokens: jax.Array, learning_rate: jax.Array) -> tuple[State, Metrics]:
        def objective(params: Any) -> tuple[jax.Array, tuple[Metrics, Any, list[MoEAux]]]:
            model = nnx.merge(state.graph, params, state.rest, copy=True)
            metrics, auxes = _metrics(model, tokens, train=True)
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


def _metrics(model: Transformer, tokens: jax.Array, *, train: bool) -> tuple[Metrics, list[MoEAux]]:
    tokens = tokens.astype(jnp.int32)
    logits, auxes = model(tokens[:, :-1], train=train)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
    metrics = Metrics(
        loss=loss,
        aux_loss=jnp.stack([aux.loss for aux in auxes]).sum(),
        load=jax.tree.map(lambda *leaves: jnp.stack(leaves), *(aux.load for aux in auxes)),
        gradient_norm=jnp.zeros((), jnp.float32),
    )
    return metrics, auxes
