"""Several nodes, every method, CFG, steps, and prompts of the positive side."""

import asyncio

import pytest
import torch
from comfyui.oracle import ALPHA, close, node
from comfyui.tiny import predict, sample, tiny

from nasa_kernels import nasa_attention_reference


def test_comfyui_finds_the_node(pack):
    (node,) = asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list())
    schema = node.GET_SCHEMA()
    assert schema.node_id == "NasaNegativePrompt"
    assert [x.id for x in schema.inputs] == [
        "model", "negative", "method", "strength", "rule", "start_percent", "end_percent", "layers",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["wan", "sd15", "flux", "hunyuan", "krea2"])
def test_nodes_in_a_row_add_up(pack, name):
    """One negative prompt at 0.4 is the same prompt twice at 0.2."""
    model = tiny(name)
    positive, negative = model.text(20, 1), model.text(13, 2)
    stock = predict(model, positive)
    for method, rule in (("NASA", "nasa-cross"), ("NASA projected", "nasa")):
        once = node(pack, model, negative, method=method, rule=rule)
        first = node(pack, model, negative, method=method, rule=rule, strength=ALPHA / 2)
        twice = node(pack, model, negative, first, method, ALPHA / 2, rule)
        close(predict(model, positive, twice), predict(model, positive, once), stock)
        # the first node's MODEL has one term still
        assert len(first.model_options["transformer_options"]["nasa_terms"]) == 1


@pytest.mark.parametrize("name", ["wan", "sd15", "flux", "zimage"])
def test_nodes_in_a_row_have_layers_of_their_own(pack, name):
    """A node in the first layer and one in the others are one node in all."""
    model = tiny(name)
    positive, negative = model.text(20, 1), model.text(13, 2)
    stock = predict(model, positive)
    last = {"wan": 2, "sd15": 6, "flux": 3, "zimage": 1}[name]
    for method in ("NASA", "NASA projected"):
        settings = {"method": method, "rule": "nasa-cross"}
        first = node(pack, model, negative, layers="0", **settings)
        both = node(pack, model, negative, first, layers=f"1-{last}", **settings)
        whole = node(pack, model, negative, **settings)
        close(predict(model, positive, both), predict(model, positive, whole), stock)
        only = predict(model, positive, first)
        assert (only - predict(model, positive, whole)).norm() > 1e-4 * stock.norm()


def test_nodes_of_vsf_in_a_row_are_one_text(pack, model, texts):
    positive, negative, _ = texts
    first = node(pack, model, negative[:, :8], method="VSF")
    both = node(pack, model, negative[:, 8:], first, "VSF")
    whole = predict(model, positive, node(pack, model, negative, method="VSF"))
    close(predict(model, positive, both), whole, predict(model, positive))


def by_formula(model, positive, negative, formula):
    """The stock network of Wan, whose attention to text is `formula(q, k+, v+, k-, v-)`."""

    def override(func, q, k, v, heads, *args, **kwargs):
        if k.shape[1] != 33:
            return func(q, k, v, heads, *args, **kwargs)
        q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
        (kp, kn), (vp, vn) = (x.split((20, 13), 1) for x in (k, v))
        return formula(q, kp, vp, kn, vn).flatten(2)

    both = torch.cat((positive, negative), 1)
    return predict(model, both, optimized_attention_override=override)


def z(q, k, v):
    return nasa_attention_reference(q, k, v, k, v, 0.0)


def nag(q, kp, vp, kn, vn, scale=3.0, tau=2.5, alpha=0.25):
    pos, neg = z(q, kp, vp), z(q, kn, vn)
    guided = scale * pos - (scale - 1) * neg
    norm_pos, norm = (x.abs().sum((2, 3), keepdim=True) for x in (pos, guided))
    return alpha * guided * (tau * norm_pos / norm).clamp(max=1) + (1 - alpha) * pos


def vsf(q, kp, vp, kn, vn):
    return z(q, torch.cat((kp, kn), 1), torch.cat((vp, -ALPHA * vn), 1))


def projected(q, kp, vp, kn, vn):
    pos, neg = z(q, kp, vp), z(q, kn, vn)
    off = neg - (neg * pos).sum(-1, keepdim=True) / pos.square().sum(-1, keepdim=True) * pos
    o = pos - ALPHA * off
    return o * pos.norm(dim=-1, keepdim=True) / o.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize(
    ("method", "strength", "formula"),
    [("NAG", 3.0, nag), ("VSF", ALPHA, vsf), ("NASA projected", ALPHA, projected)],
    ids=["nag", "vsf", "projected"],
)
def test_the_methods(pack, model, texts, method, strength, formula):
    positive, negative, _ = texts
    stock = predict(model, positive)
    actual = predict(model, positive, node(pack, model, negative, None, method, strength))
    close(actual, by_formula(model, positive, negative, formula), stock)


