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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from bench.measure.errors import describe
from bench.record.json_files import append_records, read_records
from bench.tpu.libtpu import LONGEST_REASON, CompileError, run_job
from bench.tpu.slices import parse_slice

_ANSWERS = "answers.jsonl"
NOTE = (
    "cycles leave out loops whose trips the data tell, so grouped products show less than they take (bench.cycles has "
    "those); waits for copies are counted as if each semaphore had a memory of its own"
)


def kernel_cycles(
    module: str, job: Mapping[str, Any], count: int, timeout: float = 120, *, total: bool = False
) -> list[int | str]:
    """The cycles of kernels 0 … count − 1, or why there is no figure.

    Args:
      module: one whose `main` serves jobs with `compile_alone`.
      job: what it is given, with the "topology" to compile for.
      count: kernels.
      timeout: seconds for all of them; the compiler walks a grid step by step, and large ones take it long.
      total: the cycles of all operations, as for a function that is no kernel, instead of the longest one's.
    """
    answers: list[int | str] = []
    while len(answers) < count:
        with tempfile.TemporaryDirectory() as folder:
            rest = {"kernels": list(range(len(answers), count)), "folder": folder, "total": total}
            profile = f"--xla_jf_dump_static_llo_profile_to={folder}"
            died = None
            try:
                run_job(module, {**job, **rest}, options=profile, timeout=timeout)
            except CompileError as error:
                died = str(error)
            answers += [record["answer"] for _, record in read_records(Path(folder, _ANSWERS), {})]
            if died is not None and len(answers) < count:
                answers.append(profiled_cycles(Path(folder), died, total=total))
    return answers


def compile_alone(kernels: Sequence[tuple[Callable, Sequence[Any]]], job: Mapping[str, Any]) -> dict[str, Any]:
    """The other end: compiles those of `kernels`, functions and shapes, that job["kernels"] says, for one device."""
    folder, mesh = Path(job["folder"]), parse_slice(job["topology"]).one_device
    for index in job["kernels"]:
        function, shapes = kernels[index]
        reason = "the compiler wrote no profile"
        try:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # says which TPU the kernel is for
                jitted = jax.jit(function, keep_unused=True, in_shardings=NamedSharding(mesh, PartitionSpec()))
                lowered = jitted.lower(*shapes)
            lowered.compile()
        except Exception as error:  # the compiler's reason is the result; the other kernels go on
            reason = describe(error, LONGEST_REASON)
        append_records(folder / _ANSWERS, [{"answer": profiled_cycles(folder, reason, total=job["total"])}])
        for profile in folder.glob("*.textproto"):
            profile.unlink()
    return {}


def profiled_cycles(folder: Path, reason: str, *, total: bool = False) -> int | str:
    """The cycles in a folder's profiles of the operation that takes most, or of all; `reason` if there is no profile.

    Around a kernel alone there are only trifles.
    """
    texts = [path.read_text() for path in folder.glob("*.textproto")]
    cycles = [int(number) for text in texts for number in re.findall(r"estimated_cycles: (\d+)", text)]
    return reason if not cycles else sum(cycles) if total else max(cycles)
