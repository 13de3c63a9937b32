"""What cannot be: one sentence, and the MODEL that came in is as it was."""

import dataclasses

import pytest
import torch
from comfyui.oracle import ALPHA, node
from comfyui.tiny import predict, tiny


@pytest.mark.parametrize(
    ("conditioning", "message"),
    [
        ([], "is empty; connect a text"),
        ([[torch.zeros(1, 0, 64), {}]], "the negative text has no tokens"),
        ([[torch.zeros(1, 4, 64), {}]] * 2, "has 2 prompts; give each a node of its own"),
        ([[torch.zeros(1, 4, 64), {"mask": torch.ones(1, 8, 8)}]], "has a mask, which is not"),
        ([[torch.zeros(1, 4, 64), {"area": (8, 8, 0, 0)}]], "has an area, which is not"),
        ([[torch.zeros(1, 4, 64), {"end_percent": 0.5}]], "has a range of steps, which is not"),
    ],
    ids=["empty", "no tokens", "two", "mask", "area", "steps"],
)
def test_a_conditioning_that_is_no_prompt(pack, model, conditioning, message):
    from nasa_pack.nodes import NasaNegativePrompt

    arguments = ("NASA", ALPHA, "nasa", 0.0, 1.0, "")
    with pytest.raises(ValueError, match=message):
        NasaNegativePrompt.execute(model.patcher, conditioning, *arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "PAG"}, "method must be one of NASA, NASA projected, NAG, VSF, got 'PAG'"),
        ({"rule": "sum"}, "rule must be one of nasa-cross, nasa-text, nasa, got 'sum'"),
        ({"strength": float("nan")}, "strength must be 0 or more, got nan"),
        ({"start_percent": 0.7, "end_percent": 0.2}, "start_percent must be below end_percent"),
    ],
    ids=["method", "rule", "strength", "steps"],
)
def test_settings_of_another_version(pack, model, texts, change, message):
    from nasa_pack.nodes import NasaNegativePrompt

    settings = {
        "model": model.patcher, "negative": model.conditioning(texts[1]), "method": "NASA",
        "strength": ALPHA, "rule": "nasa", "start_percent": 0.0, "end_percent": 1.0, "layers": "",
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        NasaNegativePrompt.execute(**{**settings, **change})


def test_a_text_of_another_model(pack, model, texts):
    other = torch.randn(1, 7, 32)
    guided = node(pack, model, other)
    with pytest.raises(ValueError, match="has 32 channels and this model's text 64; encode it"):
        predict(model, texts[0], guided)


def test_nodes_that_do_not_go_together(pack, model, texts):
    first = node(pack, model, texts[1])
    with pytest.raises(ValueError, match="different methods, NAG, NASA; set one for all"):
        node(pack, model, texts[2], first, "NAG", 3.0)
    nag = node(pack, model, texts[1], None, "NAG", 3.0)
    with pytest.raises(ValueError, match="NAG takes one negative prompt, and there are 2 nodes"):
        node(pack, model, texts[2], nag, "NAG", 3.0)


def test_nodes_that_do_not_go_together_in_joint_attention(pack):
    model = tiny("flux")
    positive, negative = model.text(20, 1), model.text(13, 2)
    first = node(pack, model, negative, method="VSF")
    with pytest.raises(ValueError, match="VSF takes one negative prompt where text and image"):
        node(pack, model, negative, first, "VSF")
    first = node(pack, model, negative, rule="nasa-cross")
    with pytest.raises(ValueError, match="several nodes in a row need the rule nasa-cross"):
        node(pack, model, negative, first, rule="nasa")
    # the node before them is as it was
    assert torch.isfinite(predict(model, positive, first)).all()


def test_a_mask_of_tokens_is_refused_in_joint_attention(pack):
    """As Lumina 2 has it where the mask hides something."""
    model = tiny("lumina2")
    positive, negative = model.text(20, 1), model.text(13, 2)
    settings = {**model.settings, "attention_mask": None}
    masked = dataclasses.replace(model, settings=settings, shown=9)
    for of_positive, of_negative in ((masked, model), (model, masked)):
        with pytest.raises(ValueError, match="has a mask of its tokens, which is not obeyed"):
            predict(of_positive, positive, node(pack, of_negative, negative))


@pytest.mark.parametrize(
    ("layers", "message"),
    [("one", "must be like 0-9, 12"), ("2-1", "must be like"), ("0-3", "must be below 3")],
)
def test_layers_that_are_none(pack, model, texts, layers, message):
    with pytest.raises(ValueError, match=message):
        node(pack, model, texts[1], layers=layers)


def test_a_network_that_is_not_known(pack, model, texts, monkeypatch):
    from nasa_pack.steering import families

    monkeypatch.setattr(families, "FAMILIES", {"Flux": families.Flux})
    with pytest.raises(ValueError, match="the network WanModel is not known to this node"):
        node(pack, model, texts[1])


def test_a_guider_with_three_predictions(pack, model, texts):
    with pytest.raises(ValueError, match="more than a positive and a negative prediction"):
        predict(model, texts[0], node(pack, model, texts[1]), cond_or_uncond=[2])
