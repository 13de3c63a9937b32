"""Quantised linears, by the packages that people quantise with, before and after `enable_nasa`.

`make test` puts both packages into a folder beside its environment and runs this file with them;
where one is missing its tests are skipped by name.
"""

import importlib.util

import pytest
import torch
from drawing import assert_same_image, draw, negative_embeds, relative_error
from nasa_diffusers import nasa, testing
from oracle import algorithm_1


def needs(package):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed: pip install {package}")


def quantise_torchao(denoiser):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(denoiser, Int8WeightOnlyConfig())
    assert type(first_projection(denoiser).weight) is not torch.nn.Parameter


def quantise_8bit(denoiser):
    """As diffusers' BitsAndBytesConfig(load_in_8bit=True) does while it loads."""
    import bitsandbytes as bnb

    replace_linears(denoiser, bnb.nn.Linear8bitLt, has_fp16_weights=False)
    assert first_projection(denoiser).weight.dtype == torch.int8


def quantise_4bit(denoiser):
    """As BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")."""
    import bitsandbytes as bnb

    replace_linears(denoiser, bnb.nn.Linear4bit, quant_type="nf4")
    assert first_projection(denoiser).weight.dtype == torch.uint8


def replace_linears(denoiser, linear_class, **options):
    for parent in list(denoiser.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is torch.nn.Linear:
                sizes, bias = (linear.in_features, linear.out_features), linear.bias is not None
                quantised = linear_class(*sizes, bias=bias, **options)
                quantised.load_state_dict(linear.state_dict())
                setattr(parent, name, quantised.to("cpu").requires_grad_(False))


def first_projection(denoiser):
    return next(m for name, m in denoiser.named_modules() if name.endswith("attn2.to_k"))


PACKAGES = [
    pytest.param(quantise_torchao, marks=needs("torchao"), id="torchao-int8-weight-only"),
    pytest.param(quantise_8bit, marks=needs("bitsandbytes"), id="bitsandbytes-8bit"),
    pytest.param(quantise_4bit, marks=needs("bitsandbytes"), id="bitsandbytes-4bit"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("is_first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("quantise", PACKAGES)
def test_quantised_linears(quantise, is_first):
    """Algorithm 1 on the same quantised weights; quantising drops what was kept of the others."""
    oracle = testing.stable_diffusion()
    negative = negative_embeds(oracle)
    with algorithm_1(oracle.unet, [(negative, None, 0.5)]):
        exact = draw(oracle, steps=2)
        quantise(oracle.unet)
        eager = draw(oracle, steps=2)
    # the weights did change
    assert relative_error(eager, exact) > 1e-4

    pipe = testing.stable_diffusion()
    if is_first:
        quantise(pipe.unet)
    with nasa(pipe, "blurry", alpha=0.5) as handle:
        if not is_first:
            assert_same_image(draw(pipe, steps=2), exact)
            quantise(pipe.unet)
        check(quantise, draw(pipe, steps=2), eager, exact)
        assert handle.report().cache_bytes > 0
        # from the cache now
        check(quantise, draw(pipe, steps=2), eager, exact)
    plain = testing.stable_diffusion()
    quantise(plain.unet)
    assert torch.equal(draw(pipe, steps=2), draw(plain, steps=2))


def check(quantise, ours, eager, other):
    """`ours` is `eager`; `other` is what it would be if quantising, or NASA, were left out."""
    if quantise is not quantise_8bit:
        assert_same_image(ours, eager)
    else:
        # activations are rounded to 8 bits too: a rounding before may become a step of 1 / 127
        assert 3 * relative_error(ours, eager) < relative_error(other, eager)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantise", PACKAGES)
def test_quantised_transformer_with_masks(quantise):
    """PixArt: the text passes quantised projections before the blocks as well."""
    oracle, pipe = testing.pixart(), testing.pixart()
    embeds, mask, *_ = pipe.encode_prompt("blurry", do_classifier_free_guidance=False)
    for each in (oracle, pipe):
        quantise(each.transformer)
    with torch.no_grad():
        text = oracle.transformer.caption_projection(embeds)
    with algorithm_1(oracle.transformer, [(text, mask.bool(), 5.0)]):
        eager = draw(oracle)
    stock = draw(pipe)
    with nasa(pipe, "blurry", alpha=5.0):
        ours = draw(pipe)
    check(quantise, ours, eager, stock)


@pytest.mark.filterwarnings("ignore")
@needs("torchao")
def test_a_write_to_a_part_of_a_quantised_weight():
    """Its scale is a tensor of its own, whose writes the weight itself does not count."""
    pipe, call = testing.stable_diffusion(), {"prompt": "a cat"}
    quantise_torchao(pipe.unet)
    with nasa(pipe, "blurry", alpha=5.0) as handle, torch.no_grad():
        kept = draw(pipe, **call)
        pipe.unet.to("cpu")
        assert torch.equal(draw(pipe, **call), kept)
        first_projection(pipe.unet).weight.scale.mul_(2)
        written = draw(pipe, **call)
        handle.clear_cache()
        assert torch.equal(draw(pipe, **call), written) and not torch.equal(written, kept)
