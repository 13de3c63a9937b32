"""Several nodes, every method, CFG, other nodes before and after, and what is refused."""

import asyncio
import dataclasses

import comfy.patcher_extension
import pytest
import torch
from comfyui.test_comfy_families import (
    ALPHA,
    by_two_calls,
    close,
    in_lockstep,
    layers_of,
    node,
    rows_of,
)
from comfyui.tiny import predict, sample, tiny

from nasa_kernels import nasa_attention_reference


@pytest.fixture
def model():
    return tiny("wan")


@pytest.fixture
def texts(model):
    return [model.text(n, seed) for n, seed in ((20, 1), (13, 2), (9, 3))]


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


# ---- other nodes ---------------------------------------------------------------------------------


def foreign_override(func, *args, **kwargs):
    foreign_override.calls += 1
    return func(*args, **kwargs)


def test_an_attention_override_before_is_kept_and_after_is_named(pack, model, texts):
    positive, negative, _ = texts
    whole = predict(model, positive, node(pack, model, negative))
    before = model.patcher.clone()
    foreign_override.calls = 0
    before.model_options["transformer_options"]["optimized_attention_override"] = foreign_override
    kept = predict(model, positive, node(pack, model, negative, before))
    torch.testing.assert_close(kept, whole)
    # the image's attention to itself, in 3 blocks
    assert foreign_override.calls == 3
    after = node(pack, model, negative)
    after.model_options["transformer_options"]["optimized_attention_override"] = foreign_override
    with pytest.raises(RuntimeError, match=r"0 of 3 .*foreign_override holds their place"):
        predict(model, positive, after)


def test_an_ip_adapter_before_is_kept_and_after_is_named(pack):
    model = tiny("sd15")
    positive, negative = model.text(20, 1), model.text(13, 2)
    before = model.patcher.clone()
    from comfy.ldm.modules.attention import optimized_attention

    seen = set()

    def adapter(q, k, v, extra_options):
        seen.add(k.shape[1])
        return optimized_attention(q, k, v, extra_options["n_heads"]) + 0.01 * q

    keys = [("input", 1), ("middle", 0), ("output", 1)]
    for key in keys:
        before.set_model_attn2_replace(adapter, *key)
    plain = predict(model, positive, before)
    guided = node(pack, model, negative, before)
    assert (predict(model, positive, guided) - plain).norm() > 1e-3 * plain.norm()
    # the adapter's part is added whatever the strength: at next to nothing it is there alone
    faint = predict(model, positive, node(pack, model, negative, before, strength=1e-6))
    assert (faint - plain).norm() < 1e-4 * plain.norm()
    after = node(pack, model, negative)
    after.set_model_attn2_replace(adapter, *keys[0])
    assert seen == {20}
    with pytest.raises(RuntimeError, match=r"6 of 7 .*adapter holds their place; move that node"):
        predict(model, positive, after)
    with pytest.raises(ValueError, match="adapter adds to the attention .* beside which NAG"):
        predict(model, positive, node(pack, model, negative, before, "NAG", 3.0))


def test_a_patch_of_the_text_that_adds_tokens_is_named(pack):
    """As an IP-Adapter may, before the projections."""
    model = tiny("sd15")
    positive, negative = model.text(20, 1), model.text(13, 2)

    def adapter(n, context, value, extra_options):
        return n, torch.cat((context, context[:, :4]), 1), torch.cat((value, value[:, :4]), 1)

    before = model.patcher.clone()
    before.set_model_attn2_patch(adapter)
    after = node(pack, model, negative)
    after.set_model_attn2_patch(adapter)
    for patcher in (node(pack, model, negative, before), after):
        with pytest.raises(ValueError, match=r"adapter changed the text from 33 tokens to 37"):
            predict(model, positive, patcher)


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_a_controlnet_adds_what_it_adds_without(pack, name):
    model = tiny(name)
    positive, negative = model.text(20, 1), model.text(13, 2)
    hints = torch.Generator().manual_seed(9)
    if name == "sd15":
        control = {"middle": [50 * torch.randn(1, 64, 8, 8, generator=hints)]}
    else:
        control = {"input": [torch.randn(1, 64, 128, generator=hints)], "output": []}
    guided = node(pack, model, negative, method="NASA", rule="nasa")
    stock = predict(model, positive, control=control)
    assert (stock - predict(model, positive)).norm() > 1e-3 * stock.norm()
    actual = predict(model, positive, guided, control=control)
    if name == "sd15":
        layers = len(layers_of(name, model.net))
        expected = by_two_calls(name, model, positive, negative, [ALPHA] * layers, control=control)
    else:
        rows = rows_of(name, model)
        expected = in_lockstep(model, positive, negative, ALPHA, rows, control=control)
    close(actual, expected, stock)


