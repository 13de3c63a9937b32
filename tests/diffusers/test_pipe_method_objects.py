"""The methods as objects: what they are made of, refuse, and do on a handle."""

import dataclasses
from types import SimpleNamespace

import joint_cases
import pytest
import torch
from diffusers.pipelines.wan import pipeline_wan
from drawing import assert_same_image, draw
from nasa_diffusers import NAG, NASA, VSF, Method, ProjectedNASA, enable_nasa, nasa, testing
from nasa_diffusers.methods import METHODS
from nasa_diffusers.prompts import nothing, subtract
from nasa_diffusers.streams import keep_apart
from PIL import Image

CROSS = {
    "sd": (testing.stable_diffusion, 0.1, (3.0, 2.5, 0.375)),
    "sdxl": (testing.stable_diffusion_xl, 0.2, (3.0, 2.5, 0.5)),
    "pixart": (testing.pixart, 0.5, (5.0, 2.5, 0.375)),
    "sana": (testing.sana, 0.5, (5.0, 2.5, 0.375)),
    "wan": (testing.wan, 0.5, (5.0, 2.5, 0.25)),
}
JOINT = {
    "flux": (testing.flux, 0.1, (5.0, 2.5, 0.25)),
    "sd3": (testing.stable_diffusion_3, 0.1, (5.0, 2.5, 0.125)),
}


def negative(family):
    return joint_cases.random(1, 9, 64 if family == "sdxl" else 32, seed=2)


@pytest.fixture
def sd():
    return testing.stable_diffusion()


# ---- alone ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", METHODS)
def test_a_method_is_a_frozen_dataclass_with_a_formula(cls):
    method = cls()
    assert issubclass(cls, Method)
    assert all(getattr(method, field.name) is None for field in dataclasses.fields(method))
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.alpha = 0.5
    assert "arXiv:" in cls.__doc__ and " = " in cls.__doc__ and "Args:" in cls.__doc__


def test_equal_settings_are_equal():
    assert NASA(0.5) == NASA(alpha=0.5) != NASA(0.25)
    assert NASA(0.5) != VSF(0.5)
    assert NAG(3.0, norm=2) == NAG(torch.tensor(3), norm=2) != NAG(3.0)
    assert NASA(torch.eye(2)) == NASA(torch.eye(2)) != NASA(torch.ones(2, 2))
    assert NASA(torch.ones(1)) != NASA(torch.ones(2)) != NASA([1.0, 1.0])


def test_names():
    assert str(NASA()) == "NASA" and str(NASA(rule="nasa-text")) == "NASA, rule nasa-text"
    assert str(NAG()) == "NAG" and str(NAG(8, 2, norm=2)) == "NAG, scale 8, tau 2, norm 2"
    assert str(VSF(0.5)) == "VSF"
    assert str(ProjectedNASA(0.5)) == "ProjectedNASA"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NASA("strong"), "NASA: alpha must be a finite number"),
        (lambda: NASA(float("nan")), "NASA: alpha must be a finite number"),
        (lambda: NASA(torch.ones(2, 2, 2)), "NASA: a tensor alpha must be"),
        (lambda: NASA(rule="vsf"), r"NASA: .* write VSF\(alpha\)"),
        (lambda: NASA(rule="nasa-image"), "NASA: rule must be one of 'nasa', 'nasa-cross', 'n"),
        (lambda: NASA(0.5, ["nasa"]), "NASA: rule must be one of"),
        (lambda: VSF("strong"), "VSF: alpha must be a finite number"),
        (lambda: ProjectedNASA("strong"), "ProjectedNASA: alpha must be a finite number"),
        (lambda: NAG(alpha="half"), "NAG: alpha must be a finite number"),
        (lambda: NAG(scale=1), "NAG: scale 1 is no guidance"),
        (lambda: NAG(scale="3"), "NAG: scale must be a finite number"),
        (lambda: NAG(tau=0), "NAG: tau must be above 0"),
        (lambda: NAG(norm=3), "NAG: norm must be 1"),
    ],
)
def test_bad_settings_are_refused_when_the_method_is_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---- enable_nasa ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CROSS | JOINT)
def test_defaults_of_the_family(family):
    make, alpha, (scale, tau, share) = (CROSS | JOINT)[family]
    rule = "nasa" if family in CROSS else "nasa-cross"
    for given, expected in (
        (None, NASA(alpha, rule)),
        (NASA(), NASA(alpha, rule)),
        (NASA(0.7), NASA(0.7, rule)),
        (VSF(), VSF(alpha)),
        (ProjectedNASA(), ProjectedNASA(1.5 if family in CROSS else 1.0)),
        (NAG(), NAG(scale, tau, share, norm=1)),
        (NAG(tau=4.0, norm=2), NAG(scale, 4.0, share, norm=2)),
    ):
        with nasa(make(), method=given, negative_prompt_embeds=negative(family)) as handle:
            assert handle.method == expected
            assert handle.alpha == expected.alpha
            handle.set_negative_prompt(negative_prompt_embeds=2 * negative(family))
            assert handle.method == expected


