"""LoRA and IP-Adapter, loaded, switched, rescaled and unloaded while NASA is on."""

import copy

import diffusers
import pytest
import torch
from counting import Projections
from drawing import assert_same_image, negative_embeds, relative_error
from nasa_diffusers import NAG, VSF, ip_adapter, nasa, testing
from oracle import Algorithm1, algorithm_1
from peft import LoraConfig

# ---- LoRA ----------------------------------------------------------------------------------------


def add_lora(module, name, seed, targets=("to_k", "to_v", "to_q")):
    torch.manual_seed(seed)
    module.add_adapter(
        LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False), adapter_name=name
    )
    module.requires_grad_(False)


@pytest.fixture
def compare(draw):
    """Draw with NASA on, then the same with Algorithm 1 on a pipeline changed the same way."""
    history = []

    def change_and_compare(pipe, oracle, change, **options):
        for each in (pipe, oracle):
            change(each)
        ours = draw(pipe, steps=2, **options)
        with algorithm_1(oracle.unet, [(negative_embeds(oracle), None, 0.5)]):
            assert_same_image(ours, draw(oracle, steps=2, **options))
        # every change was a change
        assert not any(torch.allclose(ours, earlier) for earlier in history)
        history.append(ours)

    return change_and_compare


def test_lora_switched_and_rescaled_between_calls(sd, compare):
    oracle = testing.stable_diffusion()
    with nasa(sd, "blurry", alpha=0.5):
        compare(sd, oracle, lambda pipe: None)
        compare(sd, oracle, lambda pipe: add_lora(pipe.unet, "first", 1))
        compare(sd, oracle, lambda pipe: add_lora(pipe.unet, "second", 2))
        compare(sd, oracle, lambda pipe: pipe.set_adapters(["first", "second"], [0.5, 2.0]))
        compare(sd, oracle, lambda pipe: pipe.set_adapters(["first"], [0.25]))
        # the scale that a call brings acts inside the denoiser
        compare(sd, oracle, lambda pipe: None, cross_attention_kwargs={"scale": 0.1})
        compare(sd, oracle, lambda pipe: pipe.set_adapters(["second"], [0.3]))


def test_lora_fused_and_disabled(sd, draw):
    with nasa(sd, "blurry", alpha=0.5):
        plain = draw(sd)
        add_lora(sd.unet, "first", 1)
        adapted = draw(sd)
        assert not torch.allclose(adapted, plain)
        sd.fuse_lora()
        assert_same_image(draw(sd), adapted)
        sd.unfuse_lora()
        assert_same_image(draw(sd), adapted)
        sd.disable_lora()
        assert_same_image(draw(sd), plain)
        sd.enable_lora()
        assert_same_image(draw(sd), adapted)
        sd.unload_lora_weights()
        assert_same_image(draw(sd), plain)


def test_lora_before_nasa(sd, draw, compare):
    oracle = testing.stable_diffusion()
    for pipe in (sd, oracle):
        add_lora(pipe.unet, "first", 1)
    with nasa(sd, "blurry", alpha=0.5):
        compare(sd, oracle, lambda pipe: None)


def test_lora_of_the_text_encoder(sd, draw, compare):
    """The negative prompt is encoded again when its encoder has changed."""
    oracle = testing.stable_diffusion()
    targets = ("q_proj", "v_proj")
    with nasa(sd, "blurry", alpha=0.5):
        compare(sd, oracle, lambda pipe: None)
        compare(sd, oracle, lambda pipe: add_lora(pipe.text_encoder, "first", 1, targets))
        compare(sd, oracle, lambda pipe: pipe.set_adapters(["first"], [0.2]))


