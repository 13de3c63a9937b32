"""No image is made with keys and values of weights, or of a text, that are no more.

Whatever happens to a family's text path between two calls, the next image is, bit for bit, that of
a pipeline to which the same was done before NASA saw it.
"""

import accelerate
import pytest
import torch
from counting import Projections
from diffusers.hooks import apply_layerwise_casting
from diffusers.training_utils import EMAModel
from drawing import draw, negative_embeds
from nasa_diffusers import nasa, testing
from peft import LoraConfig
from torch.multiprocessing.reductions import StorageWeakRef

FAMILIES = {
    "sd": testing.stable_diffusion,
    "pixart": testing.pixart,
    "sana": lambda: testing.sana(qk_norm="rms_norm_across_heads"),
    "wan": testing.wan,
}


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def prompts(name, seed=1):
    """The same tensor object for every call, as from a user who encodes once."""
    call = {"prompt": None, "prompt_embeds": random(1, 7, 32, seed=seed)}
    if name in ("pixart", "sana"):
        call["prompt_attention_mask"] = torch.ones(1, 7)
    return call


NEGATIVE = {"negative_prompt_embeds": random(1, 5, 32, seed=2), "alpha": 5.0}


def denoiser(pipe):
    return getattr(pipe, "unet", None) or pipe.transformer


def first(pipe):
    """The first linear layer that the text passes: before the blocks, where there is one."""
    model = denoiser(pipe)
    if hasattr(model, "caption_projection") and model.caption_projection is not None:
        return model.caption_projection.linear_1
    if hasattr(model, "condition_embedder"):
        return model.condition_embedder.text_embedder.linear_1
    return last(pipe)


def last(pipe):
    return [m for name, m in denoiser(pipe).named_modules() if name.endswith("attn2.to_v")][-1]


def needs(module, name):
    if getattr(module, name, None) is None:
        pytest.skip(f"{type(module).__name__} has no {name}")


# ---- weights -------------------------------------------------------------------------------------


@torch.no_grad()
def write_in_place(pipe):
    first(pipe).weight.mul_(2)


@torch.no_grad()
def write_to_the_last(pipe):
    last(pipe).weight.mul_(2)


@torch.inference_mode()
def write_in_inference_mode(pipe):
    first(pipe).weight.mul_(2)


def load_state_dict(pipe):
    first(pipe).load_state_dict({k: 1.5 * v for k, v in first(pipe).state_dict().items()})


def assign_state_dict(pipe):
    weights = {k: 1.5 * v for k, v in first(pipe).state_dict().items()}
    first(pipe).load_state_dict(weights, assign=True)


def replace_parameter(pipe):
    first(pipe).weight = torch.nn.Parameter(2 * first(pipe).weight.detach())


def replace_module(pipe):
    torch.manual_seed(0)
    linear, model = first(pipe), denoiser(pipe)
    name = next(name for name, module in model.named_modules() if module is linear)
    model.set_submodule(
        name, torch.nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
    )


def swap_tensors(pipe):
    """What `.to` does to weights that are tensor subclasses, as quantised ones are."""
    torch.utils.swap_tensors(
        first(pipe).weight, torch.nn.Parameter(2 * first(pipe).weight, requires_grad=False)
    )


def replace_data(pipe):
    first(pipe).weight.data = 2 * first(pipe).weight.data


def write_through_data(pipe):
    first(pipe).weight.data.mul_(2)


def write_one_row_through_data(pipe):
    first(pipe).weight.data[3] = 1


def write_through_numpy(pipe):
    first(pipe).weight.detach().numpy()[:] *= 2


def copy_an_average(pipe):
    """EMAModel writes through `.data`."""
    average = EMAModel(denoiser(pipe).parameters())
    average.shadow_params = [1.1 * p for p in average.shadow_params]
    average.copy_to(denoiser(pipe).parameters())


# ---- dtypes: the same parameters afterwards, with rounded values ---------------------------------


