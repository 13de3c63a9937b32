"""Which rows are guided, case by case: branches in any order, equal texts, callbacks, own loops,
modular pipelines, and handles whose denoiser is no longer the one that runs."""

import copy
import pickle
from types import SimpleNamespace

import diffusers
import every_pipeline
import joint_cases
import pytest
import streams
import torch
from drawing import assert_same_image, denoise, negative_embeds, relative_error
from nasa_diffusers import NASA, VSF, disable_nasa, enable_nasa, nasa, rows, testing
from oracle import algorithm_1
from test_pipe_rows import Calls, check_rows, prompt_texts

TEXT = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(4))


def call(name, prompts, negatives, guidance=5.0, **options):
    pipe = every_pipeline.build(name)
    arguments = every_pipeline.arguments(pipe, prompts, negatives, guidance)
    return pipe, arguments | options


# ---- pipelines of diffusers ----------------------------------------------------------------------


def test_multidiffusion_in_one_batch_is_that_of_one_view_at_a_time():
    def draw(views, **settings):
        pipe, arguments = call(
            "StableDiffusionPanoramaPipeline", ["a cat"], ["bad"], width=640, view_batch_size=views
        )
        with nasa(pipe, negative_prompt_embeds=TEXT, **settings):
            return pipe(**arguments)[0]

    one_by_one = draw(1, alpha=0.5)
    assert_same_image(draw(8, alpha=0.5), one_by_one)
    assert relative_error(draw(8, alpha=0), one_by_one) > 1e-4


@pytest.mark.parametrize(
    "name",
    ["StableUnCLIPPipeline", "StableDiffusionPipeline", "PixArtSigmaPAGPipeline", "FluxPipeline"],
)
def test_two_prompts_two_images_each_and_a_negative_for_each_prompt(name):
    """StableUnCLIP counts images in its `batch_size`."""
    prompts = ["a cat", "a big dog"]
    pipe = every_pipeline.build(name)
    texts = prompt_texts(name, pipe)
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    options = {"num_images_per_prompt": 2, "generator": generators}
    counts = check_rows(pipe, prompts, 5.0, 1.0, texts, **options)
    assert sum(counts) == (8 if "PAG" in name else 4)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "PixArtSigmaPipeline"])
@pytest.mark.parametrize("negatives", [["a cat", "a big dog"], ["a big dog", "a cat"]])
def test_prompts_that_are_negative_prompts_too(name, negatives):
    """Their values are the same, so the order of the branches is that of the pipeline."""
    pipe, arguments = call(name, ["a cat", "a big dog"], negatives)
    outputs = []
    Calls(every_pipeline.denoiser_of(pipe), lambda inputs, out: outputs.append(out.clone()))
    pipe(**arguments)
    with nasa(pipe, negative_prompt_embeds=TEXT, alpha=0.5):
        pipe(**call(name, ["a cat", "a big dog"], negatives)[1])
    stock, ours = outputs
    for row in range(2):
        assert_same_image(ours[row], stock[row])
        assert relative_error(ours[row + 2], stock[row + 2]) > 1e-4


@pytest.mark.parametrize("name", ["WanPipeline", "FluxPipeline"])
def test_two_calls_with_the_same_text(name, monkeypatch):
    pipe, arguments = call(name, ["a cat"], ["a cat"])
    module = every_pipeline.inspect.getmodule(type(pipe))
    monkeypatch.setattr(module, "ftfy", SimpleNamespace(fix_text=str), raising=False)
    outputs = []
    Calls(pipe.transformer, lambda inputs, out: outputs.append(out.clone()))
    with nasa(pipe, negative_prompt_embeds=TEXT, alpha=0.5):
        pipe(**arguments)
    guided, stock = outputs
    assert relative_error(guided, stock) > 1e-4


