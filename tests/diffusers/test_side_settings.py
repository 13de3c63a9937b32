"""Families with a side stream in the few steps that people run them in, and what else is done with
their pipelines: made of one another, in threads, with weights that come and go."""

import copy
import functools
import threading

import diffusers
import pytest
import torch
from changes import offload_sequentially
from drawing import relative_error
from hunyuan_pipes import TWO_STEPS
from nasa_diffusers import NASA, nasa, testing_side
from peft import LoraConfig
from seen_calls import check, seen
from side_pipes import PIPES, draw


def text(*shape, seed=2):
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))


def add_lora(model, name, seed):
    torch.manual_seed(seed)
    names = ["to_q", "to_k", "add_k_proj", "add_v_proj"]
    model.add_adapter(LoraConfig(r=2, target_modules=names, init_lora_weights=False), name)


def checked(pipe, options, negative, steps):
    """One call a step, each with the prompt, and each what the oracle makes of it."""
    calls = seen(pipe, lambda: draw(pipe, options, steps=steps), negative)
    assert len(calls) == steps
    for call in calls[:2]:
        check(call, negative, [True])


# ---- popular settings ----------------------------------------------------------------------------


def test_qwen_image_with_lightning_at_true_cfg_1():
    """LoRAs for 4 and 8 steps, swapped between calls. The pipeline's own negative prompt does
    nothing there; the scheduler is Lightning's."""
    build, options = PIPES["qwen-image"]
    pipe = build()
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        base_shift=1.0986, max_shift=1.0986, use_dynamic_shifting=True, shift_terminal=None
    )
    for seed, name in enumerate(("four", "eight")):
        add_lora(pipe.transformer, name, seed)
    images = {}
    with nasa(pipe, "blurry", NASA(0.5)):
        for name in ("four", "eight", "four"):
            pipe.transformer.set_adapter(name)
            image = draw(pipe, options, steps=4)
            assert torch.equal(images.setdefault(name, image), image)
        assert torch.equal(draw(pipe, options | {"negative_prompt": "dull"}, steps=4), image)
    assert relative_error(images["four"], images["eight"]) > 1e-4
    assert relative_error(images["four"], draw(pipe, options, steps=4)) > 1e-4
    checked(pipe, options, text(5, 32), 4)


def test_z_image_turbo_at_guidance_0():
    if "z-image" not in PIPES:
        pytest.skip("a newer diffusers has it")
    build, options = PIPES["z-image"]
    assert options["guidance_scale"] == 0
    checked(build(), options, text(5, 32), 8)


@pytest.mark.parametrize("version", testing_side.LTX2_VERSIONS)
def test_ltx2_distilled_at_guidance_1(version):
    """In the eight noises that it was distilled for."""
    if "ltx2" not in PIPES:
        pytest.skip("a newer diffusers has it")
    sigmas = [1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875]
    _, options = PIPES["ltx2"]
    assert options["guidance_scale"] == options["audio_guidance_scale"] == 1
    sound = 32 if version == "2.0" else 16
    negative = text(5, 32), text(5, sound)
    checked(testing_side.ltx2(version), options | {"sigmas": sigmas}, negative, 8)


# ---- what else is done with a pipeline -----------------------------------------------------------


@pytest.fixture(scope="module", params=PIPES)
def pipe(request):
    build, options = PIPES[request.param]
    made = build()
    made.short_name, made.options = request.param, options
    made.steps = 2 if request.param in TWO_STEPS else 1
    return made


def drawn(pipe, prompt="a cat", of=None):
    return draw(of or pipe, pipe.options, prompt, steps=pipe.steps)


def test_made_of_a_guided_one(pipe):
    if pipe.short_name == "krea2":
        pytest.skip("from_pipe forgets which layers of the small text encoder are read")
    stock = drawn(pipe)
    with nasa(pipe, "blurry", NASA(0.5)):
        expected = drawn(pipe)
        other = type(pipe).from_pipe(pipe)
        other.set_progress_bar_config(disable=True)
        # the small pipelines have shorter templates, and layers of encoders that they have
        for name, value in vars(pipe).items():
            if not name.startswith("_") and isinstance(value, (str, int, tuple, list, dict)):
                setattr(other, name, value)
        assert torch.equal(drawn(pipe, of=other), expected)
    assert relative_error(expected, stock) > 1e-4
    assert torch.equal(drawn(pipe, of=other), stock)


