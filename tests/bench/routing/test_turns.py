"""A turn is one process's alone, until it ends or is given away."""

import threading

from bench.routing.turns import Turns


def test_one_at_a_time(tmp_path):
    path, order = tmp_path / "folder" / "lock", []
    first, second = Turns(path), Turns(path)
    gave, took = threading.Event(), threading.Event()

    def other():
        assert gave.wait(10)
        with second.take():
            order.append("second")
            took.set()

    thread = threading.Thread(target=other)
    thread.start()
    with first.take():
        order.append("first")
        gave.set()
        assert not took.wait(0.2)
        order.append("first goes on")
        with first.give():
            assert took.wait(10)
        order.append("first again")
    thread.join(10)
    assert order == ["first", "first goes on", "second", "first again"]


def test_who_is_alone_waits_for_nobody():
    turns = Turns()
    with turns.take(), turns.give():
        pass
    with turns.give():
        pass
