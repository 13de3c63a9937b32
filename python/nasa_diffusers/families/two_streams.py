"""What families share whose text has no positions, in blocks of two streams.

The image's positions turn its own queries and keys alone. The attention of a block has projections
of the text's own, or one set for both.
"""

from __future__ import annotations

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from nasa_diffusers.families.side import SideStream, linears

# of an attention, for its text alone
OWN_LAYERS = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


class TwoStreams(SideStream):
    """The answers for `Attention` with `add_q_proj` and the like, or without."""

    # of a pair of channels that turn together: neighbours (-1), or one of each half (-2)
    halves = -1

    def default_nag(self, denoiser):
        """No published code of the paper has it: the NAG paper's for FLUX.1."""
        return 5.0, 2.5, 0.25

    def arrange(self, denoiser, side, rope):
        """Nothing turns the text: cosine 1 and sine 0."""
        count = sum(side.lengths)
        return tuple(
            torch.cat([x, x.new_full((count, *x.shape[1:]), value)])
            for x, value in zip(rope, (1.0, 0.0), strict=True)
        )

    def rotate(self, x, rope):
        return apply_rotary_emb(x, rope, use_real_unbind_dim=self.halves, sequence_dim=1)

    def project(self, attn, image, text):
        if attn.add_q_proj is not None:
            return super().project(attn, image, text)
        return *self.image_heads(attn, torch.cat([image, text], dim=1)), None

    def finish(self, attn, o, image, layout, rest):
        o, text = o[:, :image], o[:, image:]
        if attn.to_out is not None:
            o = self.output(attn, o)
        # the last block of some has no use for its text
        to_add_out = getattr(attn, "to_add_out", None)
        return o, text if to_add_out is None else to_add_out(text)

    def text_layers(self, block):
        name = "attn" if hasattr(block, "attn") else "attn1"
        attn = getattr(block, name)
        if attn.add_q_proj is None:
            # one set for both
            return linears(block, "norm", "norm1", "norm2")
        own = [f"{name}.{layer}" for layer in OWN_LAYERS if getattr(attn, layer, None) is not None]
        feed_forward = [x for x in ("ff_context", "txt_ff") if getattr(block, x, None) is not None]
        return (*own, *feed_forward)


def key_mask(mask: Tensor | None, tokens: int) -> Tensor | None:
    """That of the last `tokens` keys, `[b, n]`, of a mask `[b, 1, 1, keys]`."""
    return None if mask is None else mask[:, 0, 0, mask.shape[3] - tokens :]