def test_a_callback_that_rewrites_both_texts():
    """The pipeline keeps the negative prompt it began with; which half it is does not change."""
    fresh = torch.randn(2, 77, 32)

    def rewrite(pipe, step, timestep, kwargs):
        return {"prompt_embeds": fresh}

    pipe, arguments = call("StableDiffusionPipeline", ["a cat"], ["bad"], num_inference_steps=2)
    options = {
        "callback_on_step_end": rewrite,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    }
    handle = enable_nasa(pipe, negative_prompt_embeds=TEXT, alpha=0.5)
    checked = []

    @torch.no_grad()
    def check(inputs, ours):
        handle.alpha = 0
        stock = pipe.unet(**inputs)[0]
        handle.alpha = 0.5
        assert_same_image(ours[0], stock[0])
        assert relative_error(ours[1], stock[1]) > 1e-4
        checked.append(torch.equal(inputs["encoder_hidden_states"], fresh))

    Calls(pipe.unet, check)
    handle.disable()
    handle = enable_nasa(pipe, negative_prompt_embeds=TEXT, alpha=0.5)
    pipe(**arguments | options)
    assert checked == [False, True]


def test_a_callback_that_ends_guidance():
    def end(pipe, step, timestep, kwargs):
        pipe._guidance_scale = 0.0
        return {"prompt_embeds": kwargs["prompt_embeds"][-1:]}

    pipe, arguments = call("StableDiffusionPipeline", ["a cat"], ["a cat"], num_inference_steps=2)
    options = {"callback_on_step_end": end}
    options["callback_on_step_end_tensor_inputs"] = ["prompt_embeds"]
    seen = []
    Calls(pipe.unet, lambda inputs, out: seen.append(out.clone()))
    with nasa(pipe, negative_prompt_embeds=TEXT, alpha=0.5) as handle:
        pipe(**arguments | options)
        guided = [hook.last_call for hook in handle._guidances[0].guided_layers.values()]
    assert [len(out) for out in seen] == [2, 1]
    assert all(last.q[0] == 1 for last in guided)


def test_texts_are_compared_once_a_run(monkeypatch):
    pipe, arguments = call("StableDiffusionPipeline", ["a cat"], ["bad"], num_inference_steps=4)
    counted, compare = [], rows.equal_rows
    monkeypatch.setattr(rows, "equal_rows", lambda *args: counted.append(1) or compare(*args))
    with nasa(pipe, negative_prompt_embeds=TEXT, alpha=0.5):
        pipe(**arguments)
    assert len(counted) == 1


def test_a_subclass_that_wraps_the_call_of_diffusers():
    class Wrapping(diffusers.StableDiffusionPipeline):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    pipe, arguments = call("StableDiffusionPipeline", ["a cat"], ["a cat"])
    wrapping = Wrapping(**pipe.components, requires_safety_checker=False)
    wrapping.set_progress_bar_config(disable=True)
    with nasa(pipe, negative_prompt_embeds=TEXT, alpha=0.5):
        expected = pipe(**arguments)[0]
        arguments["generator"] = [torch.Generator().manual_seed(0)]
        assert torch.equal(wrapping(**arguments)[0], expected)


# ---- pipelines of others -------------------------------------------------------------------------


