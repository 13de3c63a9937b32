"""Code and commands of docs/distill and the README, on tiny stand-ins for the models they name."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from nasa_diffusers import cli as diffusers_cli
from nasa_diffusers import testing as small
from nasa_distill import cli

from nasa_kernels.testing import MODEL_SHAPES, make_inputs

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "distill").glob("*.md"))
README = ROOT / "README.md"
CARD = ROOT / "python" / "nasa_distill" / "models" / "few-step" / "README.md"


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def run(page, names):
    """Blocks of a page share their names, as a reader who pastes one after the other has it."""
    for block in blocks(page):
        exec(compile(block, page.name, "exec"), names)
    return names


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda page: page.stem)
def test_blocks_run(page, world, tmp_path, monkeypatch):
    (tmp_path / "world").symlink_to(world)
    monkeypatch.chdir(tmp_path)
    assert run(page, {})["image"].size == (32, 32)


def test_the_readmes_blocks_run(monkeypatch):
    opened, moved = [], []
    monkeypatch.setattr(
        DiffusionPipeline,
        "from_pretrained",
        lambda path: opened.append(path) or small.stable_diffusion(),
    )
    monkeypatch.setattr(DiffusionPipeline, "to", lambda pipe, device: moved.append(device) or pipe)
    shape = next(s for s in MODEL_SHAPES if s.name == "sd15-8")
    inputs = make_inputs(shape, torch.float32, "cpu")
    mask = torch.ones(inputs["k_neg"].shape[:2], dtype=torch.bool)
    names = run(README, {**inputs, "mask": mask})
    assert opened == ["path/to/sd-turbo"] and moved == ["cuda"]
    assert names["handle"].report().layers_guided > 0
    assert names["o"].shape == inputs["q"].shape


def commands(page):
    """The commands in a page: indented, or in a code span, up to the end of a line without `\\`."""
    text = page.read_text().replace("\\\n", " ")
    found = re.findall(r"^    python -m (nasa_\w+) (\w+ .*)$", text, re.MULTILINE)
    # a span may go over a line's end
    found += re.findall(r"`python -m (nasa_\w+) ([^`]+)`", text)
    return [(package, shlex.split(arguments)) for package, arguments in found]


PARSERS = {"nasa_distill": cli, "nasa_diffusers": diffusers_cli}


@pytest.mark.parametrize(
    "page", [*(ROOT / "docs").rglob("*.md"), README, CARD], ids=lambda page: page.stem
)
def test_commands_are_known(page, world, capsys):
    """Every option exists, and what the command `world` leaves has the names they say."""
    for package, arguments in commands(page):
        if arguments[-1].startswith("--") or len(arguments) == 1:
            continue  # names an option or a command and is no whole one
        try:
            PARSERS[package].build_parser().parse_args(arguments)
        except SystemExit:
            pytest.fail(f"{arguments}: {capsys.readouterr().err}")
        for argument in arguments:
            if argument.startswith("world/"):
                assert (world.parent / argument.replace("world", world.name, 1)).exists(), argument


def test_there_are_commands():
    found = [arguments[0] for page in PAGES for _, arguments in commands(page)]
    assert {"world", "train", "eval", "ablate", "score"} <= set(found)
    assert [p.stem for p in PAGES if blocks(p)] == ["training"]
