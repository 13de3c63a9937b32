"""Keys and values of the text, projected once and kept until something they depend on changes.

A prompt is recognised by its values, so the same prompt encoded again is the same prompt. What a
kept projection depends on besides is in `weights.py`.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nasa_diffusers.weights import Fingerprint, Record, version

DEFAULT_LIMIT = 512 << 20
MAX_OLDER_CALLS = 4
# of prompts whose keys and values change with the time: the steps of a distilled schedule
MAX_OLDER_TIMES = 16
# the length of a text [r, n, c] after equal padding at its end is folded into one token
FoldedLength = Callable[[Tensor], int]


class Prompts:
    """The texts of one denoiser call, the positive one first, and what each module made of them.

    They are kept together because they are projected together: what a call computes then depends
    on its own prompts, and not on which prompts were seen before.
    """

    def __init__(self, texts: Sequence[Tensor], folded_lengths: Sequence[FoldedLength] = ()):
        # the values: whoever has the tensors may write to them
        self.copies = [text.detach().clone() for text in texts]
        self.folded_lengths = tuple(folded_lengths)
        self._see(texts)
        # every row the same, as for several images of one prompt: one row serves them all
        self.are_uniform = [not text.is_meta and bool((text == text[:1]).all()) for text in texts]
        self.folded = [
            _fold(length(text), text.shape[1], text.device)
            for text, length in zip(texts, folded_lengths, strict=False)
        ] or [None] * len(self.copies)
        self.entries: dict[int, Entry] = {}
        self.nbytes = sum(text.numel() * text.element_size() for text in self.copies)

    def _see(self, texts: Sequence[Tensor]) -> None:
        self.objects = [weakref.ref(text) for text in texts]
        self.versions = [version(text) for text in texts]

    def are(self, texts: Sequence[Tensor], folded_lengths: Sequence[FoldedLength]) -> bool:
        """True for the same objects, unchanged as far as PyTorch counts writes."""
        same = (
            self.folded_lengths == tuple(folded_lengths)
            and len(texts) == len(self.copies)
            and all(mine() is text for mine, text in zip(self.objects, texts, strict=True))
        )
        # in inference mode no write is counted, and only the values tell
        return same and all(
            torch.equal(copy, text) if text.is_inference() else version(text) == seen
            for text, seen, copy in zip(texts, self.versions, self.copies, strict=True)
        )

    def equal(self, texts: Sequence[Tensor], folded_lengths: Sequence[FoldedLength]) -> bool:
        """True for the same values."""
        if self.folded_lengths != tuple(folded_lengths) or len(texts) != len(self.copies):
            return False
        if any(text.is_meta for text in texts):
            return self.are(texts, folded_lengths)
        if not all(map(_equal, self.copies, texts)):
            return False
        self._see(texts)
        return True

    def forget_what_changed(self) -> None:
        """Drop what was made by weights that have other values now, in whatever way they got
        them."""
        entries = list(self.entries.values())
        if entries and not Record.hold(entry.made_by for entry in entries):
            self.nbytes -= sum(entry.nbytes for entry in entries)
            self.entries = {}


def all_tokens(text: Tensor) -> int:
    return text.shape[1]


def folded_length(text: Tensor) -> int:
    """The length of a text `[r, n, c]` after the tokens at its end that are equal, bit for bit and
    in every row, are folded into one. Zero-padding to 512 tokens is one such run."""
    if text.is_meta or text.shape[1] == 0:
        return text.shape[1]
    # [n]
    differs = (text != text[:, -1:]).any(2).any(0)
    last = differs.nonzero().flatten()[-1:]
    return 1 if last.numel() == 0 else int(last) + 2


@dataclass(frozen=True)
class Fold:
    """m equal keys at the end of a prompt weigh as much as one with a bias of log m, exactly."""

    length: int
    bias: Tensor  # [1, length] fp32


def _fold(length: int, tokens: int, device: torch.device) -> Fold | None:
    if length >= tokens:
        return None
    bias = torch.zeros(1, length, device=device)
    bias[:, -1] = math.log(tokens - length + 1)
    return Fold(length, bias)


def _equal(copy: Tensor, text: Tensor) -> bool:
    same_kind = (copy.shape, copy.dtype, copy.device) == (text.shape, text.dtype, text.device)
    return same_kind and torch.equal(copy, text)


@dataclass(frozen=True)
class Entry:
    made_by: Record
    made: list[tuple[Tensor, ...]]  # one tuple per text

    @property
    def nbytes(self) -> int:
        tensors = (x for made in self.made for x in made)
        return self.made_by.nbytes + sum(x.numel() * x.element_size() for x in tensors)


class TextCache:
    """The prompts one denoiser has seen lately, least recent first, within a limit of bytes."""

    def __init__(self, limit: int = DEFAULT_LIMIT):
        self.limit = limit
        self._calls: list[Prompts] = []
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes held now, over all prompts and layers."""
        return sum(prompts.nbytes for prompts in tuple(self._calls))

    def clear(self) -> None:
        with self._lock:
            self._calls = []

    def recognise(
        self,
        texts: Sequence[Tensor],
        folded_lengths: Sequence[FoldedLength] = (),
        *,
        afresh: bool = False,
        older_calls: int = MAX_OLDER_CALLS,
    ) -> Prompts:
        """The prompts of a denoiser call: known ones where their values are known.
        `folded_lengths` are for text, one for each; image prompts have none. `afresh` compares
        values even where the objects are those of the last call."""
        with self._lock:
            prompts = None if afresh else self._find(Prompts.are, texts, folded_lengths)
            if prompts is None:
                prompts = self._find(Prompts.equal, texts, folded_lengths) or Prompts(
                    texts, folded_lengths
                )
                prompts.forget_what_changed()
            older = [other for other in self._calls if other is not prompts]
            # of text and of image prompts so many each
            are_text = bool(folded_lengths)
            same_kind = [other for other in older if bool(other.folded_lengths) == are_text]
            for other in same_kind[:-older_calls]:
                older.remove(other)
            self._calls = [*older, prompts]
            return prompts

    def _find(
        self,
        same: Callable[[Prompts, Sequence[Tensor], Sequence[FoldedLength]], bool],
        texts: Sequence[Tensor],
        folded_lengths: Sequence[FoldedLength],
    ) -> Prompts | None:
        return next(
            (each for each in reversed(self._calls) if same(each, texts, folded_lengths)), None
        )

    def through(
        self,
        owner: nn.Module,
        modules: Iterable[nn.Module | None],
        earlier: Fingerprint | None,
        prompts: Prompts,
        project: Callable[[], list[tuple[Tensor, ...]]],
        scale: float = 1.0,
    ) -> tuple[list[tuple[Tensor, ...]], Fingerprint]:
        """What `owner` makes of the prompts with its `modules` and at its `scale`, kept from an
        earlier call or projected now, and the fingerprint of all that made it."""
        modules = list(modules)
        made_by = Fingerprint(modules, earlier, scale)
        entry = prompts.entries.get(id(owner))
        if entry is not None and entry.made_by.matches(made_by):
            return entry.made, made_by
        made = project()
        # as a projection leaves its weights: casting and offloading hooks move them to and fro
        made_by = Fingerprint(modules, earlier, scale)
        if made_by.is_complete:
            self._keep(prompts, owner, Entry(Record(made_by), made))
        return made, made_by

    def _keep(self, prompts: Prompts, owner: nn.Module, entry: Entry) -> None:
        """Keep `entry` if it fits, at the price of prompts used less recently."""
        with self._lock:
            replaced = prompts.entries.pop(id(owner), None)
            prompts.nbytes += entry.nbytes - (replaced.nbytes if replaced else 0)
            while self.nbytes > self.limit and self._calls and self._calls[0] is not prompts:
                self._calls.pop(0)
            if self.nbytes > self.limit:
                prompts.nbytes -= entry.nbytes
            else:
                prompts.entries[id(owner)] = entry
