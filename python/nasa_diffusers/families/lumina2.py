"""Lumina-Image 2.0: Gemma's text before the image, in one sequence through 26 blocks.

The text passes two blocks of its own before, which know nothing of time. Its padding is left out of
the sequence, so that in a batch of prompts of several lengths each image begins elsewhere, and the
sequence is filled up at its end. Text counts from 0, and the image stands where the prompt ends.
Eight heads of keys serve 24 of queries. A negative prompt is encoded as the pipeline encodes its
own: without the words for the system that go before a prompt.

Classifier-free guidance is two calls; the one with the pipeline's own negative prompt is left
alone.
"""

import torch

from nasa_diffusers.encoding import encode_prompt
from nasa_diffusers.families.base import token_grid
from nasa_diffusers.families.side import SideStream, complex_rotation, linears
from nasa_diffusers.families.versions import stock_class
from nasa_diffusers.side import Layout


class Lumina2(SideStream):
    name = "Lumina 2"
    denoisers = ("Lumina2Transformer2DModel",)
    doubles_batch = False
    masks_text = True
    text_parts = ("text_encoder", "tokenizer")
    text_options = ("max_sequence_length", "system_prompt")
    processors = (stock_class("transformer_lumina2", "Lumina2AttnProcessor2_0"),)
    block_lists = (("layers", Layout()),)
    reads = ("encoder_attention_mask",)

    def default_nag(self, denoiser):
        """Where users of a ComfyUI node for Z-Image, built like it, have settled."""
        return 2.0, 2.5, 0.25

    def encode(self, pipe, prompts, **options):
        options |= {"do_classifier_free_guidance": True, "negative_prompt": prompts}
        _, _, embeds, mask = encode_prompt(pipe, [""] * len(prompts), options)
        return embeds, mask

    def grids(self, denoiser, sample, inputs):
        return (token_grid(sample, denoiser.config.patch_size),)

    # ---- the sequence ------------------------------------------------------------------------

    def positive_tokens(self, side, inputs):
        mask, x = side.inputs["encoder_attention_mask"], inputs["hidden_states"]
        # the denoiser reads them as well
        own = mask.sum(1).tolist()
        n, total = max(own), x.shape[1]
        if len(set(own)) > 1:
            image = total - n
            order = [
                [*range(k, k + image), *range(k), *range(k + image, total)] for k in own
            ]  # fmt: skip
            side.inputs["order"] = torch.tensor(order, device=x.device)
            at = torch.arange(n, device=x.device)
            side.inputs["own"] = at < torch.tensor(own, device=x.device)[:, None]
        return n

    def image_first(self, side, x):
        """`[b, n + l, c]` as [image; positive], with what fills up a shorter text behind it."""
        order, n = side.inputs.get("order"), side.lengths[0]
        if order is None:
            return torch.cat([x[:, n:], x[:, :n]], dim=1)
        return x.take_along_dim(order[..., None], dim=1)

    def enter(self, side, layout, given, negatives):
        return torch.cat([self.image_first(side, given), negatives], dim=1)

    def leave(self, side, layout, x):
        order = side.inputs.get("order")
        if order is None:
            return super().leave(side, layout, x)
        own = x.shape[1] - side.m
        back = order.argsort(dim=1)[..., None]
        return x[:, :own].take_along_dim(back, dim=1), x[:, own:]

    def text_mask(self, side, options):
        return side.inputs.get("own")

    # ---- text --------------------------------------------------------------------------------

    def prepare(self, denoiser, side, term):
        x = denoiser.time_caption_embed.caption_embedder(term.text)
        turns = self.turns(denoiser, x.shape[1], x.device).expand(len(x), -1, -1)
        for block in denoiser.context_refiner:
            x = block(x, term.mask, turns)
        return x, term.mask

    def turns(self, denoiser, n, device):
        """The positions of a text, `[1, n, d / 2]`."""
        counted, *others = denoiser.rope_embedder.freqs_cis
        if n > len(counted):
            raise ValueError(
                f"nasa_diffusers: the negative prompt has {n} tokens, and this model has "
                f"positions for {len(counted)}; set max_sequence_length"
            )
        return torch.cat([counted[:n], *(x[:1].expand(n, -1) for x in others)], dim=1)[None].to(
            device
        )

    def arrange(self, denoiser, side, rope):
        text = self.turns(denoiser, max(side.lengths[1:]), rope.device)
        own = [text[:, :m].expand(len(rope), -1, -1) for m in side.lengths[1:]]
        return torch.cat([self.image_first(side, rope), *own], dim=1)

    # ---- one layer ---------------------------------------------------------------------------

    def rotate(self, x, rope):
        return complex_rotation(x, rope)

    def project(self, attn, image, text):
        # it gets its input twice: queries, and keys and values, are of the same tokens
        return super().project(attn, image, None)

    def text_layers(self, block):
        return linears(block, "norm1")
