"""`python -m nasa_diffusers gallery`: its pictures are those of the library, its page links them."""

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
    prompts = ["--prompt", "a cat", "--negative", "blurry", "--prompt", "a *dog*", "--negative", "b"]
    more = ["--methods", "projected:1.5,nag:4", "--seeds", "3,4", "--size", "64"]
    assert gallery(checkpoint, tmp_path, *prompts, *more) == 0, capsys.readouterr().err
    pipe = testing.stable_diffusion()
    call = {"num_inference_steps": 1, "guidance_scale": 0.0}
    for i, (prompt, negative) in enumerate([("a cat", "blurry"), ("a *dog*", "b")]):
        shown = Image.open(tmp_path / f"{i}.png")
        assert shown.size == (2 * 64, 3 * (64 + 16))
        for row, method in enumerate((None, ProjectedNASA(1.5), NAG(scale=4.0))):
            for column, seed in enumerate((3, 4)):
                generator = torch.Generator().manual_seed(seed)
                if method is None:
                    expected = pipe(prompt, generator=generator, **call).images[0]
                else:
                    with nasa(pipe, negative, method):
                        expected = pipe(prompt, generator=generator, **call).images[0]
                box = (64 * column, 80 * row, 64 * column + 64, 80 * row + 64)
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
