"""Every family against an oracle of its own, at strengths above 0, on prompts of unequal size."""

import dataclasses
import inspect
import types

import pytest
import torch
from comfyui.oracle import (
    ALPHA,
    by_two_calls,
    close,
    in_lockstep,
    layers_of,
    node,
    rows_of,
)
from comfyui.tiny import predict, tiny

CROSS = (
    "sd15", "sdxl", "wan", "wan-i2v", "wan-camera", "vace", "ltxv", "ltx2", "ltx2.3", "pixart",
    "cosmos1", "cosmos", "anima",
)  # fmt: skip
JOINT = (
    "flux", "flux2", "chroma", "qwen", "sd3", "aura", "hunyuan", "hunyuan1.5", "hunyuan-image",
    "lumina2", "zimage", "krea2",
)  # fmt: skip


@pytest.fixture
def model(request):
    return tiny(request.param)


@pytest.mark.parametrize("model", CROSS, indirect=True, ids=CROSS)
def test_cross_attention(pack, model, request):
    name = request.node.callspec.id
    positive, negative = model.text(20, 1), model.text(13, 2)
    if name == "pixart":
        # its attention takes one length
        negative = model.text(20, 2)
    stock = predict(model, positive)
    layers = len(layers_of(name, model.net))
    expected = by_two_calls(name, model, positive, negative, [ALPHA] * layers)
    actual = predict(model, positive, node(pack, model, negative))
    close(actual, expected, stock)
    # the MODEL that came in is as it was
    assert torch.equal(predict(model, positive), stock)
    some = by_two_calls(name, model, positive, negative, [0.0] + [ALPHA] * (layers - 1))
    actual = predict(model, positive, node(pack, model, negative, layers=f"1-{layers - 1}"))
    close(actual, some, stock)


@pytest.mark.parametrize(
    ("model", "lengths"), [("wan", (100, 28)), ("wan-i2v", (200, 57))],
    indirect=["model"], ids=["as many keys as the image has", "as many as the image to start from"],
)  # fmt: skip
def test_a_text_as_long_as_another_attention(pack, model, lengths, request):
    """Of 128 tokens of the image, or 257 of the one it starts from."""
    name = request.node.callspec.params["model"]
    positive, negative = (model.text(n, seed) for seed, n in enumerate(lengths))
    expected = by_two_calls(name, model, positive, negative, [ALPHA] * 3)
    close(predict(model, positive, node(pack, model, negative)), expected, predict(model, positive))


@pytest.mark.parametrize("model", JOINT, indirect=True, ids=JOINT)
def test_joint_attention(pack, model, request):
    name = request.node.callspec.id
    rows = rows_of(name, model)
    # the image of Lumina 2 stands behind its text, whose length is the positive's
    positive, negative = model.text(20, 1), model.text(20 if name == "lumina2" else 13, 2)
    stock = predict(model, positive)
    expected = in_lockstep(model, positive, negative, ALPHA, rows)
    actual = predict(model, positive, node(pack, model, negative))
    close(actual, expected, stock)
    assert torch.equal(predict(model, positive), stock)
    # another length, and in the order that was not the longer one's
    expected = in_lockstep(model, negative, positive, ALPHA, rows)
    close(predict(model, negative, node(pack, model, positive)), expected, stock)


@pytest.mark.parametrize("model", ["flux", "flux2", "qwen", "krea2"], indirect=True)
def test_images_to_refer_to_are_of_the_image(pack, model, request):
    """FLUX.1 Kontext, FLUX.2, Qwen-Image-Edit, Krea 2."""
    name = request.node.callspec.params["model"]
    image = torch.randn(model.latent, generator=torch.Generator().manual_seed(5))
    references = {"reference_latents": [image], "reference_latents_method": "index"}
    model = dataclasses.replace(model, settings={**model.settings, **references})
    positive, negative = model.text(20, 1), model.text(13, 2)
    expected = in_lockstep(model, positive, negative, ALPHA, rows_of(name, model, 64))
    close(predict(model, positive, node(pack, model, negative)), expected, predict(model, positive))


@pytest.mark.parametrize("is_added", [False, True], ids=["integers", "added to the scores"])
@pytest.mark.parametrize("model", ["ltxv"], indirect=True)
def test_tokens_that_a_mask_hides_are_as_if_they_were_not_there(pack, model, is_added):
    positive, negative = model.text(20, 1), model.text(13, 2)
    masked = dataclasses.replace(model, shown=9, is_added=is_added)
    expected = predict(model, positive[:, :9], node(pack, model, negative[:, :9]))
    stock = predict(model, positive[:, :9])
    # one that hides nothing of the negative text may be of the other kind
    for text, of_text in ((negative, masked), (negative[:, :9], model)):
        close(predict(masked, positive, node(pack, of_text, text)), expected, stock)


@pytest.mark.parametrize(
    ("model", "conds", "message"),
    [
        ("hunyuan1.5", {"conditioning_byt5small": torch.zeros(1, 4, 1472)}, "glyphs .txt_byt5."),
        ("hunyuan1.5", {"clip_vision_output": types.SimpleNamespace(
            last_hidden_state=torch.zeros(1, 5, 1152))}, "an image .clip_fea."),
        ("zimage", {"reference_latents": [torch.zeros(1, 16, 16, 16)]}, "an image to refer to"),
    ],
    indirect=["model"], ids=["glyphs", "an image", "an image of Z-Image"],
)  # fmt: skip
def test_tokens_that_are_neither_text_nor_image_are_refused(pack, model, conds, message):
    text = model.text(20, 1)
    other = dataclasses.replace(model, settings={**model.settings, **conds})
    guided = node(pack, model, text)
    if "ref_latents" not in inspect.getsource(type(model.patcher.model).extra_conds) and (
        "reference_latents" in conds
    ):
        pytest.skip("this ComfyUI's Z-Image takes no image to refer to")
    with pytest.raises(ValueError, match=f"this call has {message} .* leave it out"):
        predict(other, text, guided)
    # in the negative text as well
    if "conditioning_byt5small" in conds:
        with pytest.raises(ValueError, match=f"this call has {message}"):
            predict(model, text, node(pack, other, text))


@pytest.mark.parametrize("model", CROSS + JOINT, indirect=True, ids=CROSS + JOINT)
def test_a_prompt_against_itself(pack, model):
    """Projected takes nothing from an equal prompt, whatever the strength: the stock result."""
    text = model.text(20, 1)
    stock = predict(model, text)
    actual = predict(model, text, node(pack, model, text, method="NASA projected", strength=2.0))
    assert (actual - stock).norm() < 1e-4 * stock.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["wan", "flux", "ltxv"])
def test_half_precision_rounds_as_the_stock_network_does(pack, name, dtype):
    results = []
    for model in (tiny(name), tiny(name, dtype)):
        positive, negative = model.text(20, 1), model.text(13, 2)
        stock = predict(model, positive)
        results.append((stock, predict(model, positive, node(pack, model, negative))))
    (stock, guided), (stock_half, guided_half) = results
    assert (guided_half - guided).norm() < 4 * (stock_half - stock).norm()
    assert (guided_half - stock_half).norm() > 0.5 * (guided - stock).norm()