@pytest.mark.parametrize("place", ["before", "after"])
def test_easycache(pack, model, texts, place):
    """ComfyUI's own cache of the network, which leaves out steps."""
    nodes = pytest.importorskip("comfy_extras.nodes_easycache")
    positive, negative, other = texts
    calls = 0

    def counted(executor, *args, **kwargs):
        nonlocal calls
        calls += 1
        return executor(*args, **kwargs)

    def cached(threshold):
        patcher = model.patcher if place == "before" else node(pack, model, negative)
        patcher = nodes.EasyCacheNode.execute(patcher, threshold, 0.0, 1.0, False).args[0]
        if place == "before":
            patcher = node(pack, model, negative, patcher)
        kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
        patcher.add_wrapper_with_key(kind, "counted", counted)
        return sample(model, patcher, positive, other, steps=6)

    plain = sample(model, node(pack, model, negative), positive, other, steps=6)
    assert torch.equal(cached(0.0), plain)
    assert calls == 6
    result = cached(1e6)
    assert torch.isfinite(result).all()
    assert calls < 12


def test_a_node_that_leaves_out_blocks_is_an_error(pack, model, texts):
    """As a cache of blocks does."""
    guided = node(pack, model, texts[1])
    guided.set_model_patch_replace(lambda args, _: {"img": args["img"]}, "dit", "double_block", 1)
    with pytest.raises(RuntimeError, match=r"2 of 3 .*the others did not run; .* cache of blocks"):
        predict(model, texts[0], guided)

    def again(args, extra):
        return extra["original_block"](args) and extra["original_block"](args)

    guided.set_model_patch_replace(again, "dit", "double_block", 1)
    with pytest.raises(RuntimeError, match=r"4 of 3 .*more than the network has"):
        predict(model, texts[0], guided)
    # and nothing is left behind
    assert torch.equal(predict(model, texts[0]), predict(model, texts[0], model.patcher.clone()))
    from nasa_pack.steering.call import CURRENT

    assert CURRENT.get() is None


def test_weights_that_a_lora_changed_project_both_prompts(pack, model, texts):
    positive, negative, _ = texts
    lora = model.patcher.clone()
    name = "diffusion_model.blocks.0.cross_attn.k.weight"
    change = 0.5 * torch.randn(128, 128, generator=torch.Generator().manual_seed(4))
    assert lora.add_patches({name: ("diff", (change,))}) == [name]
    guided = node(pack, model, negative, lora)
    plain = predict(model, positive, node(pack, model, negative))
    changed = predict(model, positive, guided)
    assert (changed - plain).norm() > 1e-3 * plain.norm()
    again = node(pack, model, positive, lora, "NASA projected", 2.0)
    stock = predict(model, positive, lora)
    assert (predict(model, positive, again) - stock).norm() < 1e-4 * stock.norm()


