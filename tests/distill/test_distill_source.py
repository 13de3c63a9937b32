"""What the sources say of themselves: their layers, and the options that their hints name."""

import argparse
import ast
import json
import re
from dataclasses import asdict, fields
from pathlib import Path

import nasa_distill
import numpy
import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from nasa_diffusers import cli as diffusers_cli
from nasa_distill import cli
from nasa_distill.train.config import Settings
from nasa_distill.world import shipped
from nasa_distill.world.evaluation import evaluate, report
from nasa_distill.world.fit import Settings as FitSettings
from nasa_distill.world.make import Recipe
from torch.distributed.run import get_args_parser

ROOT = Path(nasa_distill.__file__).parent
REPOSITORY = Path(__file__).parents[2]
# a folder, and the folders that it may import from
LAYERS = {
    "train": {"train"},
    "world": {"train", "world"},
    "scores": {"train", "scores"},
    "demo": {"train", "world", "demo"},
}


def sources(folder=""):
    return sorted((ROOT / folder).rglob("*.py"))


def imported(path):
    """The folders of this package that a file imports from."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("nasa_distill."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.ImportFrom) and node.module == "nasa_distill":
            yield from (name.name for name in node.names)


def test_folders_import_one_way():
    found = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert found == {*LAYERS, "models"}
    for folder, allowed in LAYERS.items():
        for path in sources(folder):
            wrong = set(imported(path)) & set(LAYERS) - allowed
            assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"
    assert "world" in set().union(*map(imported, sources("demo")))


def test_every_folder_is_installed():
    """`find_packages` takes folders with an `__init__.py` and no others."""
    assert all((path.parent / "__init__.py").exists() for path in sources())


def test_names_of_modules_are_right():
    """Also where they stand in a text, as `nasa_distill.train.config` does."""
    pages = [*(REPOSITORY / "docs" / "distill").glob("*.md"), REPOSITORY / "README.md"]
    found = 0
    for path in (*sources(), *pages):
        for name in re.findall(r"nasa_distill(?:\.[a-z]\w*)+", path.read_text()):
            parts = name.split(".")[1:]
            exists = [(ROOT / "/".join(parts[:n])).with_suffix(".py") for n in (1, 2, 3)]
            folder = ROOT / "/".join(parts)
            assert folder.is_dir() or any(e.exists() for e in exists), f"{path.name}: {name}"
            found += 1
    assert found > 50


# ---- hints ---------------------------------------------------------------------------------------


def texts(path):
    """The strings of a file that a user may come to read, and the lines they stand in."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def commands_of(parser):
    (action,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return action.choices


def options_of(*parsers):
    return {name for parser in parsers for a in parser._actions for name in a.option_strings}


def known_options(package):
    """The options of its own commands, and of the launchers that its hints name."""
    ours = {"nasa_distill": cli, "nasa_diffusers": diffusers_cli}[package].build_parser()
    launchers = launch_command_parser(), get_args_parser()
    return options_of(*commands_of(ours).values(), *launchers)


# what the commit of a result is asked with
GIT = {"--porcelain", "--untracked-files", "--short"}
PACKAGES = {"nasa_distill": ROOT, "nasa_diffusers": ROOT.parent / "nasa_diffusers"}


@pytest.mark.parametrize("package", PACKAGES)
def test_hints_name_options_that_exist(package):
    known, found = known_options(package) | GIT, 0
    for path in sorted(PACKAGES[package].rglob("*.py")):
        for line, text in texts(path):
            for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", text):
                assert option in known, f"{path.name}:{line}: there is no {option}"
                found += 1
    assert found > 20


def test_hints_name_settings_and_commands_that_exist():
    settings = {field.name for field in fields(Settings)}
    commands = set(commands_of(cli.build_parser()))
    found = [set(), set()]
    pages = {page: page.read_text() for page in (REPOSITORY / "docs/distill").glob("*.md")}
    for path in sources():
        pages[path] = "\n".join(text for _, text in texts(path))
    for path, text in pages.items():
        for name in re.findall(r"--set (\w+)=", text):
            assert name in settings, f"{path.name}: there is no setting {name}"
            found[0].add(name)
        for name in re.findall(r"-m nasa_distill (\w+)", text):
            assert name in commands, f"{path.name}: there is no command {name}"
            found[1].add(name)
    assert len(found[0]) > 3 and len(found[1]) > 3


# ---- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [numpy.float32, numpy.float64, torch.tensor], ids=lambda k: k.__name__
)
def test_settings_take_any_scalar(kind):
    """And hold Python's, which a checkpoint can be compared with and a log can write."""
    whole = torch.tensor if kind is torch.tensor else numpy.int64
    steps = {"steps": whole(3), "batch": whole(2), "seed": whole(1)}
    range_ = (kind(0.5), kind(1.5))
    for made in (
        Settings(**steps, kappa=range_, ema=kind(0.5), lora_rank=whole(4)),
        FitSettings(**steps, learning_rate=kind(0.5), ema=kind(0.25), muon=kind(0.5)),
        Recipe(pairs=whole(5), guidance=kind(1.5), joint_size=(whole(32), whole(2), whole(2))),
    ):
        json.dumps(asdict(made))
        for value in asdict(made).values():
            parts = value if isinstance(value, (tuple, list)) else [value]
            assert {type(part) for part in parts} <= {int, float, bool, str, dict, type(None)}
    with pytest.raises(ValueError, match="ema must be between 0 and 1, got 1.5"):
        Settings(**steps, ema=kind(1.5))


def test_an_evaluation_takes_any_scalar(tmp_path):
    numbers = evaluate.Method("nasa", 0.5), 2, [1], 3
    others = (
        evaluate.Method("nasa", torch.tensor(0.5)),
        numpy.int64(2),
        [torch.tensor(1)],
        numpy.int8(3),
    )
    results = [
        evaluate.run(shipped.path(32), steps, images, seed, methods=(method,))
        for method, images, steps, seed in (numbers, others)
    ]
    assert results[0] == results[1]
    assert report.as_json(results[0]) == report.as_json(results[1])
    report.write(results[1], tmp_path)
