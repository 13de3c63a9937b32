"""tools/gpu.py where there is no GPU: what `make gpu` would do, and that its checks run at all."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
STEPS = "forward,layouts,joint,small,heads,batches,streamed,overlap,suite,rows"


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it is run by `make gpu`")
def test_a_dry_run_checks_on_a_cpu_times_nothing_and_misses_no_file(tmp_path):
    report = tmp_path / "gpu.txt"
    command = [sys.executable, "tools/gpu.py", "--only", STEPS, "--report", str(report)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    text = report.read_text()
    assert text.startswith("DRY RUN") and "0 failures" in text
    assert re.findall(r"^## (\w+)", text, re.M) == STEPS.split(",")
    assert "tests/diffusers/test_pipe_gpu.py" in text
    # predictions of every layer, and not one time beside them
    layers = re.findall(r"^[a-z0-9.-]+-b\d+-l\S+ +([\d.]+) +(\S+)$", text, re.M)
    assert len(layers) > 15
    assert all(float(us) > 0 and measured == "-" for us, measured in layers)


def test_a_step_that_does_not_exist_is_an_error():
    command = [sys.executable, "tools/gpu.py", "--only", "forwards"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "no step is named forwards" in done.stderr
