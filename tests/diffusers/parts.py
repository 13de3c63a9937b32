"""The denoisers with a side stream, run on their parts: an oracle independent of `nasa_diffusers`.

The stock denoiser is called with each prompt as its own, and what its first block receives is kept:
the tokens of that text and their positions. Then the stock blocks run on the tokens of all prompts
side by side, under an attention written out from the definition of each rule (`streams.py`). At
last the stock denoiser is called once more, and its last block returns what was found.
"""

import contextlib
import inspect
from types import SimpleNamespace

import torch
from oracle import published_nag
from streams import Nag, attend, heads, image_heads, joint_attention, text_heads


class Found(Exception):
    """The first block was reached: the rest of the call is not wanted."""


def block_inputs(model, block, **inputs):
    """What the denoiser calls this block with, by name."""
    names = list(inspect.signature(type(block).forward).parameters)[1:]
    kept = {}

    def keep(_, args, kwargs):
        kept.update(dict(zip(names, args, strict=False)) | kwargs)
        raise Found

    handle = block.register_forward_pre_hook(keep, with_kwargs=True)
    with contextlib.suppress(Found):
        model(**inputs)
    handle.remove()
    return kept


@contextlib.contextmanager
def attention(layers, make):
    """Each attention computed by `make(layer, **inputs)`, through diffusers' own processors."""
    before = [layer.processor for layer in layers]
    for layer in layers:
        layer.processor = make
    yield
    for layer, processor in zip(layers, before, strict=True):
        layer.processor = processor


def turn_complex(x, turn):
    """`[b, n, h, d]` by complex numbers `[n, d / 2]` or `[b, n, d / 2]`."""
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn[..., None, :]
    return torch.view_as_real(turned).flatten(-2)


def turn_real(x, rope):
    """The same by cosines and sines `[n, d]`, each given twice."""
    cos, sin = (y[:, None] for y in rope)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-odd, even], -1).flatten(-2) * sin


def turn_halves(x, rope):
    """The same where a channel of the first half turns with one of the second."""
    cos, sin = (y[:, None] for y in rope)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class Rules:
    """An attention over image and texts, from the heads of each: a diffusers processor."""

    def __init__(self, rule, negatives, parts, turn):
        self.rule, self.negatives, self.parts, self.turn = rule, negatives, parts, turn
        self.lengths = [part.text.shape[1] for part in parts]

    def mix(self, image, texts):
        """Each (q, k, v); as many `[b, tokens, h * d]`."""
        ropes = [self.parts[0].image_rope, *(part.text_rope for part in self.parts)]
        image, pos, *negs = (
            (q, k, v) if rope is None else (self.turn(q, rope), self.turn(k, rope), v)
            for (q, k, v), rope in zip((image, *texts), ropes, strict=True)
        )
        masked = [
            (None, alpha, part.mask)
            for (_, alpha, *_), part in zip(self.negatives, self.parts[1:], strict=True)
        ]
        return joint_attention(self.rule, masked, image, pos, negs, self.parts[0].mask)


class TwoStreams(Rules):
    def __call__(self, attn, hidden_states, encoder_hidden_states, *_, **__):
        texts = encoder_hidden_states.split(self.lengths, 1)
        o, *of_texts = self.mix(
            image_heads(attn, hidden_states), [text_heads(attn, t) for t in texts]
        )
        return attn.to_out[0](o), attn.to_add_out(torch.cat(of_texts, 1))


class Shared(Rules):
    """Two streams with the projections of one, returned the other way round."""

    def __call__(self, attn, hidden_states, encoder_hidden_states, *_, **__):
        texts = encoder_hidden_states.split(self.lengths, 1)
        o, *of_texts = self.mix(*self.of(attn, hidden_states, texts))
        return attn.to_out[0](o), attn.to_out[0](torch.cat(of_texts, 1))

    def of(self, attn, image, texts):
        return image_heads(attn, image), [image_heads(attn, t) for t in texts]


class MaybeWithoutText(Shared):
    """Two streams whose text has projections of its own or has not, before or behind (Mochi,
    EasyAnimate)."""

    def __call__(self, attn, hidden_states, encoder_hidden_states, *_, **__):
        of_text = image_heads if attn.add_q_proj is None else text_heads
        texts = encoder_hidden_states.split(self.lengths, 1)
        o, *texts = self.mix(image_heads(attn, hidden_states), [of_text(attn, t) for t in texts])
        to_text = getattr(attn, "to_add_out", None) or torch.nn.Identity()
        return attn.to_out[0](o), to_text(torch.cat(texts, 1))


