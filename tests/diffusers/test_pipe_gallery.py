"""`python -m nasa_diffusers gallery`: the pictures are the library's, its page is current."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from nasa_diffusers import NAG, ProjectedNASA, nasa, testing
from nasa_diffusers.cli import main
from PIL import Image


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd")
    testing.stable_diffusion().save_pretrained(folder)
    return folder


def gallery(checkpoint, out, *more):
    return main(["gallery", "--model", str(checkpoint), "--out", str(out), "--steps", "1", *more])


def test_the_pictures_are_those_of_the_library(checkpoint, tmp_path, capsys):
    prompts = ["--prompt", "a cat", "--negative", "blurry"]
    prompts += ["--prompt", "a *dog*", "--negative", "b"]
    more = ["--methods", "projected:1.5,nag:4", "--seeds", "3,4", "--size", "64"]
    assert gallery(checkpoint, tmp_path, *prompts, *more) == 0, capsys.readouterr().err
    pipe = testing.stable_diffusion()
    call = {"num_inference_steps": 1, "guidance_scale": 0.0}
    for i, (prompt, negative) in enumerate([("a cat", "blurry"), ("a *dog*", "b")]):
        shown = Image.open(tmp_path / f"{i}.png")
        assert shown.size == (2 * 64 + 4, 3 * (64 + 16))
        for row, method in enumerate((None, ProjectedNASA(1.5), NAG(scale=4.0))):
            for column, seed in enumerate((3, 4)):
                generator = torch.Generator().manual_seed(seed)
                if method is None:
                    expected = pipe(prompt, generator=generator, **call).images[0]
                else:
                    with nasa(pipe, negative, method):
                        expected = pipe(prompt, generator=generator, **call).images[0]
                box = (68 * column, 80 * row, 68 * column + 64, 80 * row + 64)
                expected = expected.resize((64, 64), Image.Resampling.NEAREST)
                assert shown.crop(box).tobytes() == expected.tobytes()
    page = (tmp_path / "index.md").read_text(encoding="utf-8")
    assert "(0.png)" in page and "(1.png)" in page
    assert "## a \\*dog\\*, without b" in page and "seeds 3, 4" in page
    assert page.count("7 of 7 text cross-attention layers guided") == 4


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prompt", "a"], "each --prompt has its --negative; got 1 and 0"),
        (["--prompt", "a", "--negative", "b", "--prompt", "c"], "got 2 and 1"),
        (["--prompt", "a", "--negative", ""], "the negative prompt is empty"),
        (["--prompt", "a", "--negative", "b", "--seeds=-1"], "the seed must be"),
        (["--prompt", "a", "--negative", "b", "--size", "0"], "--size must be"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(tmp_path, capsys, more, message):
    assert gallery(tmp_path / "nothing", tmp_path / "out", *more) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("methods", ["other", "nasa:x", "nag:1"])
def test_methods_that_are_none(tmp_path, capsys, methods):
    with pytest.raises(SystemExit):
        gallery(tmp_path, tmp_path, "--prompt", "a", "--negative", "b", "--methods", methods)
    assert f"{methods}: " in capsys.readouterr().err


# ---- the page of the docs ------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "gallery" / "index.md"
COMMAND = re.search(
    r"python -m nasa_diffusers (gallery .*?)\n\n", (ROOT / "docs" / "README.md").read_text(), re.S
)


def without_backend(text):
    """Which back end is the best differs between machines."""
    return re.sub(r" *back end .*\n", "", text)


def test_the_page_of_the_docs_is_what_its_command_makes(tmp_path, monkeypatch, capsys):
    """Its first two columns, drawn again: another CPU rounds otherwise, and no more."""
    arguments = shlex.split(COMMAND[1].replace("\\\n", " "))
    seeds = "0,1,2,3,4,5,6,7"
    assert seeds in arguments and str(PAGE.parent.relative_to(ROOT)) in arguments
    changed = {seeds: "0,1", str(PAGE.parent.relative_to(ROOT)): str(tmp_path)}
    monkeypatch.chdir(ROOT)
    assert main([changed.get(x, x) for x in arguments]) == 0, capsys.readouterr().err
    text = (
        (tmp_path / "index.md").read_text().replace("seeds 0, 1.", "seeds 0, 1, 2, 3, 4, 5, 6, 7.")
    )
    assert without_backend(text) == without_backend(PAGE.read_text())
    for i in range(3):
        again = Image.open(tmp_path / f"{i}.png")
        # without the labels, which may be cut here
        rows = [y for y in range(again.height) if y % 144 < 128]
        shown = Image.open(PAGE.parent / f"{i}.png").crop((0, 0, *again.size))
        difference = np.abs(np.asarray(again, np.int16) - np.asarray(shown, np.int16))[rows]
        assert difference.mean() < 1 and (difference > 16).mean() < 0.01
