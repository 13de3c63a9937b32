"""The hooks on a denoiser's modules: text cross-attention, and what the text passes before it.

Both are diffusers `ModelHook`s, so they outlive what replaces attention processors (IP-Adapter,
attention slicing, fused projections). A call that brings plain text is passed on untouched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers.hooks import ModelHook
from torch import Tensor, nn

from nasa_diffusers import ip_adapter
from nasa_diffusers.cache import TextCache
from nasa_diffusers.guided_text import GuidedText
from nasa_diffusers.prompts import KeysValues, Signed, nothing, subtract


class LayerMaths(Protocol):
    """What a family says of its text cross-attention layers."""

    processors: tuple[type, ...]  # those whose computation the following reproduce

    def projections(self, attn: Any) -> tuple[nn.Module | None, ...]: ...
    def queries(self, attn: Any, hidden_states: Tensor) -> Tensor: ...
    def keys_values(self, attn: Any, text: Tensor) -> tuple[Tensor, Tensor]: ...
    def keys_values_beside(self, attn: Any, text: GuidedText) -> KeysValues: ...
    def plain(self, text: GuidedText) -> Any: ...
    def output(self, attn: Any, o: Tensor) -> Tensor: ...


def refuse_copy(self, memo: dict):
    """A hooked forward is bound to its module: a copy would run with the original's weights."""
    raise RuntimeError(
        "nasa_diffusers: a denoiser cannot be copied while NASA is on; call disable_nasa(pipe), "
        "copy it, then call enable_nasa again"
    )


class Hook(ModelHook):
    """A `ModelHook` that decides whether the module's own computation runs."""

    def stock(self, *args, **kwargs) -> Any:
        """What the module computes without NASA."""
        return self.fn_ref.original_forward(*args, **kwargs)  # type: ignore[misc]

    __deepcopy__ = refuse_copy


class CrossAttentionHook(Hook):
    """Computes guided attention in place of a layer's own text cross-attention."""

    def __init__(self, name: str, family: LayerMaths, cache: TextCache, guided: bool):
        super().__init__()
        self.name, self.family, self.cache, self.guided = name, family, cache, guided
        self.last_call: LayerCall | None = None

    def new_forward(
        self,
        attn: Any,
        hidden_states: Tensor,  # [b, l, c]
        encoder_hidden_states: Any = None,  # text, or (text, [images]) with an IP-Adapter
        attention_mask: Tensor | None = None,  # additive [b, 1, n_pos], over the positive text
        *args,
        **kwargs,
    ) -> Tensor:
        text, images = encoder_hidden_states, None
        if isinstance(text, tuple):
            text, images = text
        if not isinstance(text, GuidedText):
            return self._stock(hidden_states, encoder_hidden_states, attention_mask, args, kwargs)
        if not self.guided:
            plain = self.family.plain(text)
            plain = plain if images is None else (plain, images)
            return self._stock(hidden_states, plain, attention_mask, args, kwargs)
        self._check_processor(attn, images)
        if not torch.compiler.is_compiling():
            text.reached.add(self.name)

        q = self.family.queries(attn, hidden_states)
        pos, *negatives = self.keys_values(attn, text)
        if not torch.compiler.is_compiling():
            prompts = zip(text.texts, (pos, *negatives), strict=True)
            sizes = [(x.shape[0], prompt.k.shape[1], x.shape[2]) for x, prompt in prompts]
            self.last_call = LayerCall(q.shape, sizes)
        if attention_mask is not None:
            pos = pos._replace(mask=key_mask(self.name, attention_mask, pos.k.shape[1]))
        signed = [
            Signed(prompt, term.alpha) for prompt, term in zip(negatives, text.terms, strict=True)
        ]
        masks, beside = kwargs.get("ip_adapter_masks"), None
        if images is not None:
            beside = ip_adapter.image_beside(attn, images, masks, text, q.shape[0])
        is_image_beside, own = beside is not None, None
        if text.beside is not None:
            own = self.family.keys_values_beside(attn, text)
            if beside is None and text.method.adds_images:
                beside, own = own, None
        o = text.method.cross(q, pos, signed, text.backend, beside)
        if images is not None and not is_image_beside:
            for image, alpha in ip_adapter.image_terms(attn, q, images, masks, text):
                o = o + subtract(q, nothing(image), image, alpha, text.backend)
        if own is not None:
            o = o + subtract(q, nothing(own), own, -1.0, text.backend)
        # [b, l, h, d] -> [b, l, h * d], a view
        return self.family.output(attn, o.flatten(2))

    def _stock(self, hidden_states, text, attention_mask, args, kwargs) -> Tensor:
        if args:
            return self.stock(hidden_states, text, attention_mask, *args, **kwargs)
        # AnyFlow's layers take nothing else by position
        kwargs = {"encoder_hidden_states": text, "attention_mask": attention_mask} | kwargs
        return self.stock(hidden_states, **kwargs)

    def _check_processor(self, attn: Any, images: Any) -> None:
        known = self.family.processors if images is None else ip_adapter.PROCESSORS
        if type(attn.processor) not in known:
            raise RuntimeError(
                f"nasa_diffusers: layer {self.name!r} has the processor "
                f"{type(attn.processor).__name__}, whose computation NASA does not know and would "
                f"replace. Restore a stock one, set_attn_processor({known[-1].__name__}()), or "
                "leave the layer out with enable_nasa(..., layers=...)"
            )

    # ---- keys and values ---------------------------------------------------------------------

    def keys_values(self, attn: Any, text: GuidedText) -> list[KeysValues]:
        """K and V of the positive text, then of each negative one."""
        if text.prepared is not None:
            return text.prepared.keys_values[self.name]
        masks = [None, *(term.mask for term in text.terms)]
        if text.prompts is None or not text.is_cached:
            made = self._project(attn, text.texts)
            return [KeysValues(k, v, mask) for (k, v), mask in zip(made, masks, strict=True)]
        are_uniform, folds = text.prompts.are_uniform, text.prompts.folded

        def project() -> list[tuple[Tensor, ...]]:
            texts = [x[:1] if same else x for x, same in zip(text.texts, are_uniform, strict=True)]
            shorter = zip(texts, folds, strict=True)
            return self._project(attn, [x if f is None else x[:, : f.length] for x, f in shorter])

        made, _ = self.cache.through(
            attn, self.family.projections(attn), text.made_by, text.prompts, project
        )
        # offloading may have moved the text since its padding was found
        device = made[0][0].device
        masks = [m if f is None else f.bias.to(device) for m, f in zip(masks, folds, strict=True)]
        return [KeysValues(k, v, mask) for (k, v), mask in zip(made, masks, strict=True)]

    def _project(self, attn: Any, texts: list[Tensor]) -> list[tuple[Tensor, ...]]:
        """One projection for all prompts, their tokens side by side: `[1, sum of r * n, c]`."""
        sizes = [text.shape[:2] for text in texts]
        tokens = torch.cat([text.flatten(0, 1) for text in texts])[None]
        # [sum of r * n, h, d]
        k, v = (x[0] for x in self.family.keys_values(attn, tokens))
        lengths = [r * n for r, n in sizes]
        return [
            (k_part.unflatten(0, size), v_part.unflatten(0, size))
            for k_part, v_part, size in zip(k.split(lengths), v.split(lengths), sizes, strict=True)
        ]


