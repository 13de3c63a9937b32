"""What guidance must give, from stock networks and layers; and a call of the node."""

import inspect
import threading

import pytest
import torch
from comfyui.tiny import predict

ALPHA = 0.4


def node(pack, model, text, patcher=None, method="NASA", strength=ALPHA, rule="nasa", layers=""):
    from nasa_pack.nodes import NasaNegativePrompt

    return NasaNegativePrompt.execute(
        model.patcher if patcher is None else patcher, model.conditioning(text), method, strength,
        rule, 0.0, 1.0, layers,
    ).args[0]  # fmt: skip


def close(actual, expected, stock):
    """To fp32's rounding, in proportion to what guidance changes."""
    effect = (expected - stock).norm()
    assert effect > 1e-4 * stock.norm()
    assert (actual - expected).norm() < 2e-3 * effect


# ---- cross-attention: out = out(positive) - alpha (out(negative) - bias), all of it stock --------


def layers_of(name, net):
    """The text attentions of a stock network in their order, and the bias of what follows each."""
    if name in ("sd15", "sdxl"):
        found = [m.attn2 for m in net.modules() if getattr(m, "attn2", None) is not None]
    elif name in ("wan", "wan-i2v", "wan-camera"):
        found = [block.cross_attn for block in net.blocks]
        return [(m, m.o.bias) for m in found]
    elif name == "vace":
        found = []
        for i, block in enumerate(net.blocks):
            found.append(block.cross_attn)
            if (control := net.vace_layers_mapping.get(i)) is not None:
                found.append(net.vace_blocks[control].cross_attn)
        return [(m, m.o.bias) for m in found]
    elif name == "ltxv":
        found = [block.attn2 for block in net.transformer_blocks]
    elif name in ("ltx2", "ltx2.3"):
        found = [m for block in net.transformer_blocks for m in (block.attn2, block.audio_attn2)]
    elif name == "pixart":
        return [(block.cross_attn, block.cross_attn.proj.bias) for block in net.blocks]
    elif name == "cosmos1":
        return [(block.blocks[1].block.attn, 0.0) for block in net.blocks.values()]
    else:
        return [(block.cross_attn, 0.0) for block in net.blocks]
    return [(m, m.to_out[0].bias) for m in found]


def prepared(name, model, text):
    """The text as each layer gets it."""
    net, layers = model.net, len(layers_of(name, model.net))
    if name in ("wan", "wan-i2v", "wan-camera", "vace"):
        text = net.text_embedding(text)
    elif name == "ltxv":
        text = net.caption_projection(text)
    elif name in ("ltx2", "ltx2.3"):
        both = net.preprocess_text_embeds(text)
        video, sound = both.split(both.shape[-1] // 2, -1)
        if name == "ltx2":
            video, sound = net.caption_projection(video), net.audio_caption_projection(sound)
        return [video, sound] * (layers // 2)
    elif name == "pixart":
        text = net.y_embedder.y_proj(text)
    elif name == "cosmos1":
        text = text.transpose(0, 1)
    elif name == "anima":
        ids = torch.arange(text.shape[1])[None]
        text = torch.nn.functional.pad(net.llm_adapter(text, ids), (0, 0, 0, 512 - text.shape[1]))
    return [text] * layers


def by_two_modulated_calls(model, positive, texts, alphas):
    """As below, where the text of each attention is modulated before it: LTX-2.3."""
    from comfy.ldm.lightricks import av_model

    attend = av_model.apply_cross_attention_adaln
    layers = layers_of("ltx2.3", model.net)
    of = {id(m): rest for (m, bias), *rest in zip(layers, texts, alphas, strict=True)}

    def subtract(x, context, layer, shift, scale, gate, *args):
        text, alpha = of[id(layer)]
        z_pos, z_neg = (
            attend(x, tokens, layer, shift, scale, gate, *args) for tokens in (context, text)
        )
        return z_pos - alpha * (z_neg - gate * layer.to_out[0].bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(av_model, "apply_cross_attention_adaln", subtract)
        return predict(model, positive)


def by_two_calls(name, model, positive, negative, alphas, **call):
    """The stock network, each of whose text attentions is called again with the negative text."""
    with torch.no_grad():
        texts = prepared(name, model, negative)
    if name == "ltx2.3":
        return by_two_modulated_calls(model, positive, texts, alphas)
    handles = []

    def hook(alpha, bias, text, forward):
        def of(args, kwargs, text):
            args, kwargs = list(args), dict(kwargs)
            if "context" in kwargs:
                kwargs["context"] = text
                kwargs.pop("value", None)
            else:
                args[1] = text
            if kwargs.get("mask") is not None:
                kwargs["mask"] = None
            return forward(*args, **kwargs)

        def subtract(module, args, kwargs, output):
            if images := kwargs.get("context_img_len"):
                # beside keys of the image: those of a text of zeros have one value, their bias
                image, nothing = args[1][:, :images], torch.zeros_like(text)
                z, z_bias = (of(args, kwargs, torch.cat((image, x), 1)) for x in (text, nothing))
                return output - alpha * (z - z_bias + module.v.bias @ module.o.weight.T)
            return output - alpha * (of(args, kwargs, text) - bias)

        return subtract

    for (module, bias), text, alpha in zip(layers_of(name, model.net), texts, alphas, strict=True):
        handles.append(
            module.register_forward_hook(hook(alpha, bias, text, module.forward), with_kwargs=True)
        )
    try:
        return predict(model, positive, **call)
    finally:
        for handle in handles:
            handle.remove()


# ---- joint attention: two stock networks side by side, which exchange the image's rows -----------


def in_lockstep(model, positive, negative, alpha, rows_of, **call):
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
                model, text, patched=False, optimized_attention_override=override, **call
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


def rows_of(name, model, references=0):
    """Of a joint attention of this many queries, those of the image and those of registers; None
    for another attention."""
    tokens = (128 if name in ("hunyuan", "hunyuan1.5") else 64) + references
    registers = model.net.register_tokens.shape[1] if name == "aura" else 0
    # as it was until 2026
    is_image_first = name.startswith("hunyuan") and "(img, txt), 1)" in inspect.getsource(
        type(model.net).forward_orig
    )

    def rows(l, text):
        if name == "flux2":
            # as the text encoder's output is padded
            text = 512
        if name == "zimage":
            text = -(-text // 32) * 32
        if l != registers + text + tokens:
            return None
        image = slice(0, tokens) if is_image_first else slice(registers + text, l)
        return image, slice(0, registers)

    return rows
