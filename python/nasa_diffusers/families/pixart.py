"""PixArt-alpha and -sigma: T5 text, masked, projected once before 28 cross-attention layers.

Allegro and Latte make video of the same text path.
"""

from diffusers.models import attention_processor as stock

from nasa_diffusers.families.base import Family, nonzero_tokens, token_grid, video_grid


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


class Allegro(PixArt):
    name = "Allegro"
    denoisers = ("AllegroTransformer3DModel",)
    processors = (stock.AllegroAttnProcessor2_0,)

    def as_text(self, text):
        # [b, 1, n, c], which the transformer folds after projecting it
        return super().as_text(text).flatten(1, 2)

    def grids(self, denoiser, sample, inputs):
        patch = denoiser.config.patch_size
        return (video_grid(sample, (denoiser.config.patch_size_t, patch, patch)),)


class Latte(PixArt):
    """Blocks over the frames, which are rows, attend to the text; blocks over time do not."""

    name = "Latte"
    denoisers = ("LatteTransformer3DModel",)
    text_options = ("clean_caption", "mask_feature")
    masks_text = False

    def own_tokens(self, embeds):
        """A prompt beside a longer one is padded with zeros."""
        return nonzero_tokens(embeds)

    def token_limits(self, pipe, tokens, **options):
        # whatever the call says
        return {"tokenizer": 120}
