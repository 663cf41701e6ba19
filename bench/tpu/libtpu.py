"""Runs the TPU compiler where there is no TPU: each job in a process of its own, as libtpu reads its options once.

libtpu also ends the process when it meets a fault of its own, so a job that dies is a result here, not an end.
"""

import json
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench.measure.errors import describe, one_line
from bench.processes.interrupts import child_environment, end_with_parent
from bench.record.files import write_whole
from bench.record.provenance import package_version

_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    # Without these libtpu says on standard error that it cannot find them out.
    "TPU_ACCELERATOR_TYPE": "none-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}

LONGEST_REASON = 400
"""Characters of a reason that are kept: what VMEM does not hold is named with its sizes and shapes in some 330, which
the 300 of other messages would cut."""


class CompileError(Exception):
    """The compiler refused; the message is its reason, in one line."""


def libtpu_version() -> str | None:
    """The version of the installed compiler, None where it is not installed."""
    return package_version("libtpu")


def require_libtpu() -> None:
    """Raises ValueError if the compiler is not installed."""
    if libtpu_version() is None:
        raise ValueError("the TPU compiler is not installed; pip install -e '.[aot]' (or make with EXTRAS=aot)")


def run_job(module: str, job: Mapping[str, Any], *, options: str = "", timeout: float = 1800) -> dict[str, Any]:
    """What `python -m {module}`, which calls `serve`, answers to a job of what JSON can say; `options` are libtpu's.

    Raises:
      CompileError: it failed, died or took too long.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer.json")
        try:
            done = subprocess.run(
                [sys.executable, "-m", module, str(answer)],
                input=json.dumps(job),
                env={**child_environment(), **_ENVIRONMENT, "LIBTPU_INIT_ARGS": options},
                text=True,
                capture_output=True,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise CompileError(f"took more than {timeout:.0f} s") from None
        if answer.exists():
            result = json.loads(answer.read_text())
            if "error" in result:
                raise CompileError(result["error"])
            return result
        raise CompileError(f"the compiler ended with status {done.returncode}: {reason_of(done.stderr)}")


def serve(work: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The other end of `run_job`: reads the job, calls `work(job)` and writes its answer, or why there is none."""
    end_with_parent()
    job = json.load(sys.stdin)
    try:
        answer = work(job)
    except Exception as error:
        # Whatever the compiler raises becomes one line; where it came from matters to who mends a kernel.
        traceback.print_exc()
        answer = {"error": describe(error, LONGEST_REASON)}
    write_whole(Path(sys.argv[1]), json.dumps(answer))


def reason_of(stderr: str) -> str:
    """The line of a dead compiler's output that says why it died."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    patterns = (r"Check failed|LLO_CHECK", r"Error\b|ERROR|error:")
    telling = [line for pattern in patterns for line in lines if re.search(pattern, line)]
    return one_line([*telling, *lines[-1:], "no reason given"][0], LONGEST_REASON)
