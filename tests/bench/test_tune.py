"""The command line of the tuner and what it writes, with made-up times; its programs, as far as a CPU can tell."""

import dataclasses
import json
import os

import jax
import pytest

from bench import tune
from bench.command.parser import run
from bench.hopper import tune_measure, tune_prefetch
from bench.hopper.products import PRODUCT_DTYPES, Product, make_inputs
from bench.hopper.tune_measure import ConfigTimer
from bench.hopper.tune_search import Outcome
from bench.measure.clock import CallTime
from bench.model.shapes import GemmShape
from pallas_kernels.chips import get_chip
from pallas_kernels.grouped_matmul.gpu.hopper import tiling
from pallas_kernels.grouped_matmul.gpu.hopper.tuned_table import parse_table
from pallas_kernels.on_gpu.prefetch import PLAIN, Prefetch

MODEL, BEST = tiling.Config(64, 128, 6, 1, 16), tiling.Config(128, 128, 5, 2, 4)
SHAPE = ["--shape", "8,48,7168,2048"]


@pytest.fixture
def gains(monkeypatch):
    """Stands in for an H200 on which the best of each product, in turn, saves such a share."""
    given = []

    def search(product, chip, timer, exhaustive):
        gain = given.pop(0)
        if isinstance(gain, Exception):
            raise gain
        return Outcome(MODEL, 100.0, BEST, 100.0 * (1 - gain), 7)

    monkeypatch.setattr(tune, "hopper_at_hand", lambda: get_chip("h200"))
    monkeypatch.setattr(tune, "ConfigTimer", lambda *args: None)
    monkeypatch.setattr(tune, "search", search)
    monkeypatch.setattr(jax, "clear_caches", lambda: None)
    return given


def test_what_beats_the_model_is_written(gains, tmp_path, capsys):
    gains += [0.1, 0.01]
    path = tmp_path / "h200.json"
    argv = [*SHAPE, "--shape", "8,4096,7168,4096", "--dtype", "fp8", "--output", str(path), "--commit", "abc"]
    assert run(tune.main, argv) == 0
    table = json.loads(path.read_text())
    assert set(table) == {"what", "command", "chip", "driver", "versions", "commit", "date", "entries"}
    (entry,) = table["entries"]
    assert entry.pop("date") == table["date"]
    assert entry == {
        "operand": "float8_e4m3fn",
        "block_scales": False,
        "fused": False,
        "result_in_8_bits": False,
        "num_groups": 8,
        "rows": 64,
        "depth": 7168,
        "columns": 2048,
        "config": {"block_m": 128, "block_n": 128, "num_stages": 5, "warpgroups": 2, "strip": 4, "out_slots": 2},
        "us": 90.0,
        "model_us": 100.0,
        "commit": "abc",
    }
    assert list(parse_table(table).values()) == [BEST]
    out, err = capsys.readouterr()
    first, second = (line for line in out.splitlines() if line.startswith("8,"))
    assert first.split()[-1] == "128,128,5,2,4,2"
    assert second.endswith("as modelled")
    assert "[ 50 %, " in err


def test_entries_of_other_products_stay_and_a_lost_gain_goes(gains, tmp_path):
    path = tmp_path / "h200.json"
    for gain, shape, left in ((0.1, "8,48,7168,2048", 1), (0.1, "8,48,2048,7168", 2), (0.0, "8,48,7168,2048", 1)):
        gains.append(gain)
        assert run(tune.main, ["--shape", shape, "--output", str(path)]) == 0
        entries = json.loads(path.read_text())["entries"]
        assert len(entries) == left
    assert entries[0]["depth"] == 2048


def test_a_failure_is_told_and_the_rest_goes_on(gains, capsys):
    gains += [MemoryError("out of\nmemory"), 0.5]
    assert run(tune.main, [*SHAPE, *SHAPE, "--output", "-"]) == 1
    out, err = capsys.readouterr()
    assert len(json.loads(out)["entries"]) == 1
    assert "FAILED: 8,48,7168,2048 bf16: out of memory" in err


