"""FLUX.2 dev and klein: Mistral's or Qwen3's text beside the image in blocks of two streams, then
in one sequence with it.

The text's projection acts token by token, and its positions are counted from 0: a negative prompt
counts them as well. Padding is attended to and not masked, as FLUX.1's. The images that are edited
stand behind the image that is made, at other times of the position; it alone is guided. The
pipelines of the weights with a cache of their keys (klein KV) call the transformer in another way
and are refused.
"""

from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch.utils.weak import WeakTensorKeyDictionary

from nasa_diffusers.alpha import Targets
from nasa_diffusers.encoding import side_by_side
from nasa_diffusers.families.base import ImageTokens
from nasa_diffusers.families.side import SideStream, linears
from nasa_diffusers.side import Layout

try:
    from diffusers.models.transformers.transformer_flux2 import (
        Flux2AttnProcessor,
        Flux2ParallelSelfAttnProcessor,
    )
    from diffusers.pipelines.flux2.pipeline_flux2 import format_input
except ImportError:  # before diffusers 0.36
    PROCESSORS: tuple[type, ...] = ()
else:
    PROCESSORS = (Flux2AttnProcessor, Flux2ParallelSelfAttnProcessor)

MAX_TOKENS = 512


class Flux2Tokens(ImageTokens):
    """Said by `img_ids`. Pipelines hand over the same tensor in each step, or, with images that are
    edited, an equal one."""

    def __init__(self, family, denoiser, made=0):
        super().__init__(family, denoiser)
        # at axis 0 of the image that is made
        self.made = made
        self._found = WeakTensorKeyDictionary()
        self._last: tuple | None = None

    def _look(self, inputs):
        """The grid of the image that is made, its tokens, and how many follow."""
        ids = inputs["img_ids"]
        # another thread may look at the same time: both find the same
        found, last = self._found.get(ids), self._last
        if found is None and last is not None and _equal(last[0], ids):
            found = self._found[ids] = last[1]
        if found is None:
            found = self._found[ids] = look(ids, self.family.name, self.made)
            self._last = ids.clone(), found
        return found

    def grids(self, sample, inputs):
        return (self._look(inputs)[0],)

    def padding(self, sample, inputs):
        return self._look(inputs)[2]

    def targets(self, inputs):
        return None if inputs["img_ids"].is_meta else self._look(inputs)[1]


def _equal(ids, others):
    return ids.shape == others.shape and ids.device == others.device and torch.equal(ids, others)


def look(ids, name, made):
    """Of the positions `[l, axes]`, or the first of `[b, l, axes]`: time, row and column."""
    ids = ids[0] if ids.dim() == 3 else ids
    are = ids[:, 0] == made
    count = int(are.sum())
    own = ids[are] - ids[are].amin(0) if count else ids[are]
    height, width = (own.amax(0) + 1).long().tolist()[1:3] if count else (0, 0)
    rows = torch.arange(height * width, device=ids.device)
    expected = torch.stack([rows // max(width, 1), rows % max(width, 1)], dim=1)
    is_first = count > 0 and bool(are[:count].all())
    if not is_first or not torch.equal(own[:, 1:3].long(), expected):
        raise ValueError(
            f"nasa_diffusers: img_ids of {name} must begin with the tokens of the image that is "
            f"made, at time {made}, row by row; without them it is not known which tokens to guide"
        )
    following = len(ids) - count
    return (1, height, width), Targets(are) if following else None, following


class Flux2(SideStream):
    name = "FLUX.2"
    denoisers = ("Flux2Transformer2DModel",)
    doubles_batch = False
    text_parts = ("text_encoder", "tokenizer")
    text_options = ("max_sequence_length", "text_encoder_out_layers")
    processors = PROCESSORS
    block_lists = (
        ("transformer_blocks", Layout(text="encoder_hidden_states")),
        ("single_transformer_blocks", Layout()),
    )

    def default_nag(self, denoiser):
        """No published code of the paper has it: the NAG paper's for FLUX.1."""
        return 5.0, 2.5, 0.25

    def encode_unpadded(self, pipe, prompts, length_is_named, **options):
        if length_is_named:
            return self.encode(pipe, prompts, **options)
        # padding is attended to: a prompt without any is one encoded to its own length
        limit, rows = options.get("max_sequence_length", MAX_TOKENS), []
        for prompt in prompts:
            length = {"max_sequence_length": min(self.chat_tokens(pipe, prompt), limit)}
            rows.append(self.encode(pipe, [prompt], **options | length)[0][0])
        return side_by_side(rows)

    def chat_tokens(self, pipe: Any, prompt: str) -> int:
        """How many tokens the prompt has in its chat, before it is cut or padded."""
        if hasattr(pipe, "system_message"):
            (messages,) = format_input([prompt], pipe.system_message)
            chat = pipe.tokenizer.apply_chat_template(
                [messages], add_generation_prompt=False, tokenize=True, return_dict=True
            )
            return len(chat["input_ids"][0])
        chat = pipe.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True,
            enable_thinking=False,
        )  # fmt: skip
        return len(pipe.tokenizer(chat)["input_ids"])

    def image_tokens(self, denoiser):
        return Flux2Tokens(self, denoiser)

    def check_call(self, denoiser, inputs):
        super().check_call(denoiser, inputs)
        if inputs.get("kv_cache_mode") is not None:
            raise RuntimeError(
                "nasa_diffusers: this call keeps keys and values of reference images (klein KV), "
                "whose attention is another one; use Flux2KleinPipeline, or call disable_nasa(pipe)"
            )

    def prepare(self, denoiser, side, term):
        return denoiser.context_embedder(term.text), term.mask

    def arrange(self, denoiser, side, rope):
        n, longest = side.lengths[0], max(side.lengths[1:])
        # time, row, column and the number of the token
        ids = torch.zeros(longest, 4, device=rope[0].device)
        ids[:, 3] = torch.arange(longest, device=ids.device)
        own = denoiser.pos_embed(ids)
        return tuple(
            torch.cat([given[n:], given[:n], *(x[:m] for m in side.lengths[1:])])
            for given, x in zip(rope, own, strict=True)
        )

    def rotate(self, x, rope):
        return apply_rotary_emb(x, rope, sequence_dim=1)

    def project(self, attn, image, text):
        if text is not None:
            return super().project(attn, image, text)
        # one projection makes Q, K, V and the feed-forward's input
        made = attn.to_qkv_mlp_proj(image)
        qkv, mlp = made.split([3 * attn.inner_dim, made.shape[2] - 3 * attn.inner_dim], dim=-1)
        return *self.heads(attn, qkv.chunk(3, dim=-1), attn.norm_q, attn.norm_k), mlp

    def finish(self, attn, o, image, layout, rest):
        if layout.text is not None:
            return super().finish(attn, o, image, layout, rest)
        return attn.to_out(torch.cat([o, attn.mlp_act_fn(rest)], dim=-1))

    def uses_fused_projection(self, attn):
        return attn.fused_projections

    def text_layers(self, block):
        if not hasattr(block, "ff_context"):
            return linears(block)
        return (
            "attn.add_q_proj",
            "attn.add_k_proj",
            "attn.add_v_proj",
            "attn.to_add_out",
            "ff_context",
        )
