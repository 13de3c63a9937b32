"""Every family against an oracle of its own, at strengths above 0, on prompts of unequal size."""

import threading

import pytest
import torch
from comfyui.tiny import predict, tiny

CROSS = ("sd15", "sdxl", "wan", "ltxv", "pixart", "cosmos")
JOINT = ("flux", "flux2", "chroma", "qwen", "sd3", "aura", "hunyuan", "lumina2", "zimage")
ALPHA = 0.4


def node(pack, model, text, patcher=None, method="NASA", strength=ALPHA, rule="nasa", layers=""):
    from nasa_pack.nodes import NasaNegativePrompt

    return NasaNegativePrompt.execute(
        model.patcher if patcher is None else patcher, model.conditioning(text), method, strength,
        rule, 0.0, 1.0, layers,
    ).args[0]  # fmt: skip


@pytest.fixture
def model(request):
    return tiny(request.param)


def close(actual, expected, stock):
    """To fp32's rounding, in proportion to what guidance changes."""
    effect = (expected - stock).norm()
    assert effect > 1e-4 * stock.norm()
    assert (actual - expected).norm() < 2e-3 * effect


# ---- cross-attention: out = out(positive) - alpha (out(negative) - bias), all of it stock --------


def layers_of(name, net):
    """The text attentions of a stock network, and the bias of what follows each."""
    if name in ("sd15", "sdxl"):
        found = [m.attn2 for m in net.modules() if getattr(m, "attn2", None) is not None]
        return [(m, m.to_out[0].bias) for m in found]
    if name == "wan":
        return [(block.cross_attn, block.cross_attn.o.bias) for block in net.blocks]
    if name == "ltxv":
        return [(block.attn2, block.attn2.to_out[0].bias) for block in net.transformer_blocks]
    if name == "pixart":
        return [(block.cross_attn, block.cross_attn.proj.bias) for block in net.blocks]
    return [(block.cross_attn, 0.0) for block in net.blocks]


def prepared(name, net, text):
    """The text as the layers get it."""
    if name == "wan":
        return net.text_embedding(text)
    if name == "ltxv":
        return net.caption_projection(text)
    if name == "pixart":
        return net.y_embedder.y_proj(text)
    return text


def by_two_calls(name, model, positive, negative, alphas):
    """The stock network, each of whose text attentions is called again with the negative text."""
    text = prepared(name, model.net, negative)
    handles = []

    def hook(alpha, bias, forward):
        def subtract(module, args, kwargs, output):
            args, kwargs = list(args), dict(kwargs)
            if "context" in kwargs:
                kwargs["context"] = text
                kwargs.pop("value", None)
            else:
                args[1] = text
            if kwargs.get("mask") is not None:
                kwargs["mask"] = None
            return output - alpha * (forward(*args, **kwargs) - bias)

        return subtract

    for (module, bias), alpha in zip(layers_of(name, model.net), alphas, strict=True):
        handles.append(
            module.register_forward_hook(hook(alpha, bias, module.forward), with_kwargs=True)
        )
    try:
        return predict(model, positive)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("model", CROSS, indirect=True, ids=CROSS)
def test_cross_attention(pack, model, request):
    name = request.node.callspec.id
    positive, negative = model.text(20, 1), model.text(13, 2)
    if name == "pixart":
        # its attention takes one length
        negative = model.text(20, 2)
    stock = predict(model, positive)
    layers = len(layers_of(name, model.net))
    expected = by_two_calls(name, model, positive, negative, [ALPHA] * layers)
    actual = predict(model, positive, node(pack, model, negative))
    close(actual, expected, stock)
    # the MODEL that came in is as it was
    assert torch.equal(predict(model, positive), stock)
    some = by_two_calls(name, model, positive, negative, [0.0] + [ALPHA] * (layers - 1))
    actual = predict(model, positive, node(pack, model, negative, layers=f"1-{layers - 1}"))
    close(actual, some, stock)


# ---- joint attention: two stock networks side by side, which exchange the image's rows -----------


def in_lockstep(model, positive, negative, alpha, rows_of):
    """The stock network on either text, in two threads. At each joint attention both get
    Z+ - alpha Z- for the image's queries, and keep what their text's queries found. Registers are
    those of the positive's network in both."""
    barrier = threading.Barrier(2, timeout=60)
    found, results = {}, {}

    def run(side, text):
        def override(func, q, *args, **kwargs):
            o = func(q, *args, **kwargs)
            axis = 2 if kwargs.get("skip_reshape") else 1
            if (rows := rows_of(q.shape[axis], text.shape[1])) is None:
                return o
            image, registers = rows
            found[side] = o[:, image], o[:, registers]
            barrier.wait()
            (z_pos, kept), (z_neg, _) = found["+"], found["-"]
            o = o.clone()
            o[:, image], o[:, registers] = z_pos - alpha * z_neg, kept
            barrier.wait()
            return o

        try:
            results[side] = predict(
                model, text, patched=False, optimized_attention_override=override
            )
        except BaseException as error:
            barrier.abort()
            results[side] = error

    sides = (("+", positive), ("-", negative))
    threads = [threading.Thread(target=run, args=side) for side in sides]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results.values():
        if isinstance(result, BaseException):
            raise result
    return results["+"]


def rows_of(name, model):
    """Of a joint attention of this many queries, those of the image and those of registers; None
    for another attention."""
    tokens = 128 if name == "hunyuan" else 64
    registers = model.net.register_tokens.shape[1] if name == "aura" else 0

    def rows(l, text):
        if name == "flux2":
            # as the text encoder's output is padded
            text = 512
        if name == "zimage":
            text = -(-text // 32) * 32
        if l != registers + text + tokens:
            return None
        image = slice(0, tokens) if name == "hunyuan" else slice(registers + text, l)
        return image, slice(0, registers)

    return rows


@pytest.mark.parametrize("model", JOINT, indirect=True, ids=JOINT)
def test_joint_attention(pack, model, request):
    name = request.node.callspec.id
    rows = rows_of(name, model)
    # the image of Lumina 2 stands behind its text, whose length is the positive's
    positive, negative = model.text(20, 1), model.text(20 if name == "lumina2" else 13, 2)
    stock = predict(model, positive)
    expected = in_lockstep(model, positive, negative, ALPHA, rows)
    actual = predict(model, positive, node(pack, model, negative))
    close(actual, expected, stock)
    assert torch.equal(predict(model, positive), stock)
    # another length, and in the order that was not the longer one's
    expected = in_lockstep(model, negative, positive, ALPHA, rows)
    close(predict(model, negative, node(pack, model, positive)), expected, stock)


@pytest.mark.parametrize("model", CROSS + JOINT, indirect=True, ids=CROSS + JOINT)
def test_a_prompt_against_itself(pack, model):
    """Projected takes nothing from an equal prompt, whatever the strength: the stock result."""
    text = model.text(20, 1)
    stock = predict(model, text)
    actual = predict(model, text, node(pack, model, text, method="NASA projected", strength=2.0))
    assert (actual - stock).norm() < 1e-4 * stock.norm()