def test_alpha_is_short_for_nasa(sd):
    with nasa(sd, "blurry", alpha=0.3) as handle:
        assert handle.method == NASA(0.3, "nasa")
        short = draw(sd)
    with nasa(sd, "blurry", NASA(0.3)):
        assert torch.equal(draw(sd), short)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "nag"}, r"one of the classes NASA, ProjectedNASA, NAG, VSF .*got 'nag'"),
        ({"method": 0.5}, r"one of the classes NASA, ProjectedNASA, NAG, VSF .*got 0.5"),
        ({"method": NAG}, r"write NAG\(\)"),
        ({"method": NAG(), "alpha": 0.5}, r"short for NASA\(alpha\); .* write NAG\(alpha=...\)"),
        ({"method": NASA(), "alpha": 0.5}, r"write NASA\(alpha=...\)"),
        ({"method": NASA(rule="nasa-text")}, "NASA: rule must be one of 'nasa' for Stable Diff"),
    ],
    ids=str,
)
def test_what_enable_nasa_refuses(sd, options, message):
    with pytest.raises(ValueError, match=message):
        enable_nasa(sd, "blurry", **options)
    assert not sd.unet._forward_pre_hooks


def test_pairs_make_alpha_a_factor(sd):
    pairs = [("blurry", 0.3), ("red", 0.8)]
    for method, alpha in ((NASA(), 0.1), (VSF(), 0.1), (ProjectedNASA(), 1.5)):
        with nasa(sd, pairs, method) as handle:
            assert handle.alpha == 1.0
            handle.set_negative_prompt("blurry")
            assert handle.alpha == alpha


@dataclasses.dataclass(frozen=True, eq=False)
class Positive(Method):
    """A method of one's own: the positive prompt alone, whatever alpha is."""

    alpha: float | None = None
    name = "Positive"

    def cross(self, q, pos, negatives, backend, image=None):
        assert [x.alpha.rows.item() for x in negatives] == [0.5]
        return subtract(q, pos, nothing(pos), 0.0, backend, image)

    def joint(self, streams):
        return keep_apart(streams)


def test_a_method_of_ones_own(sd):
    stock = draw(sd)
    with nasa(sd, "blurry", Positive(0.5)) as handle:
        assert_same_image(draw(sd), stock)
        assert handle.report().method == "Positive"
    case = joint_cases.sd3()
    stock = case()
    with nasa(case.pipe, "blurry", Positive(), cfg=False, max_sequence_length=8) as handle:
        assert handle.method == Positive(0.1)
        assert_same_image(case(), stock)


# ---- the handle ----------------------------------------------------------------------------------


def alone(method, **options):
    pipe = testing.stable_diffusion()
    with nasa(pipe, "blurry", method, **options):
        return draw(pipe, guidance=5.0)