class Own(diffusers.StableDiffusionPipeline):
    """A user's pipeline, which batches its branches in its own way."""

    def encode(self, prompt):
        return negative_embeds(self, prompt)

    @torch.no_grad()
    def reversed(self, latents):
        prompt_embeds, negative_prompt_embeds = self.encode("a cat"), self.encode("bad")
        text = torch.cat([prompt_embeds, negative_prompt_embeds])
        return self.unet(latents.expand(2, -1, -1, -1), 500, text).sample

    @torch.no_grad()
    def shuffled(self, latents):
        prompt_embeds = torch.cat([self.encode("a cat"), self.encode("a dog")])
        negative_prompt_embeds = self.encode("bad").repeat(2, 1, 1)
        batch_size = 2  # noqa: F841
        text = torch.cat([negative_prompt_embeds, prompt_embeds])[[3, 0, 2, 1]]
        return self.unet(latents.expand(4, -1, -1, -1), 500, text).sample

    @torch.no_grad()
    def three(self, latents):
        prompt_embeds = self.encode("a cat")
        negative_prompt_embeds, uncond_embeds = self.encode("bad"), self.encode("")
        prompt_embeds = torch.cat([uncond_embeds, prompt_embeds, negative_prompt_embeds])
        return self.unet(latents.expand(3, -1, -1, -1), 500, prompt_embeds).sample

    @torch.no_grad()
    def hidden(self, latents):
        text = torch.cat([self.encode("bad"), self.encode("a cat")])
        return self.unet(latents.expand(2, -1, -1, -1), 500, text).sample

    @torch.no_grad()
    def equal(self, latents):
        prompt_embeds, negative_prompt_embeds = self.encode("a cat"), self.encode("a cat")
        text = torch.cat([negative_prompt_embeds, prompt_embeds])
        return self.unet(latents.expand(2, -1, -1, -1), 500, text).sample


@pytest.fixture
def own():
    sd = testing.stable_diffusion()
    return Own(**sd.components, requires_safety_checker=False)


LATENTS = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("method", "negative_of"),
    [("reversed", [0, None]), ("shuffled", [1, None, 0, None]), ("three", [None, 0, None])],
)
def test_branches_in_any_order(own, method, negative_of):
    """Two prompts: a negative and an alpha for each follow their rows."""
    prompts = 2 if method == "shuffled" else 1
    texts = torch.randn(prompts, 5, 32, generator=torch.Generator().manual_seed(2))
    alphas = [0.4, 0.9][:prompts]
    with nasa(own, negative_prompt_embeds=texts, alpha=alphas):
        ours = getattr(own, method)(LATENTS)
    by_row = torch.tensor([0.0 if i is None else alphas[i] for i in negative_of])
    text = texts[[i or 0 for i in negative_of]]
    with algorithm_1(own.unet, [(text, None, by_row.view(-1, 1, 1, 1))]):
        assert_same_image(ours, getattr(own, method)(LATENTS))


@pytest.mark.parametrize("method", ["hidden", "equal"])
def test_what_is_not_known_is_asked(own, method):
    stock = getattr(own, method)(LATENTS)
    handle = enable_nasa(own, negative_prompt_embeds=TEXT, alpha=0.5)
    with pytest.raises(RuntimeError, match=r"carry the prompt is not known.*cfg=\.\.\."):
        getattr(own, method)(LATENTS)
    for handle.cfg in (True, [False, True]):
        ours = getattr(own, method)(LATENTS)
        assert_same_image(ours[0], stock[0])
        assert relative_error(ours[1], stock[1]) > 1e-4


def test_cfg_that_contradicts_the_texts(own):
    with (
        nasa(own, negative_prompt_embeds=TEXT, cfg=True) as handle,
        pytest.raises(RuntimeError, match="cfg=True says that numbers 1 of the 2 rows carry"),
    ):
        own.reversed(LATENTS)
    assert not handle.is_enabled


# ---- loops of one's own --------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", [True, [False, True]], ids=str)
def test_batched_guidance_on_a_transformer(cfg):
    case = joint_cases.flux()
    inputs = {k: v[:1].repeat(2, 1, 1) for k, v in case.inputs.items() if k == "hidden_states"}
    text = joint_cases.negative()
    with torch.no_grad(), nasa(case.pipe, negative_prompt_embeds=text, alpha=0.5) as handle:
        with pytest.raises(RuntimeError, match="both halves of the batch have the same latents"):
            case(**inputs)
        handle.cfg = cfg
        ours = case(**inputs)
    rows_alpha = torch.tensor([0.0, 0.5]).view(-1, 1, 1, 1)
    assert_same_image(ours, case.expected("nasa-cross", [(text, rows_alpha, None)], **inputs))