def test_compiled(pack, model, texts):
    """By ComfyUI's own node for it, before and after this one."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    positive, negative, _ = texts
    plain = predict(model, positive, node(pack, model, negative))
    compiled = model.patcher.clone()
    set_torch_compile_wrapper(model=compiled, backend="eager")
    first = node(pack, model, negative, compiled)
    last = node(pack, model, negative)
    set_torch_compile_wrapper(model=last, backend="eager")
    for patcher in (first, last):
        torch._dynamo.reset()
        torch.testing.assert_close(predict(model, positive, patcher), plain, rtol=1e-3, atol=1e-3)


# ---- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("conditioning", "message"),
    [
        ([], "is empty; connect a text"),
        ([[torch.zeros(1, 0, 64), {}]], "the negative text has no tokens"),
        ([[torch.zeros(1, 4, 64), {}]] * 2, "has 2 prompts; give each a node of its own"),
        ([[torch.zeros(1, 4, 64), {"mask": torch.ones(1, 8, 8)}]], "has a mask, which is not"),
        ([[torch.zeros(1, 4, 64), {"area": (8, 8, 0, 0)}]], "has an area, which is not"),
        ([[torch.zeros(1, 4, 64), {"end_percent": 0.5}]], "has a range of steps, which is not"),
    ],
    ids=["empty", "no tokens", "two", "mask", "area", "steps"],
)
def test_a_conditioning_that_is_no_prompt(pack, model, conditioning, message):
    from nasa_pack.nodes import NasaNegativePrompt

    arguments = ("NASA", ALPHA, "nasa", 0.0, 1.0, "")
    with pytest.raises(ValueError, match=message):
        NasaNegativePrompt.execute(model.patcher, conditioning, *arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "PAG"}, "method must be one of NASA, NASA projected, NAG, VSF, got 'PAG'"),
        ({"rule": "sum"}, "rule must be one of nasa-cross, nasa-text, nasa, got 'sum'"),
        ({"strength": float("nan")}, "strength must be 0 or more, got nan"),
        ({"start_percent": 0.7, "end_percent": 0.2}, "start_percent must be below end_percent"),
    ],
    ids=["method", "rule", "strength", "steps"],
)
def test_settings_of_another_version(pack, model, texts, change, message):
    from nasa_pack.nodes import NasaNegativePrompt

    settings = {
        "model": model.patcher, "negative": model.conditioning(texts[1]), "method": "NASA",
        "strength": ALPHA, "rule": "nasa", "start_percent": 0.0, "end_percent": 1.0, "layers": "",
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        NasaNegativePrompt.execute(**{**settings, **change})


def test_a_text_of_another_model(pack, model, texts):
    other = torch.randn(1, 7, 32)
    guided = node(pack, model, other)
    with pytest.raises(ValueError, match="has 32 channels and this model's text 64; encode it"):
        predict(model, texts[0], guided)


def test_nodes_that_do_not_go_together(pack, model, texts):
    first = node(pack, model, texts[1])
    with pytest.raises(ValueError, match="different methods, NAG, NASA; set one for all"):
        node(pack, model, texts[2], first, "NAG", 3.0)
    nag = node(pack, model, texts[1], None, "NAG", 3.0)
    with pytest.raises(ValueError, match="NAG takes one negative prompt, and there are 2 nodes"):
        node(pack, model, texts[2], nag, "NAG", 3.0)


def test_nodes_that_do_not_go_together_in_joint_attention(pack):
    model = tiny("flux")
    positive, negative = model.text(20, 1), model.text(13, 2)
    first = node(pack, model, negative, method="VSF")
    with pytest.raises(ValueError, match="VSF takes one negative prompt where text and image"):
        node(pack, model, negative, first, "VSF")
    first = node(pack, model, negative, rule="nasa-cross")
    with pytest.raises(ValueError, match="several nodes in a row need the rule nasa-cross"):
        node(pack, model, negative, first, rule="nasa")
    # the node before them is as it was
    assert torch.isfinite(predict(model, positive, first)).all()


def test_a_mask_of_tokens_is_refused_in_joint_attention(pack):
    """As Lumina 2 has it where the mask hides something."""
    model = tiny("lumina2")
    positive, negative = model.text(20, 1), model.text(13, 2)
    settings = {**model.settings, "attention_mask": None}
    masked = dataclasses.replace(model, settings=settings, shown=9)
    for of_positive, of_negative in ((masked, model), (model, masked)):
        with pytest.raises(ValueError, match="has a mask of its tokens, which is not obeyed"):
            predict(of_positive, positive, node(pack, of_negative, negative))


@pytest.mark.parametrize(
    ("layers", "message"),
    [("one", "must be like 0-9, 12"), ("2-1", "must be like"), ("0-3", "must be below 3")],
)
def test_layers_that_are_none(pack, model, texts, layers, message):
    with pytest.raises(ValueError, match=message):
        node(pack, model, texts[1], layers=layers)


def test_a_network_that_is_not_known(pack, model, texts, monkeypatch):
    from nasa_pack.steering import families

    monkeypatch.setattr(families, "FAMILIES", {"Flux": families.Flux})
    with pytest.raises(ValueError, match="the network WanModel is not known to this node"):
        node(pack, model, texts[1])


def test_a_guider_with_three_predictions(pack, model, texts):
    with pytest.raises(ValueError, match="more than a positive and a negative prediction"):
        predict(model, texts[0], node(pack, model, texts[1]), cond_or_uncond=[2])
