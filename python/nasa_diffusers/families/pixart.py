"""PixArt-alpha and -sigma: T5 text, masked, projected once before 28 cross-attention layers."""

from nasa_diffusers.families.base import Family, on_device, token_grid


class PixArt(Family):
    name = "PixArt"
    denoisers = ("PixArtTransformer2DModel",)
    text_modules = ("caption_projection",)

    def default_alpha(self, denoiser) -> float:
        """The paper's, for PixArt-alpha; -sigma has the same blocks."""
        return 0.5

    def default_nag(self, denoiser):
        """The NAG paper's for PixArt-sigma."""
        return 5.0, 2.5, 0.375

    def encode(self, pipe, prompts, max_sequence_length, **options):
        length = {} if max_sequence_length is None else {"max_sequence_length": max_sequence_length}
        embeds, mask, *_ = pipe.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=on_device(pipe), **length
        )
        return embeds, mask

    def grids(self, denoiser, sample, inputs):
        return (token_grid(sample, denoiser.config.patch_size),)