@pytest.mark.parametrize("method", ["NASA", "NASA projected", "NAG", "VSF"])
@pytest.mark.parametrize("name", ["wan", "flux", "sd3", "aura"])
def test_rows_of_cfg_stay_stock(pack, name, method):
    """Of [positive; CFG's negative] in one call only the positive's row is guided."""
    model = tiny(name)
    positive, negative = model.text(20, 1), model.text(13, 2)
    guided = node(pack, model, negative, None, method, 2.0)
    alone = predict(model, positive, guided)
    stock = predict(model, positive, rows=2)
    both = predict(model, positive, guided, rows=2, cond_or_uncond=[0, 1])
    first = predict(model, positive, guided, rows=2)[:1]
    torch.testing.assert_close(both[:1], first, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(both[1:], stock[1:], rtol=1e-3, atol=1e-3)
    assert (both[1:] - predict(model, positive, guided, rows=2)[1:]).abs().max() > 1e-2
    assert torch.isfinite(alone).all()


def test_through_the_sampler(pack, model, texts):
    positive, negative, other = texts
    guided = node(pack, model, negative)
    for cfg in (1.0, 3.0):
        stock = sample(model, model.patcher, positive, other, cfg)
        assert (sample(model, guided, positive, other, cfg) - stock).norm() > 1e-3 * stock.norm()
        # strength 0 is the stock call itself, and the MODEL before the node is what it was
        off = node(pack, model, negative, strength=0.0)
        assert torch.equal(sample(model, off, positive, other, cfg), stock)
        assert torch.equal(sample(model, model.patcher, positive, other, cfg), stock)


def test_cfg_takes_the_guided_prediction(pack, model, texts):
    positive, negative, other = texts
    guided = node(pack, model, negative)
    # after one step the latent is the prediction: uncond + cfg (guided - uncond)
    uncond = sample(model, model.patcher, other, other, steps=1)
    cond = sample(model, guided, positive, other, steps=1)
    actual = sample(model, guided, positive, other, 3.0, steps=1)
    close(actual, uncond + 3.0 * (cond - uncond), uncond)


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_masks_and_several_prompts_of_the_positive_are_obeyed(pack, name):
    model = tiny(name)
    first, second, negative = (model.text(n, seed) for n, seed in ((20, 1), (20, 4), (13, 2)))
    guided = node(pack, model, negative)
    left = torch.zeros(1, *model.latent[-2:])
    left[..., : model.latent[-1] // 2] = 1.0
    alone = [sample(model, guided, text, negative, steps=1) for text in (first, second)]
    conditioning = []
    for text, mask in ((first, left), (second, 1.0 - left)):
        ((text, settings),) = model.conditioning(text)
        conditioning.append([text, {**settings, "mask": mask, "mask_strength": 1.0}])
    actual = sample(model, guided, conditioning, negative, steps=1)
    expected = left * alone[0] + (1.0 - left) * alone[1]
    close(actual, expected, sample(model, model.patcher, first, negative, steps=1))


def test_an_area_of_the_positive_is_obeyed(pack):
    """Half of the image has a call of its own, of half the size."""
    model = tiny("sd15")
    positive, negative = model.text(20, 1), model.text(13, 2)
    guided = node(pack, model, negative)
    whole = sample(model, guided, positive, negative, steps=1)
    ((text, settings),) = model.conditioning(positive)
    area = [text, {**settings, "area": (16, 8, 0, 0), "strength": 1.0}]
    half, other = (
        sample(model, patcher, [area], negative, steps=1) for patcher in (guided, model.patcher)
    )
    stock = sample(model, model.patcher, positive, negative, steps=1)
    assert (half[..., :8] - other[..., :8]).norm() > 1e-3 * stock.norm()
    # where no prompt is, nothing is predicted
    assert half[..., 8:].abs().max() < 1e-3 * whole.abs().max()


def test_the_steps_between_start_and_end(pack, model, texts):
    from nasa_pack.nodes import NasaNegativePrompt

    positive, negative, _ = texts

    def window(start, end):
        return NasaNegativePrompt.execute(
            model.patcher, model.conditioning(negative), "NASA", ALPHA, "nasa", start, end, ""
        ).args[0]

    sampling = model.patcher.get_model_object("model_sampling")
    early, late = (float(sampling.percent_to_sigma(x)) for x in (0.1, 0.9))
    whole = node(pack, model, negative)
    for sigma, guided, other in (
        (early, window(0.0, 0.5), window(0.5, 1.0)),
        (late, window(0.5, 1.0), window(0.0, 0.5)),
    ):
        inside = predict(model, positive, guided, sigma=sigma)
        assert torch.equal(inside, predict(model, positive, whole, sigma=sigma))
        outside = predict(model, positive, other, sigma=sigma)
        assert torch.equal(outside, predict(model, positive, sigma=sigma))


def test_the_steps_are_those_of_a_sampling_that_a_later_node_sets(pack, model, texts):
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3
    from nasa_pack.nodes import NasaNegativePrompt

    late = NasaNegativePrompt.execute(
        model.patcher, model.conditioning(texts[1]), "NASA", ALPHA, "nasa", 0.5, 1.0, ""
    ).args[0]
    middle = float(model.patcher.get_model_object("model_sampling").percent_to_sigma(0.5))
    # at a shift of 1 the middle of the steps is at a lower sigma than at the model's own 8
    (shifted,) = ModelSamplingSD3().patch(late, 1.0, 1000)
    sigma = (middle + 0.5) / 2
    stock = predict(model, texts[0], sigma=sigma)
    assert not torch.equal(predict(model, texts[0], late, sigma=sigma), stock)
    (plain,) = ModelSamplingSD3().patch(model.patcher, 1.0, 1000)
    expected = predict(model, texts[0], plain, sigma=sigma)
    assert torch.equal(predict(model, texts[0], shifted, sigma=sigma), expected)
