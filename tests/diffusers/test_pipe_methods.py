"""NAG and value sign flip on every family, against plain eager processors of their formulas."""

import contextlib
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from drawing import assert_same_image, draw, negative_embeds, relative_error
from nasa_diffusers import NAG, VSF, ProjectedNASA, enable_nasa, nasa, testing
from oracle import Algorithm1, installed, published_nag, rows

FAMILIES = {
    "sd": testing.stable_diffusion,
    "sdxl": testing.stable_diffusion_xl,
    "pixart": testing.pixart,
    "sana": lambda: testing.sana(qk_norm="rms_norm_across_heads"),
    "wan": lambda: testing.wan(two_transformers=True),
}
CHANNELS = {"sdxl": 64}


class PlainNag(Algorithm1):
    """`share` is NAG's alpha, [b, 1, 1] or a number."""

    def __init__(self, text, mask, scale, tau, share, p=1):
        self.text, self.mask, self.scale, self.tau, self.share = text, mask, scale, tau, share
        self.p = p

    def combine(self, attn, q, text, text_mask):
        z_pos = self.merged(self.attend(attn, q, text, text_mask))
        rows, mask = self.rows(q)
        z_neg = self.merged(self.attend(attn, q, rows, mask))
        return published_nag(z_pos, z_neg, self.scale, self.tau, self.share, self.p)

    def merged(self, z):
        return z.transpose(1, 2).flatten(2)

    def rows(self, q):
        mask = self.mask
        if mask is not None:
            mask = rows(mask, len(q))[:, None, None, :]
        return rows(self.text, len(q)), mask


class PlainFlip(PlainNag):
    """One softmax over both prompts' keys, the negative values times -alpha.

    `guided` `[b]` are the rows that see the negative keys."""

    def __init__(self, text, mask, alpha, guided=None):
        self.text, self.mask, self.alpha, self.guided = text, mask, alpha, guided

    def combine(self, attn, q, text, text_mask):
        negative, mask = self.rows(q)
        both = torch.cat([text, negative], dim=1)
        k = self.normed(attn, attn.norm_k, attn.to_k(both))
        v = self.heads(attn, attn.to_v(both)).clone()
        v[:, :, text.shape[1] :] *= -self.alpha
        bias = torch.zeros(len(q), 1, 1, both.shape[1])
        if text_mask is not None:
            bias[..., : text.shape[1]] += text_mask
        if mask is not None:
            bias[..., text.shape[1] :].masked_fill_(~mask, float("-inf"))
        if self.guided is not None:
            bias[~self.guided, ..., text.shape[1] :] = float("-inf")
        return self.merged(F.scaled_dot_product_attention(q, k, v, attn_mask=bias))


def denoisers(pipe):
    names = ("unet", "transformer", "transformer_2")
    return [model for name in names if (model := getattr(pipe, name, None)) is not None]


@torch.no_grad()
def projected(model, text):
    """Text as the layers of the denoiser see it."""
    for name in ("caption_projection", "caption_norm"):
        module = getattr(model, name, None)
        text = text if module is None else module(text)
    embedder = getattr(model, "condition_embedder", None)
    return text if embedder is None else embedder.text_embedder(text)


@contextlib.contextmanager
def everywhere(pipe, make):
    """`make(model)` as the processor of every text layer of every denoiser."""
    with contextlib.ExitStack() as stack:
        for model in denoisers(pipe):
            stack.enter_context(installed(model, make(model)))
        yield


def prompts(name, n=7, seed=1, rows=1):
    """A prompt as embeddings, with padding where the family masks it, as arguments of a call."""
    channels = CHANNELS.get(name, 32)
    text = torch.randn(rows, n, channels, generator=torch.Generator().manual_seed(seed))
    call = {"prompt": None, "prompt_embeds": text}
    if name == "sdxl":
        call["pooled_prompt_embeds"] = torch.ones(rows, 32)
    if name in ("pixart", "sana"):
        call["prompt_attention_mask"] = (torch.arange(n) < n - 2)[None].expand(rows, -1)
    return call


def negative(name):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(1, 9, CHANNELS.get(name, 32), generator=generator)


STRONG = NAG(scale=20.0, tau=2.0, alpha=0.5)


@pytest.mark.parametrize(
    ("family", "backend"),
    [*((family, None) for family in FAMILIES), ("pixart", "triton"), ("wan", "triton")],
)
def test_nag_is_its_published_formula(family, backend):
    pipe, text = FAMILIES[family](), negative(family)
    steps = 1 if backend else 4
    with nasa(pipe, method=STRONG, negative_prompt_embeds=text, backend=backend):
        ours = draw(pipe, steps=steps, **prompts(family))
    with everywhere(pipe, lambda m: PlainNag(projected(m, text), None, 20.0, 2.0, 0.5)):
        plain = draw(pipe, steps=steps, **prompts(family))
    assert_same_image(ours, plain)
    with everywhere(pipe, lambda m: PlainNag(projected(m, text), None, 20.0, 1e9, 0.5)):
        # the clip did something
        assert relative_error(plain, draw(pipe, steps=steps, **prompts(family))) > 1e-3


@pytest.mark.parametrize(("family", "backend"), [("sd", None), ("pixart", "triton")])
def test_nag_with_the_norm_of_its_flux_code(family, backend):
    pipe, text = FAMILIES[family](), negative(family)
    options = {"negative_prompt_embeds": text, "backend": backend}
    with nasa(pipe, method=replace(STRONG, norm=2), **options):
        ours = draw(pipe, **prompts(family))
    with everywhere(pipe, lambda m: PlainNag(projected(m, text), None, 20.0, 2.0, 0.5, p=2)):
        assert_same_image(ours, draw(pipe, **prompts(family)))