@pytest.mark.parametrize("build", [testing.stable_diffusion, testing.stable_diffusion_xl])
def test_options_of_the_call_reach_the_negative_prompt(build, draw):
    """clip_skip and the scale of text LoRAs: both prompts are encoded alike, call by call."""
    pipe, oracle = build(), build()
    for each in (pipe, oracle):
        add_lora(each.text_encoder, "first", 1, ("q_proj", "v_proj"))
    lora_scale = {"cross_attention_kwargs": {"scale": 0.1}}
    calls = [({}, {}), (lora_scale, {"lora_scale": 0.1}), ({}, {})]
    # with transformers 5 the stock clip_skip of Stable Diffusion 1 and 2 is an AttributeError
    if hasattr(pipe, "text_encoder_2") or hasattr(pipe.text_encoder, "text_model"):
        calls += [({"clip_skip": 1}, {"clip_skip": 1}), ({}, {})]
    negatives = []
    with nasa(pipe, "blurry", alpha=0.5):
        for call, encoding in calls:
            negatives.append(
                oracle.encode_prompt(
                    "blurry",
                    device="cpu",
                    do_classifier_free_guidance=False,
                    num_images_per_prompt=1,
                    **encoding,
                )[0]  # fmt: skip
            )
            with algorithm_1(oracle.unet, [(negatives[-1], None, 0.5)]):
                expected = draw(oracle, steps=2, **call)
            assert_same_image(draw(pipe, steps=2, **call), expected)
    # each option changes the negative prompt by itself
    pairs = zip(negatives, negatives[1:], strict=False)
    assert not any(torch.allclose(a, b, rtol=1e-4) for a, b in pairs)


def test_lora_scale_of_image_to_image(sd):
    """These pipelines have another name for it."""
    add_lora(sd.text_encoder, "first", 1, ("q_proj", "v_proj"))
    second = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(sd)
    second.set_progress_bar_config(disable=True)
    labels = []
    with nasa(second, "blurry", alpha=0.5) as handle:
        for scale in (None, {"scale": 0.1}):
            second(
                "a cat", image=torch.zeros(1, 3, 32, 32), strength=1.0, num_inference_steps=1,
                guidance_scale=0, cross_attention_kwargs=scale,
            )  # fmt: skip
            labels.append(handle._guidances[0].settings.negative.terms[0].embeds)
    expected = sd.encode_prompt("blurry", "cpu", 1, False, lora_scale=0.1)[0]
    assert torch.equal(labels[1], expected) and not torch.equal(*labels)


def test_lora_dropout_is_not_cached(sd, draw):
    """In training mode each call draws its own dropout, as the stock layers do."""
    torch.manual_seed(0)
    sd.unet.add_adapter(
        LoraConfig(r=4, target_modules=["to_k"], init_lora_weights=False, lora_dropout=0.5)
    )
    sd.unet.train()
    with nasa(sd, "blurry", alpha=0.5):
        assert not torch.equal(draw(sd), draw(sd))


# ---- IP-Adapter ----------------------------------------------------------------------------------