def test_the_method_changes_between_calls(sd):
    handle = enable_nasa(sd, "blurry")
    for method in (NAG(8.0), VSF(0.5), NASA(0.3), ProjectedNASA(1.5), NAG(alpha=[0.5])):
        handle.method = method
        assert torch.equal(draw(sd, guidance=5.0), alone(method))
        assert type(handle.method) is type(method)
    handle.method = dataclasses.replace(handle.method, tau=1.0)
    assert handle.method == NAG(3.0, 1.0, [0.5], norm=1)


def test_alpha_of_the_handle_is_that_of_the_method(sd):
    handle = enable_nasa(sd, "blurry", NAG(8.0))
    handle.alpha = 0.25
    assert handle.method == NAG(8.0, 2.5, 0.25, norm=1)
    handle.alpha = None
    assert handle.alpha == 0.375
    handle.method = NASA(Image.new("L", (4, 4), 255))
    assert torch.equal(handle.method.alpha, torch.full((4, 4), 0.1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda handle: setattr(handle, "method", "vsf"), "one of the classes"),
        (lambda handle: setattr(handle, "method", None), "write NASA()"),
        (lambda handle: setattr(handle, "method", NASA(rule="nasa-text")), "rule must be one of"),
        (lambda handle: setattr(handle, "method", VSF(torch.ones(4, 4))), "cannot be a map"),
        (lambda handle: setattr(handle, "alpha", "strong"), "NASA: alpha must be"),
    ],
)
def test_a_refused_change_changes_nothing(sd, change, message):
    handle = enable_nasa(sd, "blurry", NASA(0.3))
    before = draw(sd)
    with pytest.raises(ValueError, match=message):
        change(handle)
    assert handle.method == NASA(0.3, "nasa")
    assert torch.equal(draw(sd), before)


def test_several_prompts_do_not_become_nag(sd):
    handle = enable_nasa(sd, [("blurry", 0.3), ("red", 0.8)])
    before = draw(sd)
    with pytest.raises(ValueError, match="NAG: it takes one negative prompt"):
        handle.method = NAG()
    assert torch.equal(draw(sd), before)


@pytest.fixture
def clean_prompts(monkeypatch):
    """diffusers 0.35 cleans Wan's prompts with the package ftfy whether it is there or not."""
    monkeypatch.setattr(pipeline_wan, "ftfy", SimpleNamespace(fix_text=str), raising=False)


@pytest.mark.parametrize("given", ["prompt", "embeds"])
def test_padding_goes_and_comes_with_the_method(clean_prompts, given):
    """VSF leaves it out, the others keep it: as if each had been enabled by itself."""
    pipe = testing.wan()
    options = {"negative_prompt": "blurry"}
    if given == "embeds":
        text = torch.zeros(1, 20, 32)
        text[:, :5] = joint_cases.random(1, 5, 32)
        options = {"negative_prompt_embeds": text}
    keys = {}
    for method in (NASA(), VSF()):
        with nasa(pipe, method=method, **options) as handle:
            draw(pipe)
            keys[type(method)] = handle.report().keys_neg
    assert keys[VSF] < keys[NASA]
    handle = enable_nasa(pipe, **options)
    for cls in (VSF, NASA, NAG, VSF):
        handle.method = cls()
        draw(pipe)
        assert handle.report().keys_neg == keys.get(cls, keys[NASA])


def test_padding_that_cannot_be_left_out_any_more(clean_prompts):
    """Without text encoders the prompt cannot be encoded again: nothing changes."""
    pipe = testing.wan()
    handle = enable_nasa(pipe, "blurry", NASA(0.3))
    before = draw(pipe)
    pipe.text_encoder = None
    with pytest.raises(ValueError, match="no text encoder"):
        handle.method = VSF()
    assert handle.method == NASA(0.3, "nasa")
    handle.method = NAG()
    handle.method = NASA(0.3)
    text = testing.wan().encode_prompt("a cat", None, False, max_sequence_length=512)[0]
    assert torch.equal(draw(pipe, None, prompt_embeds=text), before)