class Unprojected(Shared):
    """The same where the block projects what comes out (HunyuanVideo's second kind)."""

    def __call__(self, attn, hidden_states, encoder_hidden_states, *_, **__):
        texts = encoder_hidden_states.split(self.lengths, 1)
        o, *of_texts = self.mix(*self.of(attn, hidden_states, texts))
        return o, torch.cat(of_texts, 1)


class OneSequence(Rules):
    """[image; texts], whatever the model's own order is: nothing else looks at it."""

    def __call__(self, attn, hidden_states, *_, **__):
        lengths = [hidden_states.shape[1] - sum(self.lengths), *self.lengths]
        image, *texts = ((self.heads(attn, x)) for x in hidden_states.split(lengths, 1))
        return self.output(attn, hidden_states, torch.cat(self.mix(image, texts), 1))

    def heads(self, attn, x):
        return image_heads(attn, x)

    def output(self, attn, x, o):
        return attn.to_out[0](o)


class WithFeedForward(OneSequence):
    """One projection makes Q, K, V and the feed-forward's input (FLUX.2)."""

    def heads(self, attn, x):
        qkv = attn.to_qkv_mlp_proj(x)[..., : 3 * attn.inner_dim]
        q, k, v = (y.unflatten(-1, (attn.heads, -1)) for y in qkv.chunk(3, -1))
        return attn.norm_q(q), attn.norm_k(k), v

    def output(self, attn, x, o):
        mlp = attn.to_qkv_mlp_proj(x)[..., 3 * attn.inner_dim :]
        return attn.to_out(torch.cat([o, attn.mlp_act_fn(mlp)], -1))


class Gated(OneSequence):
    """Twelve key heads for 48 of the queries, and a gate (Krea 2)."""

    def heads(self, attn, x):
        layer = SimpleNamespace(heads=attn.num_kv_heads)
        _, k, v = heads(layer, x, (attn.to_k,) * 2 + (attn.to_v,), (None, attn.norm_k))
        q = attn.norm_q(attn.to_q(x).unflatten(-1, (attn.num_heads, -1)))
        times = attn.num_heads // attn.num_kv_heads
        return q, k.repeat_interleave(times, 2), v.repeat_interleave(times, 2)

    def output(self, attn, x, o):
        return attn.to_out[0](o * attn.to_gate(x).sigmoid())


def guided(case, rule, negatives, **changes):
    """The denoiser's output; `negatives` are (embeds, alpha, mask), as encoded."""
    model, inputs = case.model, case.inputs | changes
    rows = case.rows
    first = case.blocks[0][0]
    given = block_inputs(model, first[0], **inputs)
    parts = [case.part(given)]
    for embeds, _, mask in negatives:
        text = case.with_text(inputs, embeds, mask, rows)
        parts.append(case.negative_part(block_inputs(model, first[0], **text)))
    image, texts, i = parts[0].image, torch.cat([part.text for part in parts], 1), 0
    modulations = []
    if case.modulates_anew:
        every = [block for blocks, *_ in case.blocks for block in blocks]
        modulations = [block_inputs(model, block, **inputs)["temb"] for block in every]
    for blocks, processor, text_name in case.blocks:
        make = processor(rule, negatives, parts, case.turn)
        with attention([getattr(block, case.attention) for block in blocks], make):
            # what a later kind of block is called with, besides its tokens
            own = given if blocks is first else block_inputs(model, blocks[0], **inputs)
            own |= {name: None for name in case.positions if name in own}
            for block in blocks:
                if modulations:
                    own["temb"] = modulations[i]
                texts = case.before(i, texts, inputs, negatives)
                i += 1
                if text_name is None:
                    n = texts.shape[1]
                    x = case.run(block, own, torch.cat([image, texts], 1))
                    image, texts = x[:, : x.shape[1] - n], x[:, x.shape[1] - n :]
                else:
                    texts, image = case.both(block, own, image, texts)
    pos = texts[:, : parts[0].text.shape[1]]
    last_blocks, _, text_name = case.blocks[-1]
    handle = last_blocks[-1].register_forward_hook(
        lambda *_: case.returned(image, pos) if text_name is None else case.last(image, pos)
    )
    output = model(**inputs, return_dict=False)
    handle.remove()
    return case.out(output)


