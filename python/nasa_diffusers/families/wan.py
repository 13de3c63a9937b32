"""Wan 2.1 and 2.2, to video from text, images or videos: UMT5 text, zero-padded and not masked.

Classifier-free guidance is two calls a step; the one with the pipeline's own negative prompt is
left alone. Wan 2.2 has two transformers, for early and for late steps: both are guided.

Image to video of Wan 2.1 puts the tokens of an image encoder before the text, and each layer adds
its attention to them. They are not guided: they travel beside the text to the layers.
"""

from dataclasses import replace

import torch
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor

from nasa_diffusers.cache import folded_length
from nasa_diffusers.families.base import config, nonzero_tokens, video_grid
from nasa_diffusers.families.dispatched import Dispatched
from nasa_diffusers.families.sana import norm_then_heads
from nasa_diffusers.guided_text import GuidedText
from nasa_diffusers.layer import TextHook
from nasa_diffusers.prompts import KeysValues

# the tokens of the text where images stand before it: the layers take all others for images
TEXT_BESIDE_IMAGES = 512


class Wan(Dispatched):
    name = "Wan"
    # VACE has control blocks as well, whose layers attend to the same text
    denoisers: tuple[str, ...] = ("WanTransformer3DModel", "WanVACETransformer3DModel")
    doubles_batch = False
    text_parts = ("text_encoder", "tokenizer")
    text_options = ("max_sequence_length",)
    processors: tuple[type, ...] = (WanAttnProcessor,)
    attention: type = WanAttention

    def default_alpha(self, denoiser) -> float:
        """The paper has none for video: PixArt's, the transformer it does name."""
        return 0.5

    def default_nag(self, denoiser):
        """The NAG paper's."""
        return 5.0, 2.5, 0.25

    def own_tokens(self, embeds):
        """All but the zeros at the end: the pipelines pad with them what the encoder made."""
        return nonzero_tokens(embeds)

    def grids(self, denoiser, sample, inputs):
        return (video_grid(sample, denoiser.config.patch_size),)

    def folded_length(self, text):
        """Padding is zeros here, and attended to: hundreds of equal keys that are one."""
        return folded_length(text)

    def text_hooks(self, denoiser, cache):
        return [(denoiser.condition_embedder, WanTextHook(cache))]

    def plain(self, text):
        if text.beside is None:
            return text.text
        return torch.cat([text.beside, text.text], dim=1)

    def check(self, denoiser):
        embedder = getattr(denoiser.condition_embedder, "image_embedder", None)
        if embedder is None:
            return
        if any(getattr(attn, "add_k_proj", None) is None for _, attn in self.layers(denoiser)):
            raise ValueError(
                f"enable_nasa: the image tokens of this {type(denoiser).__name__} (image_dim="
                f"{config(denoiser, 'image_dim')} without added_kv_proj_dim in its config) are "
                "among the keys of the text, which is not supported; the image-to-video models of "
                "Wan, whose layers have keys of their own for them, are"
            )

    def images_beside(self, denoiser, inputs):
        images = inputs.get("encoder_hidden_states_image")
        return None if images is None else ([images], denoiser.condition_embedder.image_embedder)

    def keys_values_beside(self, attn, text):
        def project():
            if attn.fused_projections:
                k, v = attn.to_added_kv(text.beside).chunk(2, dim=-1)
            else:
                k, v = attn.add_k_proj(text.beside), attn.add_v_proj(text.beside)
            k = norm_then_heads(attn, attn.norm_added_k, k)
            return [(k, v.unflatten(2, (attn.heads, -1)))]

        seen = text.images
        if seen is None or torch.compiler.is_compiling():
            return KeysValues(*project()[0])
        fused = getattr(attn, "to_added_kv", None)
        modules = attn.add_k_proj, attn.add_v_proj, fused, attn.norm_added_k
        made, _ = seen.cache.through(attn, modules, seen.made_by, seen.prompts, project)
        return KeysValues(*made[0])


class WanTextHook(TextHook):
    """The condition embedder takes timesteps, text and images together: only the text is doubled,
    and the images go with it."""

    def new_forward(self, module, *args, **kwargs):
        guided = next((x for x in args if isinstance(x, GuidedText)), None)
        if guided is None:
            return self.stock(*args, **kwargs)
        args = tuple(guided.text if x is guided else x for x in args)
        # where there is an image encoder, its tokens come last
        temb, timestep_proj, projected, *images = self.stock(*args, **kwargs)
        if projected is guided.text:
            # asked for the embedding of a timestep only
            return temb, timestep_proj, guided, *images
        text = self.project(module, guided, projected)
        if not images or images[0] is None:
            return temb, timestep_proj, text, *images
        if projected.shape[1] != TEXT_BESIDE_IMAGES:
            raise ValueError(
                f"nasa_diffusers: beside images the text of this model must have "
                f"{TEXT_BESIDE_IMAGES} tokens, got {projected.shape[1]}: its layers take all "
                "others for images; call with max_sequence_length=512"
            )
        return temb, timestep_proj, replace(text, beside=images[0]), None

    def project(self, module, text, positive=None):
        """`positive` is the positive text, where the module has projected it already."""
        if text.prepared is not None:
            return text.as_prepared()
        texts = text.texts if positive is None else text.texts[1:]

        def embed():
            return [(module.text_embedder(x),) for x in texts]

        if text.is_cached:
            owner = module if positive is None else module.text_embedder
            made, made_by = self.cache.through(
                owner, [module.text_embedder], text.made_by, text.prompts, embed
            )
        else:
            made_by, made = None, embed()
        projected = [x for (x,) in made]
        return text.projected(projected if positive is None else [positive, *projected], made_by)
