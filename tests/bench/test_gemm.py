import json
import subprocess
import sys

import jax
import pytest

from bench import gemm
from bench.command.parser import run
from bench.gemm import main
from bench.measure.overlap import OverlapTimes
from pallas_kernels.chips import get_chip

TIMES = "elapsed", "comp_elapsed", "dma_elapsed"
KEYS = {"G", "M", "K", "N", "chip", "dtype", *TIMES, "dram_traffic", "best_tile", "best_partition", "urate"}


def call(*argv):
    return subprocess.run(
        [sys.executable, "-m", "bench.gemm", *argv], capture_output=True, text=True, timeout=120, check=False
    )


def test_json_of_one_shape_is_one_object(capsys):
    assert run(main, ["--chip", "v32-run", "--dtype", "fp8", "--shape", "8,48,7168,2048", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    record = json.loads(out)
    assert set(record) == KEYS
    assert record["elapsed"] == pytest.approx(17.960774704761906, rel=1e-12)
    assert record["dram_traffic"] == 129236992
    assert record["best_partition"] == {"dims": "GMNK", "procs": [8, 1, 2, 4]}
    assert set(record["best_tile"]) == {"order", "M", "N", "K"}
    assert (record["chip"], record["dtype"], record["G"], record["N"]) == ("v32-run", "fp8", 8, 2048)


@pytest.mark.slow
def test_an_error_is_one_line_without_traceback():
    done = call("--chip", "v33", "--shape", "8,48,7168,2048")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: unknown chip 'v33'; expected one of ")
    assert done.stderr.count("\n") == 1


def test_several_shapes_are_a_list(capsys):
    shapes = ["--shape", "8,48,7168,2048", "--shape", "1,48,7168,256"]
    assert run(main, [*shapes, "--json", "-"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert [record["G"] for record in records] == [8, 1]


def test_a_described_chip_is_the_named_one(capsys):
    records = []
    for chip in ("v32-run", "cores=64,tflops=768,gbps=8601.6"):
        assert run(main, ["--chip", chip, "--shape", "8,48,7168,2048", "--json", "-"]) == 0
        records.append(json.loads(capsys.readouterr().out))
    assert records[1].pop("chip") == "cores=64,tflops=768,gbps=8601.6"
    assert records[0].pop("chip") == "v32-run"
    assert records[0] == records[1]


def test_real_chips_have_neither_tile_nor_partition(capsys):
    assert run(main, ["--chip", "h200", "--shape", "8,48,7168,2048", "--json", "-"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert set(record) == KEYS
    assert (record["best_tile"], record["best_partition"]) == (None, None)
    assert record["elapsed"] == max(record["comp_elapsed"], record["dma_elapsed"])


def test_table_and_file(tmp_path, capsys):
    path = tmp_path / "gemm.json"
    assert run(main, ["--chip", "tier6", "--dtype", "bf16", "--shape", "8,48,7168,2048", "--json", str(path)]) == 0
    assert json.loads(path.read_text())["best_tile"] == {"order": "mnk", "M": 48, "N": 1024, "K": 384}
    title, _, _, row = capsys.readouterr().out.splitlines()
    assert title == "tier6, bf16 operands, BF16 output"
    assert " ".join(row.split()) == "8,48,7168,2048 14.680 21.989 24.925 252.183 58.898 48,1024,384 mnk 8,1,2,4"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--shape", "8,48,7168"],
            "--shape must be four positive whole numbers G,M,K,N like 8,48,7168,2048, below 2^63, got '8,48,7168'",
        ),
        (["--shape", "8,48,7168,2048,1"], "--shape must be four positive whole numbers"),
        (["--shape", "8,0,7168,2048"], "--shape must be four positive whole numbers"),
        (["--shape", f"{2**63},1,1,1"], "below 2^63, got '9223372036854775808,1,1,1'"),
        (["--shape", "a,b,c,d"], "--shape must be four positive whole numbers"),
        (["--shape", "1,1,1,1", "--dtype", "fp4"], "argument --dtype: invalid choice: 'fp4'"),
        (["--shape", "1,1,1,1", "--chip", "cores=64"], "lacks tflops, gbps"),
        (["--shape", "1,1,1,1", "--json", "/nowhere/x.json"], "cannot write /nowhere/x.json"),
        ([], "the following arguments are required: --shape"),
    ],
)
def test_errors(argv, message, capsys):
    assert run(main, argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.fixture
def h200(monkeypatch):
    """Stands in for an H200 on which the whole takes 40 µs, arithmetic 30, copies 20."""
    asked = []

    def measure_overlap(stage_function, inputs):
        for stage in ("full", "comp", "dma"):
            asked.append((stage, jax.eval_shape(stage_function(stage), *inputs[0]).shape))
        return OverlapTimes(40.0, 30.0, 20.0)

    monkeypatch.setattr(gemm, "hopper_at_hand", lambda: get_chip("h200"))
    monkeypatch.setattr(gemm, "measure_overlap", measure_overlap)
    return asked


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp8"])
@pytest.mark.quick("fp8")
def test_measured_beside_modelled(h200, dtype, capsys):
    assert run(main, ["--device", "--dtype", dtype, "--shape", "4,8,256,128", "--json", "-"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert set(record) == KEYS | {"measured"}
    assert record["chip"] == "h200"
    assert record["measured"] == {"elapsed": 40.0, "comp_elapsed": 30.0, "dma_elapsed": 20.0, "overlap": 0.5}
    assert h200 == [(stage, (32, 128)) for stage in ("full", "comp", "dma")]


@pytest.mark.slow
def test_measured_table_and_another_chip(h200, capsys):
    assert run(main, ["--device", "--chip", "tier6", "--dtype", "bf16", "--shape", "8,48,7168,2048"]) == 0
    *_, title, head, _, measured, modelled = capsys.readouterr().out.splitlines()
    assert title == "measured on h200, modelled for tier6"
    assert head.split() == ["G,M,K,N", "comp", "µs", "dma", "µs", "elapsed", "µs", "overlap"]
    assert measured.split() == ["8,48,7168,2048", "measured", "30.000", "20.000", "40.000", "0.500"]
    assert modelled.split() == ["8,48,7168,2048", "modelled", "14.680", "21.989", "24.925", "-"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dtype", "int8", "--shape", "1,1,64,64"], "--device multiplies fp8, bf16, fp16, got --dtype int8"),
        (["--dtype", "bf16", "--shape", "1,8,60,64"], "--shape 1,8,60,64 bf16: Hopper's copy engine needs K"),
    ],
)
def test_what_the_kernels_cannot_do_is_one_line(h200, argv, message, capsys):
    assert run(main, ["--device", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_device_without_a_gpu_is_one_line(capsys):
    assert run(main, ["--device", "--shape", "8,48,7168,2048"]) == 2
    assert capsys.readouterr().err == "error: kernel times need an NVIDIA GPU, and jax runs on cpu here\n"
