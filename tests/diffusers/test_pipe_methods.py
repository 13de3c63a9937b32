"""NAG and value sign flip on every family, against plain eager processors of their formulas."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from drawing import assert_same_image, draw, negative_embeds, relative_error
from nasa_diffusers import enable_nasa, nasa, testing
from oracle import Algorithm1, installed, published_nag

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
            mask = mask[:, None, None, :].expand(len(q), 1, 1, -1)
        return self.text.expand(len(q), -1, -1), mask


class PlainFlip(PlainNag):
    """One softmax over both prompts' keys, the negative values times -alpha; `rows` [b] steered."""

    def __init__(self, text, mask, alpha, guided=None):
        self.text, self.mask, self.alpha, self.guided = text, mask, alpha, guided

    def combine(self, attn, q, text, text_mask):
        negative, mask = self.rows(q)
        both = torch.cat([text, negative], dim=1)
        k = self.heads(attn, self.norm(attn.norm_k, attn.to_k(both)))
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


SETTINGS = {"nag_scale": 20.0, "nag_tau": 2.0, "nag_alpha": 0.5}


@pytest.mark.parametrize(
    ("family", "backend"),
    [*((family, None) for family in FAMILIES), ("pixart", "triton"), ("wan", "triton")],
)
def test_nag_is_its_published_formula(family, backend):
    pipe, text = FAMILIES[family](), negative(family)
    steps = 1 if backend else 4
    with nasa(pipe, negative_prompt_embeds=text, method="nag", backend=backend, **SETTINGS):
        ours = draw(pipe, steps=steps, **prompts(family))
    with everywhere(pipe, lambda m: PlainNag(projected(m, text), None, 20.0, 2.0, 0.5)):
        plain = draw(pipe, steps=steps, **prompts(family))
    assert_same_image(ours, plain)
    with everywhere(pipe, lambda m: PlainNag(projected(m, text), None, 20.0, 1e9, 0.5)):
        # the clip did something
        assert relative_error(plain, draw(pipe, steps=steps, **prompts(family))) > 1e-3


@pytest.mark.parametrize(("family", "backend"), [("sd", None), ("sd", "triton")])
def test_nag_with_the_norm_of_its_flux_code(family, backend):
    pipe, text = FAMILIES[family](), negative(family)
    options = {"negative_prompt_embeds": text, "method": "nag", "backend": backend, **SETTINGS}
    with nasa(pipe, **options, nag_norm=2):
        ours = draw(pipe, **prompts(family))
    with everywhere(pipe, lambda m: PlainNag(projected(m, text), None, 20.0, 2.0, 0.5, p=2)):
        assert_same_image(ours, draw(pipe, **prompts(family)))


@pytest.mark.parametrize("family", FAMILIES)
def test_vsf_is_its_published_formula(family):
    pipe, text = FAMILIES[family](), negative(family)
    mask = torch.tensor([[1] * 6 + [0] * 3]).bool()
    options = {"negative_prompt_embeds": text, "negative_prompt_attention_mask": mask}
    with nasa(pipe, **options, rule="vsf", alpha=1.5) as handle:
        ours = draw(pipe, steps=4, **prompts(family))
        assert handle.report().rule == "vsf"
    with everywhere(pipe, lambda m: PlainFlip(projected(m, text), mask, 1.5)):
        assert_same_image(ours, draw(pipe, steps=4, **prompts(family)))
    assert relative_error(ours, draw(pipe, steps=4, **prompts(family))) > 1e-3


def test_only_conditional_rows(sd):
    """Under classifier-free guidance the other rows are stock: NAG's share is 0 there, and VSF
    hides its keys."""
    text = negative_embeds(sd)
    share = torch.tensor([0.0, 0.5]).view(2, 1, 1)
    with nasa(sd, "blurry", method="nag", **SETTINGS):
        ours = draw(sd, guidance=5.0)
    with everywhere(sd, lambda m: PlainNag(text, None, 20.0, 2.0, share)):
        assert_same_image(ours, draw(sd, guidance=5.0))
    with nasa(sd, "blurry", rule="vsf", alpha=0.5):
        ours = draw(sd, guidance=5.0)
    guided = torch.tensor([False, True])
    with everywhere(sd, lambda m: PlainFlip(text, None, 0.5, guided)):
        assert_same_image(ours, draw(sd, guidance=5.0))


def test_alpha_per_image(sd):
    """0 for one of two images: that one is stock, whatever the method."""
    both = ["a cat", "a dog"]
    stock = draw(sd, both)
    for options in ({"method": "nag", "nag_alpha": [0, 0.5]}, {"rule": "vsf", "alpha": [0, 0.5]}):
        with nasa(sd, "blurry", **options):
            ours = draw(sd, both)
        assert_same_image(ours[0], stock[0])
        assert not torch.allclose(ours[1], stock[1])


def test_a_map_of_the_share(sd):
    with nasa(sd, "blurry", method="nag", **SETTINGS) as handle:
        whole = draw(sd)
        handle.alpha = torch.full((16, 16), 0.5)
        assert_same_image(draw(sd), whole)
        handle.alpha = torch.cat([torch.zeros(8, 16), torch.full((8, 16), 0.5)])
        assert not torch.allclose(draw(sd), whole)


