"""What differs between model families, in one place: a family overrides what it does otherwise.

A new family is one file with one subclass, listed in `families/__init__.py`. The class says how
the negative prompt is encoded, which modules the text passes on its way to the blocks, which
layers are its text cross-attention, and how such a layer makes Q, K and V.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from diffusers.models import attention_processor as stock
from torch import Tensor, nn

from nasa_diffusers.alpha import Grid, Targets
from nasa_diffusers.cache import DEFAULT_LIMIT, TextCache
from nasa_diffusers.chain import check_own_forward
from nasa_diffusers.encoding import encode_prompt
from nasa_diffusers.guided_text import GuidedText
from nasa_diffusers.layer import CrossAttentionHook, Hook, TextHook
from nasa_diffusers.prompts import KeysValues

# duck-typed: diffusers' attention classes and denoisers share names, not a base class
Layer = Any
Denoiser = Any


class ImageTokens:
    """Where the image tokens of a denoiser's calls lie. `inputs` are all that it is called with."""

    def __init__(self, family: Family, denoiser: Denoiser):
        self.family, self.denoiser = family, denoiser

    def grids(self, sample: Tensor, inputs: dict[str, Any]) -> tuple[Grid, ...]:
        """As the family says."""
        return self.family.grids(self.denoiser, sample, inputs)

    def padding(self, sample: Tensor, inputs: dict[str, Any]) -> int:
        """How many tokens follow those of a grid, which a map over the image leaves alone."""
        return 0

    def leading(self, sample: Tensor, inputs: dict[str, Any]) -> int:
        """How many tokens stand before those of a grid."""
        return 0

    def targets(self, inputs: dict[str, Any]) -> Targets | None:
        """Where reference images stand beside the image that is made: its tokens. The same object
        for the same inputs."""
        return None


