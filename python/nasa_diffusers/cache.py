"""Keys and values of the text, projected once and kept until something they depend on changes.

A prompt is recognised by its values, so the same prompt encoded again is the same prompt. A
kept projection is used again only if every module, weight version, dtype, adapter, adapter
scale and merge that made it is still the same, and only where no gradient is recorded.

The one change PyTorch does not count is a write through `.data`, such as an EMA copied into the
weights in the middle of a run: call `handle.clear_cache()` after it.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

DEFAULT_LIMIT = 512 << 20
MAX_OLDER_CALLS = 4
# of a text [r, n, c]: how many of its first tokens there are before the last one only repeats
Count = Callable[[Tensor], int]


class Prompts:
    """The texts of one denoiser call, the positive one first, and what each module made of them.

    They are kept together because they are projected together: what a call computes then depends
    on its own prompts, and not on which prompts were seen before.
    """

    def __init__(self, texts: Sequence[Tensor], counts: Sequence[Count] = ()):
        self.texts = tuple(texts)
        self.counts = tuple(counts)
        self.versions = [_version(text) for text in texts]
        # in inference mode PyTorch does not count writes: the values themselves are the record
        self.copies = [text.clone() if text.is_inference() else None for text in texts]
        # every row the same, as for several images of one prompt: one row serves them all
        self.are_uniform = [not text.is_meta and bool((text == text[:1]).all()) for text in texts]
        self.folded = [
            _fold(count(text), text.shape[1], text.device)
            for text, count in zip(texts, counts, strict=False)
        ] or [None] * len(self.texts)
        self.entries: dict[int, Entry] = {}
        self.nbytes = sum(text.numel() * text.element_size() for text in texts)

    def are_unchanged(self) -> bool:
        return all(
            _version(text) == version if copy is None else torch.equal(text, copy)
            for text, version, copy in zip(self.texts, self.versions, self.copies, strict=True)
        )

    def are(self, texts: Sequence[Tensor], counts: Sequence[Count]) -> bool:
        """True for the same objects, unchanged: no value is compared."""
        same = (
            self.counts == tuple(counts)
            and len(texts) == len(self.texts)
            and all(mine is text for mine, text in zip(self.texts, texts, strict=True))
        )
        return same and self.are_unchanged()

    def equal(self, texts: Sequence[Tensor], counts: Sequence[Count]) -> bool:
        """True for the same values, bit for bit."""
        return (
            self.counts == tuple(counts)
            and len(texts) == len(self.texts)
            and all(map(_equal, self.texts, texts))
            and self.are_unchanged()
        )


def all_tokens(text: Tensor) -> int:
    return text.shape[1]


def distinct_tokens(text: Tensor) -> int:
    """Tokens up to and with the first of those at the end that are bit for bit the last one, in
    every row: zero-padding to 512 tokens is one such run."""
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


def _equal(mine: Tensor, text: Tensor) -> bool:
    if mine is text:
        return True
    same_kind = (mine.shape, mine.dtype, mine.device) == (text.shape, text.dtype, text.device)
    return same_kind and not text.is_meta and torch.equal(mine, text)


@dataclass(frozen=True)
class Entry:
    made_by: Fingerprint
    made: list[tuple[Tensor, ...]]  # one tuple per text

    @property
    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for made in self.made for x in made)


class Fingerprint:
    """Everything a projection's result depends on besides its input, cheap to compare."""

    key: tuple
    alive: list[weakref.ref]  # an id says nothing once its object is gone
    is_complete: bool  # False: a dropout draws, or a weight's writes are not counted

    def __init__(self, modules: Iterable[nn.Module | None], earlier: Fingerprint | None = None):
        key = [_autocast_dtype()] if earlier is None else list(earlier.key)
        self.alive = [] if earlier is None else list(earlier.alive)
        self.is_complete = earlier is None or earlier.is_complete
        for root in modules:
            for module in root.modules() if root is not None else ():
                key.append(id(module))
                self.alive.append(weakref.ref(module))
                for tensor in (*module._parameters.values(), *module._buffers.values()):
                    if tensor is None:
                        continue
                    # an offloaded weight rests on meta and is another object after each use
                    is_meta = tensor.is_meta
                    self.is_complete &= not tensor.is_inference()
                    key += (_version(tensor), tensor.dtype, 0 if is_meta else id(tensor))
                    if not is_meta:
                        self.alive.append(weakref.ref(tensor))
                if hasattr(module, "merged_adapters"):
                    key.append(_adapters(module))
                elif isinstance(module, nn.Dropout) and module.training and module.p > 0:
                    self.is_complete = False
        self.key = tuple(key)

    def matches(self, other: Fingerprint) -> bool:
        return self.key == other.key and all(ref() is not None for ref in self.alive)


def _autocast_dtype() -> tuple:
    """Autocast to another dtype makes other keys of the same weights."""
    return tuple(
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        for device in ("cpu", "cuda")
    )


def _adapters(layer) -> tuple:
    """The state of a PEFT layer that its weights do not show."""
    return (
        tuple(layer.active_adapters),
        layer.disable_adapters,
        tuple(layer.merged_adapters),
        tuple(getattr(layer, "scaling", {}).items()),
    )


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


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

    def recognise(self, texts: Sequence[Tensor], counts: Sequence[Count] = ()) -> Prompts:
        """The prompts of a denoiser call: known ones where their values are known. `counts` say
        of each text how many leading tokens stand for all."""
        with self._lock:
            prompts = self._find(texts, counts) or Prompts(texts, counts)
            older = [other for other in self._calls if other is not prompts]
            # text has counts; image prompts, which have none, do not drive it out
            alike = [other for other in older if bool(other.counts) == bool(counts)]
            for other in alike[:-MAX_OLDER_CALLS]:
                older.remove(other)
            self._calls = [*older, prompts]
            return prompts

    def _find(self, texts: Sequence[Tensor], counts: Sequence[Count]) -> Prompts | None:
        # the objects of the last step first
        for same in (Prompts.are, Prompts.equal):
            for prompts in reversed(self._calls):
                if same(prompts, texts, counts):
                    return prompts
        return None

    def through(
        self,
        owner: nn.Module,
        made_by: Fingerprint,
        prompts: Prompts,
        project: Callable[[], list[tuple[Tensor, ...]]],
    ) -> list[tuple[Tensor, ...]]:
        """What `owner` makes of the prompts: kept from an earlier call, or projected now."""
        entry = prompts.entries.get(id(owner))
        if entry is not None and made_by.is_complete and entry.made_by.matches(made_by):
            return entry.made
        made = project()
        if made_by.is_complete:
            self._keep(prompts, owner, Entry(made_by, made))
        return made

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
