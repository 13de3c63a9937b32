"""What FLUX.1 and SD3 share: blocks that carry an image stream and a text stream together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from nasa_diffusers.chain import check_own_forward, skipping_hooks
from nasa_diffusers.families.base import Denoiser, Family, Layer
from nasa_diffusers.joint import KEYWORD, BlockHook, JointAttentionHook, Texts, side_by_side

# of a block of two streams: what projects its text for the attention
TEXT_LAYERS = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")


class Joint(Family):
    """The answers for blocks with one attention over `[image; text]`, called `attn`."""

    rules = ("nasa-cross", "nasa-text", "nasa")
    is_joint = True

    def default_alpha(self, denoiser: Denoiser) -> float:
        """The paper has none. What a query attends to is partly the image here, so the same alpha
        takes away more than in cross-attention. Of four small networks 0.25 made the images of two
        worse than no negative prompt, and 0.1 those of none of the three it was tried on
        (docs/diffusers/joint.md)."""
        return 0.1

    # ---- hooks -------------------------------------------------------------------------------

    def blocks(self, denoiser: Denoiser) -> Iterator[tuple[str, Any]]:
        """Every block, by name, in the order in which the denoiser runs them."""
        for i, block in enumerate(denoiser.transformer_blocks):
            yield f"transformer_blocks.{i}", block

    def layers(self, denoiser):
        for name, block in self.blocks(denoiser):
            yield f"{name}.attn", block.attn

    def layer_hook(self, denoiser, name, cache, guided):
        block = denoiser.get_submodule(name.removesuffix(".attn"))
        flops = token_flops(block, self.text_layers(block))
        return JointAttentionHook(name, self, guided, flops)

    def block_hook(self, name: str, block: Any, is_last: bool) -> BlockHook:
        return BlockHook(name, block, is_last)

    def block_hooks(self, denoiser, guided):
        last = max(i for i, is_guided in enumerate(guided.values()) if is_guided)
        return [
            (block, self.block_hook(name, block, is_last=i >= last))
            for i, (name, block) in enumerate(self.blocks(denoiser))
        ]

    def hooked_modules(self, denoiser):
        return {f"{name}.attn": (block, block.attn) for name, block in self.blocks(denoiser)}

    # ---- a call ------------------------------------------------------------------------------

    def carry(self, denoiser, guided_text, inputs, is_guided=True):
        """The tokens of all prompts, side by side, are the text of the call."""
        texts = Texts(
            guided_text,
            [text.shape[1] for text in guided_text.texts],
            is_guided,
            may_end=not self.keeps_text(denoiser),
        )
        options = inputs.get("joint_attention_kwargs") or {}
        return {
            "encoder_hidden_states": side_by_side(guided_text, inputs["hidden_states"].shape[0]),
            "joint_attention_kwargs": options | {KEYWORD: texts},
        }

    def keeps_text(self, denoiser):
        """Whether a cache keeps the text of one call for another: hooks of diffusers that skip
        blocks or attentions, or cache-dit's mark."""
        if getattr(denoiser, "_is_cached", False) or skipping_hooks(denoiser):
            return True
        return any(
            skipping_hooks(m) for _, block in self.blocks(denoiser) for m in (block, block.attn)
        )

    def check_call(self, denoiser, inputs):
        if (inputs.get("joint_attention_kwargs") or {}).get("ip_adapter_masks") is not None:
            raise ValueError(
                f"nasa_diffusers: the call brings ip_adapter_masks, which diffusers takes for "
                f"{self.name} and passes over; leave them out of joint_attention_kwargs"
            )

    # ---- one layer ---------------------------------------------------------------------------

    def check_layer(self, name, attn):
        check_own_forward(name, attn)
        self.check_attention(name, attn, None)

    def check_attention(self, name: str, attn: Layer, attention_mask: Tensor | None) -> None:
        """Raise if the layer would do something that the computation here does not."""
        processor = attn.processor
        if type(processor) not in self.processors:
            raise RuntimeError(
                f"nasa_diffusers: layer {name!r} has the processor {type(processor).__name__}, "
                f"whose computation NASA does not know and would replace. Restore a stock one, "
                f"set_attn_processor({self.processors[0].__name__}()); an IP-Adapter is taken off "
                "with pipe.unload_ip_adapter()"
            )
        if getattr(processor, "_parallel_config", None) is not None:
            raise RuntimeError(
                "nasa_diffusers: context parallelism is on for this transformer, and NASA does "
                "not split its attention; load the model without enable_parallelism"
            )
        if attention_mask is not None:
            raise ValueError(
                f"nasa_diffusers: layer {name!r} got an attention_mask, which the pipelines of "
                f"{self.name} never give; leave it out of joint_attention_kwargs"
            )

    def uses_fused_projection(self, attn: Layer) -> bool:
        raise NotImplementedError

    def image_heads(self, attn: Layer, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[b, l, c]` to Q, K and V, each `[b, l, h, d]`; modules are called, so LoRA, offload and
        quantised linears do their part."""
        if self.uses_fused_projection(attn):
            return self.heads(attn, attn.to_qkv(image).chunk(3, dim=-1), attn.norm_q, attn.norm_k)
        projected = attn.to_q(image), attn.to_k(image), attn.to_v(image)
        return self.heads(attn, projected, attn.norm_q, attn.norm_k)

    def text_heads(self, attn: Layer, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[b, n, c]` to Q, K and V, each `[b, n, h, d]`: text has projections of its own."""
        norms = attn.norm_added_q, attn.norm_added_k
        if self.uses_fused_projection(attn):
            return self.heads(attn, attn.to_added_qkv(text).chunk(3, dim=-1), *norms)
        projected = attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text)
        return self.heads(attn, projected, *norms)

    def heads(
        self, attn: Layer, projected: Any, norm_q: nn.Module | None, norm_k: nn.Module | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        head_dim = attn.inner_dim // attn.heads
        q, k, v = (x.unflatten(-1, (-1, head_dim)) for x in projected)
        return (q if norm_q is None else norm_q(q)), (k if norm_k is None else norm_k(k)), v

    def text_layers(self, block: Any) -> tuple[str, ...]:
        """Names of the linear layers that text passes in this block, or of modules of them."""
        raise NotImplementedError


def token_flops(block: nn.Module, names: tuple[str, ...]) -> int:
    """FLOPs of the linear layers in the named modules of a block, for one token."""
    modules = (m for name in names for m in block.get_submodule(name).modules())
    return sum(2 * m.in_features * m.out_features for m in modules if isinstance(m, nn.Linear))
