"""Processes meet, say who is there, and give up in time."""

import concurrent.futures
import contextlib
import socket

import pytest

from bench.processes.rendezvous import meet


@pytest.fixture
def address():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return f"localhost:{probe.getsockname()[1]}"


def test_all_are_told_who_is_there(address):
    lines = [[], [], []]
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        # Process 0 comes last, so that the others have to wait for it.
        list(pool.map(lambda i: meet(address, 3, i, lines[i].append, seconds=30), (2, 1, 0)))
    assert lines[0] == ["1 of 3 processes here", "2 of 3 processes here", "3 of 3 processes here"]
    for others in lines[1:]:
        assert others[0] == f"waiting for process 0 at {address}"
        assert others[-1] == "3 of 3 processes here"


def test_giving_up(address):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(meet, address, 4, i, lambda line: None, seconds=1) for i in range(2)]
        errors = [str(each.exception()) for each in waiting]
    assert errors[0] == ("2 of 4 processes here after 1 s; start the same command with --process-id 0 to 3, each once")
    assert errors[1].startswith("2 of 4 processes here ")
    with pytest.raises(ValueError, match=f"process 0 does not answer at {address} after 0 s"):
        meet(address, 2, 1, lambda line: None, seconds=0.3)


def test_bad_addresses():
    with pytest.raises(ValueError, match="--coordinator must be HOST:PORT, got 'localhost'"):
        meet("localhost", 2, 0, lambda line: None)
    with pytest.raises(ValueError, match="--process-id must be below --num-processes=2, got 2"):
        meet("localhost:1", 2, 2, lambda line: None)


def test_strangers_are_passed_over_and_a_number_that_comes_twice_is_an_error(address):
    host, port = address.split(":")
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        first, *others = (pool.submit(meet, address, 3, i, lambda line: None, seconds=20) for i in (0, 1))
        is_there = False
        while not is_there:
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection((host, int(port))) as stranger:
                stranger.sendall(b"GET / HTTP/1.0\n")
                is_there = True
        others.append(pool.submit(meet, address, 3, 1, lambda line: None, seconds=20))
        with pytest.raises(ValueError, match="--process-id 1 was given twice"):
            first.result()
        for other in others:
            with pytest.raises(ValueError, match="each once"):
                other.result()
