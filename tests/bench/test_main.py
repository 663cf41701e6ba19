"""The list of commands."""

import pathlib

import bench
from bench.__main__ import commands, main
from bench.command.parser import run


def test_every_module_at_the_top_is_a_command_that_is_listed(capsys):
    folder = pathlib.Path(bench.__file__).parent
    runnable = {path.stem for path in folder.glob("*.py") if 'if __name__ == "__main__":' in path.read_text()}
    assert {path.stem for path in folder.glob("*.py")} - runnable == {"__init__"}
    assert run(main, []) == 0
    listed = dict(line.split("  ", 1) for line in capsys.readouterr().out.split("\n\n")[0].splitlines())
    assert listed.keys() == runnable - {"__main__"}
    assert all(len(line) > 30 for line in commands().values())


def test_a_command_as_an_argument_is_an_error(capsys):
    assert run(main, ["decode"]) == 2
    assert "unrecognized arguments: decode" in capsys.readouterr().err
