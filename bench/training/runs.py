"""One router trained with one seed: steps, looks at the held-out text, records, checkpoints."""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from bench.inputs.corpus import Corpus
from bench.measure.clock import Stopwatch
from bench.training.checkpoints import Checkpoints
from bench.training.learner import Learner, Metrics, State, learning_rates
from bench.training.records import Run, append, read_runs, run_name
from bench.training.settings import Settings, count_parameters

COLLAPSED_ENTROPY = 0.5
"""A layer whose held-out load ends below this entropy (of 1) has collapsed: most tokens go to few experts."""

_STEPS_SHARE = 0.9  # of the time of all runs; looks at the held-out text and checkpoints need the rest


def compile_learner(router: str, settings: Settings, corpus: Corpus) -> Learner:
    """Makes the model with this router, and runs both its programs once on a state that is thrown away.

    Raises:
      ValueError: the settings do not suit the router.
    """
    learner = Learner(router, settings)
    watch = Stopwatch()
    state, _ = learner.step(learner.start(0), corpus.train_batch(settings.batch_size, seed=0, step=0), 0.0)
    jax.block_until_ready(learner.evaluate(state, corpus.held_out_batches(settings.batch_size, 1)))
    learner.compile_seconds = watch.seconds
    return learner


def seconds_a_step(learner: Learner, settings: Settings, corpus: Corpus, steps: int = 5) -> float:
    """What a step takes, by a short run that is thrown away."""
    state = learner.start(0)
    batches = [corpus.train_batch(settings.batch_size, seed=0, step=step) for step in range(steps)]
    watch = Stopwatch()
    for batch in batches:
        state, metrics = learner.step(state, batch, 0.0)
    jax.block_until_ready(metrics)
    return watch.seconds / steps


def fit_steps(settings: Settings, learners: Sequence[Learner], seeds: int, corpus: Corpus, seconds: float) -> Settings:
    """The settings with as many steps as all runs together can take in the time.

    Raises:
      ValueError: they are fewer than the looks at the held-out text.
    """
    step = seeds * sum(seconds_a_step(learner, settings, corpus) for learner in learners)
    steps = math.floor(_STEPS_SHARE * seconds / step)
    if steps < settings.evaluations:
        raise ValueError(
            f"--minutes leaves {max(0, seconds):.0f} s after compiling, and one step of every run takes {step:.2g} s: "
            f"too few steps for {settings.evaluations} looks at the held-out text; pass more minutes or fewer --routers"
        )
    return dataclasses.replace(settings, steps=steps)


