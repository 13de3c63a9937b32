"""The op run at alpha 0, where nothing but the attention function may differ from stock.

Stock attends with `scaled_dot_product_attention`, whose kernels sum in an order of their own; the
reference back end multiplies, takes a softmax and multiplies. So a stock pipeline is given the
reference's attention in its text layers, and then no bit may differ: what the hooks do with text,
masks, projections, the cache, rows and layouts changes nothing.
"""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from drawing import denoise, negative_embeds, relative_error
from nasa_diffusers import nasa, testing

from nasa_kernels.reference import attend

FAMILIES = {
    "sd": testing.stable_diffusion,
    "sdxl": testing.stable_diffusion_xl,
    "pixart": testing.pixart,
    "sana": testing.sana,
    "sana-qk-norm": lambda: testing.sana(qk_norm="rms_norm_across_heads"),
    "wan-2.2": lambda: testing.wan(two_transformers=True),
}
# no padding, which is folded for Wan and then sums in another order
WAN_TEXT = {"prompt_embeds": torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(1))}


def forced_zero():
    """0, but one that could learn: the only alpha of 0 for which the op runs."""
    return torch.zeros((), requires_grad=True)


@contextlib.contextmanager
def reference_attention(pipe, monkeypatch):
    """`scaled_dot_product_attention` as the reference computes it, in the text layers only."""
    real, inside, used = F.scaled_dot_product_attention, [], []

    def substitute(query, key, value, attn_mask=None, **options):
        if not inside:
            return real(query, key, value, attn_mask=attn_mask, **options)
        used.append(1)
        # one bias per key, the same for every head and query
        mask = None if attn_mask is None else attn_mask[:, 0, 0]
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        z = attend(q, k, v, mask, q.shape[-1] ** -0.5)
        return z.to(query.dtype).contiguous().transpose(1, 2)

    handles = []
    for model in pipe.components.values():
        for name, module in model.named_modules() if isinstance(model, torch.nn.Module) else ():
            if name.endswith(".attn2"):
                handles.append(module.register_forward_pre_hook(lambda *_: inside.append(1)))
                handles.append(module.register_forward_hook(lambda *_: inside.clear()))
    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", substitute)
        yield used
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("guidance", [0.0, 5.0], ids=["no-cfg", "cfg"])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_bit_equal_to_stock_with_the_same_attention(family, steps, guidance, draw, monkeypatch):
    pipe = FAMILIES[family]()
    call = {"steps": steps, "guidance": guidance}
    negative = {"negative_prompt": "blurry"}
    if family.startswith("wan"):
        call |= {"prompt": None, **WAN_TEXT}
        if guidance:
            call["negative_prompt_embeds"] = -WAN_TEXT["prompt_embeds"]
        negative = {"negative_prompt_embeds": torch.ones(1, 5, 32).cumsum(1)}
    with reference_attention(pipe, monkeypatch) as used:
        stock = draw(pipe, **call)
        assert used
        with nasa(pipe, **negative, alpha=forced_zero(), backend="reference") as handle:
            used.clear()
            ours = draw(pipe, **call)
            # the op did run: only Wan's unconditional call of each step was left to stock layers
            assert handle.report().attention_flops > 0
            assert bool(used) == (family.startswith("wan") and guidance > 0)
            # and a call from the cache gives the same bits
            assert torch.equal(draw(pipe, **call), ours)
    assert torch.equal(ours, stock)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_as_accurate_as_stock(backend):
    """Against fp64, with stock's own attention: no more error than stock's."""
    pipe = testing.stable_diffusion()
    text = negative_embeds(pipe, "a cat")
    with torch.no_grad():
        stock = denoise(pipe, text)
        with nasa(pipe, "blurry", alpha=forced_zero(), backend=backend):
            ours = denoise(pipe, text)
        pipe.unet.double()
        exact = denoise(pipe, text.double())
    assert relative_error(stock, exact) > 0
    # two computations of the same accuracy round differently
    assert relative_error(ours, exact) <= 1.5 * relative_error(stock, exact)
