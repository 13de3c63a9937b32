"""HunyuanVideo 1.0, its image-to-video, and Framepack: Llama's text beside the video.

A refiner of two blocks, which knows the time, makes the text ready in each call, and makes the
negative prompt ready as well. Blocks of two streams come first, then some with one set of
projections. Padding is masked. CLIP's pooled vector, that of the prompt, is part of the modulation.
Classifier-free guidance (`true_cfg_scale`) is two calls; the one with the pipeline's own negative
prompt is left alone.

Image-to-video puts the image's tokens into the prompt; a negative prompt is encoded without them,
as text-to-video does it. Where the first frame is replaced by the image, and in Framepack, which
puts the frames that there are before those that it makes, the frames that are made alone are
guided. Framepack puts the image's tokens before the text; they stay with the prompt.
"""

import inspect

import torch
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video as text_to_video

from nasa_diffusers.alpha import Targets
from nasa_diffusers.encoding import encode_prompt, on_device
from nasa_diffusers.families.base import ImageTokens, config, video_grid
from nasa_diffusers.families.two_streams import TwoStreams, key_mask
from nasa_diffusers.side import Layout

MAX_TOKENS = 256


def patches(denoiser):
    return denoiser.config.patch_size_t, denoiser.config.patch_size, denoiser.config.patch_size


class VideoTokens(ImageTokens):
    """The frames that are made are the last ones."""

    def __init__(self, family, denoiser):
        super().__init__(family, denoiser)
        # of a call's sizes the targets: the same object for the same sizes
        self._targets: dict[tuple, Targets] = {}

    def grids(self, sample, inputs):
        frames, height, width = video_grid(sample, patches(self.denoiser))
        return ((frames - self._given_frames(), height, width),)

    def _given_frames(self):
        return int(config(self.denoiser, "image_condition_type") == "token_replace")

    def leading(self, sample, inputs):
        _, height, width = video_grid(sample, patches(self.denoiser))
        return self._given_frames() * height * width

    def targets(self, inputs):
        sample = inputs["hidden_states"]
        before = self.leading(sample, inputs)
        if before == 0 or sample.is_meta:
            return None
        frames, height, width = self.grids(sample, inputs)[0]
        key = before, frames * height * width, sample.device
        if key not in self._targets:
            # another thread may do the same: both make the same
            are = torch.arange(sum(key[:2]), device=sample.device) >= before
            self._targets = {key: Targets(are)}
        return self._targets[key]


class HunyuanVideo(TwoStreams):
    name = "HunyuanVideo"
    denoisers = ("HunyuanVideoTransformer3DModel",)
    doubles_batch = False
    masks_text = True
    text_parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    text_options = ("prompt_template", "max_sequence_length")
    encodes_without = ("image",)
    processors = (HunyuanVideoAttnProcessor2_0,)
    block_lists = tuple(
        (name, Layout(text="encoder_hidden_states", text_first=False, rope=rope))
        for name, rope in (
            ("transformer_blocks", "freqs_cis"),
            ("single_transformer_blocks", "image_rotary_emb"),
        )
    )
    reads = ("timestep",)

    def encode(self, pipe, prompts, **options):
        if "image" in inspect.signature(pipe.encode_prompt).parameters:
            # the template of the call has a place for the image
            embeds, mask = text_to_video.HunyuanVideoPipeline._get_llama_prompt_embeds(
                pipe, prompts, text_to_video.DEFAULT_PROMPT_TEMPLATE, device=on_device(pipe),
                max_sequence_length=options.get("max_sequence_length", MAX_TOKENS),
            )  # fmt: skip
            return embeds, mask
        embeds, _, mask = encode_prompt(pipe, prompts, options)
        return embeds, mask

    def image_tokens(self, denoiser):
        return VideoTokens(self, denoiser)

    def positive_tokens(self, side, inputs):
        return inputs["encoder_hidden_states"].shape[1]

    def prepare(self, denoiser, side, term):
        timestep = side.inputs["timestep"]
        text, mask = of_all_rows(timestep, term.text, term.mask)
        return denoiser.context_embedder(text, timestep, mask), mask

    def text_mask(self, side, options):
        return key_mask(options.get("attention_mask"), side.lengths[0])


def of_all_rows(like, *tensors):
    """Each `[1, ...]` as `[b, ...]`: what the time changes is another in each row."""
    rows = like.shape[0]
    return [x if x is None else x.expand(rows, *x.shape[1:]) for x in tensors]


class FramepackTokens(VideoTokens):
    """Frames that there are already stand before them, the oldest ones pooled."""

    def _given_frames(self):
        return 0

    def leading(self, sample, inputs):
        tokens = 0
        for name, pooled in (("clean", 1), ("history_2x", 2), ("history_4x", 4)):
            given = inputs.get(f"latents_{name}")
            if given is not None:
                sizes = zip(given.shape[-3:], (pooled, 2 * pooled, 2 * pooled), strict=True)
                # filled up to whole patches
                frames, height, width = (-(-size // patch) for size, patch in sizes)
                tokens += frames * height * width
        return tokens


class Framepack(HunyuanVideo):
    name = "Framepack"
    denoisers = ("HunyuanVideoFramepackTransformer3DModel",)

    def image_tokens(self, denoiser):
        return FramepackTokens(self, denoiser)
