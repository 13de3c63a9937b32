"""Negative prompts: the forms a user may give, their encoding, and their rows in a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from nasa_diffusers.weights import Fingerprint, Record

if TYPE_CHECKING:
    from nasa_diffusers.families.base import Family
    from nasa_diffusers.rows import Rows

# ((prompts: one, or one per image), its own alpha), ...
Terms = tuple[tuple[tuple[str, ...], float], ...]
NegativePrompt = str | Sequence[str] | Sequence[tuple[str, float]]


@dataclass(frozen=True, eq=False)
class Encoded:
    """One negative prompt, or one per image, as the text encoder returned it."""

    label: str
    weight: float  # its own alpha, a factor on the common one
    embeds: Tensor  # [m, n, c], m = 1 for the whole batch
    mask: Tensor | None  # [m, n] bool, True = attend
    placed: dict[tuple, tuple[Tensor, Tensor | None]] = field(default_factory=dict)

    def rows(self, like: Tensor, rows: Rows) -> tuple[Tensor, Tensor | None]:
        """`embeds` and `mask` for the batch of `like`, whose rows these are."""
        if self.embeds.requires_grad:
            return self._place(like, rows)
        inference = torch.is_inference_mode_enabled()
        key = (like.dtype, like.device, rows, inference)
        if key not in self.placed:
            if len(self.placed) >= 8:
                self.placed.clear()
            self.placed[key] = self._place(like, rows)
        return self.placed[key]

    def _place(self, like: Tensor, rows: Rows) -> tuple[Tensor, Tensor | None]:
        what = "negative prompt"
        embeds = rows.spread(self.embeds.to(like.device, like.dtype), what)
        if self.mask is None:
            return embeds, None
        return embeds, rows.spread(self.mask.to(like.device), what)


@dataclass(frozen=True, eq=False)
class Negative:
    """What the user asked to steer away from."""

    terms: tuple[Encoded, ...]
    prompts: Terms  # empty when embeddings were given
    has_own_alphas: bool
    max_sequence_length: int | None
    encoders: Record | None
    tokenizers: Sequence[Any]
    # of `encode_prompt`: those of the call the prompts were encoded for
    options: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def from_prompts(
        pipe: DiffusionPipeline,
        family: Family,
        negative_prompt: NegativePrompt,
        max_sequence_length: int | None,
    ) -> Negative:
        prompts, has_own_alphas = _parse(negative_prompt)
        return _encode(pipe, family, prompts, has_own_alphas, max_sequence_length, {})

    @staticmethod
    def from_embeds(embeds: Tensor, mask: Tensor | None) -> Negative:
        """The values as they are now; embeddings that learn are used as they are in each call."""
        _check_embeds(embeds, mask)
        mask = None if mask is None else mask.bool()
        if not embeds.requires_grad:
            embeds, mask = _trim(embeds.clone(), mask)
        return Negative((Encoded("embeddings", 1.0, embeds, mask),), (), False, None, None, ())

    def current(self, pipe: DiffusionPipeline, family: Family, options: dict[str, Any]) -> Negative:
        """The same prompts, encoded again if a text encoder has changed (a LoRA, say), or if this
        call encodes its own prompt with other options."""
        modules = text_encoders(pipe)
        if self.encoders is None or not modules:
            return self
        now = Fingerprint(modules)
        is_same = options == self.options and all(map(is_, tokenizers(pipe), self.tokenizers))
        if is_same and self.encoders.matches(now, compare_values=True):
            return self
        return _encode(
            pipe, family, self.prompts, self.has_own_alphas, self.max_sequence_length, options
        )


def text_encoders(pipe: DiffusionPipeline) -> list[nn.Module]:
    names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    return [encoder for name in names if (encoder := getattr(pipe, name, None)) is not None]


def tokenizers(pipe: DiffusionPipeline) -> list[Any]:
    return [getattr(pipe, name, None) for name in ("tokenizer", "tokenizer_2", "tokenizer_3")]


def _parse(negative_prompt: NegativePrompt) -> tuple[Terms, bool]:
    """Every form as terms, and whether they are pairs with an alpha of their own."""
    is_list = isinstance(negative_prompt, Sequence) and not isinstance(negative_prompt, str)
    items: list = list(negative_prompt) if is_list else [negative_prompt]
    are_pairs = [isinstance(item, tuple) and len(item) == 2 for item in items]
    pairs = items if all(are_pairs) else [(item, 1.0) for item in items]
    if not items or not all(isinstance(prompt, str) for prompt, _ in pairs):
        raise ValueError(
            "enable_nasa: negative_prompt must be a string, a list of strings (one per image) or "
            f"a list of (string, alpha) pairs (all at once), got {negative_prompt!r}"
        )
    if any(not prompt.strip() for prompt, _ in pairs):
        raise ValueError(
            "enable_nasa: the negative prompt is empty, so there is nothing to steer away from; "
            "give a prompt, or set alpha to 0 to switch NASA off"
        )
    if not all(are_pairs):
        return ((tuple(items), 1.0),), False
    for _, weight in pairs:
        if not isinstance(weight, (int, float)) or not math.isfinite(weight) or weight == 0:
            raise ValueError(
                "enable_nasa: the alpha of a negative prompt must be a finite number other than "
                f"0, got {weight!r}; leave out a prompt that is not wanted"
            )
    return tuple(((prompt,), float(weight)) for prompt, weight in pairs), True


@torch.no_grad()
def _encode(
    pipe: DiffusionPipeline,
    family: Family,
    prompts: Terms,
    has_own_alphas: bool,
    max_sequence_length: int | None,
    options: dict[str, Any],
) -> Negative:
    if not text_encoders(pipe):
        raise ValueError(
            f"enable_nasa: {type(pipe).__name__} has no text encoder loaded; pass "
            "negative_prompt_embeds"
        )
    terms = []
    for names, weight in prompts:
        embeds, mask = family.encode(pipe, list(names), max_sequence_length, **options)
        mask = None if mask is None else mask.bool()
        _check_embeds(embeds, mask)
        terms.append(Encoded(" | ".join(names), weight, *_trim(embeds, mask)))
    encoders = Record(Fingerprint(text_encoders(pipe)))
    return Negative(
        tuple(terms), prompts, has_own_alphas, max_sequence_length, encoders, tokenizers(pipe),
        options,
    )  # fmt: skip


def _trim(embeds: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Drop the padding that no row attends to: a masked key is an absent key."""
    if mask is None or embeds.is_meta:
        return embeds, mask
    length = int(mask.any(0).nonzero().max()) + 1
    embeds, mask = embeds[:, :length].contiguous(), mask[:, :length].contiguous()
    return embeds, None if mask.all() else mask


def _check_embeds(embeds: Tensor, mask: Tensor | None) -> None:
    if not isinstance(embeds, Tensor) or embeds.dim() != 3 or 0 in embeds.shape:
        shape = list(embeds.shape) if isinstance(embeds, Tensor) else type(embeds).__name__
        raise ValueError(
            "enable_nasa: negative_prompt_embeds must be [1 or one per image, n >= 1, c], got "
            f"{shape}"
        )
    if mask is None:
        return
    if mask.shape != embeds.shape[:2]:
        raise ValueError(
            "enable_nasa: negative_prompt_attention_mask must be [rows, n] "
            f"{list(embeds.shape[:2])} to match negative_prompt_embeds, got {list(mask.shape)}"
        )
    if not mask.is_meta and not mask.bool().any(1).all():
        raise ValueError(
            "enable_nasa: negative_prompt_attention_mask leaves a negative prompt without any "
            "token; 1 keeps a token, 0 drops it"
        )
