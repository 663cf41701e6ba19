"""The time line of an NVIDIA GPU: when each kernel begins and ends, as jax's profiler records it.

Kernels that overlap take less than the sum of their times, and kernels with gaps between them more. So kernels that run
one after the other are timed by their span, from the begin of the first one to the end of the last one.

    launches = recorded(lambda: [jax.block_until_ready(chain(*inputs)) for _ in range(2)])
    spans(launches, 12)     # [203.1, 202.8]: µs of each run of a chain of 12 kernels
"""

import dataclasses
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax

from bench.measure.clock import require_nvidia_gpu

_DEVICE = "/device:GPU:0"
_STREAM = "Stream #"  # other lines of a device sum up what these hold


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes:
      name: as the compiler calls the kernel.
      begin_us: when it began, in µs since the recording did.
      end_us: when it ended.
    """

    name: str
    begin_us: float
    end_us: float


def recorded(run: Callable[[], Any]) -> list[Launch]:
    """What the first GPU did while `run` ran, in the order in which it began; `run` has to wait for its results.

    Raises:
      ValueError: jax does not run on NVIDIA GPUs.
    """
    require_nvidia_gpu()
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level = options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            run()
        (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
        return launches_in(jax.profiler.ProfileData.from_file(str(file)))


def launches_in(data: jax.profiler.ProfileData) -> list[Launch]:
    """The launches on the first GPU of a recording, in the order in which they began."""
    device = data.find_plane_with_name(_DEVICE)
    lines = [] if device is None else [line for line in device.lines if (line.name or "").startswith(_STREAM)]
    launches = [
        Launch(event.name, event.start_ns / 1e3, (event.start_ns + event.duration_ns) / 1e3)
        for line in lines
        for event in line.events
    ]
    return sorted(launches, key=lambda launch: launch.begin_us)


def last_call(launches: Sequence[Launch], calls: int) -> list[Launch]:
    """The launches of the last of so many calls that launch alike, in µs since it began."""
    own = launches[len(launches) - len(launches) // calls :]
    begin = own[0].begin_us if own else 0.0
    return [Launch(launch.name, launch.begin_us - begin, launch.end_us - begin) for launch in own]


def spans(launches: Sequence[Launch], length: int) -> list[float]:
    """µs of each run of a chain of `length` kernels, given the launches of several runs, one after the other.

    Raises:
      ValueError: there are no launches, or some that belong to no whole run.
    """
    if not launches or len(launches) % length:
        raise ValueError(f"the time line must hold whole runs of {length} kernels, got {len(launches)} kernels")
    runs = [launches[i : i + length] for i in range(0, len(launches), length)]
    return [max(launch.end_us for launch in run) - run[0].begin_us for run in runs]