def test_a_bool_for_each_row(sd):
    text = negative_embeds(sd, "a cat")
    alphas = torch.tensor([0.5, 0.0, 0.5]).view(-1, 1, 1, 1)
    with torch.no_grad():
        with algorithm_1(sd.unet, [(TEXT, None, alphas)]):
            eager = denoise(sd, text, rows=3)
        with nasa(sd, negative_prompt_embeds=TEXT, alpha=0.5, cfg=[True, False, True]) as handle:
            assert_same_image(denoise(sd, text, rows=3), eager)
            with pytest.raises(ValueError, match="cfg has 3 bools, one per row, but the batch has"):
                denoise(sd, text, rows=2)
            handle.cfg = [False]
            stock = denoise(sd, text, rows=1)
            handle.alpha = 0
            assert torch.equal(denoise(sd, text, rows=1), stock)


@pytest.mark.parametrize("cfg", ["yes", 1, [], [1, 0]], ids=str)
def test_cfg_that_says_nothing(sd, cfg):
    with pytest.raises(ValueError, match="enable_nasa: cfg must be True"):
        enable_nasa(sd, "blurry", cfg=cfg)


# ---- modular pipelines ---------------------------------------------------------------------------


def modular():
    blocks = diffusers.modular_pipelines.stable_diffusion_xl.StableDiffusionXLAutoBlocks()
    pipe = blocks.init_pipeline()
    parts = testing.stable_diffusion_xl().components
    wanted = {name: part for name, part in parts.items() if name in pipe.component_names}
    pipe.register_components(**wanted)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("negative", ["bad", "a cat"])
def test_the_guider_of_a_modular_pipeline(negative):
    """It calls the UNet once for each branch: the unconditional call is stock, bit for bit."""
    pipe = modular()
    text = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(2))
    handle, guided = enable_nasa(pipe, negative_prompt_embeds=text, alpha=0.5), []
    handle.disable()

    @torch.no_grad()
    def check(inputs, ours):
        handle.alpha = 0
        stock = pipe.unet(**inputs)[0]
        with algorithm_1(pipe.unet, [(text, None, 0.5)]):
            eager = pipe.unet(**inputs)[0]
        handle.alpha = 0.5
        guided.append(not torch.equal(ours, stock))
        if guided[-1]:
            assert_same_image(ours, eager)

    Calls(pipe.unet, check)
    handle = enable_nasa(pipe, negative_prompt_embeds=text, alpha=0.5, stop=1)
    pipe(
        prompt="a cat", negative_prompt=negative, num_inference_steps=2, output="latents",
        height=32, width=32, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert sorted(guided[:2]) == [False, True]
    assert guided[2:] == [False, False]


# ---- the denoiser that runs ----------------------------------------------------------------------


def test_a_new_denoiser_made_from_the_guided_one(sd, draw):
    pipe = every_pipeline.build("StableDiffusionPipeline")
    arguments = every_pipeline.arguments(pipe, ["a cat"], ["bad"], 1.0)
    handle = enable_nasa(pipe, "blurry", alpha=0.5)
    guided = pipe(**arguments)[0]
    video = diffusers.AnimateDiffPipeline.from_pipe(
        pipe, motion_adapter=every_pipeline.motion_adapter()
    )
    video.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 1, "num_frames": 2, "height": 16, "width": 16}
    with pytest.raises(RuntimeError, match="made from the guided UNet2DConditionModel; the copy"):
        video("a cat", **options)
    assert "AnimateDiffPipeline" in handle.report().problem
    assert handle.report().layers_guided == 0
    # the first pipeline still is what it was
    again = every_pipeline.arguments(pipe, ["a cat"], ["bad"], 1.0)
    assert torch.equal(pipe(**again)[0], guided)
    assert handle.report().problem is None
    handle.disable()
    video("a cat", **options)


