"""Cross-attention layers that call diffusers' attention dispatcher and norm all heads at once.

LTX-Video, Wan and the models built on Wan have each a copy of the same attention class.
"""

from nasa_diffusers.chain import check_own_forward
from nasa_diffusers.families.base import Family, project_keys_values
from nasa_diffusers.families.sana import norm_then_heads


class Dispatched(Family):
    """The answers for those layers, called `attn2`."""

    attention: type  # their class

    def layers(self, denoiser):
        for name, module in denoiser.named_modules():
            if name.endswith(".attn2") and isinstance(module, self.attention):
                yield name, module

    def check_layer(self, name, attn):
        check_own_forward(name, attn)
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
