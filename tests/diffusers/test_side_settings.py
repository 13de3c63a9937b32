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
            if name in vars(other) and isinstance(value, (str, int, tuple, list)):
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


# has parameters that it reads beside its modules, so that stock cannot be offloaded in parts
WHOLE = ("hunyuan-dit",)


def test_weights_that_come_and_go(pipe):
    if pipe.short_name in WHOLE:
        pytest.skip("it cannot be offloaded in parts, with or without NASA")
    made = PIPES[pipe.short_name][0]()
    made.short_name, made.options, made.steps = pipe.short_name, pipe.options, pipe.steps
    with nasa(made, "blurry", NASA(0.5)):
        expected = drawn(made)
    offload_sequentially(made.transformer)
    with nasa(made, "blurry", NASA(0.5)):
        assert relative_error(drawn(made), expected) < 2e-5
