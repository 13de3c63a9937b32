"""HunyuanVideo 1.5 and HunyuanImage 2.1: two texts, Qwen2.5-VL's and ByT5's of what is quoted.

A refiner, which knows the time, makes Qwen's text ready in each call, and makes that of the
negative prompt ready as well; ByT5's is projected token by token. Both are masked and stand side by
side. HunyuanVideo 1.5 has blocks of two streams alone; in image to video the tokens of the image
stand before its texts, and stay with the prompt. HunyuanImage has blocks with one set of
projections, too; its refiner of images has no ByT5. A guider inside the pipelines calls for each
branch; the call with the pipeline's own negative prompt is left alone.

Both texts of a negative prompt travel as one, see `two_texts.py`.
"""

import torch
from torch import Tensor

from nasa_diffusers.encoding import encode_prompt
from nasa_diffusers.families.base import video_grid
from nasa_diffusers.families.hunyuan_video import of_all_rows, patches
from nasa_diffusers.families.two_streams import TwoStreams, key_mask
from nasa_diffusers.families.two_texts import as_one, present, read_two
from nasa_diffusers.side import Layout

try:
    from diffusers.models.transformers.transformer_hunyuan_video15 import (
        HunyuanVideo15AttnProcessor2_0,
    )
    from diffusers.models.transformers.transformer_hunyuanimage import HunyuanImageAttnProcessor
except ImportError:  # before diffusers 0.36
    VIDEO: tuple[type, ...] = ()
    IMAGE: tuple[type, ...] = ()
else:
    VIDEO, IMAGE = (HunyuanVideo15AttnProcessor2_0,), (HunyuanImageAttnProcessor,)

SECOND = "encoder_hidden_states_2"


class WithGlyphs(TwoStreams):
    """The answers for a refined text and one of what is quoted."""

    doubles_batch = False
    text_parts = ("text_encoder", "tokenizer")
    reads = ("timestep", SECOND)

    def encode(self, pipe, prompts, **options):
        for name in ("text_encoder_2", "tokenizer_2"):
            if hasattr(type(pipe), "_get_byt5_prompt_embeds") and getattr(pipe, name) is None:
                raise ValueError(
                    f"enable_nasa: {name} of this {type(pipe).__name__} is not loaded, and what a "
                    "prompt quotes is encoded with it; load it, or pass negative_prompt_embeds"
                )
        made = encode_prompt(pipe, prompts, options | {"batch_size": len(prompts)})
        return made if len(made) == 2 else as_one(made[::2], made[1::2])

    def token_limits(self, pipe, tokens, **options):
        return {"tokenizer": pipe.tokenizer_max_length}

    def read_embeds(self, embeds, mask):
        """Two texts as `encode_prompt` makes them, `(text, glyphs)`, with a mask of each; one, for
        a denoiser that has no second."""
        return (embeds, mask) if isinstance(embeds, Tensor) else read_two(self.name, embeds, mask)

    def channels(self, text, inputs):
        second = inputs.get(SECOND)
        return text.shape[2] + (0 if second is None else second.shape[2])

    def positive_tokens(self, side, inputs):
        return inputs["encoder_hidden_states"].shape[1]

    def prepare(self, denoiser, side, term):
        timestep, channels = side.inputs["timestep"], side.text.text.shape[2]
        text, mask = of_all_rows(timestep, term.text, term.mask)
        if text.shape[2] == channels:
            return self.refine(denoiser, text, timestep, mask), mask
        text, glyphs = text[..., :channels], text[..., channels:]
        masks = present(glyphs), present(text)
        glyphs = self.project_glyphs(denoiser, glyphs)
        text = self.refine(denoiser, text, timestep, masks[1])
        return torch.cat([glyphs, text], dim=1), torch.cat(masks, dim=1)

    def refine(self, denoiser, text, timestep, mask):
        return denoiser.context_embedder(text, timestep, mask)

    def project_glyphs(self, denoiser, glyphs):
        return denoiser.context_embedder_2(glyphs)


class HunyuanVideo15(WithGlyphs):
    name = "HunyuanVideo 1.5"
    denoisers = ("HunyuanVideo15Transformer3DModel",)
    processors = VIDEO
    block_lists = (
        (
            "transformer_blocks",
            Layout(text="encoder_hidden_states", text_first=False, rope="freqs_cis"),
        ),
    )

    def read_embeds(self, embeds, mask):
        return read_two(self.name, embeds, mask)

    def grids(self, denoiser, sample, inputs):
        return (video_grid(sample, patches(denoiser)),)

    def refine(self, denoiser, text, timestep, mask):
        return super().refine(denoiser, text, timestep, mask) + kind(denoiser, 0, text)

    def project_glyphs(self, denoiser, glyphs):
        return super().project_glyphs(denoiser, glyphs) + kind(denoiser, 1, glyphs)

    def text_mask(self, side, options):
        mask = options.get("attention_mask")
        return None if mask is None else mask.bool()


def kind(denoiser, which: int, like: Tensor) -> Tensor:
    """What tells its texts apart, `[1, c]`."""
    return denoiser.cond_type_embed(torch.full((1,), which, device=like.device))


class HunyuanImage(WithGlyphs):
    name = "HunyuanImage"
    denoisers = ("HunyuanImageTransformer2DModel",)
    processors = IMAGE
    block_lists = tuple(
        (name, Layout(text="encoder_hidden_states", text_first=False))
        for name in ("transformer_blocks", "single_transformer_blocks")
    )

    def grids(self, denoiser, sample, inputs):
        # of one frame, where there are none
        video = sample if sample.dim() == 5 else sample[:, :, None]
        return (video_grid(video, (1, *denoiser.config.patch_size)[-3:]),)

    def text_mask(self, side, options):
        return key_mask(options.get("attention_mask"), side.lengths[0])