class Family:
    """The answers for diffusers' `Attention` layers called `attn2`."""

    name: str
    denoisers: tuple[str, ...]  # class names
    # of NASA, the default first
    rules: tuple[str, ...] = ("nasa",)
    # why the installed diffusers cannot be guided, where it is too old
    missing = ""
    # text and image share one attention
    is_joint = False
    # negative prompts travel beside the text of a call, not in its place
    is_beside = False
    # the argument of the denoiser that holds the text
    text_argument = "encoder_hidden_states"
    # attributes of the denoiser: modules whose first argument is the text
    text_modules: tuple[str, ...] = ()
    # options of the pipeline's `encode_prompt` that a call of the pipeline can bring
    text_options: tuple[str, ...] = ()
    # attributes of the pipeline without which it cannot encode a prompt
    text_parts: tuple[str, ...] = ()
    # what the pipeline's `encode_prompt` may ask for, and `encode` does without
    encodes_without: tuple[str, ...] = ()
    # `encode_prompt` returns a mask after the embeddings
    masks_text = False
    # one doubled batch per step under classifier-free guidance, or two calls
    doubles_batch = True
    # processors whose computation `queries`, `keys_values` and `output` reproduce
    processors: tuple[type, ...] = (
        stock.AttnProcessor,
        stock.FusedAttnProcessor2_0,
        stock.SlicedAttnProcessor,
        stock.XFormersAttnProcessor,
        stock.AttnProcessor2_0,
    )

    def default_alpha(self, denoiser: Denoiser) -> float:
        raise NotImplementedError

    def default_nag(self, denoiser: Denoiser) -> tuple[float, float, float]:
        """NAG's scale (as its code counts it, 1 more than in the paper), tau and alpha."""
        raise NotImplementedError

    def encode(self, pipe: Any, prompts: list[str], **options: Any) -> tuple[Tensor, Tensor | None]:
        """`[m, n, c]` and, where the family masks its text, `[m, n]`. `options` are those of
        `text_options` that the call has set."""
        embeds, *others = encode_prompt(pipe, prompts, options)
        return embeds, others[0] if self.masks_text else None

    def encode_unpadded(
        self, pipe: Any, prompts: list[str], length_is_named: bool, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The same with a mask that leaves out padding, for one softmax over all prompts, in
        which it would take weight. A length that the user has named is padded to."""
        embeds, mask = self.encode(pipe, prompts, **options)
        return embeds, self.own_tokens(embeds) if mask is None else mask

    def own_tokens(self, embeds: Tensor) -> Tensor | None:
        """`[m, n]`, False for padding, where embeddings show which of them are padding."""
        return None

    def token_limits(self, pipe: Any, tokens: int, **options: Any) -> dict[str, int]:
        """For each tokenizer the length to which it cuts a prompt; `tokens` is that of the encoded
        one."""
        return {"tokenizer": options.get("max_sequence_length", tokens)}

    def least_tokens(self, pipe: Any) -> int:
        """The least `max_sequence_length` that the pipeline can encode to."""
        return 1

    def grids(self, denoiser: Denoiser, sample: Tensor, inputs: dict[str, Any]) -> tuple[Grid, ...]:
        """Frames, height and width of the image tokens, for every size a layer may have. `inputs`
        are all that the denoiser is called with."""
        raise NotImplementedError

    def image_tokens(self, denoiser: Denoiser) -> ImageTokens:
        """Made once for a denoiser: what is remembered of its calls is remembered there."""
        return ImageTokens(self, denoiser)

    def folded_length(self, text: Tensor) -> int:
        """The length of a text `[r, n, c]` without a mask after equal padding at its end is folded:
        n where the model's padding is not equal."""
        return text.shape[1]

    def cache_limit(self, denoiser: Denoiser) -> int:
        """Bytes of keys and values that are kept, where the user sets nothing else."""
        return DEFAULT_LIMIT

    def kept_with(self, denoiser: Denoiser, inputs: dict[str, Any]) -> list[Tensor] | None:
        """Of prompts beside the text: what keys and values depend on besides them, the text and
        weights, each `[r, ...]`; None where they are made in every call."""
        return None

    def follows_time(self, denoiser: Denoiser) -> bool:
        """Whether that changes from step to step."""
        return False

    def text_hooks(self, denoiser: Denoiser, cache: TextCache) -> list[tuple[nn.Module, TextHook]]:
        """The modules that receive the text before the blocks do, each with a hook for it."""
        modules = (getattr(denoiser, name) for name in self.text_modules)
        return [(module, TextHook(cache)) for module in modules if module is not None]

    def layer_hook(
        self, denoiser: Denoiser, name: str, cache: TextCache, guided: bool
    ) -> CrossAttentionHook | Any:
        """What computes the text attention layer called `name`."""
        return CrossAttentionHook(name, self, cache, guided)

    def block_hooks(
        self, denoiser: Denoiser, guided: dict[str, bool]
    ) -> list[tuple[nn.Module, Hook]]:
        """Hooks on the blocks around the layers, where text changes from block to block."""
        return []

    def hooked_modules(self, denoiser: Denoiser) -> dict[str, tuple[nn.Module, ...]]:
        """For each layer, the modules with a hook of ours that a call must pass to reach it."""
        return {name: (attn,) for name, attn in self.layers(denoiser)}

    def carry(
        self,
        denoiser: Denoiser,
        guided_text: GuidedText,
        inputs: dict[str, Any],
        is_guided: bool = True,
    ) -> dict[str, Any]:
        """The inputs of the denoiser that change, so that the prompts reach the layers. Where not
        `is_guided`, the negative prompts are carried and change nothing."""
        return {"encoder_hidden_states": guided_text}

    def images_beside(
        self, denoiser: Denoiser, inputs: dict[str, Any]
    ) -> tuple[Any, nn.Module | None] | None:
        """The images whose tokens go beside the text in a call, and what projects them."""
        return None

    def plain(self, text: GuidedText) -> Any:
        """What a layer that is not guided is given in place of `text`."""
        return text.text

    def read_embeds(self, embeds: Any, mask: Tensor | None) -> tuple[Any, Tensor | None]:
        """`negative_prompt_embeds` as the pipeline has its own, as `[m, n, c]`, and their mask."""
        return embeds, mask

    def as_text(self, text: Any) -> Tensor:
        """The text of a call as `[b, n, c]`."""
        if isinstance(text, Tensor):
            return text
        why = "a deprecated IP-Adapter call passes images there, use ip_adapter_image_embeds"
        if text is None:
            why = "this denoiser is called without a text, so there is no prompt to guide"
        raise ValueError(
            f"nasa_diffusers: {self.text_argument} must be one tensor [b, n, c], got "
            f"{type(text).__name__}; {why}"
        )

    def channels(self, text: Tensor, inputs: dict[str, Any]) -> int:
        """Of a negative prompt that fits a call with this text, `[b, n, c]`."""
        return text.shape[2]

    def as_sample(self, sample: Any) -> Tensor:
        """The latents of a call, `[b, ...]`."""
        return sample

    def keeps_text(self, denoiser: Denoiser) -> bool:
        """Whether a cache on this denoiser keeps text from call to call, so that its length must
        stay: then the negative prompts are carried in every step, guided or not."""
        return False

    def check_call(self, denoiser: Denoiser, inputs: dict[str, Any]) -> None:
        """Raise if the denoiser is called in a way in which nothing can be guided."""

    def check(self, denoiser: Denoiser) -> None:
        """Raise if this denoiser mixes text tokens before its blocks, or counts their positions."""

    def layers(self, denoiser: Denoiser) -> Iterator[tuple[str, nn.Module]]:
        """The text cross-attention layers, all of them, by name."""
        for name, module in denoiser.named_modules():
            if name.endswith(".attn2") and isinstance(module, stock.Attention):
                yield name, module

    def check_layer(self, name: str, attn: Layer) -> None:
        """Raise if the layer does something that the computation here does not."""
        check_own_forward(name, attn)
        unusual = {
            "spatial_norm_dim": attn.spatial_norm is not None,
            "norm_num_groups": attn.group_norm is not None,
            "added_kv_proj_dim": attn.added_kv_proj_dim is not None,
            "kv_heads": attn.inner_kv_dim != attn.inner_dim,
            "scale_qk": attn.scale != (attn.inner_dim // attn.heads) ** -0.5,
            # over all tokens of a text, and ours are not one text
            "cross_attention_norm='group_norm'": isinstance(attn.norm_cross, nn.GroupNorm),
            "pre_only": attn.pre_only,
            "residual_connection": attn.residual_connection,
            "rescale_output_factor": attn.rescale_output_factor != 1,
        }
        if any(unusual.values()):
            which = ", ".join(key for key, is_set in unusual.items() if is_set)
            raise ValueError(
                f"enable_nasa: layer {name!r} uses {which}, which text cross-attention of "
                f"{self.name} does not have; leave it out with layers=..."
            )

    # ---- one layer ---------------------------------------------------------------------------

    def projections(self, attn: Layer) -> tuple[nn.Module | None, ...]:
        """Everything K and V depend on besides the text."""
        fused = attn.to_kv if _uses_fused_projection(attn) else None
        kv = (attn.to_k, attn.to_v) if fused is None else (fused,)
        norms = attn.norm_k if _has_norms(attn) else None, getattr(attn, "norm_cross", None)
        return (*kv, *norms)

    def queries(self, attn: Layer, hidden_states: Tensor) -> Tensor:
        """`[b, l, c]` to `[b, l, h, d]`."""
        q = attn.to_q(hidden_states).unflatten(2, (attn.heads, -1))
        return attn.norm_q(q) if _has_norms(attn) else q

    def keys_values(self, attn: Layer, text: Tensor) -> tuple[Tensor, Tensor]:
        """`[r, n, c]` to K and V, each `[r, n, h, d]`."""
        if attn.norm_cross is not None:
            text = attn.norm_encoder_hidden_states(text)
        k, v = project_keys_values(attn, text)
        k, v = (x.unflatten(2, (attn.heads, -1)) for x in (k, v))
        return (attn.norm_k(k) if _has_norms(attn) else k), v

    def keys_values_beside(self, attn: Layer, text: GuidedText) -> KeysValues:
        """K and V of the image tokens that go beside a text."""
        raise NotImplementedError

    def output(self, attn: Layer, o: Tensor) -> Tensor:
        """`[b, l, h * d]` through the output projection and its dropout."""
        return attn.to_out[1](attn.to_out[0](o))


def project_keys_values(attn: Layer, text: Tensor) -> tuple[Tensor, Tensor]:
    """K and V before the heads are split; modules are called, so LoRA, offload and quantised
    linears do their part."""
    if _uses_fused_projection(attn):
        k, v = attn.to_kv(text).chunk(2, dim=-1)
        return k, v
    return attn.to_k(text), attn.to_v(text)


# the other processors leave out a layer's norms of queries and keys
WITH_NORMS = (stock.AttnProcessor2_0, stock.FusedAttnProcessor2_0)


def _has_norms(attn: Layer) -> bool:
    return attn.norm_q is not None and type(attn.processor) in WITH_NORMS


def _uses_fused_projection(attn: Layer) -> bool:
    return attn.fused_projections and hasattr(attn, "to_kv")


def nonzero_tokens(embeds: Tensor) -> Tensor | None:
    """`[m, n]`: True up to the last token that is not zeros, and always for the first; None where
    all are."""
    if embeds.is_meta:
        return None
    mask = (embeds != 0).any(2).flip(1).long().cumsum(1).flip(1) > 0
    mask[:, 0] = True
    return None if mask.all() else mask


def token_grid(sample: Tensor, patch: int) -> Grid:
    """The one grid of a transformer over `[b, c, height, width]` latents."""
    height, width = sample.shape[-2:]
    return 1, height // patch, width // patch


def video_grid(sample: Tensor, patches: Sequence[int]) -> Grid:
    """The one grid of a transformer over `[b, c, frames, height, width]` latents."""
    size = zip(sample.shape[-3:], patches, strict=True)
    frames, height, width = (latents // patch for latents, patch in size)
    return frames, height, width


def config(denoiser: Denoiser, name: str):
    """A config value, None where this version of the model does not have it."""
    return getattr(denoiser.config, name, None)
