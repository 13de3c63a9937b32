"""Families built like FLUX.1: text beside the image in blocks of two streams, then in one sequence
with it. Chroma, Ovis-Image, LongCat-Image, Bria and Fibo.

Their projections of text act token by token. What differs is what the blocks are called with, where
the text stands, and what is done about its padding: Chroma weighs it, Fibo masks it, the others
attend to it as FLUX.1 does.
"""

import sys
from types import SimpleNamespace

import diffusers
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

from nasa_diffusers.encoding import encode_prompt, side_by_side, takes
from nasa_diffusers.families.base import nonzero_tokens
from nasa_diffusers.families.flux2 import Flux2Tokens
from nasa_diffusers.families.joint import TEXT_LAYERS
from nasa_diffusers.families.side import SideStream, linears
from nasa_diffusers.families.versions import stock_class
from nasa_diffusers.side import Layout

JOINED = Layout(text="encoder_hidden_states", joins=True)


class FluxLike(SideStream):
    doubles_batch = False
    text_parts = ("text_encoder", "tokenizer")
    text_options: tuple[str, ...] = ("max_sequence_length",)
    block_lists = (
        ("transformer_blocks", Layout(text="encoder_hidden_states")),
        ("single_transformer_blocks", JOINED),
    )
    # of the axes of a position, those at which text is counted
    counted: tuple[int, ...] = ()

    def default_nag(self, denoiser):
        """No published code of the paper has it: the NAG paper's for FLUX.1."""
        return 5.0, 2.5, 0.25

    def image_tokens(self, denoiser):
        return Flux2Tokens(self, denoiser)

    def prepare(self, denoiser, side, term):
        return denoiser.context_embedder(term.text), term.mask

    def arrange(self, denoiser, side, rope):
        n, longest = side.lengths[0], max(side.lengths[1:])
        ids = torch.zeros(longest, 3, device=rope[0].device)
        for axis in self.counted:
            ids[:, axis] = torch.arange(longest, device=ids.device)
        own = denoiser.pos_embed(ids)
        return tuple(
            torch.cat([given[n:], given[:n], *(x[:m] for m in side.lengths[1:])])
            for given, x in zip(rope, own, strict=True)
        )

    def rotate(self, x, rope):
        return apply_rotary_emb(x, rope, sequence_dim=1)

    def finish(self, attn, o, image, layout, rest):
        # blocks of one sequence project it together with the feed-forward
        return o if attn.pre_only else super().finish(attn, o, image, layout, rest)

    def uses_fused_projection(self, attn):
        return attn.fused_projections

    def text_layers(self, block):
        if hasattr(block, "ff_context"):
            return (*TEXT_LAYERS, "attn.to_add_out", "ff_context")
        return linears(block, "norm")


class Chroma(FluxLike):
    """Its mask is added to the scores between tokens that are not padding, so that padding weighs
    less by a factor of e. A negative prompt goes without: of its padding the first token counts."""

    name = "Chroma"
    denoisers = ("ChromaTransformer2DModel",)
    masks_text = True
    text_options = ("max_sequence_length", "lora_scale")
    processors = (FluxAttnProcessor,)
    block_lists = (
        ("transformer_blocks", Layout(text="encoder_hidden_states")),
        ("single_transformer_blocks", Layout()),
    )
    reads = ("attention_mask",)

    def encode(self, pipe, prompts, **options):
        embeds, _, mask, *_ = encode_prompt(pipe, prompts, options)
        return embeds, mask

    def text_mask(self, side, options):
        """One less for padding than for all else: what a softmax looks at are differences."""
        mask = side.inputs["attention_mask"]
        return None if mask is None else mask[:, : side.lengths[0]].float() - 1

    def amend(self, side, streams, o):
        """To the scores of padding as a query nothing is added."""
        mask = side.inputs["attention_mask"]
        if mask is None:
            return o
        n, at = streams.lengths[0], streams.image_tokens
        text = slice(at, at + n)
        q, k, v = (
            x.transpose(1, 2)
            for x in (streams.q[:, text], streams.k[:, : at + n], streams.v[:, : at + n])
        )
        as_padding = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        is_own = mask[:, :n, None, None] > 0
        own = torch.where(is_own, o[:, text], as_padding)
        return torch.cat([o[:, :at], own, o[:, at + n :]], dim=1)


class Ovis(FluxLike):
    name = "Ovis-Image"
    denoisers = ("OvisImageTransformer2DModel",)
    processors = (stock_class("transformer_ovis_image", "OvisImageAttnProcessor"),)
    counted = (1, 2)

    def own_tokens(self, embeds):
        # the pipeline makes zeros of its padding
        return nonzero_tokens(embeds)

    def prepare(self, denoiser, side, term):
        text = denoiser.context_embedder_norm(term.text)
        return denoiser.context_embedder(text), term.mask