def test_a_denoiser_that_was_replaced(sd, draw):
    handle = enable_nasa(sd, "blurry", alpha=0.5)
    own, sd.unet = sd.unet, testing.stable_diffusion(seed=1).unet
    assert "it runs another UNet2DConditionModel now" in handle.report().problem
    assert str(handle.report()).startswith("NOT GUIDED")
    with pytest.raises(RuntimeError, match="it runs another UNet2DConditionModel now"):
        draw(sd)
    sd.unet = own
    draw(sd)
    assert handle.report().problem is None
    handle.disable()
    assert "NASA is off" in handle.report().problem


def test_another_pipeline_may_share_text_encoder_and_vae(sd, draw):
    """As a refiner does: its own denoiser is no copy of the guided one."""
    other = testing.stable_diffusion(seed=1)
    other.text_encoder, other.vae = sd.text_encoder, sd.vae
    stock = draw(other)
    with nasa(sd, "blurry", alpha=0.5):
        assert torch.equal(draw(other), stock)


def test_the_parts_that_are_watched_stay_what_they_were(sd, draw):
    handle = enable_nasa(sd, "blurry", alpha=0.5)
    encoder = copy.deepcopy(sd.text_encoder)
    pickle.loads(pickle.dumps(sd.text_encoder))
    encoded, encode = [], sd.text_encoder.register_forward_hook(lambda *_: encoded.append(1))
    draw(sd, "a cat", steps=2)
    encode.remove()
    # the prompt and stock's own nothing: the negative prompt is not encoded again
    assert len(encoded) == 2
    handle.disable()
    assert not sd.text_encoder._forward_pre_hooks
    assert not sd.vae.decoder._forward_pre_hooks
    del encoder


def test_an_exported_engine(sd):
    class Engine:
        config = sd.unet.config

    sd.register_modules(unet=None)
    sd.unet = Engine()
    with pytest.raises(ValueError, match=r"is a Engine and no torch\.nn\.Module"):
        enable_nasa(sd, "blurry")
    with pytest.raises(ValueError, match=r"no torch\.nn\.Module"):
        disable_nasa(sd)


# ---- reference images ----------------------------------------------------------------------------


def kontext_inputs(case):
    """A second image of the same size beside the one that is made."""
    ids = case.inputs["img_ids"]
    reference = ids + torch.tensor([1.0, 0.0, 0.0])
    states = joint_cases.random(2, 48, 16, seed=8)
    return {"img_ids": torch.cat([ids, reference]), "hidden_states": states}


@pytest.mark.parametrize("rule", ["nasa-cross", "nasa-text", "nasa"])
@pytest.mark.parametrize("alpha", [0.5, [0.2, 0.7]], ids=str)
def test_reference_images_are_not_guided(rule, alpha):
    case = joint_cases.flux()
    inputs, text = kontext_inputs(case), joint_cases.negative()
    is_target = torch.cat([torch.ones(24), torch.zeros(24)]).view(1, -1, 1, 1)
    tokens = torch.tensor(alpha).view(-1, 1, 1, 1) * is_target
    expected = case.expected(rule, [(text, tokens, None)], **inputs)
    with (
        torch.no_grad(),
        nasa(case.pipe, None, NASA(alpha, rule), negative_prompt_embeds=text, cfg=False),
    ):
        assert_same_image(case(**inputs), expected)


def test_value_sign_flip_cannot_leave_references_out():
    case = joint_cases.flux()
    with (
        nasa(case.pipe, None, VSF(), negative_prompt_embeds=joint_cases.negative(), cfg=False),
        pytest.raises(ValueError, match="reference images beside the image that is made"),
    ):
        case(**kontext_inputs(case))


def test_nag_leaves_references_out():
    case = joint_cases.flux()
    inputs, text = kontext_inputs(case), joint_cases.negative()
    share = torch.cat([torch.full((24,), 0.5), torch.zeros(24)]).view(1, -1, 1, 1)
    expected = case.expected(streams.Nag(20.0, 2.0), [(text, share, None)], **inputs)
    with torch.no_grad(), nasa(
        case.pipe, None, joint_cases.STRONG, negative_prompt_embeds=text, cfg=False
    ):  # fmt: skip
        assert_same_image(case(**inputs), expected)
