"""Processes use an accelerator side by side, but whoever is alone there is alone."""

import threading
import time

import pytest

from bench.turns import Turns


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
    order, threads = [], []

    def measure(name):
        turns = Turns(folder)
        for _ in range(2):
            with turns.alone():
                order.append(name)
                time.sleep(0.2)

    for name in "ab":
        threads.append(threading.Thread(target=measure, args=name))
        threads[-1].start()
        time.sleep(0.05)
    for thread in threads:
        thread.join(10)
    assert "".join(order) == "abab"


def test_without_others_there_is_no_waiting():
    turns = Turns()
    with turns.beside(), turns.away():
        pass
    with turns.beside(), turns.alone():
        pass
    with turns.alone():
        pass