def to_half_and_back(pipe):
    denoiser(pipe).to(torch.bfloat16).to(torch.float32)


CASTS = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32}


def cast_layer_by_layer(pipe):
    denoiser(pipe).enable_layerwise_casting(**CASTS)


def cast_as_a_whole(pipe):
    """Cast on the way into the denoiser: a layer never sees the storage dtype."""
    apply_layerwise_casting(denoiser(pipe), **CASTS, skip_modules_pattern=None)


def cast_the_projection(pipe):
    """Cast on the way into a module on which NASA has a hook, before that hook."""
    needs(denoiser(pipe), "caption_projection")
    projection = denoiser(pipe).caption_projection
    apply_layerwise_casting(projection, **CASTS, skip_modules_pattern=None)


# ---- code around weights -------------------------------------------------------------------------


def hook_that_doubles(pipe):
    first(pipe).register_forward_hook(lambda module, args, out: 2 * out)


def patch_forward(pipe):
    linear = first(pipe)
    stock = linear.forward
    linear.forward = lambda x: 2 * stock(x)


def patch_below_a_hook(pipe):
    patch_forward(pipe)
    accelerate.hooks.add_hook_to_module(first(pipe), accelerate.hooks.ModelHook())


def fuse_projections(pipe):
    needs(denoiser(pipe), "fuse_qkv_projections")
    denoiser(pipe).fuse_qkv_projections()
    attn = [m for name, m in denoiser(pipe).named_modules() if name.endswith("attn2")][-1]
    needs(attn, "to_kv")
    with torch.no_grad():
        attn.to_kv.weight.mul_(2)


def add_lora(pipe):
    needs(denoiser(pipe), "add_adapter")
    torch.manual_seed(1)
    targets = ["to_k", "to_v", "linear_1"]
    denoiser(pipe).add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    denoiser(pipe).requires_grad_(False)


def fuse_lora(pipe):
    add_lora(pipe)
    denoiser(pipe).fuse_lora(lora_scale=0.5)


def fuse_lora_at_two_scales(pipe):
    fuse_lora(pipe)
    denoiser(pipe).unfuse_lora()
    denoiser(pipe).fuse_lora(lora_scale=2.0)


