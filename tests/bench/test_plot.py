"""The report: figures of records that real, tiny runs made."""

import importlib.util
import json
import re
import shutil

import pytest

import bench.layer
import bench.permute
from bench.command.parser import run
from bench.plot import REPORT, main
from bench.record.json_files import append_records
from bench.train import main as train_main
from bench.training.records import FILE_NAME
from tests.bench.training.tiny_runs import SIZES

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed"
)


@pytest.fixture(scope="module")
def systems(tmp_path_factory):
    """A folder with records of permute and of the layer."""
    folder = tmp_path_factory.mktemp("systems")
    tiny = ["--tokens=32", "--hidden=16", "--repeats=2", "--out", str(folder)]
    assert run(bench.permute.main, [*tiny, "--experts=4,8", "--k=1,2"]) == 0
    assert run(bench.layer.main, [*tiny, "--experts=4", "--block=8", "--layout=compact,padded"]) == 0
    return folder


@pytest.fixture
def results(tmp_path, systems):
    """A folder with these, and records of two routers and two seeds."""
    folder = tmp_path / "results"
    shutil.copytree(systems, folder)
    text = tmp_path / "text.txt"
    text.write_text("the router gives the token to the expert. " * 100)
    common = ["--text", str(text), "--out", str(folder)]
    assert run(train_main, [*SIZES, *common, "--steps=4", "--seeds=2", "--routers=softmax,soft_moe"]) == 0
    return folder


@needs_matplotlib
def test_report_holds_every_figure(results, tmp_path, capsys):
    capsys.readouterr()
    figures = tmp_path / "figures"
    assert run(main, [str(results), "--svg", str(figures)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"wrote {results / REPORT}"
    page = (results / REPORT).read_text()
    names = ["pareto", "curves", "routers", "balance", "load", "permute", "bandwidth", "split"]
    assert {path.stem for path in figures.iterdir()} == set(names)
    assert page.count("<svg") == len(names)
    # One size of the layer has one number of experts, so there is no line to draw, and the report says so.
    assert "no layer with two numbers of experts at one size" in page
    assert page.count("Left out") == 1
    assert "soft_moe (not causal)" in page
    assert "Held-out loss less that of softmax with the same precision and seed" in page
    assert "gate_up" in page
    assert "python -m bench.train --hidden=16" in page
    # Nothing is fetched: addresses are names of formats only. Ink follows the page.
    assert set(re.findall(r'(?:href|src)="([^"#]+)', page)) <= {m for m in re.findall(r'"(data:[^"]+)"', page)}
    assert "currentColor" in page
    assert "#010203" not in page
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))

    assert run(main, [str(results)]) == 0
    assert (results / REPORT).read_text() == page

    # The same runs once more, said to be of another precision: they are compared with those of before.
    lines = (results / FILE_NAME).read_text()
    other = re.sub(r'"run": "(\w+)-seed', r'"run": "\1-w8a8-seed', lines.replace('"w16a16"', '"w8a8"'))
    (results / FILE_NAME).write_text(lines + other)
    assert run(main, [str(results)]) == 0
    page = (results / REPORT).read_text()
    assert "What a precision costs" in page
    assert page.count("<svg") == len(names) + 1
    assert re.search(r"<td>softmax-w8a8</td>(<td[^>]*>(2|4)[.0]*</td>)(<td[^>]*>0[.0]*</td>){2}", page)


@needs_matplotlib
def test_figures_without_data_are_left_out_with_the_reason(systems):
    assert run(main, [str(systems)]) == 0
    page = (systems / REPORT).read_text()
    assert page.count("<svg") == 3
    assert "Left out: train.jsonl has no finished run; python -m bench.train writes it." in page