def test_several_prompts_in_one_softmax(sd):
    """VSF of two negative prompts is that of both side by side, each with its alpha."""
    first, second = negative_embeds(sd, "blurry"), negative_embeds(sd, "red")
    with nasa(sd, [("blurry", 0.3), ("red", 0.8)], rule="vsf"):
        ours = draw(sd)
    alphas = torch.cat([torch.full((77, 1), 0.3), torch.full((77, 1), 0.8)])
    text = torch.cat([first, second], dim=1)
    with everywhere(sd, lambda m: PlainFlip(text, None, alphas)):
        assert_same_image(ours, draw(sd))


@pytest.mark.parametrize(
    "options", [{"method": "nag", **SETTINGS}, {"rule": "vsf", "alpha": 0.5}], ids=["nag", "vsf"]
)
def test_off_is_stock_and_settings_change_between_calls(sd, options):
    stock = draw(sd, guidance=5.0)
    handle = enable_nasa(sd, "blurry", **options)
    first = draw(sd, guidance=5.0)
    handle.alpha = 0
    assert torch.equal(draw(sd, guidance=5.0), stock)
    handle.alpha = 0.5
    assert torch.equal(draw(sd, guidance=5.0), first)
    if "method" in options:
        handle.set_nag(nag_scale=8.0, nag_tau=1.0)
        assert "nag, scale 8, tau 1" in str(handle.report())
        assert not torch.allclose(draw(sd, guidance=5.0), first)
    handle.disable()
    assert torch.equal(draw(sd, guidance=5.0), stock)


@pytest.mark.parametrize(
    ("family", "expected"),
    [("sd", (3.0, 2.5, 0.375)), ("sdxl", (3.0, 2.5, 0.5)), ("pixart", (5.0, 2.5, 0.375))],
)
def test_defaults_of_nag(family, expected):
    handle = enable_nasa(FAMILIES[family](), negative_prompt_embeds=negative(family), method="nag")
    nag = handle._steerings[0].settings.nag
    assert (nag.scale, nag.tau, handle.alpha) == expected
    handle.set_negative_prompt(negative_prompt_embeds=2 * negative(family))
    assert handle.alpha == expected[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "cfg"}, "method must be 'nasa' or 'nag', got 'cfg'"),
        ({"rule": "nasa-text"}, "rule must be one of 'nasa', 'vsf' for Stable Diffusion"),
        ({"nag_scale": 3.0}, "nag_scale goes with method='nag'"),
        ({"nag_alpha": 0.5}, "nag_alpha goes with method='nag'"),
        ({"method": "nag", "alpha": 0.5}, "method='nag' takes nag_alpha"),
        ({"method": "nag", "rule": "vsf"}, "rule='vsf' goes with method='nasa'"),
        ({"method": "nag", "nag_scale": 1}, "1 more than the paper's scale"),
        ({"method": "nag", "nag_scale": "3"}, "nag_scale must be a finite number"),
        ({"method": "nag", "nag_tau": 0}, "nag_tau must be above 0"),
        ({"method": "nag", "nag_alpha": "half"}, "must be a finite number"),
        ({"rule": "vsf", "alpha": torch.ones(4, 4)}, "alpha cannot be a map over the image"),
    ],
    ids=str,
)
def test_refusals(sd, options, message):
    with pytest.raises(ValueError, match="enable_nasa:") as error:
        enable_nasa(sd, "blurry", **options)
    assert message in str(error.value)
    stock = draw(sd)
    assert torch.equal(draw(sd), stock)


def test_refusals_after_it_is_on(sd):
    handle = enable_nasa(sd, "blurry", method="nag")
    with pytest.raises(ValueError, match="takes one negative prompt"):
        handle.set_negative_prompt([("blurry", 0.3), ("red", 0.8)])
    with pytest.raises(ValueError, match="1 more than the paper's"):
        handle.set_nag(nag_scale=1.0)
    before = draw(sd)
    handle.disable()
    handle = enable_nasa(sd, "blurry", rule="vsf")
    with pytest.raises(ValueError, match="cannot be a map"):
        handle.alpha = torch.ones(4, 4)
    with pytest.raises(ValueError, match="NAG is not on"):
        handle.set_nag(nag_scale=2.0)
    assert not torch.allclose(draw(sd), before)


@pytest.mark.parametrize(
    "options", [{"method": "nag", **SETTINGS}, {"rule": "vsf", "alpha": 0.5}], ids=["nag", "vsf"]
)
def test_compiled(options):
    """Alpha and the prompts are data here too."""
    torch._dynamo.reset()
    plain, pipe = testing.pixart(), testing.pixart()
    pipe.transformer.compile(fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        handles = [enable_nasa(each, "blurry", **options) for each in (plain, pipe)]
        for alpha in (0.5, 0.25):
            for handle in handles:
                handle.alpha = alpha
                handle.set_negative_prompt("red" * int(4 * alpha))
            assert_same_image(draw(pipe), draw(plain))
