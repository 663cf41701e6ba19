"""The clocks: wall time, and on an NVIDIA GPU device time, the sum of the kernels.

A kernel that runs again and again on the same weights reads them from the cache, and looks faster than it is in a
model. So a function is timed over several copies of its inputs, one call after the other in one program, and the time
divided by the calls. Every input is copied, as XLA would otherwise do work common to the calls only once.

    inputs = copies_of((lhs, rhs, group_sizes))
    kernel_times(rotated(grouped_matmul), inputs, calls=len(inputs)).median_us
"""

import collections
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

ROTATED_BYTES = 600e6  # ten times the cache of an H200
MAX_COPIES = 8
_GRAPH_US = 2000.0  # long enough to make the time between two graphs negligible
_WALL_SECONDS = 0.03  # of a repeat: long enough to make the first launch and the last wait negligible
_MOST_RUNS = 50
_RUNS_TOGETHER = 4  # of processes that have to agree how often: one that ran it more often would wait for the others


class Stopwatch:
    """Runs from when it is made.

    Args:
      clock: gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._begin = clock()

    @property
    def seconds(self) -> float:
        """Seconds elapsed since it was made."""
        return self._clock() - self._begin


def wall_seconds(f: Callable[..., Any], *args: Any, wait: Callable[[Any], Any] = jax.block_until_ready) -> float:
    """From the call of f(*args) until its result is there, as `wait` tells."""
    watch = Stopwatch()
    wait(f(*args))
    return watch.seconds


@dataclasses.dataclass(frozen=True)
class CallTime:
    """Time of one call.

    Attributes:
      median_us: median over the repeats.
      min_us: least of the repeats.
      spread_us: greatest less least.
      kernels: by the name of each kernel, in order, what its launches take of a call, the median of the repeats that
        have it; empty where the method does not tell them.
    """

    median_us: float
    min_us: float
    spread_us: float
    kernels: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, times_us: Sequence[float], kernels: Mapping[str, float] | None = None) -> "CallTime":
        """The summary of the times of several repeats."""
        least, most = min(times_us), max(times_us)
        return cls(statistics.median(times_us), least, most - least, kernels or {})


def require_nvidia_gpu() -> None:
    """Raises ValueError unless jax runs on NVIDIA GPUs."""
    device = jax.devices()[0]
    if not is_nvidia(device):
        found = " ".join(device.client.platform_version.split()) if device.platform == "gpu" else device.platform
        raise ValueError(f"kernel times need an NVIDIA GPU, and jax runs on {found} here")


def is_nvidia(device: jax.Device) -> bool:
    """Whether a device is an NVIDIA GPU, whose kernels can be timed."""
    return device.platform == "gpu" and "rocm" not in device.client.platform_version.lower()


def copies_of(inputs: Any, *, at_most: int = MAX_COPIES) -> list[Any]:
    """`inputs`, a tree of arrays, and as many copies of it as exceed the cache: at most `at_most` in all."""
    count = min(at_most, num_copies(sum(leaf.nbytes for leaf in jax.tree.leaves(inputs))))
    return [inputs, *(jax.tree.map(jnp.copy, inputs) for _ in range(count - 1))]


def num_copies(num_bytes: int) -> int:
    """How many times inputs of `num_bytes` must exist to take `ROTATED_BYTES` together."""
    return max(1, min(MAX_COPIES, math.ceil(ROTATED_BYTES / num_bytes)))


def rotated(f: Callable[..., Any]) -> Callable[[Sequence[Any]], list[Any]]:
    """One program that calls `f` on each of several tuples of arguments, and returns all results."""
    traced_once = jax.jit(f)
    return jax.jit(lambda inputs: [traced_once(*args) for args in inputs])


def kernel_times(f: Callable[..., Any], *args: Any, repeats: int = 10, calls: int = 1, detach: bool = True) -> CallTime:
    """Sums the kernels of f(*args), as CUPTI times them on the device, and divides by `calls`.

    Args:
      f: a function that jax can trace, best one that is jitted.
      *args: its arguments.
      repeats: how often it is run and timed; each time it runs once untimed before.
      calls: how many calls of an operator `f` makes.
      detach: whether CUPTI leaves the process after each repeat, as what times otherwise in the same process wants it;
        that takes 20 ms.

    Raises:
      ValueError: jax does not run on NVIDIA GPUs, `repeats` is below 1, or `f` launches no kernel.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    require_nvidia_gpu()
    from jax.experimental.mosaic.gpu import profiler

    measured = profiler.Cupti(finalize=detach).measure(f, aggregate=False)
    times: list[float] = []
    by_name: dict[str, list[float]] = collections.defaultdict(list)
    for _ in range(repeats):
        _, kernels = measured(*args)
        if not kernels:
            raise ValueError("the function launches no kernel that could be timed")
        of_name: dict[str, float] = collections.defaultdict(float)
        for name, milliseconds in kernels:
            of_name[name] += milliseconds * 1e3 / calls
        times.append(sum(of_name.values()))
        for name, time_us in of_name.items():
            by_name[name].append(time_us)
    return CallTime.of(times, {name: statistics.median(times_us) for name, times_us in by_name.items()})


def wall_times(
    f: Callable[..., Any],
    *args: Any,
    repeats: int = 10,
    calls: int = 1,
    wait: Callable[[Any], Any] = jax.block_until_ready,
) -> CallTime:
    """Time of f(*args) by the wall clock, divided by `calls`: launches and the gaps between kernels count.

    A repeat runs `f` several times on end and waits for the last result only, so that the way to the GPU and back
    hardly counts. How often depends on how long it takes; not so where several processes run `f` together. What is not
    jax's is waited for by `wait`, which is given the result.
    """
    wait(f(*args))
    at_once = _RUNS_TOGETHER
    if jax.process_count() == 1:
        at_once = max(2, min(_MOST_RUNS, math.ceil(_WALL_SECONDS / wall_seconds(f, *args, wait=wait))))

    def runs() -> Any:
        for _ in range(at_once - 1):
            f(*args)
        return f(*args)

    return CallTime.of([wall_seconds(runs, wait=wait) * 1e6 / at_once / calls for _ in range(repeats)])


def torch_wait(_: Any) -> None:
    """Until all that torch has begun is done."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def torch_times(f: Callable[..., Any], inputs: Sequence[Any], *, repeats: int = 10) -> CallTime:
    """Time of f(*args) in torch, the mean over the tuples of arguments in `inputs`.

    A CUDA graph of all calls is replayed behind another replay of itself, so that neither Python nor the launch counts.
    What counts beyond the kernels are the gaps between them, about a microsecond each.

    Raises:
      RuntimeError: `f` cannot be captured in a CUDA graph.
    """
    import torch

    def sweep() -> None:
        for args in inputs:
            f(*args)

    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # capture wants everything initialised, on a stream that is not the default one
        sweep()
        begin.record()
        sweep()
        end.record()
    torch.cuda.synchronize()
    sweeps = max(1, min(16, math.ceil(_GRAPH_US / (begin.elapsed_time(end) * 1e3))))
    graph = torch.cuda.CUDAGraph()
    # jax's threads may allocate in the meantime.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(sweeps):
            sweep()
    times = []
    for _ in range(repeats):
        graph.replay()
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / (sweeps * len(inputs)))
    return CallTime.of(times)