def moved(movement, tokens, **changes):
    """A record of bench.comm, in which a call takes as many µs as a chip has tokens."""
    step = {"median_us": float(tokens), "needed_bytes": 1, "gb_per_s": 2.5, "link_share": None}
    sizes = {"ep": 4, "hidden": 128, "experts": 8, "k": 2}
    origin = {"time": "2026-01-01T00:00:00+00:00", "command": "python -m bench.comm", "chip": "a chip", "commit": "abc"}
    what = {"movement": movement, "tokens": tokens, "load": "text", "precision": "w8a8", "error": None, "versions": {}}
    return {**what, **sizes, **origin, "send": step, "give_back": step, "together": step, **changes}


@needs_matplotlib
def test_what_moving_tokens_costs(tmp_path):
    failed = moved("remote", 16, send=None, give_back=None, together=None, error="ValueError: wrong result")
    records = [moved("dense", 16), moved("dense", 128), moved("lax.all_to_all", 16, load="zipf"), failed]
    append_records(tmp_path / "comm.jsonl", records)
    assert run(main, [str(tmp_path)]) == 0
    page = (tmp_path / REPORT).read_text()
    assert page.count("<svg") == 1
    for text in ("ep 4, text, H 128, E 8, K 2", "ep 4, zipf", "lax.all_to_all", "tokens of a chip"):
        assert f">{text}" in page
    assert '<td>dense</td><td class="number">128.000</td>' in page
    assert "remote" not in page
    assert "python -m bench.comm" in page


@needs_matplotlib
def test_when_each_kernel_of_a_layer_runs(tmp_path):
    names = ["top_k_mosaic_gpu_kernel", "loop_add_fusion", "combine_mosaic_gpu_kernel"]
    line = [{"name": name, "begin_us": 10.0 * i, "end_us": 10.0 * i + 5} for i, name in enumerate(names)]
    origin = {"date": "2026-01-01", "command": "python -m bench.gpu", "chip": "a chip", "commit": "abc", "versions": {}}
    cases = {"one": {"timeline": line}, "other": {"timeline": []}, "wrong": {"error": "ValueError: no"}}
    (tmp_path / "layers.json").write_text(json.dumps({**origin, "cases": cases}))
    (tmp_path / "layers_few.json").write_text(json.dumps({**origin, "commit": "def", "cases": {"few": cases["one"]}}))
    assert run(main, [str(tmp_path), "--svg", str(tmp_path)]) == 0
    assert sorted(path.stem for path in tmp_path.glob("*.svg")) == ["timelines", "timelines_few"]
    page = (tmp_path / REPORT).read_text()
    assert page.count("<svg") == 2
    for text in ("one: 25.0 µs", "top_k", "XLA&#x27;s"):
        assert f">{text}<" in page or f">{text.replace('&#x27;', chr(39))}<" in page
    assert '<td>one</td><td>combine</td><td class="number">20.000</td><td class="number">5.000</td>' in page
    assert page.count(">loop_add_fusion<") == 2  # in the tables; in the pictures it is one of XLA's
    assert "other" not in page
    assert "python -m bench.gpu" in page


@needs_matplotlib
def test_a_record_without_time_lines_is_no_figure(tmp_path, capsys):
    record = {"chip": "a chip", "commit": "abc", "cases": {}}
    for text, message in (
        (json.dumps(record), "has none of"),
        ("[]", "layers.json: it must be an object, got []"),
        (json.dumps({**record, "cases": None}), "layers.json: cases must be an object, got None"),
        (json.dumps({"cases": {}}), "layers.json: chip is missing"),
    ):
        (tmp_path / "layers.json").write_text(text)
        assert run(main, [str(tmp_path)]) == 2
        assert message in capsys.readouterr().err


@needs_matplotlib
def test_an_empty_folder_is_refused(tmp_path, capsys):
    assert run(main, [str(tmp_path)]) == 2
    assert (
        "has none of train.jsonl, sweep.jsonl, layer.jsonl, permute.jsonl, comm.jsonl, layers*.json with records in it"
        in capsys.readouterr().err
    )


def test_without_matplotlib_the_error_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run(main, [str(tmp_path)]) == 2
    assert "figures need matplotlib, which is not installed: pip install -e '.[plots]'" in capsys.readouterr().err
