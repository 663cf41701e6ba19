"""The programs in examples/, run as a user runs them."""

import os
import pathlib
import subprocess
import sys

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def test_training_over_a_mesh_learns():
    command = [sys.executable, str(EXAMPLES / "train.py"), "--devices", "8", "--mesh", "fsdp=2,expert=2,tensor=2"]
    done = subprocess.run(
        [*command, "--parts", "2", "--steps", "21"],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=EXAMPLES.parent,
        check=True,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent)},
    )
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("step")]
    assert losses[0] > 3.5
    assert losses[-1] < 0.5