class CrossRules:
    """LTX-2's text cross-attention over a text with the negatives behind it."""

    def __init__(self, rule, negatives, lengths, mask):
        self.rule, self.lengths, self.mask = rule, lengths, mask
        self.negatives = [(alpha, own) for _, alpha, own in negatives]

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *_, **__):
        split = encoder_hidden_states.split(self.lengths, 1)
        q = attn.norm_q(attn.to_q(hidden_states)).unflatten(-1, (attn.heads, -1))
        (pos, *negs) = (
            [x.unflatten(-1, (attn.heads, -1)) for x in (attn.norm_k(attn.to_k(t)), attn.to_v(t))]
            for t in split
        )
        o = self.mix(q, pos, negs)
        if attn.to_gate_logits is not None:
            o = o * 2 * attn.to_gate_logits(hidden_states).sigmoid()[..., None]
        return attn.to_out[0](o.flatten(2))

    def mix(self, q, pos, negs):
        """Of the prompts each K and V, `[b, n, h, d]`."""
        z = attend(q, *pos, self.mask)
        o = z
        for (alpha, own), neg in zip(self.negatives, negs, strict=True):
            alpha = alpha(q.shape[1]) if callable(alpha) else alpha
            if self.rule == "vsf":
                if own is None:
                    own = pos[0].new_ones(len(q), neg[0].shape[1], dtype=torch.bool)
                present = pos[0].new_ones(len(q), pos[0].shape[1], dtype=torch.bool)
                both = torch.cat([present if self.mask is None else self.mask, own], 1)
                keys, values = (torch.cat([x, y], 1) for x, y in zip(pos, neg, strict=True))
                values[:, self.lengths[0] :] *= -alpha
                o = attend(q, keys, values, both)
            elif isinstance(self.rule, Nag):
                taken = attend(q, *neg, own).flatten(2)
                settings = self.rule.scale, self.rule.tau, alpha, self.rule.p
                o = published_nag(z.flatten(2), taken, *settings).unflatten(2, z.shape[2:])
            else:
                o = o - alpha * attend(q, *neg, own)
        return o


class CrossTexts(CrossRules):
    """HunyuanDiT's: heads are normed, and queries have positions. `texts` are the negative ones as
    a block takes them."""

    def __init__(self, rule, negatives, texts, positive):
        super().__init__(rule, negatives, [positive], None)
        self.texts = texts

    def __call__(self, attn, hidden_states, encoder_hidden_states, image_rotary_emb, **_):
        q = turn_real(self.heads(attn.norm_q, attn, attn.to_q(hidden_states)), image_rotary_emb)
        pos, *negs = (
            [self.heads(attn.norm_k, attn, attn.to_k(t)), self.heads(None, attn, attn.to_v(t))]
            for t in (encoder_hidden_states, *self.texts)
        )
        return attn.to_out[0](self.mix(q, pos, negs).flatten(2))

    @staticmethod
    def heads(norm, attn, x):
        x = x.unflatten(-1, (attn.heads, -1))
        return x if norm is None else norm(x)


class UnprojectedTexts(CrossRules):
    """Lumina-Next's: queries and keys are normed before heads are split, the keys' are fewer."""

    def __init__(self, rule, negatives, texts, mask):
        super().__init__(rule, negatives, [mask.shape[1]], mask)
        self.texts = texts

    def __call__(self, attn, hidden_states, encoder_hidden_states, query_rotary_emb, **_):
        size = hidden_states.shape[-1] // attn.heads
        q = attn.norm_q(attn.to_q(hidden_states)).unflatten(-1, (-1, size))
        q = turn_complex(q, query_rotary_emb)
        pos, *negs = (
            [
                x.unflatten(-1, (-1, size)).repeat_interleave(2, 2)
                for x in (attn.norm_k(attn.to_k(t)), attn.to_v(t))
            ]
            for t in (encoder_hidden_states, *self.texts)
        )
        return self.mix(q, pos, negs)


def guided_by_cross_attention(case, rule, negatives, **changes):
    """The stock denoiser on texts side by side, under processors that tell them apart."""
    model, inputs = case.model, case.inputs | changes
    lengths = [inputs[case.texts[0]].shape[1], *(e[0].shape[1] for e, _, _ in negatives)]
    both = {
        name: torch.cat(
            [inputs[name], *(e[i].expand(case.rows, -1, -1) for e, _, _ in negatives)], 1
        )
        for i, name in enumerate(case.texts)
    }
    both |= dict.fromkeys(case.masks)
    mask = inputs[case.masks[0]]
    make = CrossRules(rule, negatives, lengths, None if mask is None else mask.bool())
    with attention(case.attentions(), make):
        return case.out(model(**inputs | both, return_dict=False))
