"""The world: its renders, its captions, its judge, and its latent code."""

import collections
import json
import random

import diffusers
import pytest
import torch
from diffusers import PixArtAlphaPipeline, StableDiffusionPipeline
from nasa_diffusers import nasa
from nasa_distill.train.networks import model_of
from nasa_distill.world import captions, code, model, t5
from nasa_distill.world.fit import Settings
from nasa_distill.world.judge import VALID_BELOW, judge
from nasa_distill.world.scene import ATTRIBUTES, RATES, Scene, render, renders, scenes
from transformers import CLIPTextModelWithProjection

SCENE = Scene("red", "circle", "striped", "white", "large", "blurry")


def test_rates_are_those_of_the_attributes():
    _, rates = renders()
    assert rates.sum().item() == pytest.approx(1)
    for name in ATTRIBUTES:
        for value, rate in RATES[name].items():
            shown = torch.tensor([getattr(scene, name) == value for scene in scenes()])
            assert rates[shown].sum().item() == pytest.approx(rate)


def test_the_judge_is_exact_on_every_render():
    images, _ = renders()
    verdict = judge(images)
    assert torch.equal(verdict.scene, torch.arange(len(scenes())))
    assert verdict.residual.max() == 0 and verdict.valid.all()


def test_the_judge_bears_noise_and_refuses_blends():
    images, _ = renders()
    noise = 0.05 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    verdict = judge(images + noise)
    assert (verdict.scene == torch.arange(len(scenes()))).float().mean() > 0.98
    assert verdict.valid.all()

    red, blue = (render(SCENE._replace(colour=c, defect="clean")) for c in ("red", "blue"))
    assert not judge(((red + blue) / 2)[None]).valid.item()
    assert judge(torch.zeros(1, 3, 32, 32)).residual.item() > VALID_BELOW


def test_verdicts_are_about_what_a_caption_names():
    verdict = judge(render(SCENE)[None])
    assert verdict.follows("a blurry photo of a large red striped circle").all()
    assert verdict.follows("a photo of a shape").all()
    assert not verdict.follows("a photo of a red square").any()
    assert verdict.shows("blue, blurry").all() and not verdict.shows("blue, clean").any()
    # a caption that names two values of an attribute takes either
    assert verdict.follows("red, blue").all()


@pytest.mark.parametrize(
    "images, message",
    [
        (torch.zeros(3, 32, 32), r"must be \[b, 3, 32, 32\]"),
        (torch.zeros(1, 3, 64, 64), r"got \[1, 3, 64, 64\]"),
        (torch.full((1, 3, 32, 32), torch.nan), "must be finite"),
    ],
)
def test_the_judge_refuses(images, message):
    with pytest.raises(ValueError, match=message):
        judge(images)


def test_captions_are_read_as_they_were_written():
    random_ = random.Random(0)
    for scene in scenes():
        named = [name for name in ATTRIBUTES if random_.random() < 0.5]
        expected = {name: {getattr(scene, name)} for name in named}
        assert captions.read(captions.sentence(scene, named)) == expected
        assert captions.read(captions.listing(scene, named)) == expected
        assert judge(render(scene)[None]).follows(captions.draw_caption(scene, random_)).all()


def test_captions_name_half_of_the_attributes():
    random_ = random.Random(0)
    drawn = [captions.draw_caption(SCENE, random_, p_empty=0.25) for _ in range(4000)]
    assert 0.23 < drawn.count("") / len(drawn) < 0.27
    sentences = [caption for caption in drawn if "photo" in caption]
    counts = collections.Counter(name for s in sentences for name in captions.read(s))
    for name in ATTRIBUTES:
        assert 0.46 < counts[name] / len(sentences) < 0.54


def test_unknown_words_are_refused():
    with pytest.raises(ValueError, match="'cat' in 'a red cat' is not a word"):
        captions.read("a red cat")


@pytest.mark.parametrize("make, added", [(model.make_tokenizer, 2), (t5.make_tokenizer, 1)])
def test_every_word_is_one_token(make, added):
    tokenizer = make()
    longest = captions.sentence(SCENE, ATTRIBUTES)
    for word in captions.WORDS:
        assert len(tokenizer(word).input_ids) == 1 + added
    assert len(tokenizer(longest).input_ids) <= captions.MAX_TOKENS
    assert len(tokenizer("red, blurry").input_ids) == 3 + added
    assert len(tokenizer("cat").input_ids) > 2 + added
    tokens = model.tokenize(tokenizer, ["red, blurry", ""])
    assert tokens.shape == (2, captions.MAX_TOKENS)


def test_the_code_keeps_what_the_judge_sees():
    images, _ = renders()
    decoded = code.PatchCode().decode(code.PatchCode().encode(images))
    verdict = judge(decoded)
    assert verdict.residual.max() < 0.012
    assert (verdict.scene == torch.arange(len(scenes()))).float().mean() > 0.99


def test_the_autoencoder_is_the_code():
    """Its weights are set by hand; it may differ by what tanh does to small numbers."""
    images = renders()[0][::7]
    autoencoder, patch_code = code.make_autoencoder(), code.PatchCode()
    codes = patch_code.encode(images)
    latents = autoencoder.encode(images).latents * autoencoder.config.scaling_factor
    assert (latents - codes).abs().max() < 1e-4
    random_ = torch.Generator().manual_seed(0)
    codes = codes + 0.5 * torch.randn(codes.shape, generator=random_)
    pixels = autoencoder.decode(codes / autoencoder.config.scaling_factor).sample
    # a step of an 8-bit image is 2 / 255
    assert (pixels - patch_code.decode(codes)).abs().max() < 1 / 255