def test_no_product_begins_after_the_time(gains, capsys):
    gains += [0.0]
    assert run(tune.main, [*SHAPE, *SHAPE, "--minutes", "1e-12", "--output", "-"]) == 0
    assert "2 of 2 products left out after 1e-12 minutes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--shape", "8,48"], "--shape must be four positive whole numbers"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--minutes", "0"], "argument --minutes: must be a positive number, got '0'"),
        (["--tokens", "8"], "--tokens needs --prefetch"),
        (["--json", "-"], "--json needs --prefetch"),
        (["--prefetch", "--output", "-"], "--output is not for --prefetch"),
        (["--prefetch", "--model", "deepseek-v3"], "argument --model: invalid choice: 'deepseek-v3'"),
        (["--prefetch", "--products", "QKV,up"], "--products must be of QKV, output, FFN1, FFN2, gate/up, down, got"),
        (
            ["--prefetch", "--products", "QKV", *SHAPE],
            "--shape names all products of the chain; give it without --prod",
        ),
        (["--prefetch", "--fused"], "--fused, --result-in-8-bits and --normed are for products of --shape"),
        (["--normed", "--shape", "1,16,4096,512"], "--normed needs --prefetch"),
    ],
)
def test_errors(argv, message, capsys):
    assert run(tune.main, argv) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
