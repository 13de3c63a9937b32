"""`NASAGuidance` in modular pipelines, against `enable_nasa` on the classic one, bit for bit."""

import importlib
import types

import diffusers
import pytest
import side_pipes
import torch
from nasa_diffusers import enable_nasa, testing
from nasa_diffusers.methods import METHODS

guider = pytest.importorskip("nasa_diffusers.guider", exc_type=ImportError)
NASAGuidance = guider.NASAGuidance
CALL = {"prompt": "a cat", "num_inference_steps": 3, "height": 32, "width": 32}


BLOCKS = {
    "stable_diffusion_xl": "StableDiffusionXLAutoBlocks",
    "stable_diffusion_3": "StableDiffusion3AutoBlocks",
    "wan": "WanBlocks",
}


def modular(classic, guidance, family="stable_diffusion_xl"):
    blocks = getattr(getattr(diffusers.modular_pipelines, family), BLOCKS[family])
    pipe = blocks().init_pipeline()
    parts = classic.components
    pipe.register_components(**{n: x for n, x in parts.items() if n in pipe.component_names})
    pipe.update_components(guider=guidance)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, **changes):
    options = {**CALL, "generator": torch.Generator().manual_seed(0), **changes}
    if isinstance(pipe, diffusers.ModularPipeline):
        options = {"negative_prompt": "a dog", "output": "latents"} | options
        return pipe(**options)
    return pipe(**options, guidance_scale=1.0, output_type="latent", return_dict=False)[0]


@pytest.fixture
def classic():
    pipe = testing.stable_diffusion_xl()
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Calls:
    """Rows of each call of a module."""

    def __init__(self, module):
        self.rows = []
        module.register_forward_pre_hook(
            lambda _, args, kwargs: self.rows.append(args[0].shape[0]), with_kwargs=True
        )


@pytest.mark.parametrize(
    ("method", "options"),
    [("NASA", {}), ("NAG", {"scale": 3.0}), ("VSF", {}), ("ProjectedNASA", {})],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_it_is_enable_nasa_on_the_classic_pipeline(classic, method, options):
    kind = next((cls for cls in METHODS if cls.__name__ == method), None)
    if kind is None:
        pytest.skip(f"there is no {method}")
    stock = draw(classic)
    handle = enable_nasa(classic, "a dog", kind(**options, alpha=0.5))
    wanted = draw(classic)
    handle.disable()
    pipe = modular(classic, NASAGuidance(alpha=0.5, method=method, options=options))
    calls = Calls(classic.unet)
    assert torch.equal(draw(pipe), wanted) and not torch.equal(wanted, stock)
    # one batch a step
    assert calls.rows == [1, 1, 1]
    # a second run, another negative prompt, and again the first
    assert not torch.equal(draw(pipe, negative_prompt="a bird"), wanted)
    assert torch.equal(draw(pipe), wanted)


@pytest.mark.parametrize("family", ["stable_diffusion_3", "wan"])
def test_other_modular_pipelines(family, monkeypatch):
    module = importlib.import_module(f"diffusers.modular_pipelines.{family}.encoders")
    if not hasattr(module, "ftfy"):
        # diffusers' blocks of Wan clean prompts with it unasked
        ftfy = types.SimpleNamespace(fix_text=lambda text: text)
        monkeypatch.setattr(module, "ftfy", ftfy, raising=False)
    classic = getattr(testing, family)()
    classic.set_progress_bar_config(disable=True)
    frames = {"num_frames": 5} if family == "wan" else {}
    stock = draw(classic, **frames)
    handle = enable_nasa(classic, "a dog", alpha=0.5)
    wanted = draw(classic, **frames)
    handle.disable()
    pipe = modular(classic, NASAGuidance(alpha=0.5), family)
    assert torch.equal(draw(pipe, **frames), wanted) and not torch.equal(wanted, stock)


SIDE = {
    "qwen-image": ("qwenimage", "QwenImageModularPipeline"),
    "z-image": ("z_image", "ZImageModularPipeline"),
    "ltx2": ("ltx2", "LTX2ModularPipeline"),
    "klein": ("flux2", "Flux2KleinBaseModularPipeline"),
}


def of_side(name, guidance):
    """A classic pipeline with a side stream, a modular one of its parts, and how both draw."""
    package, kind = SIDE[name]
    if name not in side_pipes.PIPES or not hasattr(diffusers, kind):
        pytest.skip("a newer diffusers has it")
    build, options = side_pipes.PIPES[name]
    made = build(is_distilled=False) if name == "klein" else build()
    if name == "qwen-image":
        # the blocks have theirs in their code
        encoders = importlib.import_module("diffusers.modular_pipelines.qwenimage.encoders")
        made.prompt_template_encode = encoders.QWENIMAGE_PROMPT_TEMPLATE
        made.prompt_template_encode_start_idx = encoders.QWENIMAGE_PROMPT_TEMPLATE_START_IDX
    cls = getattr(diffusers, kind)
    blocks = getattr(getattr(diffusers.modular_pipelines, package), cls.default_blocks_name)
    pipe = cls(blocks())
    parts = {x: part for x, part in made.components.items() if x in pipe.component_names}
    pipe.register_components(**parts)
    pipe.update_components(guider=guidance)
    pipe.set_progress_bar_config(disable=True)
    own = {x: options[x] for x in options if x in pipe.blocks.input_names}
    negative = {"negative_prompt": "a dog"} if "negative_prompt" in pipe.blocks.input_names else {}

    def draw_modular(steps=2):
        latents = pipe(
            prompt="a cat", num_inference_steps=steps, output="latents",
            generator=torch.Generator().manual_seed(0), **own, **negative,
        )  # fmt: skip
        if name == "qwen-image":
            # [b, c, 1, height, width]
            b, c, _, height, width = latents.shape
            latents = made._pack_latents(latents, b, c, height, width)
        return latents.flatten(1)

    return made, lambda: side_pipes.draw(made, options), draw_modular


@pytest.mark.parametrize("name", ["qwen-image", "z-image"])
def test_pipelines_with_a_side_stream(name):
    guidance = NASAGuidance(alpha=0.5)
    classic, draw_classic, draw_modular = of_side(name, guidance)
    stock = draw_classic()
    handle = enable_nasa(classic, "a dog", alpha=0.5)
    wanted = draw_classic()
    handle.disable()
    assert torch.equal(draw_modular(), wanted) and not torch.equal(wanted, stock)
    # one call a step, and nothing is left
    calls = []
    counter = classic.transformer.register_forward_hook(lambda *_: calls.append(1))
    draw_modular(steps=3)
    counter.remove()
    assert len(calls) == 3
    assert torch.equal(draw_classic(), stock)
    guidance.disable()
    assert torch.equal(draw_modular(), stock)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("ltx2", "a guider for the picture and one for the sound"),
        ("klein", "Flux2KleinBaseModularPipeline takes no negative_prompt"),
    ],
)
def test_pipelines_that_it_cannot_guide(name, why):
    classic, draw_classic, draw_modular = of_side(name, NASAGuidance(alpha=0.5))
    stock = draw_classic()
    with pytest.raises(ValueError, match=f"NASAGuidance: .*{why}.*negative_prompt_embeds"):
        draw_modular()
    assert torch.equal(draw_classic(), stock)
    assert not classic.transformer._forward_pre_hooks


