"""FLUX.1 and SD3 with the tokens of all prompts as one text, the plain way: an oracle that runs
diffusers' own transformers and blocks, so that whatever people put on those can be put on it.

The text is made longer by a hook of PyTorch's on the transformer, and diffusers' own
`set_attn_processor` puts an eager attention into every layer. Nothing of `nasa_diffusers` runs.
"""

import torch
from diffusers.models.embeddings import apply_rotary_emb
from streams import image_heads, joint_attention, text_heads


class Eager:
    """The attention of a block over `[image; positive text; negative texts]`."""

    def __init__(self, rule):
        # [(embeds, alpha, mask)], and all prompts' tokens: as the call in progress has them
        self.rule, self.negatives, self.lengths = rule, [], []

    def __call__(
        self,
        attn,
        hidden_states,
        encoder_hidden_states=None,
        attention_mask=None,
        image_rotary_emb=None,
        **kwargs,
    ):
        n = sum(self.lengths)
        qkv = image_heads(attn, hidden_states)
        if encoder_hidden_states is None:
            text, image = [x[:, :n] for x in qkv], [x[:, n:] for x in qkv]
        else:
            text, image = text_heads(attn, encoder_hidden_states), qkv
        if image_rotary_emb is not None:
            ropes = [[x[rows] for x in image_rotary_emb] for rows in (slice(0, n), slice(n, None))]
            for part, rope in zip((text, image), ropes, strict=True):
                part[:2] = [apply_rotary_emb(x, rope, sequence_dim=1) for x in part[:2]]
        prompts = list(zip(*(x.split(self.lengths, dim=1) for x in text), strict=True))
        o, *texts = joint_attention(self.rule, self.negatives, image, prompts[0], prompts[1:])
        if encoder_hidden_states is None:
            return torch.cat([*texts, o], dim=1)
        o, texts = attn.to_out[1](attn.to_out[0](o)), torch.cat(texts, dim=1)
        return o, texts if attn.context_pre_only else attn.to_add_out(texts)


def install(model, rule, negatives, alphas=None):
    """The oracle, on a transformer; `negatives` are (embeds, alpha, mask). `alphas` are factors,
    one for each call: what is 0 there is carried along all the same."""
    eager, calls = Eager(rule), iter(alphas or ())

    def lengthen(_, args, kwargs):
        text, factor = kwargs["encoder_hidden_states"], next(calls, 1.0)
        texts = [text, *(e.expand(len(text), -1, -1) for e, _, _ in negatives)]
        eager.negatives = [(e, factor * alpha, mask) for e, alpha, mask in negatives]
        eager.lengths = [x.shape[1] for x in texts]
        kwargs = kwargs | {"encoder_hidden_states": torch.cat(texts, dim=1)}
        if "txt_ids" in kwargs:
            kwargs["txt_ids"] = torch.zeros(sum(eager.lengths), 3)
        return args, kwargs

    model.register_forward_pre_hook(lengthen, with_kwargs=True)
    model.set_attn_processor(
        {name: own if ".attn2." in name else eager for name, own in model.attn_processors.items()}
    )
