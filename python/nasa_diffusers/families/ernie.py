"""ERNIE-Image: text behind the image, in one sequence through 24 blocks, the sequence before the
batch.

The text's projection acts token by token, and it counts from 0; the image stands where the prompt
ends. One modulation is written out for every token. Texts of a batch are filled up and masked.
Classifier-free guidance is one doubled batch.
"""

import torch
from torch import Tensor

from nasa_diffusers.encoding import encode_prompt, side_by_side
from nasa_diffusers.families.base import token_grid
from nasa_diffusers.families.side import SideStream, linears
from nasa_diffusers.families.versions import stock_class
from nasa_diffusers.side import Layout


class ErnieImage(SideStream):
    name = "ERNIE-Image"
    denoisers = ("ErnieImageTransformer2DModel",)
    text_argument = "text_bth"
    masks_text = True
    text_parts = ("text_encoder", "tokenizer")
    processors = (stock_class("transformer_ernie_image", "ErnieImageSingleStreamAttnProcessor"),)
    block_lists = (
        (
            "layers",
            Layout(
                image="x", text_first=False, rope="rotary_pos_emb", attention="self_attention"
            ),
        ),
    )  # fmt: skip

    def default_nag(self, denoiser):
        """Where users of a ComfyUI node for Z-Image, built like it, have settled."""
        return 2.0, 2.5, 0.25

    def encode(self, pipe, prompts, **options):
        return side_by_side(*encode_prompt(pipe, prompts, options))

    def read_embeds(self, embeds, mask):
        are_texts = isinstance(embeds, list) and all(isinstance(x, Tensor) for x in embeds)
        return side_by_side(embeds) if are_texts and embeds else (embeds, mask)

    def grids(self, denoiser, sample, inputs):
        return (token_grid(sample, denoiser.config.patch_size),)

    def begin(self, denoiser, side, inputs):
        # the hook and the attention have the batch first
        return super().begin(denoiser, side, inputs | {"x": inputs["x"].transpose(0, 1)})

    def enter(self, side, layout, given, negatives):
        return torch.cat([given, negatives.transpose(0, 1)])

    def leave(self, side, layout, x):
        own = x.shape[0] - side.m
        return x[:own], x[own:].transpose(0, 1)

    def changes(self, layout, inputs, x):
        # a row for each token, all of them alike
        temb = [each[:1].expand(x.shape[0], -1, -1) for each in inputs["temb"]]
        return {"x": x, "temb": temb}

    def prepare(self, denoiser, side, term):
        text = term.text
        return text if denoiser.text_proj is None else denoiser.text_proj(text), term.mask

    def arrange(self, denoiser, side, rope):
        longest = max(side.lengths[1:])
        ids = torch.zeros(1, longest, 3, device=rope.device)
        ids[..., 0] = torch.arange(longest, device=rope.device)
        text = denoiser.pos_embed(ids).expand(len(rope), -1, -1, -1)
        return torch.cat([rope, *(text[:, :m] for m in side.lengths[1:])], dim=1)

    def rotate(self, x, rope):
        """By angles `[b, n, 1, d]`; a channel of one half turns with one of the other."""
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        return x * rope.cos().to(x.dtype) + turned * rope.sin().to(x.dtype)

    def text_mask(self, side, options):
        mask = options.get("attention_mask")
        return None if mask is None else mask[:, 0, 0, -side.lengths[0] :]

    def finish(self, attn, o, image, layout, rest):
        return attn.to_out[0](o)

    def text_layers(self, block):
        return linears(block)
