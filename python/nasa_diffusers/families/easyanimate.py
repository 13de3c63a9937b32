"""EasyAnimate: Qwen2-VL's text beside the video in 48 blocks of two streams.

Text is projected token by token. Padding is attended to and not masked, as CogVideoX's. The latents
of an image or a video that controls what is made are further channels. Under classifier-free
guidance the pipelines make one doubled batch.
"""

from diffusers.models.transformers.transformer_easyanimate import EasyAnimateAttnProcessor2_0

from nasa_diffusers.encoding import encode_prompt
from nasa_diffusers.families.base import video_grid
from nasa_diffusers.families.two_streams import TwoStreams
from nasa_diffusers.side import Layout


class EasyAnimate(TwoStreams):
    name = "EasyAnimate"
    denoisers = ("EasyAnimateTransformer3DModel",)
    text_parts = ("text_encoder", "tokenizer")
    processors = (EasyAnimateAttnProcessor2_0,)
    block_lists = (
        (
            "transformer_blocks",
            Layout(text="encoder_hidden_states", text_first=False, attention="attn1"),
        ),
    )

    def encode_unpadded(self, pipe, prompts, length_is_named, **options):
        embeds, _, mask, *_ = encode_prompt(pipe, prompts, options)
        return embeds, None if length_is_named else mask

    def check_call(self, denoiser, inputs):
        super().check_call(denoiser, inputs)
        if inputs.get("encoder_hidden_states_t5") is not None:
            raise ValueError(
                "nasa_diffusers: the call brings encoder_hidden_states_t5, a second text that the "
                "pipelines of EasyAnimate never give; leave it out"
            )

    def grids(self, denoiser, sample, inputs):
        patch = denoiser.config.patch_size
        return (video_grid(sample, (1, patch, patch)),)

    def prepare(self, denoiser, side, term):
        return denoiser.text_proj(term.text), term.mask
