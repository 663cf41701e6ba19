"""Cycles of single kernels as the TPU compiler counts them in the programme it made: an estimate without a TPU.

The compiler writes down, for each operation, the cycles that it finds by following the operation's scalar instructions.
Memory that it knows nothing of is zero to it, so a loop whose trips only the data tell has none, and what such a kernel
shows is little more than what it does once: `bench.cycles` has the grouped products with their loops. Waits for copies
give each semaphore a memory of its own. The option is undocumented, so libtpu's version goes with every figure.

libtpu checks more when it writes such a profile, and ends the process on some sound programmes, after the profile has
been written. So kernels are compiled one after the other in a process that may die; the next one goes on behind it.
"""

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bench.measure.errors import describe
from bench.tpu.libtpu import CompileError, run_job
from bench.tpu.pallas_calls import PallasCall

_CURRENT = "current"
NOTE = (
    "cycles leave out loops whose trips the data tell, so grouped products show less than they take (bench.cycles has "
    "those); waits for copies are counted as if each semaphore had a memory of its own"
)


def kernel_cycles(module: str, job: Mapping[str, Any], count: int, timeout: float = 120) -> list[int | str]:
    """The cycles of kernels 0 … count − 1, or why there is no figure.

    Args:
      module: one whose `main` serves jobs with `compile_alone`.
      job: what it is given, besides "kernels" and "folder".
      count: kernels.
      timeout: seconds for all of them; the compiler walks a grid step by step, and large ones take it long.
    """
    answers: list[int | str] = []
    while len(answers) < count:
        with tempfile.TemporaryDirectory() as folder:
            rest = list(range(len(answers), count))
            reasons: dict[str, str] = {}
            died = None
            try:
                reasons = run_job(
                    module,
                    {**job, "kernels": rest, "folder": folder},
                    options=f"--xla_jf_dump_static_llo_profile_to={folder}",
                    timeout=timeout,
                )["reasons"]
            except CompileError as error:
                died = str(error)
            current = Path(folder, _CURRENT)
            last = int(current.read_text()) if current.exists() else rest[0]
            for kernel in range(rest[0], last + 1):
                done = Path(folder, str(kernel))
                cycles = profiled_cycles(done if done.exists() else Path(folder))
                answers.append(cycles if cycles is not None else reasons.get(str(kernel), died or "no profile written"))
            if died is None and last < rest[-1]:
                raise RuntimeError(f"{module} compiled kernels up to {last} of {rest}")
    return answers


def compile_alone(kernels: Sequence[PallasCall], job: Mapping[str, Any]) -> dict[str, Any]:
    """The other end: compiles the kernels of job["kernels"] for one device of job["topology"]."""
    folder = Path(job["folder"])
    topology = topologies.get_topology_desc(platform="tpu", topology_name=job["topology"])
    mesh = Mesh(topology.devices[:1], "x")
    sharding = NamedSharding(mesh, PartitionSpec())
    reasons: dict[int, str] = {}
    for index in job["kernels"]:
        Path(folder, _CURRENT).write_text(str(index))
        try:
            function = jax.jit(kernels[index].function, keep_unused=True)
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # says which TPU the kernel is for
                lowered = function.lower(*kernels[index].arguments(sharding))
            lowered.compile()
        except Exception as error:  # the compiler's reason is the result; the other kernels go on
            reasons[index] = describe(error, 400)
        done = Path(folder, str(index))
        done.mkdir()
        for profile in folder.glob("*.textproto"):
            profile.rename(done / profile.name)
    return {"reasons": reasons}


def profiled_cycles(folder: Path, all_of_them: bool = False) -> int | None:
    """The cycles in a folder's profiles of the operation that takes most, or of all; None where there is no profile.

    Around a kernel alone there are only trifles.
    """
    texts = [path.read_text() for path in folder.glob("*.textproto")]
    cycles = [int(number) for text in texts for number in re.findall(r"estimated_cycles: (\d+)", text)]
    return None if not cycles else sum(cycles) if all_of_them else max(cycles)
