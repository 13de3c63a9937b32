"""What the page answers, without a browser: `nasa_diffusers.app.Studio`, and its command."""

import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from nasa_diffusers import NAG, NASA, VSF, ProjectedNASA, app, nasa, testing
from nasa_diffusers.cli import main
from nasa_diffusers.drawing import METHODS, enlarged
from nasa_diffusers.families import FAMILIES
from PIL import Image

FIELDS = {
    "prompt": "a cat", "negative": "blurry", "method": "nasa", "strength": 0.5, "steps": 1,
    "seed": 3, "guidance": 0.0, "height": None, "width": None,
}  # fmt: skip


@pytest.fixture
def studio():
    return app.Studio(testing.stable_diffusion())


def ask(studio, **changes):
    return studio.answer(**{**FIELDS, **changes})


def drawn(method=None, steps=1, seed=3, **call):
    """By the library itself, on a pipeline of its own."""
    pipe = testing.stable_diffusion()
    call = {"num_inference_steps": steps, "guidance_scale": 0.0} | call

    def image():
        return pipe("a cat", generator=torch.Generator().manual_seed(seed), **call).images[0]

    if method is None:
        return image()
    with nasa(pipe, "blurry", method):
        return image()


def same(shown, expected):
    return shown.tobytes() == enlarged(expected).tobytes()


@pytest.mark.parametrize(
    ("name", "strength", "method"),
    [
        ("nasa", 0.5, NASA(0.5)),
        ("projected", 1.5, ProjectedNASA(1.5)),
        ("nag", 5.0, NAG(scale=5.0)),
        ("vsf", 0.5, VSF(0.5)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_both_pictures_are_those_of_the_library(studio, name, strength, method):
    without, guided, report = ask(studio, method=name, strength=strength)
    assert without.size == (256, 256)
    assert same(without, drawn()) and same(guided, drawn(method))
    assert guided.tobytes() != without.tobytes()
    assert "7 of 7 text cross-attention layers guided" in report
    assert f"{METHODS[name].name}," in report or METHODS[name].name in report


def test_every_field_is_obeyed(studio):
    call = {"guidance_scale": 3.0, "height": 64, "width": 32}
    without, guided, _ = ask(studio, steps=2, seed=5, guidance=3.0, height=64, width=32)
    assert same(without, drawn(steps=2, seed=5, **call))
    assert same(guided, drawn(NASA(0.5), steps=2, seed=5, **call))


def test_strength_0_draws_the_same_twice(studio):
    without, guided, _ = ask(studio, strength=0.0)
    assert guided.tobytes() == without.tobytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"negative": ""}, "the negative prompt is empty"),
        ({"steps": 0}, "steps must be a whole number from 1 on, got 0"),
        ({"steps": 1.5}, "steps must be a whole number from 1 on, got 1.5"),
        ({"seed": None}, "the seed must be a whole number from 0"),
        ({"seed": -1}, "the seed must be a whole number from 0"),
        ({"seed": 2**63}, "the seed must be a whole number from 0"),
        ({"guidance": float("nan")}, "the guidance scale must be a number from 0 on"),
        ({"strength": float("nan")}, "alpha must be"),
        ({"method": "other"}, "no method 'other'; there are nasa, projected, nag, vsf"),
        ({"method": "nag", "strength": 1.0}, "NAG: scale 1 is no guidance"),
        ({"height": 64}, "height and width go together"),
        ({"height": 63, "width": 64}, "divisible by 8"),
        ({"height": 0, "width": 64}, "height must be a number of pixels, got 0"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_and_nothing_is_shown(studio, changes, message):
    without, guided, report = ask(studio, **changes)
    assert without is None and guided is None
    assert report.startswith("error: ") and message in report


def test_nothing_stays_attached_after_a_failure(studio, monkeypatch):
    """An error in the middle of the guided drawing: the next request is as if there was none."""
    decode, calls = studio.pipe.vae.decode, []

    def fails(*given, **options):
        calls.append(given)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return decode(*given, **options)

    monkeypatch.setattr(studio.pipe.vae, "decode", fails)
    assert ask(studio) == (None, None, "error: out of memory")
    assert len(calls) == 2 and not studio.pipe.unet._forward_pre_hooks
    without, guided, _ = ask(studio)
    assert same(without, drawn()) and same(guided, drawn(NASA(0.5)))


def test_a_second_request_waits(studio):
    """Were both on the pipeline at once, one would be guided by the other, or refused."""
    entered, go_on = threading.Event(), threading.Event()
    inside, most = [], []
    call = studio.pipe.unet.forward

    def slow(*given, **options):
        inside.append(None)
        most.append(len(inside))
        entered.set()
        assert go_on.wait(60)
        try:
            return call(*given, **options)
        finally:
            inside.pop()

    studio.pipe.unet.forward = slow
    answers = {}

    def request(name, **changes):
        answers[name] = ask(studio, **changes)

    first = threading.Thread(target=request, args=("first",))
    second = threading.Thread(target=request, args=("second",), kwargs={"seed": 4, "method": "vsf"})
    first.start()
    assert entered.wait(60)
    second.start()
    second.join(0.3)
    assert second.is_alive() and len(most) == 1
    go_on.set()
    for thread in (first, second):
        thread.join(60)
    assert max(most) == 1
    assert same(answers["first"][1], drawn(NASA(0.5)))
    assert same(answers["second"][0], drawn(seed=4))
    assert same(answers["second"][1], drawn(VSF(0.5), seed=4))


def test_a_video_is_a_file(studio):
    frames = [drawn(seed=seed) for seed in (0, 1)]
    path = studio.picture(frames)
    assert path.endswith(".gif") and Image.open(path).n_frames == 2
    assert studio.picture(frames) != path
    for _ in range(3 * app.WAITING):
        studio.picture(frames)
    # those that nobody can be waiting for are gone
    assert len(list(app.Path(path).parent.iterdir())) == app.WAITING


@pytest.mark.parametrize("name", METHODS)
def test_the_slider_begins_at_the_familys_default(studio, name):
    slider = studio.strength_slider(name)
    assert slider["minimum"] < slider["value"] <= slider["maximum"]
    without, guided, _ = ask(studio, method=name, strength=slider["value"])
    assert same(guided, drawn(METHODS[name]()))
    assert name in app.LABELS and name in app.HIGHEST


def test_a_model_that_no_family_knows_is_refused_at_the_start():
    pipe = testing.stable_diffusion()
    pipe.unet = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="no family knows the denoiser Linear"):
        app.Studio(pipe)


def test_without_gradio_it_says_what_to_install(monkeypatch, capsys):
    """Before a model is loaded."""
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["app", "--model", "nothing"]) == 1
    assert capsys.readouterr().err == (
        'error: app: the page needs gradio; pip install "nasa-kernels[app]"\n'
    )


def test_the_shipped_model_is_the_default():
    assert (app.Path(app.shipped_model()) / "model_index.json").exists()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_defaults_of_every_family_are_on_the_slider(family):
    studio = object.__new__(app.Studio)
    # what a family asks of a denoiser for its defaults
    studio.family, studio.denoiser = family, SimpleNamespace(config=SimpleNamespace())
    for name in METHODS:
        slider = studio.strength_slider(name)
        assert slider["minimum"] < slider["value"] <= slider["maximum"]
