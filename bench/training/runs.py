"""One variant trained with one seed: steps, looks at the held-out text, records, checkpoints."""

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
from bench.training.learner import MOST_STEPS, Learner, State, learning_rates
from bench.training.records import Run, append, read_runs, run_name
from bench.training.settings import Settings, Variant, count_parameters

COLLAPSED_ENTROPY = 0.5
"""A layer whose held-out load ends below this entropy (of 1) has collapsed: most tokens go to few experts."""

_STEPS_SHARE = 0.9  # of the time of all runs; looks at the held-out text and checkpoints need the rest


def compile_learner(variant: Variant, settings: Settings, corpus: Corpus) -> Learner:
    """Makes the model, and runs both its programs once on a state that is thrown away.

    Raises:
      ValueError: the settings do not suit the router or the precision.
    """
    learner = Learner(variant, settings)
    watch = Stopwatch()
    state, _ = advance(learner, learner.start(0), settings, corpus, jax.device_put(corpus.train), 0, np.zeros(1))
    held_out = corpus.held_out_batches(settings.batch_size, settings.held_out_batches)
    jax.block_until_ready(learner.look(state, jax.device_put(held_out)))
    learner.compile_seconds = watch.seconds
    return learner


def advance(
    learner: Learner,
    state: State,
    settings: Settings,
    corpus: Corpus,
    text: jax.Array,
    seed: int,
    rates: np.ndarray,
    done: int = 0,
) -> tuple[State, dict[str, Any]]:
    """Trains a step for each of the learning rates, from the step `done` on; the new state and the means of figures."""
    sums: list[dict[str, jax.Array]] = []
    for first in range(0, len(rates), MOST_STEPS):
        part = rates[first : first + MOST_STEPS]
        steps = range(done + first, done + first + len(part))
        places = corpus.train_places(settings.batch_size, seed=seed, steps=steps)
        state, found = learner.advance(state, text, places, part)
        sums.append(found)
    total = jax.tree.map(lambda *parts: sum(parts) / len(rates), *jax.device_get(sums))
    return state, {name: value.tolist() for name, value in total.items()}


def seconds_a_step(learner: Learner, settings: Settings, corpus: Corpus, steps: int = 5) -> float:
    """What a step takes, by a short run that is thrown away."""
    state, text = learner.start(0), jax.device_put(corpus.train)
    jax.block_until_ready((state, text))
    watch = Stopwatch()
    advance(learner, state, settings, corpus, text, 0, np.zeros(steps))
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
    is_over: Callable[[], bool] = lambda: False,
    show: Callable[[int, str], None] = lambda step, line: None,
) -> bool:
    """Trains until `settings.steps` are done or the loss is no longer finite, and records in a file what happens.

    Args:
      learner: of the router and precision.
      seed: of the parameters, the routers' noise and the order of the text.
      settings: of all runs.
      corpus: the text.
      file: where the records go.
      head: what the "run" record says beyond this run's own figures.
      checkpoints: where states are kept, and the latest is gone on from; None for nowhere.
      checkpoint_every: steps from one checkpoint to the next, 0 for none.
      is_over: whether to stop before the end, after a checkpoint; asked now and then.
      show: told the steps done and a line about them.

    Returns:
      Whether the run is finished.
    """
    name = run_name(learner.variant, seed)
    state = learner.start(seed)
    done = 0
    if checkpoints is not None and checkpoints.latest is not None:
        done = checkpoints.latest
        state = checkpoints.restore(done, state)
    text = jax.device_put(corpus.train)
    held_out = jax.device_put(corpus.held_out_batches(settings.batch_size, settings.held_out_batches))

    def note(kind: str, **figures: Any) -> None:
        append(file, {"kind": kind, "run": name, **figures})

    note(
        "run",
        **dataclasses.asdict(learner.variant),
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
        looks = [look for look in settings.looks if look > done]
        until = min(settings.steps, *looks, *(done // every * every + every for every in stops))
        watch = Stopwatch()
        state, figures = advance(learner, state, settings, corpus, text, seed, rates[done:until], done)
        seconds = watch.seconds / (until - done)
        done = until
        figures["ms_per_step"] = seconds * 1e3
        figures["tokens_per_second"] = settings.batch_size * settings.length / seconds
        finite = math.isfinite(figures["loss"])
        note("step", step=done, learning_rate=float(rates[done - 1]), **figures)
        show(done, _line(figures))
        if not finite or settings.looks_after(done):
            note("held_out", step=done, **_held_out_figures(learner, state, held_out))
        stops_here = finite and done < settings.steps and is_over()
        is_time = checkpoint_every and done % checkpoint_every == 0
        if finite and checkpoints is not None and (is_time or stops_here):
            checkpoints.save(done, state)
        if stops_here:
            return False
    note("end", step=done, **summary(read_runs(file)[name], settings))
    return True


def summary(run: Run, settings: Settings) -> dict[str, Any]:
    """The figures of an "end" record, from the records before it.

    Returns:
      held_out_loss and bits_per_byte at the end; ms_per_step, median and 95th percentile over the step records, and
      tokens_per_second at the median; drop_rate and load_cv in training, means over the steps; of the last look at the
      held-out text load_entropy for each layer, unrouted_rate, word_accuracy, bracket_accuracy, collapsed_layers and
      collapsed; active_parameters,
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
        "word_accuracy": last["word_accuracy"],
        "bracket_accuracy": last["bracket_accuracy"],
        "collapsed_layers": collapsed,
        "collapsed": bool(collapsed),
        "active_parameters": round(run.head["parameters"] - routed * (1 - choices / settings.num_experts)),
        "diverged": run.steps[-1]["loss"] is None,
    }


def _held_out_figures(learner: Learner, state: State, batches: jax.Array) -> dict[str, Any]:
    found, skills = jax.device_get(learner.look(state, batches))
    figures = {name: np.asarray(value).tolist() for name, value in found.figures().items()}
    kept = {name: figures[name] for name in ("loss", "drop_rate", "load_cv", "load_entropy", "load_max")}
    tokens = batches[:, :, 1:].size
    return {
        **kept,
        "tokens": tokens,
        "load": np.asarray(found.load.tokens_per_expert).tolist(),
        "unrouted_rate": float(np.mean(found.load.unrouted)) / tokens,
        "words": int(skills.words),
        "word_accuracy": int(skills.words_right) / max(1, int(skills.words)),
        "brackets": int(skills.brackets),
        "bracket_accuracy": int(skills.brackets_right) / max(1, int(skills.brackets)),
    }


def _line(figures: dict[str, Any]) -> str:
    return (
        f"training loss {figures['loss']:.3f}, {figures['tokens_per_second']:,.0f} tokens/s, drops "
        f"{100 * figures['drop_rate']:.1f} %, load CV {np.mean(figures['load_cv']):.2f}"
    )
