"""FLUX.1 dev, schnell and their relatives: T5 text beside the image in 19 blocks of two streams,
then in one sequence with it in 38 blocks of one.

The time, guidance and CLIP vector that modulates a block stays that of the positive prompt, for
the negative stream too: in training all tokens of one attention were modulated by one vector.
Classifier-free guidance (`true_cfg_scale`) is two calls; the one with the pipeline's own negative
prompt is left alone.
"""

import torch
from diffusers.models.transformers.transformer_flux import (
    FluxAttnProcessor,
    FluxIPAdapterAttnProcessor,
)
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from nasa_diffusers.alpha import Grid, Targets
from nasa_diffusers.encoding import side_by_side, token_counts
from nasa_diffusers.families.base import ImageTokens
from nasa_diffusers.families.joint import TEXT_LAYERS, Joint
from nasa_diffusers.joint import KEYWORD, RopeBlockHook, SingleBlockHook, positions

SINGLE = "single_transformer_blocks."
T5 = "tokenizer_2"
MAX_TOKENS = 512
MISSING = object()


class TokensByIds(ImageTokens):
    """Said by `img_ids`, looked at once a run: the pipelines hand over the same tensor in every
    step."""

    def __init__(self, family, denoiser):
        super().__init__(family, denoiser)
        self._grids = WeakTensorKeyDictionary()
        self._targets = WeakTensorKeyDictionary()

    def grids(self, sample, inputs):
        ids = inputs["img_ids"]
        # another thread may look at the same time: both find the same
        found = self._grids.get(ids)
        if found is None:
            found = self._grids[ids] = super().grids(sample, inputs)
        return found

    def targets(self, inputs):
        ids = inputs["img_ids"]
        found = self._targets.get(ids, MISSING)
        if found is MISSING:
            found = self._targets[ids] = targets_of(ids)
        return found


class Flux(Joint):
    name = "FLUX.1"
    denoisers = ("FluxTransformer2DModel",)
    doubles_batch = False
    text_parts = ("text_encoder", "tokenizer", "text_encoder_2", T5)
    text_options = ("max_sequence_length", "lora_scale")
    processors = (FluxAttnProcessor, FluxIPAdapterAttnProcessor)

    def default_nag(self, denoiser):
        """The NAG paper's."""
        return 5.0, 2.5, 0.25

    def encode_unpadded(self, pipe, prompts, length_is_named, **options):
        if length_is_named:
            return self.encode(pipe, prompts, **options)
        # T5 sees its padding: a prompt without any is one encoded to its own length
        limit, rows = options.get("max_sequence_length", MAX_TOKENS), []
        for prompt, count in zip(prompts, token_counts(pipe, T5, prompts), strict=True):
            length = {"max_sequence_length": min(count, limit)}
            rows.append(self.encode(pipe, [prompt], **options | length)[0][0])
        return side_by_side(rows)

    def token_limits(self, pipe, tokens, **options):
        # what CLIP cuts is not lost: only its pooled vector is used, and that of the prompt
        return {T5: options.get("max_sequence_length", tokens)}

    def grids(self, denoiser, sample, inputs):
        return (grid_of(inputs["img_ids"]),)

    def image_tokens(self, denoiser):
        return TokensByIds(self, denoiser)

    def carry(self, denoiser, guided_text, inputs, is_guided=True):
        changes = super().carry(denoiser, guided_text, inputs, is_guided)
        lengths = changes["joint_attention_kwargs"][KEYWORD].lengths
        return changes | {"txt_ids": positions(inputs["txt_ids"], lengths)}

    def blocks(self, denoiser):
        yield from super().blocks(denoiser)
        for i, block in enumerate(denoiser.single_transformer_blocks):
            yield f"{SINGLE}{i}", block

    def block_hook(self, name, block, is_last):
        hook = SingleBlockHook if name.startswith(SINGLE) else RopeBlockHook
        return hook(name, block, is_last)

    def uses_fused_projection(self, attn):
        return attn.fused_projections

    def text_layers(self, block):
        if hasattr(block, "proj_mlp"):
            return "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out"
        return (*TEXT_LAYERS, "attn.to_add_out", "ff_context")


def targets_of(ids: Tensor) -> Targets | None:
    """The tokens of image 0 at `img_ids` `[l, 3]`, where there are others: Kontext numbers its
    reference images from 1. VisualCloze, which makes all of its images, has no image 0."""
    ids = ids[0] if ids.dim() == 3 else ids
    if ids.is_meta:
        return None
    are = ids[:, 0] == 0
    return None if are.all() or not are.any() else Targets(are)


def grid_of(ids: Tensor) -> Grid:
    """The grid whose tokens, row by row, stand at `img_ids` `[l, 3]`: image, row and column."""
    ids = ids[0] if ids.dim() == 3 else ids
    _, height, width = ((ids.amax(0) - ids.amin(0)).long() + 1).tolist()
    expected = torch.stack(
        [
            x.flatten()
            for x in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        ],
        dim=1,
    )
    found = (ids - ids.amin(0))[:, 1:].long().cpu()
    if not torch.equal(found, expected):
        raise ValueError(
            f"nasa_diffusers: img_ids are not the {height} x {width} tokens of one image, row by "
            "row (reference images stand beside it?), so alpha cannot be a map over it; give a "
            "number, or one per image"
        )
    return 1, height, width