def load_ip_adapter(pipe, seed=3, tokens=4, dim=16):
    """A small adapter in the checkpoint's own format, for images of `dim` channels."""
    generator = torch.Generator().manual_seed(seed)

    def weight(*shape):
        return torch.randn(shape, generator=generator) * 0.3

    width = pipe.unet.config.cross_attention_dim
    projection = {
        "proj.weight": weight(tokens * width, dim),
        "proj.bias": weight(tokens * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    layers, index = {}, 1
    for name in pipe.unet.attn_processors:
        if ".attn2." in name:
            attn = pipe.unet.get_submodule(name.removesuffix(".processor"))
            inner = attn.to_k.out_features
            layers[f"{index}.to_k_ip.weight"] = weight(inner, width)
            layers[f"{index}.to_v_ip.weight"] = weight(inner, width)
            index += 2
    pipe.load_ip_adapter(
        {"image_proj": projection, "ip_adapter": layers},
        subfolder="",
        weight_name="",
        image_encoder_folder=None,
    )


IMAGE = torch.linspace(-1, 1, 16).view(1, 1, 16)
IMAGE_WITH_CFG = torch.cat([torch.zeros_like(IMAGE), IMAGE])


class WithImages(Algorithm1):
    """Algorithm 1 plus what diffusers' own IP-Adapter processor adds at its scale."""

    def __init__(self, negatives, ip_processor):
        super().__init__(negatives)
        self.ip_processor = ip_processor

    def __call__(self, attn, hidden_states, encoder_hidden_states, ip_adapter_masks=None, **kwargs):
        text = encoder_hidden_states[0]
        guided = super().__call__(attn, hidden_states, text)
        scale = self.ip_processor.scale
        outputs = []
        for self.ip_processor.scale in (scale, [0.0] * len(scale)):
            outputs.append(
                self.ip_processor(
                    attn, hidden_states, encoder_hidden_states, ip_adapter_masks=ip_adapter_masks
                )
            )
        self.ip_processor.scale = scale
        return guided + outputs[0] - outputs[1]


def draw_with_oracle(pipe, draw, alpha, **options):
    """NASA must be off: a layer whose processor is not stock would be refused."""
    negative = [(negative_embeds(pipe), None, alpha)]
    processors = dict(pipe.unet.attn_processors)
    pipe.unet.set_attn_processor(
        {
            name: WithImages(negative, processor) if ".attn2." in name else processor
            for name, processor in processors.items()
        }
    )
    image = draw(pipe, **options)
    pipe.unet.set_attn_processor(processors)
    return image


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("guidance", [0.0, 5.0], ids=["no-cfg", "cfg"])
def test_ip_adapter(sd, draw, order, guidance):
    alpha = torch.tensor([0.0, 0.5] if guidance else [0.5]).view(-1, 1, 1, 1)
    options = {"guidance": guidance, "steps": 2}
    image = {"ip_adapter_image_embeds": [IMAGE_WITH_CFG if guidance else IMAGE]}
    oracle = testing.stable_diffusion()
    load_ip_adapter(oracle)

    if order == "before":
        load_ip_adapter(sd)
    with nasa(sd, "blurry", alpha=0.5):
        if order == "after":
            plain = draw(sd, **options)
            load_ip_adapter(sd)
        for scale in (1.0, 0.3):
            sd.set_ip_adapter_scale(scale)
            oracle.set_ip_adapter_scale(scale)
            expected = draw_with_oracle(oracle, draw, alpha, **options, **image)
            assert_same_image(draw(sd, **options, **image), expected)
        if order == "after":
            assert not torch.allclose(expected, plain)
            sd.unload_ip_adapter()
            assert_same_image(draw(sd, **options), plain)


def test_ip_adapter_of_sdxl(draw):
    pipe, oracle = testing.stable_diffusion_xl(), testing.stable_diffusion_xl()
    image = {"ip_adapter_image_embeds": [IMAGE]}
    for each in (pipe, oracle):
        load_ip_adapter(each)
        each.set_ip_adapter_scale(0.6)
    with nasa(pipe, "blurry", alpha=0.5):
        ours = draw(pipe, steps=2, **image)
    assert_same_image(ours, draw_with_oracle(oracle, draw, 0.5, steps=2, **image))


def test_ip_adapter_in_four_steps_of_dmd2(draw):
    pipe, oracle = testing.stable_diffusion_xl(), testing.stable_diffusion_xl()
    options = {"steps": 4, "timesteps": [999, 749, 499, 249], "ip_adapter_image_embeds": [IMAGE]}
    for each in (pipe, oracle):
        each.scheduler = diffusers.LCMScheduler.from_config(each.scheduler.config)
        load_ip_adapter(each)
        each.set_ip_adapter_scale(0.6)
    stock = draw(pipe, **options)
    with nasa(pipe, "blurry", alpha=0.5):
        ours = draw(pipe, **options)
    assert_same_image(ours, draw_with_oracle(oracle, draw, 0.5, **options))
    assert relative_error(ours, stock) > 1e-4


@pytest.mark.parametrize("method", ["nasa", "nag"])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("scale", [0.6, 0.0])
def test_images_for_both_halves_of_a_batch_that_is_not_doubled(draw, method, masked, scale):
    """LCM has no unconditional half: the stock processors take the rows of both as one row."""
    pipe, oracle = (testing.stable_diffusion_xl(time_cond_proj_dim=8) for _ in range(2))
    options = {"ip_adapter_image_embeds": [IMAGE_WITH_CFG], "guidance": 8.0, "steps": 2}
    if masked:
        mask = torch.zeros(1, 1, 32, 32)
        mask[..., :16] = 1
        options["cross_attention_kwargs"] = {"ip_adapter_masks": [mask]}
    for each in (pipe, oracle):
        each.scheduler = diffusers.LCMScheduler.from_config(each.scheduler.config)
        load_ip_adapter(each)
        each.set_ip_adapter_scale(scale)
    if method == "nag":
        # of which this share leaves Z+
        settings = {"method": NAG(alpha=1e-7)}
        expected = draw_with_oracle(oracle, draw, 0.0, **options)
    else:
        settings = {"alpha": 0.5}
        expected = draw_with_oracle(oracle, draw, 0.5, **options)
    with nasa(pipe, "blurry", **settings):
        assert_same_image(draw(pipe, **options), expected)


@pytest.fixture
def two_segments(monkeypatch):
    """An image is a call of its own, as beside NAG."""
    monkeypatch.setattr(ip_adapter, "image_beside", lambda *args: None)


SEVERAL = [("blurry", 0.3), ("red", 0.8)]


@pytest.mark.parametrize(
    "options",
    [{"negatives": SEVERAL}, {"negatives": SEVERAL, "method": VSF()}, {"alpha": torch.eye(4) / 2}],
    ids=["several", "vsf", "map"],
)
def test_an_image_in_the_call_for_the_text_is_one_after_it(sd, draw, request, options):
    load_ip_adapter(sd)
    sd.set_ip_adapter_scale(0.6)
    with nasa(sd, options.pop("negatives", "blurry"), **options):
        together = draw(sd, ip_adapter_image_embeds=[IMAGE])
        request.getfixturevalue("two_segments")
        assert_same_image(together, draw(sd, ip_adapter_image_embeds=[IMAGE]))
        sd.set_ip_adapter_scale(0.3)
        assert not torch.allclose(together, draw(sd, ip_adapter_image_embeds=[IMAGE]))


def test_ip_adapter_at_scale_0_is_none(sd, draw):
    with nasa(sd, "blurry", alpha=0.5):
        plain = draw(sd)
        load_ip_adapter(sd)
        sd.set_ip_adapter_scale(0.0)
        assert torch.equal(draw(sd, ip_adapter_image_embeds=[IMAGE]), plain)


def gradients_with_image(pipe):
    """Of one call of the denoiser, the adapter's weights included wherever its processors are."""
    weights = {f"unet.{name}": weight for name, weight in pipe.unet.named_parameters()}
    for name, processor in pipe.unet.attn_processors.items():
        processor = getattr(processor, "ip_processor", processor)
        if hasattr(processor, "to_k_ip"):
            for part, weight in processor.named_parameters():
                weights[f"unet.{name}.{part}"] = weight
    for weight in weights.values():
        weight.requires_grad_(True).grad = None
    pipe.unet.train()
    sample, text = torch.linspace(-1, 1, 2048).view(2, 4, 16, 16), negative_embeds(pipe, "a cat")
    added = {"image_embeds": [IMAGE.expand(2, -1, -1)]}
    output = pipe.unet(sample, 500, text.expand(2, -1, -1), added_cond_kwargs=added).sample
    output.square().mean().backward()
    return {name: weight.grad for name, weight in weights.items() if weight.grad is not None}


def test_an_ip_adapter_learns_beside_a_negative_prompt(sd):
    oracle = testing.stable_diffusion()
    for pipe in (sd, oracle):
        load_ip_adapter(pipe)
        pipe.set_ip_adapter_scale(0.6)
    oracle.unet.set_attn_processor(
        {
            name: WithImages([(negative_embeds(oracle), None, 0.5)], processor)
            if ".attn2." in name
            else processor
            for name, processor in oracle.unet.attn_processors.items()
        }
    )
    expected = gradients_with_image(oracle)
    assert sum("attn2.processor.to_" in name for name in expected) == 2 * 7
    for checkpointing in (False, True):
        if checkpointing:
            sd.unet.enable_gradient_checkpointing()
        with nasa(sd, "blurry", alpha=0.5):
            found = gradients_with_image(sd)
        assert found.keys() == expected.keys()
        for name, x in expected.items():
            assert relative_error(found[name], x) < 1e-4, name


@pytest.mark.parametrize("scales", [[[0.7, 0.4]], 0.7], ids=["two", "one"])
def test_ip_adapter_with_masks(sd, draw, scales):
    """Two images of one adapter, each in its half of the picture, and one in the first half."""
    images = 2 if isinstance(scales, list) else 1
    masks = torch.zeros(1, 2, 32, 32)
    masks[:, 0, :, :16], masks[:, 1, :, 16:] = 1, 1
    options = {
        "ip_adapter_image_embeds": [torch.cat([IMAGE, -IMAGE], dim=1)[:, :images]],
        "cross_attention_kwargs": {"ip_adapter_masks": [masks[:, :images]]},
    }
    oracle = testing.stable_diffusion()
    for pipe in (sd, oracle):
        load_ip_adapter(pipe)
        pipe.set_ip_adapter_scale(scales)
    with nasa(sd, "blurry", alpha=0.5):
        ours = draw(sd, **options)
    assert_same_image(ours, draw_with_oracle(oracle, draw, 0.5, **options))


def test_ip_adapter_alpha_0_and_layers(sd, draw):
    load_ip_adapter(sd)
    options = {"ip_adapter_image_embeds": [IMAGE]}
    stock = draw(sd, **options)
    with nasa(sd, "blurry", alpha=0) as handle:
        assert torch.equal(draw(sd, **options), stock)
        handle.alpha = 0.5
        assert not torch.allclose(draw(sd, **options), stock)
    with nasa(sd, "blurry", alpha=0.5, layers="mid_block.*"):
        assert not torch.allclose(draw(sd, **options), stock)
    assert torch.equal(draw(sd, **options), stock)


def test_ip_adapter_with_the_wrong_number_of_masks(sd, draw):
    load_ip_adapter(sd)
    masks = [torch.ones(1, 1, 32, 32)] * 2
    with nasa(sd, "blurry"), pytest.raises(ValueError, match="2 ip_adapter_masks"):
        draw(
            sd,
            ip_adapter_image_embeds=[IMAGE],
            cross_attention_kwargs={"ip_adapter_masks": masks},
        )


def ip_processor(pipe):
    return pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.processor


def test_images_are_projected_once(sd, draw):
    """Across steps and calls, until an image, a weight or the projection before them changes."""
    load_ip_adapter(sd)
    oracle = testing.stable_diffusion()
    load_ip_adapter(oracle)
    calls = []
    ip_processor(sd).to_k_ip[0].register_forward_hook(lambda *_: calls.append(1))

    def compare(image, expected_calls):
        calls.clear()
        options = {"steps": 2, "ip_adapter_image_embeds": [image]}
        ours = draw(sd, **options)
        assert len(calls) == expected_calls
        assert_same_image(ours, draw_with_oracle(oracle, draw, 0.5, **options))
        return ours

    def double(pipe, choose):
        with torch.no_grad():
            choose(pipe).weight.mul_(2)

    with nasa(sd, "blurry", alpha=0.5) as handle:
        drawn = [compare(IMAGE, 1)]
        # the same values in another tensor, and what depends on the text only
        assert torch.equal(compare(IMAGE.clone(), 0), drawn[0])
        handle.set_negative_prompt("red")
        handle.set_negative_prompt("blurry")
        compare(IMAGE, 0)
        drawn.append(compare(-IMAGE, 1))
        for choose in (
            lambda pipe: ip_processor(pipe).to_k_ip[0],
            lambda pipe: pipe.unet.encoder_hid_proj.image_projection_layers[0].image_embeds,
        ):
            for pipe in (sd, oracle):
                double(pipe, choose)
            drawn.append(compare(-IMAGE, 1))
        assert not any(torch.allclose(a, b) for a, b in zip(drawn, drawn[1:], strict=False))


def test_images_do_not_drive_text_out_of_the_cache(sd, draw):
    load_ip_adapter(sd)
    with nasa(sd, "blurry", alpha=0.5):
        count = Projections(sd.unet)
        for i in range(8):
            draw(sd, ip_adapter_image_embeds=[IMAGE + i])
        assert count.take() == 7


def test_two_adapters_and_a_scale_of_zero(sd, draw):
    oracle = testing.stable_diffusion()
    for pipe in (sd, oracle):
        load_ip_adapter(pipe, 3)
        first = pipe.unet.encoder_hid_proj.image_projection_layers
        processors = [p for p in pipe.unet.attn_processors.values() if hasattr(p, "to_k_ip")]
        # a second adapter beside the first, as loading two checkpoints makes it
        first.append(copy.deepcopy(first[0]))
        for processor in processors:
            processor.to_k_ip.append(copy.deepcopy(processor.to_v_ip[0]))
            processor.to_v_ip.append(copy.deepcopy(processor.to_k_ip[0]))
            processor.scale = [0.7, 0.4]
    images = {"ip_adapter_image_embeds": [IMAGE, -IMAGE]}
    with nasa(sd, "blurry", alpha=0.5):
        ours = draw(sd, **images)
        for pipe in (sd, oracle):
            pipe.set_ip_adapter_scale([0.7, 0.0])
        without = draw(sd, **images)
    assert_same_image(without, draw_with_oracle(oracle, draw, 0.5, **images))
    oracle.set_ip_adapter_scale([0.7, 0.4])
    assert_same_image(ours, draw_with_oracle(oracle, draw, 0.5, **images))


def test_ip_adapter_compiled(sd, draw):
    torch._dynamo.reset()
    load_ip_adapter(sd)
    image = {"ip_adapter_image_embeds": [IMAGE]}
    with nasa(sd, "blurry", alpha=0.5):
        expected = draw(sd, **image)
        sd.unet.mid_block.compile(fullgraph=True, backend="eager")
        assert_same_image(draw(sd, **image), expected)
        sd.set_ip_adapter_scale(0.3)
        compiled = draw(sd, **image)
        sd.unet.mid_block._compiled_call_impl = None
        assert_same_image(compiled, draw(sd, **image))
        assert not torch.allclose(compiled, expected)


def test_ip_adapter_with_nag(sd, draw):
    """The image terms are added to whatever the method makes of the text."""
    load_ip_adapter(sd)
    text_only = nasa(sd, "blurry", NAG())
    with text_only:
        sd.set_ip_adapter_scale(0.0)
        off = draw(sd, ip_adapter_image_embeds=[IMAGE])
        sd.set_ip_adapter_scale(0.5)
        on = draw(sd, ip_adapter_image_embeds=[IMAGE])
    assert not torch.allclose(on, off)
    fresh = testing.stable_diffusion()
    with nasa(fresh, "blurry", NAG()):
        assert_same_image(off, draw(fresh))