@pytest.mark.parametrize("family", FAMILIES)
def test_vsf_is_its_published_formula(family):
    pipe, text = FAMILIES[family](), negative(family)
    mask = torch.tensor([[1] * 6 + [0] * 3]).bool()
    options = {"negative_prompt_embeds": text, "negative_prompt_attention_mask": mask}
    with nasa(pipe, method=VSF(1.5), **options) as handle:
        ours = draw(pipe, steps=4, **prompts(family))
        assert handle.report().method == "VSF"
    with everywhere(pipe, lambda m: PlainFlip(projected(m, text), mask, 1.5)):
        assert_same_image(ours, draw(pipe, steps=4, **prompts(family)))
    assert relative_error(ours, draw(pipe, steps=4, **prompts(family))) > 1e-3


def test_only_conditional_rows(sd):
    """Under classifier-free guidance the other rows are stock: NAG's share is 0 there, and VSF
    hides its keys."""
    text = negative_embeds(sd)
    share = torch.tensor([0.0, 0.5]).view(2, 1, 1)
    with nasa(sd, "blurry", STRONG):
        ours = draw(sd, guidance=5.0)
    with everywhere(sd, lambda m: PlainNag(text, None, 20.0, 2.0, share)):
        assert_same_image(ours, draw(sd, guidance=5.0))
    with nasa(sd, "blurry", VSF(0.5)):
        ours = draw(sd, guidance=5.0)
    guided = torch.tensor([False, True])
    with everywhere(sd, lambda m: PlainFlip(text, None, 0.5, guided)):
        assert_same_image(ours, draw(sd, guidance=5.0))


def test_alpha_per_image(sd):
    """0 for one of two images: that one is stock, whatever the method."""
    both = ["a cat", "a dog"]
    stock = draw(sd, both)
    for method in (NAG(alpha=[0, 0.5]), VSF([0, 0.5])):
        with nasa(sd, "blurry", method):
            ours = draw(sd, both)
        assert_same_image(ours[0], stock[0])
        assert not torch.allclose(ours[1], stock[1])


def test_a_map_of_the_share(sd):
    with nasa(sd, "blurry", STRONG) as handle:
        whole = draw(sd)
        handle.alpha = torch.full((16, 16), 0.5)
        assert_same_image(draw(sd), whole)
        handle.alpha = torch.cat([torch.zeros(8, 16), torch.full((8, 16), 0.5)])
        assert not torch.allclose(draw(sd), whole)


def test_several_prompts_in_one_softmax(sd):
    """VSF of two negative prompts is that of both side by side, each with its alpha."""
    first, second = negative_embeds(sd, "blurry"), negative_embeds(sd, "red")
    with nasa(sd, [("blurry", 0.3), ("red", 0.8)], VSF()):
        ours = draw(sd)
    alphas = torch.cat([torch.full((77, 1), 0.3), torch.full((77, 1), 0.8)])
    text = torch.cat([first, second], dim=1)
    with everywhere(sd, lambda m: PlainFlip(text, None, alphas)):
        assert_same_image(ours, draw(sd))


@pytest.mark.parametrize("method", [STRONG, VSF(0.5), ProjectedNASA(0.5)], ids=str)
def test_off_is_stock_and_on_again_is_the_same(sd, method):
    stock = draw(sd, guidance=5.0)
    handle = enable_nasa(sd, "blurry", method)
    first = draw(sd, guidance=5.0)
    handle.alpha = 0
    assert torch.equal(draw(sd, guidance=5.0), stock)
    handle.alpha = 0.5
    assert torch.equal(draw(sd, guidance=5.0), first)
    handle.disable()
    assert torch.equal(draw(sd, guidance=5.0), stock)


# ---- what it says --------------------------------------------------------------------------------


def test_vsf_refuses_a_map(sd):
    for refused in (
        lambda: enable_nasa(sd, "blurry", VSF(torch.ones(4, 4))),
        lambda: setattr(enable_nasa(sd, "blurry", VSF()), "alpha", torch.ones(4, 4)),
    ):
        with pytest.raises(ValueError, match="VSF: .*cannot be a map"):
            refused()


def test_nag_refuses_several_prompts(sd):
    several = [("blurry", 0.3), ("red", 0.8)]
    with pytest.raises(ValueError, match="NAG: it takes one negative prompt"):
        enable_nasa(sd, several, NAG())
    handle = enable_nasa(sd, "blurry", NAG())
    before = draw(sd)
    with pytest.raises(ValueError, match="NAG: it takes one negative prompt"):
        handle.set_negative_prompt(several)
    assert torch.equal(draw(sd), before)


@pytest.mark.parametrize("method", [STRONG, VSF(0.5), ProjectedNASA(2.0)], ids=str)
def test_compiled(method):
    """Alpha and the prompts are data here too."""
    torch._dynamo.reset()
    plain, pipe = testing.pixart(), testing.pixart()
    pipe.transformer.compile(fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        handles = [enable_nasa(each, "blurry", method) for each in (plain, pipe)]
        for alpha in (0.5, 0.25):
            for handle in handles:
                handle.alpha = alpha
                handle.set_negative_prompt("red" * int(4 * alpha))
            assert_same_image(draw(pipe), draw(plain))
