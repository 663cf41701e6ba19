import io

import pytest

from bench.record.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock():
    times = [0.0]
    return times


def make(clock, stream, total=10):
    return Progress(total, stream, lambda: clock[0])


def test_share_and_time_left(clock):
    stream = io.StringIO()
    progress = make(clock, stream)
    progress.show(0, "first")
    clock[0] = 90.0
    progress.show(3, "fourth")
    progress.show(3, "fourth", at_most=95.0)
    assert stream.getvalue().splitlines() == [
        "[  0 %, ? left] first",
        "[ 30 %, 3 min 30 s left] fourth",
        "[ 30 %, 5 s left] fourth",
    ]
    assert progress.seconds == 90.0


def test_a_terminal_gets_one_line_that_is_written_over(clock):
    stream = Terminal()
    progress = make(clock, stream)
    progress.show(0, "first")
    progress.say("a word")
    assert stream.getvalue() == "\r\x1b[K[  0 %, ? left] first\r\x1b[Ka word\n"
