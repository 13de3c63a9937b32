"""Wan 2.1 and 2.2, text to video: UMT5 text, zero-padded and not masked.

Classifier-free guidance is two calls a step; the one with the pipeline's own negative prompt is
left alone. Wan 2.2 has two transformers, for early and for late steps: both are guided.
"""

from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor

from nasa_diffusers.cache import folded_length
from nasa_diffusers.chain import check_own_forward
from nasa_diffusers.families.base import Family, config, project_keys_values
from nasa_diffusers.families.sana import norm_then_heads
from nasa_diffusers.guided_text import GuidedText
from nasa_diffusers.layer import TextHook


class Wan(Family):
    name = "Wan"
    denoisers = ("WanTransformer3DModel",)
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
        if embeds.is_meta:
            return None
        # [m, n]: True up to the last token that is not zeros, and always for the first
        mask = (embeds != 0).any(2).flip(1).long().cumsum(1).flip(1) > 0
        mask[:, 0] = True
        return None if mask.all() else mask

    def grids(self, denoiser, sample, inputs):
        size = zip(sample.shape[-3:], denoiser.config.patch_size, strict=True)
        frames, height, width = (tokens // patch for tokens, patch in size)
        return ((frames, height, width),)

    def folded_length(self, text):
        """Padding is zeros here, and attended to: hundreds of equal keys that are one."""
        return folded_length(text)

    def text_hooks(self, denoiser, cache):
        return [(denoiser.condition_embedder, WanTextHook(cache))]

    def layers(self, denoiser):
        for name, module in denoiser.named_modules():
            if name.endswith(".attn2") and isinstance(module, self.attention):
                yield name, module

    def check(self, denoiser):
        if denoiser.condition_embedder.image_embedder is not None:
            raise ValueError(
                f"enable_nasa: this {type(denoiser).__name__} has an image encoder's tokens beside "
                f"the text (image_dim={config(denoiser, 'image_dim')} in its config), which is not "
                "supported; the image-to-video models of Wan 2.2, which have none, are"
            )

    def check_layer(self, name, attn):
        check_own_forward(name, attn)
        if attn.add_k_proj is not None:
            raise ValueError(
                f"enable_nasa: layer {name!r} attends to an image encoder's tokens besides the "
                "text, which is not supported; leave it out with layers=..."
            )
        if getattr(attn.processor, "_parallel_config", None) is not None:
            raise ValueError(
                "enable_nasa: context parallelism is on for this transformer, and NASA does not "
                "split its attention; load the model without enable_parallelism"
            )

    def projections(self, attn):
        return attn.to_k, attn.to_v, getattr(attn, "to_kv", None), attn.norm_k

    def queries(self, attn, hidden_states):
        return norm_then_heads(attn, attn.norm_q, attn.to_q(hidden_states))

    def keys_values(self, attn, text):
        k, v = project_keys_values(attn, text)
        return norm_then_heads(attn, attn.norm_k, k), v.unflatten(2, (attn.heads, -1))


class WanTextHook(TextHook):
    """The condition embedder takes timestep and text together: only the text is doubled."""

    def new_forward(self, module, timestep, text, *args, **kwargs):  # type: ignore[override]
        if not isinstance(text, GuidedText):
            return self.stock(timestep, text, *args, **kwargs)
        temb, timestep_proj, projected, images = self.stock(timestep, text.text, *args, **kwargs)
        return temb, timestep_proj, self.project(module, text, projected), images

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
