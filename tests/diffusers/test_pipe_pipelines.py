"""`python -m nasa_diffusers pipelines` walks every pipeline, and what it says is what happens."""

import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import test_pipe_rows
import test_side_walk
from nasa_diffusers import cli, enable_nasa, pipelines
from nasa_diffusers.families import FAMILIES, family_of
from torch import nn

PAGE = Path(__file__).parents[2] / "docs" / "diffusers" / "pipelines.md"
# of the newest diffusers: as many live pipelines work, with a condition or without
FLOOR = 172
# families with tests of their own pipelines in another file
TESTED_ELSEWHERE = test_side_walk.FAMILY_NAMES


@pytest.fixture(scope="module")
def rows():
    return pipelines.rows()


def test_as_json(capsys, rows):
    assert cli.main(["pipelines", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["diffusers"] == diffusers.__version__
    assert [each["name"] for each in told["pipelines"]] == [row.name for row in rows]
    assert told["totals"] == pipelines.totals(rows)


def test_the_totals(rows):
    counted = pipelines.totals(rows)
    works = counted[pipelines.WORKS] + counted[pipelines.CONDITION]
    assert counted["take a text"] == works + counted[pipelines.REFUSED]
    if diffusers.__version__.startswith("0.42"):
        assert works >= FLOOR
    assert len({row.name for row in rows}) == len(rows)


def test_every_row_says_something(rows):
    for row in rows:
        assert row.status in pipelines.STATUSES
        assert bool(row.family) == (row.status in (pipelines.WORKS, pipelines.CONDITION)), row
        if row.status in (pipelines.CONDITION, pipelines.REFUSED):
            assert row.sentence and not row.sentence.endswith("."), row


def test_nothing_works_that_was_not_run(rows):
    """0 are silently wrong: each that works is drawn with, row by row, against an oracle."""
    run = set(test_pipe_rows.RUN)
    for row in rows:
        works = row.status in (pipelines.WORKS, pipelines.CONDITION)
        if works and not row.is_modular and row.family not in TESTED_ELSEWHERE:
            is_there = "it needs" not in row.sentence
            assert row.name in run or not is_there, row.name


def test_what_was_run_works(rows):
    """And the other way round: what draws as the oracle does is not told to be refused."""
    by_name = {row.name: row for row in rows}
    for name in test_pipe_rows.RUN:
        row = by_name[name]
        is_too_old = "is supported from diffusers" in row.sentence
        assert row.status in (pipelines.WORKS, pipelines.CONDITION) or is_too_old, name


def test_a_denoiser_that_no_family_knows_is_refused_in_these_words(rows):
    known = {name for family in FAMILIES for name in family.denoisers}
    refused = {
        row.denoiser: row.sentence
        for row in rows
        if row.status == pipelines.REFUSED and row.denoiser and row.denoiser not in known
    }
    del refused["OnnxRuntimeModel"]
    for denoiser, sentence in refused.items():
        pipe = SimpleNamespace(unet=type(denoiser, (nn.Module,), {})())
        with pytest.raises(ValueError, match="^enable_nasa: ") as error:
            enable_nasa(pipe, "blurry")
        assert str(error.value).startswith(f"enable_nasa: {sentence}; run it without NASA")


def test_the_page_is_what_the_command_prints(capsys):
    page = PAGE.read_text()
    if f"diffusers {diffusers.__version__}:" not in page or find_spec("sentencepiece"):
        pytest.skip("the page is of another diffusers, or of fewer packages")
    assert cli.main(["pipelines"]) == 0
    assert capsys.readouterr().out == page


def test_a_class_made_from_one_that_is_known():
    """A user's own is of the family; one of diffusers that is told to be refused is not."""
    made = type("DreamLiteUNetModel", (diffusers.UNet2DConditionModel,), {})
    with pytest.raises(ValueError, match="no family knows the denoiser DreamLiteUNetModel"):
        family_of(made.__new__(made))
    own = type("Own", (diffusers.UNet2DConditionModel,), {})
    assert family_of(own.__new__(own)).name == "Stable Diffusion"
