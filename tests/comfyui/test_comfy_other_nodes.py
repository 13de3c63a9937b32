"""Other nodes before and after: kept and right, or one sentence."""

import comfy.patcher_extension
import pytest
import torch
from comfyui.oracle import ALPHA, by_two_calls, close, in_lockstep, layers_of, node, rows_of
from comfyui.tiny import predict, sample, tiny


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


def test_an_answer_for_the_network_is_taken_after_a_step_that_ran(pack, model, texts):
    guided = node(pack, model, texts[1])
    answer = predict(model, texts[0], guided)
    answered = node(pack, model, texts[1])
    is_there = True
    kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
    answered.add_wrapper_with_key(
        kind, "cache", lambda executor, *args, **kw: answer if is_there else executor(*args, **kw)
    )
    with pytest.raises(RuntimeError, match="0 of 3 attentions to text were guided, the others did"):
        predict(model, texts[0], answered)
    is_there = False
    assert torch.equal(predict(model, texts[0], answered), answer)
    is_there = True
    assert torch.isfinite(predict(model, texts[0], answered)).all()
    # or after a step in which the node did not act yet
    from nasa_pack.nodes import NasaNegativePrompt

    conditioning = model.conditioning(texts[1])
    late = NasaNegativePrompt.execute(
        model.patcher, conditioning, "NASA", ALPHA, "nasa", 0.5, 1.0, ""
    ).args[0]
    late.add_wrapper_with_key(
        kind, "cache", lambda executor, *args, **kw: answer if is_there else executor(*args, **kw)
    )
    is_there = False
    predict(model, texts[0], late, sigma=0.99)
    is_there = True
    assert torch.isfinite(predict(model, texts[0], late, sigma=0.1)).all()


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