@pytest.mark.parametrize("few_step", [False, True])
def test_a_checkpoint_opens_as_a_stock_pipeline(tmp_path, few_step):
    torch.manual_seed(0)
    pipe = model.make_pipeline(
        model.make_unet((16, 32)),
        model.make_text_encoder(model.make_tokenizer()),
        code.make_autoencoder(),
        few_step,
    )
    pipe.save_pretrained(tmp_path)
    opened = StableDiffusionPipeline.from_pretrained(tmp_path)
    call = {"prompt": "a photo of a red circle", "num_inference_steps": 1, "guidance_scale": 0}
    images = [
        p(**call, generator=torch.Generator().manual_seed(0), output_type="pt").images
        for p in (pipe, opened)
    ]
    assert images[0].shape == (1, 3, 32, 32)
    assert torch.equal(*images)


def test_a_t5_learns_what_a_caption_names(tmp_path):
    settings = Settings(steps=160, batch=64, learning_rate=2e-3)
    t5.train(settings, tmp_path, t5.make_tokenizer())
    losses = [json.loads(line)["loss"] for line in (tmp_path / "t5.jsonl").read_text().splitlines()]
    # of one that only knows how often each value is named
    named = captions.mentions(captions_of_the_world(2000)).mean(0)
    blind = torch.nn.functional.binary_cross_entropy(named, named).item()
    assert max(losses[-10:]) < blind / 3 < losses[0]


def captions_of_the_world(count):
    rng = random.Random(0)
    drawn = rng.choices(scenes(), [scene.rate for scene in scenes()], k=count)
    return [captions.draw_caption(scene, rng) for scene in drawn]


def pixart() -> PixArtAlphaPipeline:
    """Of the world, in small and with modulated blocks, as they are once trained."""
    torch.manual_seed(0)
    tokenizer, transformer = t5.make_tokenizer(), model.make_pixart(1, 2)
    torch.nn.init.normal_(transformer.adaln_single.linear.weight, std=0.1)
    encoder = t5.make_encoder(tokenizer).eval()
    return model.make_pixart_pipeline(
        transformer.eval(), encoder, tokenizer, code.make_autoencoder()
    )


def test_pixart_opens_as_a_stock_pipeline_and_has_a_negative_prompt(tmp_path):
    """Of 120 tokens of text, as the pipeline pads it, what was trained on 16 draws the same."""
    pipe = pixart()
    pipe.save_pretrained(tmp_path)
    opened = PixArtAlphaPipeline.from_pretrained(tmp_path)
    assert opened.transformer.config.attention_head_dim == 72
    call = {"prompt": "a photo of a red circle", "num_inference_steps": 4, "guidance_scale": 0}
    call |= {"output_type": "pt", "use_resolution_binning": False, "clean_caption": False}

    def draw(pipe, **options):
        return pipe(**call, **options, generator=torch.Generator().manual_seed(0)).images

    image = draw(pipe)
    assert image.shape == (1, 3, 32, 32)
    torch.testing.assert_close(draw(opened), image)
    torch.testing.assert_close(draw(opened, max_sequence_length=captions.MAX_TOKENS), image)
    with nasa(opened, "red, blurry", alpha=0.5):
        guided = draw(opened)
    assert (guided - image).abs().max() > 1e-2


def test_one_step_is_the_networks_own_x0():
    """DDIM and LCM, called for one step, draw what the network sees in noise, and nothing else."""
    torch.manual_seed(0)
    unet, tokenizer = model.make_unet((16, 32)), model.make_tokenizer()
    encoder, autoencoder = model.make_text_encoder(tokenizer), code.make_autoencoder()
    projected = CLIPTextModelWithProjection(model.text_config(tokenizer))
    for pipe in (
        model.make_pipeline(unet, encoder, autoencoder, few_step=False),
        model.make_pipeline(unet, encoder, autoencoder, few_step=True),
        model.make_joint_pipeline(model.make_joint(32, 2), projected, autoencoder),
        pixart(),
    ):
        ours = model_of(pipe, "here")
        z = torch.randn(2, *ours.latent_shape)
        drawn = pipe(
            ["a photo of a shape"] * 2,
            num_inference_steps=1,
            guidance_scale=0,
            latents=z,
            output_type="latent",
            **ours.call_options,
        ).images
        text = ours.encode(["a photo of a shape"] * 2)
        # not PixArt's 120; diffusers 0.35 adds 16 empty tokens to an SD3's, whatever one says
        empty = 16 if ours.joint and diffusers.__version__ < "0.36" else 0
        assert text.embeds.shape[1] == captions.MAX_TOKENS + empty
        with torch.no_grad():
            x0 = ours.x0(ours.denoiser, z, torch.full((2,), ours.last_timestep), text)
        torch.testing.assert_close(drawn, x0, atol=2e-3, rtol=0)


def test_a_new_transformer_has_open_gates():
    """With closed ones its image tokens would not see each other, and learn late to."""
    torch.manual_seed(0)
    autoencoder, tokenizer = code.make_autoencoder(), t5.make_tokenizer()
    projected = CLIPTextModelWithProjection(model.text_config(model.make_tokenizer()))
    for pipe in (
        model.make_joint_pipeline(model.make_joint(32, 2), projected, autoencoder),
        model.make_pixart_pipeline(
            model.make_pixart(1, 2), t5.make_encoder(tokenizer), tokenizer, autoencoder
        ),
    ):
        ours = model_of(pipe, "here")
        z = torch.randn(1, *ours.latent_shape).repeat(2, 1, 1, 1)
        z[1, :, :2, :2] += 1
        text, timesteps = ours.encode(["a photo of a shape"] * 2), torch.full((2,), 500)
        with torch.no_grad():
            one, other = ours.output(ours.denoiser, z, timesteps, text)
        assert (one - other)[:, 2:, 2:].abs().max() > 1e-3
