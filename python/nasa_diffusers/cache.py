"""Keys and values of the text, projected once and kept until something they depend on changes.

A prompt is recognised by its values, so the same prompt encoded again is the same prompt. A
kept projection is used again only if every module, weight version, dtype, adapter, adapter
scale and merge that made it is still the same, and only where no gradient is recorded.

The one change PyTorch does not count is a write through `.data`, such as an EMA copied into the
weights in the middle of a run: call `handle.clear_cache()` after it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

DEFAULT_LIMIT = 512 << 20
MAX_OLDER_PROMPTS = 8


class Prompt:
    """One text, `[r, n, c]`, and what each layer made of it."""

    def __init__(self, text: Tensor):
        self.text = text
        self.version = _version(text)
        # in inference mode PyTorch does not count writes: the values themselves are the record
        self.copy = text.clone() if text.is_inference() else None
        # every row the same, as for several images of one prompt: one row serves them all
        self.is_uniform = not text.is_meta and bool((text == text[:1]).all())
        self.entries: dict[int, Entry] = {}
        self.nbytes = text.numel() * text.element_size()

    def is_unchanged(self) -> bool:
        if self.copy is not None:
            return torch.equal(self.copy, self.text)
        return self.version == _version(self.text)

    def has_values(self, text: Tensor) -> bool:
        """True when `text` equals what this prompt was projected from, bit for bit."""
        mine = self.text
        same_kind = (mine.shape, mine.dtype, mine.device) == (text.shape, text.dtype, text.device)
        return same_kind and not text.is_meta and self.is_unchanged() and torch.equal(text, mine)


@dataclass(frozen=True)
class Entry:
    made_by: Fingerprint
    tensors: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.tensors)


class Fingerprint:
    """Everything a projection's result depends on besides its input, cheap to compare."""

    key: tuple
    alive: list[weakref.ref]  # an id says nothing once its object is gone
    is_random: bool  # a dropout is active: nothing it makes may be kept

    def __init__(self, modules: Iterable[nn.Module | None], earlier: Fingerprint | None = None):
        key = [] if earlier is None else list(earlier.key)
        self.alive = [] if earlier is None else list(earlier.alive)
        self.is_random = earlier is not None and earlier.is_random
        for root in modules:
            for module in root.modules() if root is not None else ():
                key.append(id(module))
                self.alive.append(weakref.ref(module))
                for tensor in (*module._parameters.values(), *module._buffers.values()):
                    if tensor is None:
                        continue
                    # an offloaded weight rests on meta and is another object after each use
                    is_meta = tensor.is_meta
                    key += (_version(tensor), tensor.dtype, 0 if is_meta else id(tensor))
                    if not is_meta:
                        self.alive.append(weakref.ref(tensor))
                if hasattr(module, "merged_adapters"):
                    key.append(_adapters(module))
                elif isinstance(module, nn.Dropout) and module.training and module.p > 0:
                    self.is_random = True
        self.key = tuple(key)

    def matches(self, other: Fingerprint) -> bool:
        return self.key == other.key and all(ref() is not None for ref in self.alive)


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
        self._prompts: list[Prompt] = []
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes held now, over all prompts and layers."""
        return sum(prompt.nbytes for prompt in tuple(self._prompts))

    def clear(self) -> None:
        with self._lock:
            self._prompts = []

    def recognise(self, texts: list[Tensor]) -> list[Prompt]:
        """The prompts of one denoiser call, known ones where the values are known."""
        with self._lock:
            found = [self._find(text) or Prompt(text) for text in texts]
            older = [prompt for prompt in self._prompts if prompt not in found]
            self._prompts = [*older[-MAX_OLDER_PROMPTS:], *found]
            return found

    def _find(self, text: Tensor) -> Prompt | None:
        for prompt in self._prompts:
            # the object of the last step: its values need no comparison
            if prompt.text is text and prompt.is_unchanged():
                return prompt
        for prompt in reversed(self._prompts):
            if prompt.has_values(text):
                return prompt
        return None

    def through(
        self,
        owner: nn.Module,
        made_by: Fingerprint,
        prompts: Sequence[Prompt | None],
        texts: list[Tensor],
        project: Callable[[list[Tensor]], list[tuple[Tensor, ...]]],
    ) -> list[tuple[Tensor, ...]]:
        """What `owner` makes of each prompt: kept, or projected now, all of them at once."""
        known = [prompt for prompt in prompts if prompt is not None]
        if made_by.is_random or len(known) < len(texts):
            return project(texts)
        kept: dict[int, tuple[Tensor, ...]] = {}
        for i, prompt in enumerate(known):
            entry = prompt.entries.get(id(owner))
            if entry is not None and entry.made_by.matches(made_by):
                kept[i] = entry.tensors
        missing = [i for i in range(len(texts)) if i not in kept]
        for i, made in zip(missing, project([texts[i] for i in missing]), strict=True):
            kept[i] = made
            self._put(known[i], owner, Entry(made_by, made))
        return [kept[i] for i in range(len(texts))]

    def _put(self, prompt: Prompt, owner: nn.Module, entry: Entry) -> None:
        """Keep `entry` if it fits, at the price of prompts used less recently."""
        with self._lock:
            replaced = prompt.entries.pop(id(owner), None)
            prompt.nbytes += entry.nbytes - (replaced.nbytes if replaced else 0)
            while self.nbytes > self.limit and self._prompts and self._prompts[0] is not prompt:
                self._prompts.pop(0)
            if self.nbytes > self.limit:
                prompt.nbytes -= entry.nbytes
            else:
                prompt.entries[id(owner)] = entry
