"""Who calls a denoiser of a further family: LoRAs that are swapped between calls, pipelines made of
one another; and a denoiser that is refused stays what it was."""

import sys
from types import SimpleNamespace

import diffusers
import every_pipeline
import pytest
import torch
from drawing import assert_same_image, relative_error
from nasa_diffusers import enable_nasa, nasa
from nasa_diffusers.families import skyreels
from oracle import algorithm_1
from test_pipe_adapters import add_lora
from test_pipe_rows import projected

TEXT = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def without_ftfy(monkeypatch):
    """Wan's pipelines clean their prompts with a package that need not be there."""
    for name, module in list(sys.modules.items()):
        cleans = name.startswith("diffusers.") and "prompt_clean" in vars(module)
        if cleans and not hasattr(module, "ftfy"):
            monkeypatch.setattr(module, "ftfy", SimpleNamespace(fix_text=str), raising=False)


# ---- what users do with Wan 2.2 ------------------------------------------------------------------


def test_image_to_video_of_wan_22_with_a_speed_lora_swapped_between_calls():
    """Two transformers, each with the LoRA of the call."""
    pipe = every_pipeline.build("WanImageToVideoPipeline")
    torch.manual_seed(1)
    config = dict(pipe.transformer.config)
    two = diffusers.WanTransformer3DModel.from_config(config).eval().requires_grad_(False)
    pipe.register_modules(transformer_2=two)
    pipe.register_to_config(boundary_ratio=0.9)
    models = pipe.transformer, pipe.transformer_2
    for model in models:
        add_lora(model, "fast", 1)
        add_lora(model, "slow", 2)

    def draw(name):
        for model in models:
            model.set_adapter(name)
        return pipe(**every_pipeline.arguments(pipe, ["a cat"], ["bad"], 1.0, steps=3))[0]

    def eager(name):
        for model in models:
            model.set_adapter(name)
        with (
            algorithm_1(models[0], [(projected(models[0], TEXT), None, 0.5)]),
            algorithm_1(models[1], [(projected(models[1], TEXT), None, 0.5)]),
        ):
            return draw(name)

    expected = {name: eager(name) for name in ("fast", "slow")}
    with nasa(pipe, negative_prompt_embeds=TEXT, alpha=0.5):
        for name in ("fast", "slow", "fast"):
            assert_same_image(draw(name), expected[name])
    assert relative_error(expected["fast"], expected["slow"]) > 1e-4


def test_pipelines_made_of_one_another_are_guided_together():
    pipe = every_pipeline.build("LTXPipeline")
    other = diffusers.LTXImageToVideoPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    arguments = every_pipeline.arguments(other, ["a cat"], ["bad"], 1.0)

    def draw():
        generator = [torch.Generator().manual_seed(0)]
        return other(**arguments | {"generator": generator})[0]

    stock = draw()
    with nasa(pipe, "blurry", alpha=0.5):
        ours = draw()
    with nasa(other, "blurry", alpha=0.5):
        assert_same_image(draw(), ours)
    assert relative_error(ours, stock) > 1e-4
    assert torch.equal(draw(), stock)


# ---- bad input -----------------------------------------------------------------------------------


WRONG = {
    "no prompt": {},
    "a rank": {"negative_prompt_embeds": torch.randn(5, 32)},
    "a mask": {
        "negative_prompt_embeds": TEXT,
        "negative_prompt_attention_mask": torch.ones(1, 4),
    },
    "a layer": {"negative_prompt_embeds": TEXT, "layers": "nothing.*"},
    "a map": {"negative_prompt_embeds": TEXT, "alpha": torch.ones(2, 2, 2)},
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", ["LTXPipeline", "SkyReelsV2ImageToVideoPipeline"])
def test_what_is_refused_leaves_nothing_behind(name, wrong):
    if name.startswith("SkyReels") and skyreels.ATTENTION is None:
        pytest.skip("SkyReels-V2 is supported from diffusers 0.36 on")
    pipe = every_pipeline.build(name)
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    with pytest.raises(ValueError, match="^(enable_nasa|NASA): "):
        enable_nasa(pipe, **WRONG[wrong])
    for part in parts:
        for module in part.modules():
            assert not hasattr(module, "_diffusers_hook")
            assert not module._forward_pre_hooks


def test_a_text_of_another_family_is_refused_in_the_call():
    pipe = every_pipeline.build("LTXPipeline")
    with (
        nasa(pipe, negative_prompt_embeds=torch.randn(1, 5, 7), alpha=0.5),
        pytest.raises(ValueError, match="has 7 channels, the prompt has 32"),
    ):
        pipe(**every_pipeline.arguments(pipe, ["a cat"], ["bad"], 1.0))
    pipe(**every_pipeline.arguments(pipe, ["a cat"], ["bad"], 1.0))
