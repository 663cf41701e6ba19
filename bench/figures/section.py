"""A section of the report: a figure as SVG that suits light and dark pages, and its numbers as a table."""

import contextlib
import dataclasses
import importlib.util
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any

from bench.record.tables import Cell

INK = "#010203"
"""Stands for the colour of the page's text while matplotlib draws, and occurs nowhere else."""

_ID = re.compile(r' id="([^"]+)"')


@dataclasses.dataclass(frozen=True)
class Section:
    """What the report shows of one question.

    Attributes:
      name: of the figure's file.
      title: heading.
      text: what is seen, and what was left out.
      svg: the figure, or None when its data is missing.
      headers: of the table.
      rows: the figures that are drawn.
    """

    name: str
    title: str
    text: str
    svg: str | None = None
    headers: Sequence[str] = ()
    rows: Sequence[Sequence[Cell]] = ()


def require_matplotlib() -> None:
    """Raises ValueError where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("figures need matplotlib, which is not installed: pip install -e '.[plots]'")


@contextlib.contextmanager
def drawing(salt: str) -> Iterator[Any]:
    """Gives pyplot, set so that lines and text have the colour of the page; needs matplotlib.

    Args:
      salt: makes the names inside an SVG differ from those of other figures on the page, and equal in each run.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    ink = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    style = {
        **dict.fromkeys(ink, INK),
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
        "legend.framealpha": 0.0,
        "axes.grid": True,
        "grid.color": "#888888",
        "grid.alpha": 0.25,
        "font.size": 9,
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
    }
    with matplotlib.rc_context(style):
        yield pyplot
        pyplot.close("all")


def svg_of(figure: Any) -> str:
    """The <svg> element of a figure, to stand in a page: the same figure gives the same text."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, bbox_inches="tight")
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    # Names such as "axes_1" are the same in every figure; those that nothing refers to are not needed.
    used = set(re.findall(r"#([\w.]+)", text))
    return _ID.sub(lambda found: found[0] if found[1] in used else "", text).strip()


def standalone(svg: str) -> str:
    """The figure as a file, readable on any page: dark on white."""
    return svg.replace("<svg", '<svg style="color: #1f2328; background: #ffffff"', 1) + "\n"