def test_disabled_it_is_stock(classic):
    stock = draw(classic)
    guidance = NASAGuidance(alpha=0.5)
    pipe = modular(classic, guidance)
    guided = draw(pipe)
    guidance.disable()
    assert torch.equal(draw(pipe), stock) and not torch.equal(guided, stock)
    guidance.enable()
    assert torch.equal(draw(pipe), guided)
    # nothing is left on the denoiser, whatever guider comes next
    assert torch.equal(draw(classic), stock)
    pipe.update_components(guider=diffusers.ClassifierFreeGuidance(guidance_scale=1.0))
    assert torch.equal(draw(pipe), stock)


def test_a_run_that_broke_off_leaves_nothing_that_acts(classic):
    stock = draw(classic)
    pipe = modular(classic, NASAGuidance(alpha=0.5))
    whole = draw(pipe)

    def stop(module, args, output):
        raise KeyboardInterrupt

    breaks = classic.unet.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        draw(pipe)
    breaks.remove()
    assert torch.equal(draw(pipe), whole)
    assert torch.equal(draw(classic), stock)


def test_the_text_is_projected_once_in_a_run(classic):
    counted = []
    layer = next(m for n, m in classic.unet.named_modules() if n.endswith("attn2.to_k"))
    layer.register_forward_hook(lambda module, args, output: counted.append(args[0].shape))
    pipe = modular(classic, NASAGuidance(alpha=0.5))
    draw(pipe)
    once = len(counted)
    draw(pipe, num_inference_steps=6)
    assert len(counted) == 2 * once


def test_the_steps_that_are_guided(classic):
    handle = enable_nasa(classic, "a dog", alpha=0.5, start=1, stop=2)
    wanted = draw(classic)
    handle.disable()
    pipe = modular(classic, NASAGuidance(alpha=0.5, start=0.34, stop=0.67))
    assert torch.equal(draw(pipe), wanted)


def test_its_settings_are_checked_and_kept():
    guidance = NASAGuidance(alpha=0.3, method="NAG", options={"scale": 4.0}, layers="up_blocks.*")
    again = guidance.new(alpha=0.4)
    assert again.config.layers == "up_blocks.*" and again.method.scale == 4.0
    assert again.method.alpha == 0.4
    with pytest.raises(ValueError, match="method must be one of NASA, .* got 'CFG'"):
        NASAGuidance(method="CFG")
    with pytest.raises(ValueError, match="options of NASA must be of rule, got scale"):
        NASAGuidance(options={"scale": 3})