class LongCat(FluxLike):
    """A prompt of Edit is encoded with the image, a negative one without."""

    name = "LongCat-Image"
    denoisers = ("LongCatImageTransformer2DModel",)
    text_options = ()
    processors = (stock_class("transformer_longcat_image", "LongCatImageAttnProcessor"),)
    counted = (1, 2)

    def image_tokens(self, denoiser):
        # 0 is the text, 2 the image that is edited
        return Flux2Tokens(self, denoiser, made=1)

    def encode(self, pipe, prompts, **options):
        if not takes(pipe, "image"):
            return super().encode(pipe, prompts, **options)
        prefix = pipe.prompt_template_encode_prefix
        for token in ("<|vision_start|>", pipe.image_token, "<|vision_end|>"):
            prefix = prefix.replace(token, "")
        parts = ("tokenizer", "text_encoder", "device", "tokenizer_max_length")
        reader = SimpleNamespace(
            prompt_template_encode_prefix=prefix,
            prompt_template_encode_suffix=pipe.prompt_template_encode_suffix,
            **{name: getattr(pipe, name) for name in parts},
        )
        return diffusers.LongCatImagePipeline._encode_prompt(reader, prompts), None

    def encode_unpadded(self, pipe, prompts, length_is_named, **options):
        embeds, _ = self.encode(pipe, prompts, **options)
        is_left = pipe.tokenizer.padding_side == "left"
        split, rows = sys.modules[type(pipe).__module__].split_quotation, []
        for row, prompt in zip(embeds, prompts, strict=True):
            # what stands in quotation marks is read letter by letter
            parts = [part for text, is_quoted in split(prompt)
                     for part in (text if is_quoted else [text])]  # fmt: skip
            count = sum(
                len(pipe.tokenizer(part, add_special_tokens=False)["input_ids"]) for part in parts
            )
            rows.append(row[-count:] if is_left else row[:count])
        return side_by_side(rows)


class Bria(FluxLike):
    name = "Bria"
    denoisers = ("BriaTransformer2DModel",)
    doubles_batch = True
    text_options = ("max_sequence_length", "lora_scale")
    processors = (stock_class("transformer_bria", "BriaAttnProcessor"),)

    def own_tokens(self, embeds):
        return nonzero_tokens(embeds)


class Fibo(FluxLike):
    """Bria's Fibo: before each block half of the text's channels are written anew, from a layer of
    its encoder. All those layers are the channels of a prompt here."""

    name = "Bria Fibo"
    denoisers = ("BriaFiboTransformer2DModel",)
    doubles_batch = True
    masks_text = True
    text_options = ("max_sequence_length", "lora_scale")
    processors = (
        stock_class("transformer_bria_fibo", "BriaFiboAttnProcessor"),
        stock_class("transformer_bria", "BriaAttnProcessor"),
    )
    block_lists = (
        ("transformer_blocks", Layout(text="encoder_hidden_states")),
        ("single_transformer_blocks", Layout()),
    )

    def encode(self, pipe, prompts, **options):
        made = encode_prompt(pipe, prompts, options | {"guidance_scale": 0.0})
        embeds, mask, layers = made[0], made[3], list(made[5])
        # one for each block, as the pipeline chooses them
        blocks = sum(len(getattr(pipe.transformer, name)) for name, _ in self.block_lists)
        layers = [*layers[-blocks:], *[layers[-1]] * (blocks - len(layers))]
        return self.read_embeds((embeds, layers), mask)

    def read_embeds(self, embeds, mask):
        """`(prompt_embeds, text_encoder_layers)`, as the denoiser is called with them."""
        if isinstance(embeds, (tuple, list)) and len(embeds) == 2:
            return torch.cat([embeds[0], *embeds[1]], dim=2), mask
        raise ValueError(
            "enable_nasa: Fibo reads a layer of its text encoder in each block; give "
            "negative_prompt_embeds=(prompt_embeds, text_encoder_layers), as encode_prompt and "
            "the pipeline make them"
        )

    def channels(self, text, inputs):
        return text.shape[2] + sum(layer.shape[2] for layer in inputs["text_encoder_layers"])

    def prepare(self, denoiser, side, term):
        text = term.text[..., : denoiser.config.joint_attention_dim]
        return denoiser.context_embedder(text), term.mask

    def arriving(self, denoiser, side, index, negatives):
        project, width = denoiser.caption_projection[index], denoiser.config.text_encoder_dim
        begin = denoiser.config.joint_attention_dim + index * width
        layers = [
            project(term.text[..., begin : begin + width]).expand(len(negatives), -1, -1)
            for term in side.text.terms
        ]
        kept = negatives[..., : denoiser.inner_dim // 2]
        return torch.cat([kept, torch.cat(layers, dim=1).to(kept.dtype)], dim=2)

    def text_mask(self, side, options):
        mask = options.get("attention_mask")
        # of an image token, which is the last one; older pipelines give a mask for each query
        return None if mask is None else mask[:, 0, -1, : side.lengths[0]]
