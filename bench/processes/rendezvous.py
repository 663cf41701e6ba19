"""Waits for all processes of a run and reports how many have arrived, which jax does not.

`jax.distributed.initialize` waits in silence, and aborts the process when its time is over. So the processes meet here
first, at the same address: process 0 listens, the others come and say their number, and are told how many are there.
"""

import contextlib
import socket
import time
from collections.abc import Callable, Iterator

GIVE_UP_SECONDS = 300.0
_HELLO_SECONDS = 10.0
"""Within which whoever comes says its number."""


def meet(
    coordinator: str, num_processes: int, process_id: int, say: Callable[[str], None], seconds: float = GIVE_UP_SECONDS
) -> None:
    """Returns when all processes have called it.

    Args:
      coordinator: host:port of process 0.
      num_processes: in all.
      process_id: number of this one.
      say: is given a line whenever one more is there.
      seconds: after which it gives up.

    Raises:
      ValueError: the address or the number makes no sense, or not all processes came in time.
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"--coordinator must be HOST:PORT, got {coordinator!r}")
    if process_id >= num_processes:
        raise ValueError(f"--process-id must be below --num-processes={num_processes}, got {process_id}")
    here, deadline = 0, time.monotonic() + seconds
    if process_id == 0:
        arrivals = _listen(int(port), num_processes, deadline)
    else:
        say(f"waiting for process 0 at {coordinator}")
        arrivals = _come(host.strip("[]"), int(port), process_id, num_processes, deadline)
    try:
        for here in arrivals:
            say(f"{here} of {num_processes} processes here")
    except OSError as error:
        found = f"{here} of {num_processes} processes here" if here else f"process 0 does not answer at {coordinator}"
        reason = f"after {seconds:.0f} s" if isinstance(error, TimeoutError) else f"({error.strerror or error})"
        raise ValueError(
            f"{found} {reason}; start the same command with --process-id 0 to {num_processes - 1}, each once"
        ) from None


def _listen(port: int, num_processes: int, deadline: float) -> Iterator[int]:
    """What process 0 does; yields how many are there whenever one more is."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("", port), family=family, dualstack_ipv6=both))
        others: dict[int, socket.socket] = {}
        yield 1
        while len(others) + 1 < num_processes:
            server.settimeout(_left(deadline))
            newcomer = stack.enter_context(server.accept()[0])
            newcomer.settimeout(min(_HELLO_SECONDS, _left(deadline)))
            number = _number_of(newcomer)
            if number is None or not 0 < number < num_processes:  # somebody else: a port scan, say
                newcomer.close()
                continue
            if number in others:
                raise ValueError(f"--process-id {number} was given twice; give 0 to {num_processes - 1}, each once")
            others[number] = newcomer
            for other in others.values():
                other.sendall(f"{len(others) + 1}\n".encode())
            yield len(others) + 1
        for other in others.values():
            other.settimeout(_left(deadline))
            other.recv(1)  # nothing: the others close first, so that the port is free for jax


def _number_of(newcomer: socket.socket) -> int | None:
    """The number that a process says when it comes; None if it is no process of ours."""
    try:
        with newcomer.makefile() as lines:
            return int(lines.readline(16))
    except (OSError, ValueError):
        return None


def _come(host: str, port: int, process_id: int, num_processes: int, deadline: float) -> Iterator[int]:
    """What another process does; yields how many are there as process 0 tells it."""
    while True:
        try:
            server = socket.create_connection((host, port), timeout=_left(deadline))
            break
        except OSError:  # process 0 has not begun to listen, or its name is not known yet
            time.sleep(min(0.2, _left(deadline)))
    with server, server.makefile() as news:
        server.sendall(f"{process_id}\n".encode())
        here = 0
        while here < num_processes:
            server.settimeout(_left(deadline))
            if not (line := news.readline()):
                raise ConnectionError("process 0 has ended")
            here = int(line)
            yield here


def _left(deadline: float) -> float:
    if (left := deadline - time.monotonic()) <= 0:
        raise TimeoutError
    return left
