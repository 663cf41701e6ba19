"""The list of commands: `python -m bench`."""

import ast
import pathlib
import sys
from collections.abc import Sequence

from bench.command.parser import make_parser, run


def commands() -> dict[str, str]:
    """What each command does, by its name: the first line of the docstring of a module in this folder."""
    paths = sorted(pathlib.Path(__file__).parent.glob("[!_]*.py"))
    docstrings = {path.stem: ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) for path in paths}
    return {name: (docstring or "").partition("\n")[0] for name, docstring in docstrings.items()}


def main(argv: Sequence[str]) -> None:
    """Prints a line for each command."""
    make_parser("bench", "Lists the commands, a line each.", ("",)).parse_args(argv)
    lines = commands()
    width = max(map(len, lines))
    print("\n".join(f"{name:{width}}  {line}" for name, line in lines.items()))
    print("\npython -m bench.COMMAND --help shows the options of a command, with examples.")


if __name__ == "__main__":
    sys.exit(run(main))
