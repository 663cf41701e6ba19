"""Processes use an accelerator side by side, but whoever is alone there is alone."""

import threading

import pytest

from bench.routing.turns import Turns


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "lock"


def test_beside_one_another(path):
    first, second = Turns(path), Turns(path)
    with first.beside(), second.beside():
        pass


@pytest.mark.parametrize("leave", ["away", "end"])
def test_alone_waits_until_the_others_left(path, leave):
    first, second, alone = Turns(path), Turns(path), threading.Event()

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


def test_others_wait_for_who_is_alone(path):
    first, second, beside = Turns(path), Turns(path), threading.Event()

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


def test_without_others_there_is_no_waiting():
    turns = Turns()
    with turns.beside(), turns.away():
        pass
    with turns.beside(), turns.alone():
        pass
    with turns.alone():
        pass