@pytest.mark.parametrize("options", [[], ["--prefetch"]])
def test_without_a_gpu_is_one_line(options, capsys, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    assert run(tune.main, [*SHAPE, *options]) == 2
    assert capsys.readouterr().err == "error: kernel times need an NVIDIA GPU, and jax runs on cpu here\n"


@pytest.fixture
def chain(monkeypatch):
    """Stands in for an H200 on which chains take 100 µs, and each product that starts early saves 2 of them.

    What is added to a chain with an L2 prefetch is noise, and with command buffers nothing is saved.
    """
    timers = []

    class Timer:
        num_kernels = 12

        def __init__(self, products, say):
            self.products, self.flags = products, os.environ["XLA_FLAGS"]
            timers.append(self)

        def sample(self, choices, rounds, *, in_command_buffers=False):
            def us(choice, number):
                modes = [value.mode for value in choice]
                saved = sum(2 * (mode in ("pdl", "smem")) for mode in modes) * (not in_command_buffers)
                return 100.0 - saved + (number % 2 - 0.5) * ("l2" in modes)

            return {choice: [us(choice, number) for number in range(rounds)] for choice in choices}

    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(tune_prefetch, "hopper_at_hand", lambda: get_chip("h200"))
    monkeypatch.setattr(tune_prefetch, "ChainTimer", Timer)
    return timers


def test_prefetch_of_a_decoder_layer(chain, tmp_path, capsys):
    path = tmp_path / "prefetch.json"
    assert run(tune.main, ["--prefetch", "--quick", "--json", str(path), "--commit", "abc"]) == 0
    assert [product.shape.N for product in chain[0].products] == [5120, 2048, 12288, 2048, 1536, 2048]
    assert {product.dtype for product in chain[0].products} == {"fp8"}
    assert chain[0].flags == "--xla_gpu_enable_command_buffer="
    record = json.loads(path.read_text())
    head = {"command", "chip", "driver", "versions", "commit", "date"}
    assert set(record) == {*head, "products", "kernels", "rounds", "choices"}
    assert record["products"]["down"] == "128,4,768,2048 fp8"
    plain, best, *rest = record["choices"]
    assert len(rest) == 9
    assert plain["prefetch"]["QKV"] == {"mode": "none", "overlap": None, "prefetch": None}
    assert best["speedup"] == pytest.approx(100 / 88)
    assert best["verdict"] == "gain"
    assert best["in_command_buffers"]["verdict"] == "no gain"
    out, err = capsys.readouterr()
    title, shapes, header, _, baseline, first, *_ = out.splitlines()
    assert "a chain of 12 kernels, 20 rounds" in title
    assert shapes.startswith("QKV 1,64,2048,5120 fp8; output")
    assert header.split()[:6] == ["QKV", "output", "FFN1", "FFN2", "gate/up", "down"]
    assert baseline.split()[:8] == [*["none"] * 6, "100.000", "0.000"]
    assert "1.136" in first
    assert "combinations of the best" in err


def test_prefetch_of_given_products_without_a_gain(chain, monkeypatch, capsys):
    monkeypatch.setattr(tune_prefetch, "QUICK_GRID", (PLAIN, Prefetch("l2", 1.0, 1.0)))
    assert run(tune.main, ["--prefetch", "--quick", *SHAPE, "--dtype", "bf16", "--json", "-"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["products"] == {"8,48,7168,2048 bf16": "8,48,7168,2048 bf16"}
    plain, other = record["choices"]
    assert (plain["us"], other["us"]) == (100, 100)
    assert other["verdict"] == "no gain"
    low, high = other["speedup_ci95"]
    assert low < 1 < high


def test_a_prefetch_search_ends_in_time(chain, capsys):
    assert run(tune.main, ["--prefetch", "--minutes", "1e-12"]) == 2
    err = capsys.readouterr().err
    assert "left out after 0 s: product 1 of 6" in err
    assert "error: no choice could be timed" in err


def test_command_buffers_that_cannot_be_timed_leave_the_rest(chain, monkeypatch, capsys):
    sample = tune_prefetch.ChainTimer.sample

    def fails(self, choices, rounds, *, in_command_buffers=False):
        if in_command_buffers:
            raise ValueError("the time line lacks kernels")
        return sample(self, choices, rounds)

    monkeypatch.setattr(tune_prefetch.ChainTimer, "sample", fails)
    assert run(tune.main, ["--prefetch", "--quick", *SHAPE]) == 0
    out, err = capsys.readouterr()
    assert "not timed with command buffers: the time line lacks kernels" in err
    assert out.splitlines()[-1].split()[-2:] == ["-", "-"]


@pytest.mark.parametrize("dtype", list(PRODUCT_DTYPES))
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.quick("True-fp8-blocks")
def test_inputs_suit_the_kernels(dtype, fused):
    product = Product(GemmShape(4, 8, 256, 256), dtype, fused, num_rows=48)
    inputs = make_inputs(product)
    traced = jax.jit(product.run).trace(*inputs)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
    assert jax.eval_shape(product.run, *inputs).shape == (48, 128 if fused else 256)


def test_a_timer_leaves_out_what_fails_or_differs(monkeypatch):
    """With programs that stand in for kernels: each gives what its strip says."""

    class Program:
        def __init__(self, config):
            self.value = config.strip

        def compile(self):
            if self.value == 3:
                raise RuntimeError("does not\ncompile")
            return lambda inputs: [jax.numpy.full(3, 1.0 + 0.1 * (self.value == 2))]

    def kernel_times(program, inputs, *, repeats, calls):
        assert calls == len(inputs) == 8
        return CallTime.of([float(repeats)])

    said = []
    monkeypatch.setattr(tune_measure, "kernel_times", kernel_times)
    monkeypatch.setattr(ConfigTimer, "_lower", lambda self, config: Program(config))
    timer = ConfigTimer(Product(GemmShape(2, 8, 64, 64), "bf16"), 5, said.append)
    right, wrong, broken = (dataclasses.replace(MODEL, strip=strip) for strip in (1, 2, 3))
    assert timer([right, wrong, broken]) == {right: 5.0}
    assert timer([right]) == {right: 5.0}
    assert "wrong result: relative error 1.0e-01" in said[0]
    assert "RuntimeError: does not compile" in said[1]


def test_each_configuration_has_its_own_program(monkeypatch):
    product = Product(GemmShape(2, 8, 64, 128), "bf16")
    timer = ConfigTimer(product, 1, print)
    rotated = tune_measure.rotated

    class Lowerable:
        def __init__(self, function):
            self.program = rotated(function)

        def lower(self, inputs):
            return self.program.trace(inputs).lower(lowering_platforms=("cuda",)).as_text()

    monkeypatch.setattr(tune_measure, "rotated", Lowerable)
    texts = {timer._lower(tiling.Config(64, block_n, 4, 1, 1)) for block_n in (64, 128)}
    assert len(texts) == 2
