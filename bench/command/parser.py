"""What the command lines of `bench` share: options with examples, and errors of one line.

if __name__ == "__main__":
    sys.exit(run(main))
"""

import argparse
import contextlib
import os
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import NoReturn

from bench.processes.interrupts import INTERRUPTED, end_with_parent, raise_at_interrupts

_TOO_LARGE = re.compile("RESOURCE_EXHAUSTED|size exceeding")
"""What jax says where memory does not suffice, or no machine's would."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} ({self.prog} --help lists the options)")


def make_parser(module: str, description: str, examples: Sequence[str]) -> argparse.ArgumentParser:
    """A parser for `python -m {module}` whose help ends with `examples`, each the arguments of one call.

    A wrong command line raises ValueError, which `run` shows.
    """
    lines = ["examples:", *(f"  python -m {module} {example}" for example in examples)]
    return _Parser(
        prog=f"python -m {module}",
        description=textwrap.fill(description, 100),
        epilog="\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def run(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Call `main` with the command line and return the exit status, its own or 0.

    ValueError and OSError with a message, and memory that does not suffice, become one line on standard error and
    status 2; without a message they are faults of the program and propagate, as every other exception does. Ctrl-C is
    one line and status 130. A reader that stops early (`… | head`) is no error.
    """
    end_with_parent()
    is_command = raise_at_interrupts()
    try:
        status = main(sys.argv[1:] if argv is None else argv)
        if sys.stdout is not None:  # closed: `>&-`
            sys.stdout.flush()
        return status or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        if is_command:
            os._exit(INTERRUPTED)  # the interpreter would wait for threads that compile, and jax for what it has begun
        return INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes standard output once more at exit, and would fail on the same pipe.
        with contextlib.suppress(OSError), open(os.devnull, "w") as devnull:
            os.dup2(devnull.fileno(), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        message = " ".join(str(error).split())
        if not isinstance(error, ValueError | OSError):
            if not isinstance(error, MemoryError) and not _TOO_LARGE.search(message):
                raise
            message = f"the sizes are too large for this machine: {message[:200]}"
        if not message:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2
