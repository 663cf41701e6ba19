"""The programs in examples/, run as a user runs them."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def run_example(name: str, *arguments: str) -> str:
    """What the program prints."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=EXAMPLES.parent,
        check=True,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent)},
    )
    return done.stdout


@pytest.mark.slow
def test_training_over_a_mesh_learns():
    mesh = "--devices", "8", "--mesh", "fsdp=2,expert=2,tensor=2"
    printed = run_example("train.py", *mesh, "--parts", "2", "--steps", "21")
    losses = [float(line.split()[-1]) for line in printed.splitlines() if line.startswith("step")]
    assert losses[0] > 3.5
    assert losses[-1] < 0.5


@pytest.mark.quick("1")
@pytest.mark.parametrize("ep", ["1", "4"])
def test_serving_in_8_bits_is_close_to_bf16(ep):
    sizes = "--slots", "4", "--requests", "7", "--longest", "6", "--steps", "3", "--hidden", "128", "--experts", "8"
    printed = run_example("serve.py", "--ep", ep, *sizes, "--top-k", "2")
    tokens, busy = map(int, re.search(r"7 requests, (\d+) tokens, (\d+)% of slots busy", printed).groups())
    assert 7 <= tokens <= 7 * 6
    assert busy < 100
    # An idle slot chooses no expert.
    assert int(re.search(r"routed +(\d+) choices", printed)[1]) == 2 * tokens
    error, same = map(float, re.search(r"relative error ([\d.]+), ([\d.]+)% of next tokens", printed).groups())
    # Four operands are rounded to 3 bits of mantissa, each with a relative error of about 0.026.
    assert 0.01 < error < 0.1
    assert same > 80
    assert float(re.search(r"speed +([\d,]+) tokens/s", printed)[1].replace(",", "")) > 0


@pytest.mark.parametrize("name", ["train.py", "serve.py"])
@pytest.mark.slow
def test_help_gives_examples(name):
    assert run_example(name, "--help").count(f"python examples/{name}") >= 2