class TextHook(Hook):
    """Sends the negative prompts, too, through a module that the text passes before the blocks."""

    def __init__(self, cache: TextCache):
        super().__init__()
        self.cache = cache

    def new_forward(self, module: nn.Module, text: Any, *args, **kwargs):
        if not isinstance(text, GuidedText):
            return self.stock(text, *args, **kwargs)
        return self.project(module, text, *args, **kwargs)

    def project(self, module: nn.Module, text: GuidedText, *args, **kwargs) -> GuidedText:
        """All texts as the module makes them."""
        if text.prepared is not None:
            return text.as_prepared()

        def project() -> list[tuple[Tensor, ...]]:
            return [(self.stock(x, *args, **kwargs),) for x in text.texts]

        if text.prompts is None or not text.is_cached:
            return text.projected([x for (x,) in project()], None)
        made, made_by = self.cache.through(module, [module], text.made_by, text.prompts, project)
        return text.projected([x for (x,) in made], made_by)


@dataclass(frozen=True)
class LayerCall:
    """The sizes of a layer's last call, for the report. FLOPs count a multiply-add as 2."""

    q: torch.Size  # [b, l, h, d]
    texts: list[tuple[int, int, int]]  # r, n, c, the positive one first

    @property
    def attention_flops(self) -> int:
        """Q K-^T and P- V-, over every row of the batch."""
        b, queries, h, d = self.q
        return sum(4 * b * h * queries * n * d for _, n, _ in self.texts[1:])

    @property
    def projection_flops(self) -> int:
        """to_k and to_v of the negative texts."""
        _, _, h, d = self.q
        return sum(4 * r * n * c * h * d for r, n, c in self.texts[1:])


def key_mask(layer: str, mask: Tensor, keys: int) -> Tensor:
    """diffusers' additive mask `[b, 1, n]` as one bias per key, `[b, n]`."""
    if mask.dim() != 3 or mask.shape[1] != 1 or mask.shape[2] != keys:
        raise ValueError(
            f"nasa_diffusers: the text mask of layer {layer!r} must be [b, 1, {keys}], one value "
            f"per text token, got {list(mask.shape)}"
        )
    return mask[:, 0]
