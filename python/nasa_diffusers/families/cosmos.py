"""Cosmos 1, Predict2 and Predict2.5: T5 or Qwen text, not masked; T5's padding is zeros.

Classifier-free guidance is two calls a step. Layers norm queries and keys head by head.
"""

from diffusers.models import attention_processor as stock
from diffusers.models.transformers.transformer_cosmos import CosmosAttnProcessor2_0

from nasa_diffusers.families.base import Family, config
from nasa_diffusers.families.wan import Wan
from nasa_diffusers.layer import TextHook


class Cosmos(Wan):
    name = "Cosmos"
    denoisers = ("CosmosTransformer3DModel",)
    attention = stock.Attention
    processors = (CosmosAttnProcessor2_0,)

    def text_hooks(self, denoiser, cache):
        # Predict2.5 projects its text
        projection = getattr(denoiser, "crossattn_proj", None)
        return [] if projection is None else [(projection, TextHook(cache))]

    def check(self, denoiser):
        if config(denoiser, "img_context_dim_in"):
            raise ValueError(
                "enable_nasa: the layers of this CosmosTransformer3DModel attend to an image with "
                "queries of its own besides the text (img_context_dim_in in its config), which is "
                "not supported; the models of Cosmos that are given no image context are"
            )

    def check_layer(self, name, attn):
        Family.check_layer(self, name, attn)

    def projections(self, attn):
        return attn.to_k, attn.to_v, attn.norm_k

    def queries(self, attn, hidden_states):
        return _heads(attn, attn.norm_q, attn.to_q(hidden_states))

    def keys_values(self, attn, text):
        k, v = attn.to_k(text), attn.to_v(text)
        return _heads(attn, attn.norm_k, k), v.unflatten(2, (attn.heads, -1))


def _heads(attn, norm, x):
    """`[b, n, h * d]` to `[b, n, h, d]`, each head normalised."""
    x = x.unflatten(2, (attn.heads, -1))
    return x if norm is None else norm(x)
