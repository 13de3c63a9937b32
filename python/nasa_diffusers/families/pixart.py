"""PixArt-alpha and -sigma: T5 text, masked, projected once before 28 cross-attention layers."""

from nasa_diffusers.families.base import Family, token_grid


class PixArt(Family):
    name = "PixArt"
    denoisers = ("PixArtTransformer2DModel",)
    text_modules = ("caption_projection",)
    text_parts = ("text_encoder", "tokenizer")
    text_options = ("max_sequence_length", "clean_caption")
    masks_text = True

    def default_alpha(self, denoiser) -> float:
        """The paper's, for PixArt-alpha; -sigma has the same blocks."""
        return 0.5

    def default_nag(self, denoiser):
        """The NAG paper's for PixArt-sigma."""
        return 5.0, 2.5, 0.375

    def grids(self, denoiser, sample, inputs):
        return (token_grid(sample, denoiser.config.patch_size),)
