"""Ideogram 4: thirteen layers of Qwen3-VL's text before the image, in one sequence in 34 blocks.

The pipeline knows no negative prompt: what it subtracts is made by a second transformer without a
text, which is left alone. Text is projected token by token and counts from 0; its padding, before
it, is masked. The image stands elsewhere, whatever the text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from nasa_diffusers import side as stream
from nasa_diffusers.encoding import encode_prompt
from nasa_diffusers.families.base import ImageTokens
from nasa_diffusers.families.side import SideStream, linears
from nasa_diffusers.families.versions import stock_class
from nasa_diffusers.side import Layout

# in `indicator`, of tokens of a text and of the image
TEXT, IMAGE = 3, 2


class Ideogram4Tokens(ImageTokens):
    """The last tokens, by their positions: time, row and column."""

    family: Ideogram4

    def grids(self, sample, inputs):
        count = self.family.count(inputs["indicator"])
        ids = inputs["position_ids"][0, -count:]
        _, height, width = (ids.amax(0) - ids.amin(0) + 1).tolist()
        return ((1, height, width),)


class Ideogram4(SideStream):
    name = "Ideogram 4"
    denoisers = ("Ideogram4Transformer2DModel",)
    doubles_batch = False
    masks_text = True
    text_parts = ("text_encoder", "tokenizer")
    text_options = ("max_sequence_length",)
    processors = (stock_class("transformer_ideogram4", "Ideogram4AttnProcessor"),)
    block_lists = (("layers", Layout(attention="attention")),)

    def __init__(self):
        # of an indicator, how many tokens the image has: the same tensor in each step
        self.counts = WeakTensorKeyDictionary()

    def default_nag(self, denoiser):
        """No published code of the paper has it: the NAG paper's for FLUX.1."""
        return 5.0, 2.5, 0.25

    def count(self, indicator: Tensor) -> int:
        # another thread may count at the same time: both find the same
        if indicator not in self.counts:
            self.counts[indicator] = int((indicator[0] == IMAGE).sum())
        return self.counts[indicator]

    def encode(self, pipe, prompts, **options):
        # padding changes nothing, and a prompt is padded to 2048 tokens
        longest = max(self.chat_tokens(pipe, prompt) for prompt in prompts)
        limit = options.get("max_sequence_length", longest)
        if longest <= limit:
            options |= {"max_sequence_length": longest}
        # before an image of one token
        embeds, _, _, indicator = encode_prompt(pipe, prompts, options)
        return self.read_embeds(embeds[:, :-1], indicator[:, :-1] == TEXT)

    def chat_tokens(self, pipe: Any, prompt: str) -> int:
        """How many tokens the prompt has in its chat."""
        message = {"role": "user", "content": [{"type": "text", "text": prompt}]}
        chat = pipe.tokenizer.apply_chat_template(
            [message], add_generation_prompt=True, tokenize=False
        )
        return len(pipe.tokenizer(chat, add_special_tokens=False)["input_ids"])

    def read_embeds(self, embeds, mask):
        """Without what no row attends to: the padding lies before the text."""
        if mask is None or mask.is_meta or mask.shape != embeds.shape[:2]:
            return embeds, mask
        are = mask.bool().any(0)
        return embeds[:, are], mask[:, are]

    def image_tokens(self, denoiser):
        return Ideogram4Tokens(self, denoiser)

    def check_call(self, denoiser, inputs):
        super().check_call(denoiser, inputs)
        if inputs["timestep"].dim() > 1:
            raise ValueError(
                "nasa_diffusers: the call has a timestep for each token, and a negative prompt has "
                "none of its own; give one for each image"
            )

    def carry(self, denoiser, guided_text, inputs, is_guided=True):
        changes = super().carry(denoiser, guided_text, inputs, is_guided)
        assert stream.CALL.side is not None
        stream.CALL.side.inputs["image"] = self.count(inputs["indicator"])
        return changes

    def positive_tokens(self, side, inputs):
        return inputs["hidden_states"].shape[1] - side.inputs["image"]

    def prepare(self, denoiser, side, term):
        text = denoiser.llm_cond_proj(denoiser.llm_cond_norm(term.text))
        # that of a text
        kind = torch.zeros(1, dtype=torch.long, device=text.device)
        return text + denoiser.embed_image_indicator(kind).to(text.dtype), term.mask

    def arrange(self, denoiser, side, rope):
        n, rows = side.lengths[0], len(rope[0])
        own = []
        for term in side.terms:
            x, mask = term.text, term.mask
            at = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
            if mask is not None:
                at = (mask.cumsum(1) - 1).clamp(min=0)
            own.append(denoiser.rotary_emb(at[..., None].expand(-1, -1, 3)))
        return tuple(
            torch.cat(
                [given[:, n:], given[:, :n], *(x.to(given.dtype).expand(rows, -1, -1) for x in xs)],
                dim=1,
            )
            for given, *xs in zip(rope, *own, strict=True)
        )

    def rotate(self, x, rope):
        """A channel of one half turns with one of the other."""
        cos, sin = (y.unsqueeze(2) for y in rope)
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    def text_mask(self, side, options):
        # of an image token, which is the last one
        mask = options.get("attention_mask")
        return None if mask is None else mask[:, 0, -1, : side.lengths[0]]

    def project(self, attn, image, text):
        q, k, v = (
            project(image).unflatten(2, (attn.num_heads, attn.head_dim))
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        return attn.norm_q(q), attn.norm_k(k), v, None

    def text_layers(self, block):
        return linears(block, "adaln_modulation")
