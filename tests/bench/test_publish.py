"""The blocks of docs/results.md and the plot."""

import importlib.util
import json
import os
import pathlib

import pytest

from bench.command.parser import run
from bench.publish import BEGIN, CYCLES_HEADING, CYCLES_MARKS, END, HEADING, block, main, plot, replace_block
from bench.tpu.cycles_table import block as cycles_block
from tests.bench.hopper.gpu_records import measurement, record

ROOT = pathlib.Path(__file__).parents[2]


def made():
    peers = {"decode-fp8": {"torch._scaled_grouped_mm": measurement(63.6)}}
    return record({"decode-fp8": 30.0, "down-fp8": "Unsupported: no"}, peers)


def test_a_new_block_goes_to_the_end():
    text = replace_block("# x\n\nText.\n", "table")
    assert text == f"# x\n\nText.\n\n{HEADING}\n\n{BEGIN}\ntable\n{END}\n"


@pytest.mark.parametrize("heading", ["## License", "# Licence and citation", "### LICENSE"])
def test_a_new_block_goes_before_the_licence(heading):
    text = replace_block(f"# x\n\n{heading}\nApache\n", "table")
    assert text == f"# x\n\n{HEADING}\n\n{BEGIN}\ntable\n{END}\n\n{heading}\nApache\n"


def test_a_block_is_replaced_where_it_stands():
    once = replace_block("# x\n\n## License\nApache\n", "one")
    moved = once.replace(HEADING, "## Speed, as measured")
    assert replace_block(moved, "two\\1") == moved.replace("one", "two\\1")
    assert replace_block(once, "one") == once


@pytest.mark.parametrize("text", [BEGIN, END, f"{END}\n{BEGIN}", f"{BEGIN}\n{BEGIN}\n{END}"])
def test_broken_marks_are_an_error(text):
    with pytest.raises(ValueError, match=f"expected {BEGIN} once and {END} once after it, or neither"):
        replace_block(text, "table")


def test_block_says_where_the_figures_come_from():
    text = block(made(), "docs/results/h200.json", "docs/results/h200.svg")
    assert text.startswith("`make bench-gpu`, NVIDIA H200, driver ")
    assert "commit abc1234, 20" in text
    assert "torch None" not in text
    assert "[h200.json](docs/results/h200.json)" in text
    assert "| decode-fp8 | 8,48,7168,2048 | 30.0 | 4.06 TB/s | 87% |" in text
    assert text.endswith("![Time of each implementation over the floor](docs/results/h200.svg)")
    assert "![" not in block(made(), "h200.json")


@pytest.fixture
def files(tmp_path):
    results = tmp_path / "docs" / "results"
    results.mkdir(parents=True)
    (results / "h200.json").write_text(json.dumps(made()))
    (tmp_path / "page.md").write_text("# x\n")
    return results / "h200.json", tmp_path / "page.md"


def test_command_without_matplotlib(files, monkeypatch, capsys):
    path, page = files
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run(main, [str(path), "--page", str(page)]) == 0
    out, err = capsys.readouterr()
    assert out == f"wrote {page}\n"
    assert err.endswith("is left as it is: matplotlib is not installed (pip install -e '.[plots]')\n")
    text = page.read_text()
    assert text.startswith(f"# x\n\n{HEADING}\n\n{BEGIN}\n`make bench-gpu`")
    assert "(docs/results/h200.json)" in text
    assert "svg" not in text


def test_a_record_of_cycles_gets_its_own_section(files):
    path, page = files
    cell = {"chip": "v6e", "case": "a product", "shape": dict(zip("GMKN", (1, 2, 3, 4), strict=True))}
    figures = {"ours": [{"cycles": 2000}], "tokamax v2": [{"cycles": 4000}]}
    rows = [{**cell, "commit": "abc", "floor_cycles": 1000, "cycles": figures, "instructions": {}}]
    found = {"rows": rows, "versions": {}, "date": "2026-01-01T", "note": "A note."}
    path.write_text(json.dumps(found))
    for _ in range(2):
        assert run(main, [str(path), "--page", str(page)]) == 0
        text = page.read_text()
        assert text.startswith(f"# x\n\n{CYCLES_HEADING}\n\n{CYCLES_MARKS[0]}\n")
        assert text.count("| a product | 1,2,3,4 | 2 / 4 / -, floor 1 |") == 1


def test_the_page_shows_the_records_that_are_stored():
    page = (ROOT / "docs" / "results.md").read_text()
    results = ROOT / "docs" / "results"
    of_gpu = json.loads((results / "h200.json").read_text())
    assert f"{BEGIN}\n{block(of_gpu, 'results/h200.json', 'results/h200.svg')}\n{END}" in page
    of_cycles = json.loads((results / "tpu_cycles.json").read_text())
    first, last = CYCLES_MARKS
    assert f"{first}\n{cycles_block(of_cycles, 'results/tpu_cycles.json')}\n{last}" in page


def test_the_page_is_docs_results_unless_another_is_named(files, monkeypatch):
    path, page = files
    page.rename(page.parent / "docs" / "results.md")
    monkeypatch.chdir(page.parent)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run(main, [os.path.relpath(path)]) == 0
    assert "[h200.json](results/h200.json)" in (page.parent / "docs" / "results.md").read_text()


def test_command_without_a_record(tmp_path, capsys):
    assert run(main, [str(tmp_path / "h200.json")]) == 2
    assert "No such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chip": 3}, "chip must be a string, got 3"),
        ({"cases": {"a": {"us": "fast"}}}, "cases.a.note is missing"),
        ({"cases": []}, "cases must be an object, got []"),
        ({"rows": [{}]}, "note is missing"),
    ],
)
def test_a_record_of_something_else_is_one_line(files, change, message, capsys):
    path, page = files
    path.write_text(json.dumps(made() | change))
    assert run(main, [str(path), "--page", str(page)]) == 2
    assert capsys.readouterr().err == f"error: {path}: {message}\n"
    assert page.read_text() == "# x\n"


def test_plot_is_the_same_for_the_same_figures(tmp_path):
    pytest.importorskip("matplotlib")
    plot(made(), tmp_path / "a.svg")
    plot(made(), tmp_path / "b.svg")
    svg = (tmp_path / "a.svg").read_text()
    assert svg.startswith("<svg")
    assert svg == (tmp_path / "b.svg").read_text()
