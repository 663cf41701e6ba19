"""Processes use an accelerator side by side, but whoever is alone there is alone."""

import threading
import time

import pytest

from bench.processes.turns import Turns


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "results" / "turns"


def test_beside_one_another(folder):
    first, second = Turns(folder), Turns(folder)
    with first.beside(), second.beside():
        pass


@pytest.mark.parametrize("leave", ["away", "end"])
def test_alone_waits_until_the_others_left(folder, leave):
    first, second, alone = Turns(folder), Turns(folder), threading.Event()

    def measure():
        with second.beside(), second.alone():
            alone.set()

    thread = threading.Thread(target=measure)
    with first.beside():
        thread.start()
        assert not alone.wait(0.2)
        if leave == "away":
            with first.away():
                assert alone.wait(10)
    assert alone.wait(10)
    thread.join(10)


def test_others_wait_for_who_is_alone(folder):
    first, second, beside = Turns(folder), Turns(folder), threading.Event()

    def prepare():
        with second.beside():
            beside.set()

    thread = threading.Thread(target=prepare)
    with first.beside():
        with first.alone():
            thread.start()
            assert not beside.wait(0.2)
        assert beside.wait(10)
    thread.join(10)


def test_who_waited_comes_before_who_was_alone_just_now(folder):
    order, entered = [], threading.Event()
    coming = {"a": threading.Event(), "b": threading.Event()}

    def measure(name, other):
        turns = Turns(folder)
        for _ in range(2):
            coming[name].set()
            with turns.alone():
                coming[name].clear()
                order.append(name)
                entered.set()
                assert coming[other].wait(10)
                time.sleep(0.3)  # in which the other begins to wait
        coming[name].set()

    threads = [threading.Thread(target=measure, args=pair) for pair in ("ab", "ba")]
    for thread in threads:
        thread.start()
        assert entered.wait(10)
    for thread in threads:
        thread.join(20)
    assert "".join(order) == "abab"


def test_without_others_there_is_no_waiting():
    turns = Turns()
    with turns.beside(), turns.away():
        pass
    with turns.beside(), turns.alone():
        pass
    with turns.alone():
        pass