def train(
    learner: Learner,
    seed: int,
    settings: Settings,
    corpus: Corpus,
    file: pathlib.Path,
    head: dict[str, Any],
    *,
    checkpoints: Checkpoints | None = None,
    checkpoint_every: int = 0,
    show: Callable[[int, str], None] = lambda step, line: None,
) -> None:
    """Trains until `settings.steps` are done or the loss is no longer finite, and records in a file what happens.

    Args:
      learner: of the router.
      seed: of the parameters, the routers' noise and the order of the text.
      settings: of all runs.
      corpus: the text.
      file: where the records go.
      head: what the "run" record says beyond this run's own figures.
      checkpoints: where states are kept, and the latest is gone on from; None for nowhere.
      checkpoint_every: steps from one checkpoint to the next, 0 for none.
      show: told the steps done and a line about them.
    """
    name = run_name(learner.router, seed)
    state = learner.start(seed)
    done = 0
    if checkpoints is not None and checkpoints.latest is not None:
        done = checkpoints.latest
        state = checkpoints.restore(done, state)
    held_out = corpus.held_out_batches(settings.batch_size, settings.held_out_batches)

    def note(kind: str, **figures: Any) -> None:
        append(file, {"kind": kind, "run": name, **figures})

    note(
        "run",
        router=learner.router,
        seed=seed,
        causal=state.model.causal,
        resumed_from=done,
        compile_seconds=round(learner.compile_seconds, 3),
        **count_parameters(state.params),
        **head,
    )
    if not done:
        note("held_out", step=0, **_held_out_figures(learner, state, held_out))

    rates = learning_rates(settings.steps, settings.learning_rate)
    stops = [settings.log_every, settings.evaluate_every, *([checkpoint_every] if checkpoint_every else [])]
    finite = True
    while done < settings.steps and finite:
        until = min(settings.steps, *(done // every * every + every for every in stops))
        metrics = []
        watch = Stopwatch()
        for step in range(done, until):
            batch = corpus.train_batch(settings.batch_size, seed=seed, step=step)
            state, found = learner.step(state, batch, rates[step])
            metrics.append(found)
        jax.block_until_ready(metrics)
        seconds = watch.seconds / (until - done)
        done = until
        figures = _step_figures(metrics, seconds, settings)
        finite = math.isfinite(figures["loss"])
        note("step", step=done, learning_rate=float(rates[done - 1]), **figures)
        show(done, _line(figures))
        if not finite or done % settings.evaluate_every == 0 or done == settings.steps:
            note("held_out", step=done, **_held_out_figures(learner, state, held_out))
        if finite and checkpoints is not None and checkpoint_every and done % checkpoint_every == 0:
            checkpoints.save(done, state)
    note("end", step=done, **summary(read_runs(file)[name], settings))


def summary(run: Run, settings: Settings) -> dict[str, Any]:
    """The figures of an "end" record, from the records before it.

    Returns:
      held_out_loss and bits_per_byte at the end; ms_per_step, median and 95th percentile over the step records, and
      tokens_per_second at the median; drop_rate and load_cv in training, means over the steps; of the last look at the
      held-out text load_entropy for each layer, unrouted_rate, collapsed_layers and collapsed; active_parameters,
      those that a token is multiplied with, an expert's as often as tokens were given to it and not dropped; diverged,
      whether the loss ceased to be finite.
    """
    last = run.held_out[-1]
    times = [step["ms_per_step"] for step in run.steps]
    entropies = [math.nan if entropy is None else entropy for entropy in last["load_entropy"]]
    collapsed = [layer for layer, entropy in enumerate(entropies) if not entropy >= COLLAPSED_ENTROPY]
    choices = np.sum(last["load"]) * (1 - last["drop_rate"]) / (last["tokens"] * settings.num_layers)
    routed = run.head["expert_parameters"]
    return {
        "held_out_loss": last["loss"],
        "bits_per_byte": None if last["loss"] is None else last["loss"] / math.log(2),
        "ms_per_step": float(np.median(times)),
        "ms_per_step_p95": float(np.percentile(times, 95)),
        "tokens_per_second": settings.batch_size * settings.length / (float(np.median(times)) * 1e-3),
        "drop_rate": float(np.mean([step["drop_rate"] for step in run.steps])),
        "load_cv": float(np.mean([step["load_cv"] for step in run.steps])),
        "load_entropy": last["load_entropy"],
        "unrouted_rate": last["unrouted_rate"],
        "collapsed_layers": collapsed,
        "collapsed": bool(collapsed),
        "active_parameters": round(run.head["parameters"] - routed * (1 - choices / settings.num_experts)),
        "diverged": run.steps[-1]["loss"] is None,
    }


def _step_figures(metrics: Sequence[Metrics], seconds: float, settings: Settings) -> dict[str, Any]:
    """Means over the steps."""
    each = jax.device_get([found.figures() for found in metrics])
    means = {name: np.mean([figures[name] for figures in each], axis=0).tolist() for name in each[0]}
    return {**means, "ms_per_step": seconds * 1e3, "tokens_per_second": settings.batch_size * settings.length / seconds}


def _held_out_figures(learner: Learner, state: State, batches: np.ndarray) -> dict[str, Any]:
    found = learner.evaluate(state, batches)
    figures = {name: np.asarray(value).tolist() for name, value in found.figures().items()}
    kept = {name: figures[name] for name in ("loss", "drop_rate", "load_cv", "load_entropy")}
    tokens = batches[:, :, 1:].size
    return {
        **kept,
        "tokens": tokens,
        "load": np.asarray(found.load.tokens_per_expert).tolist(),
        "unrouted_rate": float(np.mean(found.load.unrouted)) / tokens,
    }


def _line(figures: dict[str, Any]) -> str:
    return (
        f"loss {figures['loss']:.3f}, {figures['tokens_per_second']:,.0f} tokens/s, drops "
        f"{100 * figures['drop_rate']:.1f} %, load CV {np.mean(figures['load_cv']):.2f}"
    )