WEIGHTS = [
    write_in_place,
    write_to_the_last,
    write_in_inference_mode,
    load_state_dict,
    assign_state_dict,
    replace_parameter,
    replace_module,
    swap_tensors,
    replace_data,
    write_through_data,
    write_one_row_through_data,
    write_through_numpy,
    copy_an_average,
    to_half_and_back,
    cast_layer_by_layer,
    cast_as_a_whole,
    cast_the_projection,
    hook_that_doubles,
    patch_forward,
    patch_below_a_hook,
    fuse_projections,
    add_lora,
    fuse_lora,
    fuse_lora_at_two_scales,
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("change", WEIGHTS, ids=lambda f: f.__name__)
def test_weights(change, family):
    call, fresh, pipe = prompts(family), FAMILIES[family](), FAMILIES[family]()
    with nasa(pipe, **NEGATIVE):
        before = draw(pipe, **call)
        change(fresh)
        with nasa(fresh, **NEGATIVE):
            expected = draw(fresh, **call)
        assert not torch.equal(before, expected)
        change(pipe)
        for _ in range(2):
            assert torch.equal(draw(pipe, **call), expected)


def test_weights_that_were_written_while_they_were_not_offloaded():
    """Offloaded again they rest on meta as before; accelerate holds others."""
    device = torch.device("cpu")

    def change(pipe):
        accelerate.hooks.remove_hook_from_submodules(pipe.unet)
        write_in_place(pipe)
        accelerate.cpu_offload(pipe.unet, device)

    check_offloaded(change)


def test_offloaded_weights_that_are_written_where_they_rest():
    def change(pipe):
        last(pipe)._hf_hook.weights_map["weight"].mul_(2)

    check_offloaded(change)


def check_offloaded(change):
    fresh, pipe = testing.stable_diffusion(), testing.stable_diffusion()
    write_in_place(fresh)
    accelerate.cpu_offload(pipe.unet, torch.device("cpu"))
    with nasa(fresh, **NEGATIVE):
        expected = draw(fresh, **prompts("sd"))
    call, count = prompts("sd"), Projections(pipe.unet)
    with nasa(pipe, **NEGATIVE):
        before = draw(pipe, **call)
        assert not torch.equal(before, expected)
        # kept while nothing is written
        assert count.take() == 7
        assert torch.equal(draw(pipe, **call), before)
        assert count.take() == 0
        change(pipe)
        assert torch.equal(draw(pipe, **call), expected)


# ---- what does not change what is kept -----------------------------------------------------------


LAYERS = 2  # of the small PixArt


def use_other_memory(pipe):
    """As a move to another device and back: same values, same objects."""
    for parameter in denoiser(pipe).parameters():
        parameter.data = parameter.data.clone()


@pytest.mark.parametrize(
    ("change", "expected"),
    # weights that rest in one dtype and are used in another are projected once a run
    [(use_other_memory, 0), (cast_layer_by_layer, 0), (cast_as_a_whole, 2 * LAYERS)],
    ids=lambda f: getattr(f, "__name__", ""),
)
def test_values_that_stay_are_not_projected_again(change, expected):
    pipe, call = testing.pixart(), prompts("pixart")
    count = Projections(pipe.transformer)
    with nasa(pipe, **NEGATIVE):
        draw(pipe, **call)
        change(pipe)
        if change is not use_other_memory:
            draw(pipe, **call)
        count.take()
        draw(pipe, steps=3, **call)
        draw(pipe, **call)
        assert count.take() == expected


def test_a_kept_projection_does_not_keep_weights():
    pipe, call = testing.stable_diffusion(), prompts("sd")
    with nasa(pipe, **NEGATIVE):
        draw(pipe, **call)
        memory = StorageWeakRef(last(pipe).weight.untyped_storage())
        replace_data(pipe)
        assert memory.expired()
        draw(pipe, **call)


# ---- text ----------------------------------------------------------------------------------------


@torch.no_grad()
def write_text(text, other):
    text.copy_(other)


@torch.inference_mode()
def write_text_in_inference_mode(text, other):
    text.copy_(other)


def write_text_through_data(text, other):
    text.data.copy_(other)


def write_text_through_numpy(text, other):
    text.numpy()[:] = other.numpy()


TEXTS = [
    write_text,
    write_text_in_inference_mode,
    write_text_through_data,
    write_text_through_numpy,
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("write", TEXTS, ids=lambda f: f.__name__)
def test_text(write, family):
    pipe, call, other = FAMILIES[family](), prompts(family), prompts(family, seed=5)
    with nasa(pipe, **NEGATIVE) as handle:
        expected = draw(pipe, **other)
        handle.clear_cache()
        assert not torch.equal(draw(pipe, **call), expected)
        write(call["prompt_embeds"], other["prompt_embeds"])
        assert torch.equal(draw(pipe, **call), expected)


def write_to_the_encoder(pipe):
    with torch.no_grad():
        next(pipe.text_encoder.parameters()).mul_(2)


def write_to_the_encoder_through_data(pipe):
    next(pipe.text_encoder.parameters()).data.mul_(2)


def round_the_encoder(pipe):
    pipe.text_encoder.to(torch.float16).to(torch.float32)


def patch_the_encoder(pipe):
    embeddings = pipe.text_encoder.get_input_embeddings()
    stock = embeddings.forward
    embeddings.forward = lambda tokens: 2 * stock(tokens)


def replace_the_encoder(pipe):
    pipe.text_encoder = testing.stable_diffusion(seed=3).text_encoder


class Backwards:
    """A tokenizer that reads the other way."""

    def __init__(self, letters):
        self.letters = letters

    def __call__(self, texts, **options):
        return self.letters([text[::-1] for text in texts], **options)

    def __getattr__(self, name):
        return getattr(self.letters, name)


def replace_the_tokenizer(pipe):
    pipe.tokenizer = Backwards(pipe.tokenizer)


@pytest.mark.parametrize(
    "change",
    [
        write_to_the_encoder,
        write_to_the_encoder_through_data,
        round_the_encoder,
        patch_the_encoder,
        replace_the_encoder,
        replace_the_tokenizer,
    ],
    ids=lambda f: f.__name__,
)
def test_encoder_of_the_negative_prompt(change):
    """The prompt itself comes as embeddings, the same object each time: the negative alone is
    encoded anew."""
    pipe, fresh, call = testing.stable_diffusion(), testing.stable_diffusion(), prompts("sd")
    change(fresh)
    expected = negative_embeds(fresh, ["blurry"])
    with nasa(pipe, "blurry", alpha=5.0) as handle:
        before = draw(pipe, **call)
        change(pipe)
        ours = draw(pipe, **call)
        (term,) = handle._guidances[0].settings.negative.terms
    assert torch.equal(term.embeds, expected)
    with nasa(fresh, negative_prompt_embeds=expected, alpha=5.0):
        assert torch.equal(ours, draw(fresh, **call))
    assert not torch.equal(before, ours)


# ---- in a loop of one's own ----------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [write_in_place, swap_tensors, replace_data, to_half_and_back, cast_as_a_whole, patch_forward],
    ids=lambda f: f.__name__,
)
def test_weights_between_two_calls_with_the_same_text(change):
    """Nothing begins anew here, so nothing but objects, their memory and counts is looked at."""
    pipe, fresh, text = (
        testing.stable_diffusion(),
        testing.stable_diffusion(),
        random(1, 7, 32, seed=1),
    )
    sample = random(1, 4, 16, 16, seed=3)
    with nasa(pipe, **NEGATIVE):
        before = pipe.unet(sample, 500, text).sample
        change(pipe)
        ours = pipe.unet(sample, 500, text).sample
    change(fresh)
    with nasa(fresh, **NEGATIVE):
        assert torch.equal(ours, fresh.unet(sample, 500, text).sample)
    assert not torch.equal(ours, before)


# ---- what cannot be seen, and the way out --------------------------------------------------------


@torch.no_grad()
def test_a_write_that_nothing_counts_in_a_loop_of_ones_own():
    """As documented: there is no run that begins, and the text is the same object."""
    pipe, text = testing.stable_diffusion(), random(1, 7, 32, seed=1)
    sample = random(1, 4, 16, 16, seed=3)

    def call():
        return pipe.unet(sample, 500, text).sample

    with nasa(pipe, **NEGATIVE) as handle:
        before = call()
        write_through_data(pipe)
        kept = call()
        handle.clear_cache()
        after = call()
    assert torch.equal(kept, before)
    assert not torch.equal(after, before)


def test_a_write_in_the_middle_of_a_run():
    """From the next run on, or at once with `clear_cache`."""
    pipe, call = testing.stable_diffusion(), prompts("sd")
    half_a_run = {"steps": 2, "callback_on_step_end_tensor_inputs": ["latents"]}
    fresh = testing.stable_diffusion()
    write_through_data(fresh)

    def draw_with(callback):
        return draw(pipe, **half_a_run, **call, callback_on_step_end=callback)

    def write(pipe, step, t, tensors):
        write_through_data(pipe)
        return tensors

    def write_and_clear(pipe, step, t, tensors):
        write_through_data(pipe)
        handle.clear_cache()
        return tensors

    with nasa(pipe, **NEGATIVE) as handle:
        draw_with(write)
        drawn = draw(pipe, **call)
        # two steps wrote twice
        write_through_data(fresh)
        with nasa(fresh, **NEGATIVE):
            assert torch.equal(drawn, draw(fresh, **call))
        halve = first(pipe).weight.data
        halve.mul_(0.25)
        unseen = draw_with(lambda pipe, step, t, tensors: tensors)
        assert not torch.equal(draw_with(write_and_clear), unseen)
