"""What a guided call costs: FLOPs on the real architectures, launches and copies in a layer."""

import pytest
import torch
from drawing import draw, negative_embeds
from nasa_diffusers import NAG, VSF, enable_nasa, flops, ip_adapter, nasa, testing
from nasa_diffusers.families import family_of
from test_pipe_adapters import IMAGE, load_ip_adapter

from bench.launches import Operators


@pytest.mark.parametrize("name", ["SD 1.5, 512 px", "Sana 0.6B, 1024 px"])
def test_flops_of_the_real_architectures(name):
    """The difference between the first and a later call is the projection of both prompts."""
    counted = flops.count(name)
    model = flops.MODELS[name]
    with torch.device("meta"):
        denoiser = model.build(**model.config)
    layers = family_of(denoiser).layers(denoiser)
    # to_k and to_v of as many tokens as the negative prompt has
    projection = sum(4 * model.tokens * a.to_k.in_features * a.inner_dim for _, a in layers)
    if name.startswith("Sana"):
        caption = denoiser.caption_projection
        for linear in (caption.linear_1, caption.linear_2):
            projection += 2 * model.tokens * linear.in_features * linear.out_features
    assert counted.first - counted.later == 2 * projection
    # Q K^T and P V over the negative tokens are all that is added otherwise
    assert counted.later + projection > counted.stock
    assert 0 < counted.added_first < 0.08
    assert counted.added_later < 0.001
    assert name in flops.markdown([counted])


def test_report_counts_what_the_counter_counts(sd):
    """The report's arithmetic against operations counted one by one."""
    from torch.utils.flop_counter import FlopCounterMode

    sample, text = torch.randn(1, 4, 16, 16), negative_embeds(sd, "a cat")

    def call():
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            sd.unet(sample, 500, text)
        return counter.get_total_flops()

    # plain matrix products: the counter has no formula for the CPU's fused attention
    handle = enable_nasa(sd, "blurry", alpha=0.5, backend="reference")
    both = call()
    report = handle.report()
    later = call()
    assert both - later == 2 * report.projection_flops
    handle.set_negative_prompt(negative_prompt_embeds=negative_embeds(sd)[:, :50])
    call()
    assert later - call() == report.attention_flops - handle.report().attention_flops


def launches(pipe, denoiser, draw):
    """The operations of one cross-attention layer whose keys and values are cached."""
    calls = []
    layer = next(m for name, m in denoiser.named_modules() if name.endswith("attn2"))
    hook = layer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    draw(pipe)
    hook.remove()
    args, kwargs = calls[-1]
    with torch.no_grad(), Operators() as seen:
        layer(*args, **kwargs)
    return seen.names


@pytest.mark.parametrize(
    "build",
    [testing.stable_diffusion, testing.stable_diffusion_xl, testing.pixart],
    ids=["sd", "sdxl", "pixart"],
)
def test_three_launches_and_no_copy(build, draw):
    """Q, the op, the output projection: Q goes in and O comes out without a copy."""
    pipe = build()
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    with nasa(pipe, "blurry", alpha=0.5):
        names = launches(pipe, denoiser, draw)
    products = {"aten::mm", "aten::addmm", "aten::bmm"}
    assert len(names) == 3
    assert names[0] in products and names[2] in products
    assert names[1].startswith("nasa_kernels::")


def test_a_further_negative_is_two_more_launches(sd, draw):
    with nasa(sd, [("blurry", 0.3), ("red", 0.8)]):
        names = launches(sd, sd.unet, draw)
    assert [name.startswith("nasa_kernels::") for name in names] == [
        False,
        True,
        True,
        False,
        False,
    ]
    assert names[3] == "aten::add"


def test_an_ip_adapter_is_part_of_the_call(sd, monkeypatch):
    """Its scale included; stock takes eleven operators in all. By itself it is a further call of
    the op, and one addition."""
    load_ip_adapter(sd)
    sd.set_ip_adapter_scale(0.6)

    def draw_with_image(pipe):
        # two steps: in the second one the keys and values of the image are kept
        draw(pipe, steps=2, ip_adapter_image_embeds=[IMAGE])

    stock = launches(sd, sd.unet, draw_with_image)
    with nasa(sd, "blurry", alpha=0.5):
        together = launches(sd, sd.unet, draw_with_image)
        sd.set_ip_adapter_scale(0.0)
        assert "nasa_kernels::forward_cpu" in launches(sd, sd.unet, draw_with_image)
        sd.set_ip_adapter_scale(0.6)
        monkeypatch.setattr(ip_adapter, "image_beside", lambda *args: None)
        names = launches(sd, sd.unet, draw_with_image)
    assert [name.startswith("nasa_kernels::joint_forward") for name in together] == [
        False,
        True,
        False,
    ]
    ours = [name.startswith("nasa_kernels::forward") for name in names]
    assert ours == [False, True, True, False, False] and names[3] == "aten::add"
    assert len(stock) >= 10


def test_nag_is_three_operators_and_vsf_seven(sd):
    """NAG: one between two of the stock layer's. VSF: one attention, and what puts its values
    together.
    """
    pipe = testing.pixart()
    with nasa(pipe, "blurry", NAG(), backend="triton"):
        names = launches(pipe, pipe.transformer, draw)
    kernels = [name.removeprefix("nasa_kernels::") for name in names[1:-1]]
    assert kernels == ["nag_triton"]
    with nasa(sd, "blurry", VSF(0.5)):
        names = launches(sd, sd.unet, draw)
    assert sum(name.startswith("nasa_kernels::") for name in names) == 1
    assert len(names) == 7, names