def one_at_a_time(function, lock):
    @functools.wraps(function)
    def locked(*args, **kwargs):
        with lock:
            return function(*args, **kwargs)

    return locked


def test_two_threads_share_a_denoiser(pipe):
    """Each has a pipeline of its own, as the progress of a run is kept in it."""
    other = copy.copy(pipe)
    other.scheduler = copy.deepcopy(pipe.scheduler)
    prompts = ("a cat", "a dog")
    encoding = threading.Lock()
    for each in (pipe, other):
        if hasattr(each, "encode_prompt"):
            # text encoders are no part of this
            each.encode_prompt = one_at_a_time(each.encode_prompt, encoding)
    with nasa(pipe, "blurry", NASA(0.5)):
        alone = [drawn(pipe, prompt) for prompt in prompts]
        made = {}

        def run(i, of):
            with torch.no_grad():
                made[i] = [drawn(pipe, prompts[i], of=of) for _ in range(2)]

        threads = [threading.Thread(target=run, args=each) for each in enumerate((pipe, other))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i, expected in enumerate(alone):
        assert all(relative_error(image, expected) < 2e-5 for image in made[i])
    assert not torch.equal(*alone)


# of each kind of block one
KINDS = ("qwen-image", "z-image", "klein", "krea2", "ltx2", "chroma", "aura-flow")


@pytest.mark.parametrize("name", [name for name in KINDS if name in PIPES])
def test_weights_that_come_and_go(name):
    build, options = PIPES[name]
    made = build()
    made.options, made.steps = options, 1
    with nasa(made, "blurry", NASA(0.5)):
        expected = drawn(made)
    offload_sequentially(made.transformer)
    with nasa(made, "blurry", NASA(0.5)):
        assert relative_error(drawn(made), expected) < 2e-5


# ---- bad input -----------------------------------------------------------------------------------


def left_on(model):
    """What is hooked in the denoiser; diffusers' own contexts of caches leave an empty list of
    hooks on the whole of it."""
    hooked = [n for n, m in model.named_modules() if n and hasattr(m, "_diffusers_hook")]
    return hooked + list(model._forward_pre_hooks) + list(model._forward_hooks)


BAD = {
    "a vector": torch.randn(32),
    "one prompt without rows": torch.randn(5, 32),
    "a mask that does not fit": (torch.randn(1, 5, 32), torch.ones(1, 4)),
    "embeddings of another model": torch.randn(1, 5, 31),
    "of too many dimensions": torch.randn(1, 2, 3, 5, 32),
    "one text of three": [torch.randn(1, 5, 32)] * 3,
}


@pytest.mark.parametrize("what", BAD)
def test_what_does_not_fit_is_named_and_leaves_nothing(pipe, what):
    bad = BAD[what]
    embeds, mask = bad if isinstance(bad, tuple) else (bad, None)
    before = left_on(pipe.transformer)
    given = {"negative_prompt_embeds": embeds, "negative_prompt_attention_mask": mask}
    named = pytest.raises((ValueError, RuntimeError), match="^(enable_nasa|nasa_diff).*negative")
    with named, nasa(pipe, None, NASA(0.5), **given):
        drawn(pipe)
    assert left_on(pipe.transformer) == before


class Foreign:
    def __call__(self, attn, hidden_states, *args, **kwargs):
        return hidden_states


def test_a_processor_of_others_is_named_and_leaves_nothing(pipe):
    before = left_on(pipe.transformer)
    layers = [m for m in pipe.transformer.modules() if hasattr(m, "processor")]
    owns = [m.processor for m in layers]
    assert layers
    for m in layers:
        m.processor = Foreign()
    try:
        with pytest.raises((ValueError, RuntimeError), match="Foreign"), nasa(pipe, "blurry"):
            drawn(pipe)
    finally:
        for m, processor in zip(layers, owns, strict=True):
            m.processor = processor
    assert left_on(pipe.transformer) == before
