"""`python -m bench host`: rows of the host's time, and what it leaves out."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import host, host_shares, readme
from bench import row as rows_of

ROOT = Path(__file__).parents[2]


def test_a_ratio_is_that_of_the_work():
    x = torch.zeros(4)

    def unit():
        for _ in range(10):
            x.add(1)

    def thrice():
        unit(), unit(), unit()

    times, baseline = host.compare({"one": unit, "three": thrice}, unit, rounds=9)
    assert baseline > 0 and len(times["one"].us) == 9
    assert 0.7 < times["one"].quantile(0.5) / baseline < 1.4
    assert 2.1 < times["three"].quantile(0.5) / baseline < 4.2


def test_the_interpreter_and_a_library_that_is_not_there_are_said(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "unset it" in host._why_not("triton", tmp_path)
    reason = host._why_not("cuda", tmp_path / "host.so")
    assert "host.so is not there" in reason and "--target host" in reason


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict:
    """Of Triton, which compiles for a GPU that is not there."""
    out = tmp_path_factory.mktemp("host") / "rows.csv"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = [str(ROOT), environment.get("PYTHONPATH", "")]
    environment |= {"PYTHONPATH": os.pathsep.join(path), "PYTHONWARNINGS": "ignore"}
    command = ["-m", "bench", "host", "--quick", "--out", out, "--library", out / "none.so"]
    result = subprocess.run(
        [sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "none.so is not there" in result.stdout.replace("\n", " ")
    return {row.case: row for row in rows_of.read(out)}


def test_rows_have_a_baseline_of_the_same_run(rows):
    cases = {"plain", "masks", "alpha", "broadcast", "projected", "nag", "joint", "joint-nag"}
    assert cases | {"image", "shared", "joint-small", "joint-nag-small"} == set(rows)
    for row in rows.values():
        assert (row.bench, row.provider, row.timing) == ("host", "triton", "host")
        assert row.baseline == "sdpa" and row.baseline_us > 0
        assert row.p20_us <= row.p50_us <= row.p80_us


def test_what_pytorch_takes_for_the_image_is_said_apart(rows):
    """Its attention computes on CPU tensors, in a call that makes nothing of ours."""
    assert rows["image"].p50_us < rows["shared"].p50_us < rows["joint"].p50_us
    # the whole of a call that has one launch is less than what the other adds to PyTorch's
    ours = rows["joint"].p50_us - rows["image"].p50_us
    assert rows["joint-small"].p50_us < ours
    by = {x.row.case: x for x in host_shares.shares(rows.values())}
    unit = rows["plain"].baseline_us
    assert by["image"].ours is None
    ours = (rows["joint"].p50_us - rows["image"].p50_us) / unit
    assert by["joint"].ours == pytest.approx(ours) and by["joint"].ours < by["joint"].all
    assert by["plain"].ours == by["plain"].all == rows["plain"].p50_us / unit
    # of rows that do not have it nothing is said
    without = [row for case, row in rows.items() if case != "image"]
    assert all((x.ours is None) == (x.row.case in host_shares.AROUND_IMAGE)
               for x in host_shares.shares(without))  # fmt: skip
    page = readme.section(rows.values())
    assert f"| joint | {by['joint'].all:.2f} (" in page and f" | {by['joint'].ours:.2f} |" in page


def test_a_call_costs_the_host_no_more_than_four_of_sdpa(rows):
    """The fifth of the rounds that met least else: what runs beside it only adds."""
    for case in ("plain", "nag", "joint-small"):
        assert rows[case].p20_us / rows[case].baseline_us <= host.CEILINGS["triton"], case
