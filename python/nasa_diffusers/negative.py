"""Negative prompts: the forms a user may give, their encoding, and their rows in a batch."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nasa_diffusers.encoding import (
    Encoders,
    call_defaults,
    check_encodes,
    dropped_tokens,
    have_loras,
    takes,
    text_encoders,
)
from nasa_diffusers.families.base import Family
from nasa_diffusers.methods import Method
from nasa_diffusers.rows import Rows
from nasa_diffusers.scalars import is_int, is_real, scalar

# ((prompts: one, or one per image), its own alpha), ...
Terms = tuple[tuple[tuple[str, ...], float], ...]
NegativePrompt = str | Sequence[str] | Sequence[tuple[str, float]]
MAX_PLACED = 8
# of one prompt, with different options
MAX_ENCODINGS = 4


@dataclass(frozen=True, eq=False)
class Encoded:
    """One negative prompt, or one per image, as the text encoder returned it."""

    label: str
    weight: float  # its own alpha, a factor on the common one
    embeds: Tensor  # [m, n, c], m = 1 for the whole batch
    mask: Tensor | None  # [m, n] bool, True = attend
    # by tokenizer, how many tokens of the longest prompt did not fit
    dropped: Mapping[str, int] = field(default_factory=dict)
    placed: dict[tuple, tuple[Tensor, Tensor | None]] = field(default_factory=dict)

    def rows(self, like: Tensor, rows: Rows) -> tuple[Tensor, Tensor | None]:
        """`embeds` and `mask` for the batch of `like`, whose rows these are."""
        if self.embeds.requires_grad:
            return self._place(like, rows)
        inference = torch.is_inference_mode_enabled()
        key = (like.dtype, like.device, rows, inference)
        # another thread may clear it at any time
        found = self.placed.get(key)
        if found is None:
            if len(self.placed) >= MAX_PLACED:
                self.placed.clear()
            found = self.placed[key] = self._place(like, rows)
        return found

    def _place(self, like: Tensor, rows: Rows) -> tuple[Tensor, Tensor | None]:
        what = "negative prompt"
        embeds = rows.spread(self.embeds.to(like.device, like.dtype), what)
        if self.mask is None:
            return embeds, None
        return embeds, rows.spread(self.mask.to(like.device), what)


@dataclass(frozen=True, eq=False)
class Encoding:
    """A negative prompt as it was encoded once."""

    terms: tuple[Encoded, ...]
    # of the text encoding: those of the call it was encoded for
    options: Mapping[str, Any] = field(default_factory=dict)
    encoders: Encoders | None = None  # None where embeddings were given

    @property
    def channels(self) -> int:
        return self.terms[0].embeds.shape[2]


class Negative:
    """What the images are guided away from, and how it was encoded for the latest calls."""

    def __init__(
        self,
        first: Encoding,
        prompts: Terms = (),  # empty when embeddings were given
        has_own_alphas: bool = False,
        max_sequence_length: int | None = None,
        drops_padding: bool = False,
        given: tuple[Tensor, Tensor | None] | None = None,  # embeddings and their mask
    ):
        self.prompts, self.has_own_alphas, self.given = prompts, has_own_alphas, given
        self.max_sequence_length, self.drops_padding = max_sequence_length, drops_padding
        # replaced as a whole; the one used last is the last
        self._known: tuple[Encoding, ...] = (first,)
        self._lock = threading.Lock()

    @staticmethod
    def from_prompts(
        pipe: Any,
        family: Family,
        negative_prompt: NegativePrompt,
        max_sequence_length: int | None,
        drops_padding: bool = False,
    ) -> Negative:
        prompts, has_own_alphas = _parse(negative_prompt)
        return Negative._from_parsed(
            pipe, family, prompts, has_own_alphas, max_sequence_length, drops_padding
        )

    @staticmethod
    def _from_parsed(
        pipe: Any,
        family: Family,
        prompts: Terms,
        has_own_alphas: bool,
        max_sequence_length: int | None,
        drops_padding: bool,
    ) -> Negative:
        if pipe is None or not text_encoders(pipe):
            which = "the pipeline that NASA was enabled on is gone, and its text encoders with it"
            if pipe is not None:
                which = f"{type(pipe).__name__} has no text encoder loaded"
            raise ValueError(f"enable_nasa: {which}; pass negative_prompt_embeds")
        check_encodes(pipe, family.encodes_without)
        for name in family.text_parts:
            if getattr(pipe, name, None) is None:
                raise ValueError(
                    f"enable_nasa: {name} of this {type(pipe).__name__} is not loaded, and the "
                    "prompt is encoded with it; load it, or pass negative_prompt_embeds"
                )
        length = _check_length(pipe, family, max_sequence_length)
        options = call_defaults(pipe, family.text_options)
        if length is not None:
            options["max_sequence_length"] = length
        first = _encode(pipe, family, prompts, options, drops_padding, length is not None)
        return Negative(first, prompts, has_own_alphas, length, drops_padding)

    @staticmethod
    def from_embeds(
        embeds: Tensor, mask: Tensor | None, family: Family, drops_padding: bool = False
    ) -> Negative:
        """The values as they are now; embeddings that learn are used as they are in each call."""
        embeds, mask = family.read_embeds(embeds, mask)
        _check_embeds(embeds, mask)
        mask = None if mask is None else mask.bool()
        if not embeds.requires_grad:
            embeds = embeds.clone()
        given = embeds, mask
        if mask is None and drops_padding:
            mask = family.own_tokens(embeds)
        if not embeds.requires_grad:
            embeds, mask = _trim(embeds, mask)
        first = Encoding((Encoded("embeddings", 1.0, embeds, mask),))
        return Negative(first, drops_padding=drops_padding, given=given)

    def for_method(self, pipe: Any, family: Family, method: Method) -> Negative:
        """The same prompt with or without its padding, as the method takes it."""
        if method.drops_padding == self.drops_padding:
            return self
        if self.given is not None:
            return Negative.from_embeds(*self.given, family, method.drops_padding)
        return Negative._from_parsed(
            pipe, family, self.prompts, self.has_own_alphas, self.max_sequence_length,
            method.drops_padding,
        )  # fmt: skip

    @property
    def terms(self) -> tuple[Encoded, ...]:
        """As encoded for the latest call."""
        return self._known[-1].terms

    def current(
        self, pipes: Sequence[Any], family: Family, options: Mapping[str, Any]
    ) -> tuple[Encoded, ...]:
        """The terms for a call that encodes text with these `options`.

        Encoded again, by the first of the `pipes` that can, if that was never done with such
        options or the encoders have changed since (a LoRA, say). What was encoded before stays
        in use where no encoder is left.
        """
        if not self.prompts:
            return self.terms
        if self.max_sequence_length is not None:
            options = {**options, "max_sequence_length": self.max_sequence_length}
        with self._lock:
            latest = self._known[-1]
            assert latest.encoders is not None
            refusals = {id(pipe): latest.encoders.why_not(pipe) for pipe in pipes}
            pipe = next((pipe for pipe in pipes if refusals[id(pipe)] is None), None)
            if not (latest.encoders.have_loras if pipe is None else have_loras(pipe)):
                options = {name: x for name, x in options.items() if name != "lora_scale"}
            known = next((each for each in self._known if each.options == options), None)
            if pipe is None:
                if known is None:
                    raise _cannot_encode_again(latest.options, options, refusals.values())
            elif known is None or known.encoders is None or not known.encoders.are_those_of(pipe):
                known = self._encode_again(pipe, family, options, known)
            others = (each for each in self._known if each is not known)
            self._known = (*others, known)
            return known.terms

    def _encode_again(
        self, pipe: Any, family: Family, options: Mapping[str, Any], known: Encoding | None
    ) -> Encoding:
        is_named = self.max_sequence_length is not None
        made = _encode(pipe, family, self.prompts, options, self.drops_padding, is_named)
        if known is not None and made.channels != known.channels:
            # an encoder that only stands in the place of the model's
            return known
        still = [each for each in self._known if _is_of(each, pipe) and each.options != options]
        self._known = tuple(still[1 - MAX_ENCODINGS :])
        return made


def _is_of(encoding: Encoding, pipe: Any) -> bool:
    return encoding.encoders is not None and encoding.encoders.are_those_of(pipe)


def _cannot_encode_again(
    was: Mapping[str, Any], asked: Mapping[str, Any], reasons: Iterable[str | None]
) -> RuntimeError:
    names = [n for n in {**was, **asked} if was.get(n) != asked.get(n)]
    now = ", ".join(f"{name}={asked.get(name)!r}" for name in names)
    then = ", ".join(f"{name}={was.get(name)!r}" for name in names)
    why = "; ".join(reason for reason in reasons if reason) or "its pipeline is gone"
    length = "name max_sequence_length in enable_nasa, " if "max_sequence_length" in names else ""
    return RuntimeError(
        f"nasa_diffusers: this call encodes text with {now}, the negative prompt was encoded with "
        f"{then}, and it cannot be encoded again: {why}. Call with {then}, {length}or give "
        "handle.set_negative_prompt the negative_prompt_embeds"
    )


def _check_length(pipe: Any, family: Family, max_sequence_length: Any) -> int | None:
    if max_sequence_length is None:
        return None
    length, least = scalar(max_sequence_length), family.least_tokens(pipe)
    if not is_int(length) or length < least:
        raise ValueError(
            f"enable_nasa: max_sequence_length must be a number of tokens, from {least}, got "
            f"{max_sequence_length!r}"
        )
    if not takes(pipe, "max_sequence_length", family.encodes_without):
        raise ValueError(
            "enable_nasa: max_sequence_length is fixed by the text encoder of "
            f"{type(pipe).__name__}; leave it out"
        )
    return length


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
            "enable_nasa: the negative prompt is empty, so there is nothing to guide away from; "
            "give a prompt, or set alpha to 0 to switch NASA off"
        )
    if not all(are_pairs):
        return ((tuple(items), 1.0),), False
    pairs = [(prompt, scalar(weight)) for prompt, weight in pairs]
    for _, weight in pairs:
        if not is_real(weight) or not math.isfinite(weight) or weight == 0:
            raise ValueError(
                "enable_nasa: the alpha of a negative prompt must be a finite number other than "
                f"0, got {weight!r}; leave out a prompt that is not wanted"
            )
    return tuple(((prompt,), float(weight)) for prompt, weight in pairs), True


@torch.no_grad()
def _encode(
    pipe: Any,
    family: Family,
    prompts: Terms,
    options: Mapping[str, Any],
    drops_padding: bool,
    length_is_named: bool,
) -> Encoding:
    terms = []
    for names, weight in prompts:
        if drops_padding:
            embeds, mask = family.encode_unpadded(pipe, list(names), length_is_named, **options)
        else:
            embeds, mask = family.encode(pipe, list(names), **options)
        mask = None if mask is None else mask.bool()
        _check_embeds(embeds, mask)
        limits = family.token_limits(pipe, embeds.shape[1], **options)
        dropped = dropped_tokens(pipe, limits, names, **options)
        terms.append(Encoded(" | ".join(names), weight, *_trim(embeds, mask), dropped))
    return Encoding(tuple(terms), dict(options), Encoders(pipe))


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
