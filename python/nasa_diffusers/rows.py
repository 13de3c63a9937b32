"""Which rows of a denoiser call carry the prompt: those that are known to, and no others.

The text of each row is compared, by value, with the texts that the running pipeline holds. Where
the values do not say, because the prompt and a negative prompt are the same text, or because a
callback has rewritten them, the order in which diffusers' own pipelines put their branches says
it. What neither says is an error that tells how to say it.

A text is compared once, when it is new: by object and count of writes it is known again.

Names: b rows of the call, R rows of what the pipeline holds as its prompt, n tokens, c channels.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nasa_diffusers.caller import Caller, Texts, modular_caller
from nasa_diffusers.layouts import WITHOUT_PROMPT, Layout, layout_of
from nasa_diffusers.weights import version

# what `enable_nasa(cfg=...)` takes
Cfg = bool | tuple[bool, ...] | None
OTHER = -1
MAX_KNOWN = 8

HOW_TO_SAY = (
    "say which rows carry the prompt with enable_nasa(..., cfg=...) or handle.cfg: True, the "
    "second half; False, all of them; or one bool per row"
)


class Rows(NamedTuple):
    """For each row of a call the image whose prompt it carries, or -1; images are prompt-major."""

    image: tuple[int, ...]
    images: int
    prompts: int | None

    @property
    def guided(self) -> tuple[bool, ...]:
        return tuple(image != OTHER for image in self.image)

    @property
    def are_all(self) -> bool:
        return OTHER not in self.image

    def spread(self, x: Tensor, what: str) -> Tensor:
        """One row per prompt as one per row of the call: `[m, ...]` to `[1, ...]` or `[b, ...]`.

        Rows that do not carry the prompt get something: their alpha is 0.
        """
        m = x.shape[0]
        if m == 1:
            return x
        if m not in (self.prompts, self.images) or self.images % m != 0:
            prompts = self.images if self.prompts is None else self.prompts
            raise ValueError(
                f"nasa_diffusers: there is one {what} per image, {m} in all, but the call has "
                f"{prompts} prompts and {self.images} images; give one for all, or as many as "
                "there are prompts"
            )
        per_prompt = self.images // m
        index = [max(image, 0) // per_prompt for image in self.image]
        return x[torch.tensor(index, device=x.device)]


def read_cfg(cfg: bool | Sequence[bool] | None) -> Cfg:
    """The `cfg` of `enable_nasa`, checked."""
    if cfg is None or isinstance(cfg, bool):
        return cfg
    rows = cfg.tolist() if isinstance(cfg, Tensor) else cfg
    if not isinstance(rows, Sequence) or not rows or not all(type(on) is bool for on in rows):
        raise ValueError(
            "enable_nasa: cfg must be True (the second half of the rows carries the prompt), False "
            f"(all rows do), None (ask the pipeline) or one bool per row, got {cfg!r}"
        )
    return tuple(rows)


class UnknownRows(RuntimeError):
    """Nothing says which rows of a call carry the prompt."""


class RowFinder:
    """Finds the rows of each call of one denoiser, and remembers the latest ones."""

    def __init__(self, is_doubled: bool) -> None:
        # pipelines of this family put the branches of a step into one batch
        self.is_doubled = is_doubled
        self.known: tuple[Known, ...] = ()

    def __call__(self, text: Tensor, sample: Tensor, caller: Caller | None, cfg: Cfg) -> Rows:
        rows = sample.shape[0]
        if caller is None:
            if cfg is None:
                self._refuse_doubled(text, sample)
            return as_said(cfg or False, rows, None)
        if isinstance(cfg, tuple):
            return as_said(cfg, rows, caller.prompts)
        texts, layout = caller.texts, layout_of(caller, self.is_doubled)
        key = (caller.name, layout, caller.prompts, caller.images_per_prompt, caller.uses_cfg)
        tensors = [text, *([] if texts.prompt is None else [texts.prompt]), *texts.others]
        known = self._recall(key, tensors)
        if known is None:
            try:
                known = find_rows(text, texts, caller, layout)
            except UnknownRows:
                if cfg is None:
                    raise
                known = as_said(cfg, rows, caller.prompts)
            self._remember(key, tensors, known)
        check_said(known, cfg, caller)
        return known

    def _refuse_doubled(self, text: Tensor, sample: Tensor) -> None:
        """In a loop of one's own: an error for what may be a batch `[unconditional | prompt]`, and
        for blocks of a modular pipeline, which may call for each of them."""
        name = modular_caller()
        if name is not None:
            raise UnknownRows(
                f"nasa_diffusers: a block of {name} calls the denoiser and does not say whether "
                f"the rows carry the prompt; {HOW_TO_SAY}"
            )
        if sample.shape[0] % 2 == 1 or self._recall((), [text]) is not None:
            return
        if sample.is_meta or torch.equal(*sample.chunk(2)):
            raise UnknownRows(
                "nasa_diffusers: both halves of the batch have the same latents, so this may be "
                "classifier-free guidance, and no pipeline in the call stack says; pass cfg=True "
                "(the first half is unconditional), cfg=False, or one bool per row to enable_nasa"
            )
        self._remember((), [text], Rows((), 0, None))

    def _recall(self, key: tuple, tensors: list[Tensor]) -> Rows | None:
        return next((each.rows for each in self.known if each.is_of(key, tensors)), None)

    def _remember(self, key: tuple, tensors: list[Tensor], rows: Rows) -> None:
        if not any(x.is_inference() for x in tensors):
            # replaced as a whole: other threads may read it
            self.known = (Known(key, tensors, rows), *self.known[: MAX_KNOWN - 1])


class Known:
    """Texts that were compared once, and what was found."""

    def __init__(self, key: tuple, tensors: list[Tensor], rows: Rows):
        self.key, self.rows = key, rows
        self.tensors = [(weakref.ref(x), version(x)) for x in tensors]

    def is_of(self, key: tuple, tensors: list[Tensor]) -> bool:
        return (
            self.key == key
            and len(tensors) == len(self.tensors)
            and all(
                mine() is x and not x.is_inference() and version(x) == seen
                for (mine, seen), x in zip(self.tensors, tensors, strict=True)
            )
        )


def as_said(cfg: bool | tuple[bool, ...], rows: int, prompts: int | None) -> Rows:
    """The rows that the user names."""
    if isinstance(cfg, tuple):
        if len(cfg) != rows:
            raise ValueError(
                f"nasa_diffusers: cfg has {len(cfg)} bools, one per row, but the batch has {rows} "
                "rows; give as many, or set handle.cfg before each call"
            )
        guided: Sequence[bool] = cfg
    elif not cfg:
        guided = [True] * rows
    elif rows % 2 == 1:
        raise RuntimeError(
            f"nasa_diffusers: with classifier-free guidance the batch must be even, it has {rows} "
            "rows; pass cfg=False to enable_nasa if it is not doubled"
        )
    else:
        guided = [i >= rows // 2 for i in range(rows)]
    images = sum(guided)
    order = iter(range(images))
    return Rows(tuple(next(order) if is_on else OTHER for is_on in guided), images, prompts)


def check_said(known: Rows, cfg: Cfg, caller: Caller) -> None:
    """Raise if the user says something else than what is known."""
    rows = len(known.image)
    if cfg is not None and known.guided != as_said(cfg, rows, None).guided:
        raise RuntimeError(
            f"nasa_diffusers: cfg={cfg} says that {_which(as_said(cfg, rows, None))} of the "
            f"{rows} rows carry the prompt, but in this call of {caller.name} their texts say "
            f"that {_which(known)} do; leave cfg out, or give one bool per row"
        )


def _which(rows: Rows) -> str:
    numbers = [str(i) for i, is_on in enumerate(rows.guided) if is_on]
    return f"numbers {', '.join(numbers)}" if numbers else "none"


# ---- values --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """The rows of the tensor that holds the pipeline's prompt: an image for each, or -1."""

    image: list[int]  # [R]
    images: int


def find_rows(text: Tensor, texts: Texts, caller: Caller, layout: Layout | None) -> Rows:
    """The rows of `text` that carry the prompt of the pipeline that runs."""
    if caller.is_a(WITHOUT_PROMPT):
        raise UnknownRows(
            f"nasa_diffusers: {caller.name} calls its denoiser with an unconditional text and with "
            "edits; no row carries a prompt of the image. Call disable_nasa(pipe)"
        )
    if texts.prompt is None:
        raise _unknown(text, caller, "it holds its prompt under no name that is known")
    held = _held(texts.prompt, texts.others, caller, layout)
    image = _images(text, texts, held, caller, layout)
    return Rows(tuple(image), held.images, caller.prompts)


def _held(prompt: Tensor, others: list[Tensor], caller: Caller, layout: Layout | None) -> Held:
    """Which rows of the pipeline's `prompt_embeds` are the prompt's, and which of other branches
    that it has put beside them."""
    size, branches = prompt.shape[0], len(layout or ())
    alone = Held(list(range(size)), size)
    images = None if caller.prompts is None else caller.prompts * caller.images_per_prompt
    if caller.perturbs_attention and layout is not None and size == images:
        raise UnknownRows(
            f"nasa_diffusers: {caller.name} says that it batches more than [unconditional | "
            f"conditional] rows, for perturbed attention guidance, and they are not there; "
            f"{HOW_TO_SAY}"
        )
    if branches == 1 or caller.uses_cfg is False and branches == 0:
        return alone
    if branches and size == images:
        # other branches are held elsewhere
        return alone
    is_other = [any(row) for row in equal_rows(prompt, others)]
    count = sum(is_other)
    if layout is not None and size % branches == 0:
        n = size // branches
        expected = [i % n if layout[i // n] else OTHER for i in range(size)]
        if count != expected.count(OTHER):
            # the same text in several branches, or a text that a callback has put there
            return Held(expected, n)
        return _in_order(is_other, n)
    if count == 0 and (images == size or images is None and others):
        return alone
    if count == size == images:
        return alone
    if 0 < count < size:
        found = [i for i in range(size) if not is_other[i]]
        n = len(found) if images is None else images
        first = prompt[found[:n]]
        if len(found) % n == 0 and torch.equal(prompt[found], first.repeat(len(found) // n, 1, 1)):
            return _in_order(is_other, n)
    why = "the text of its prompt is not told from its other texts"
    raise _unknown(prompt, caller, why)


def _in_order(is_other: list[bool], images: int) -> Held:
    count, image = 0, []
    for row_is_other in is_other:
        image.append(OTHER if row_is_other else count % images)
        count += not row_is_other
    return Held(image, images)


def _images(
    text: Tensor, texts: Texts, held: Held, caller: Caller, layout: Layout | None
) -> list[int]:
    """For each row of `text` an image, or -1."""
    prompt, rows = texts.prompt, text.shape[0]
    assert prompt is not None
    if text is prompt:
        return held.image
    for other in texts.others:
        if text is other or _lies_in(text, other) is not None:
            return [OTHER] * rows
    begin = _lies_in(text, prompt)
    if begin is not None:
        return held.image[begin : begin + rows]
    size = len(held.image)
    if text.is_meta:
        if rows == size:
            return held.image
        raise _unknown(text, caller, "tensors without values cannot be compared")

    # [rows, R] and [rows]
    is_held = equal_rows(text, [prompt])
    is_other = [any(row) for row in equal_rows(text, texts.others)]
    if caller.uses_cfg is False:
        is_other = [other and not any(row) for other, row in zip(is_other, is_held, strict=True)]
    is_clear = OTHER in held.image or not all(is_other)
    # the pipeline's own tensor, several times over: the order in which MultiDiffusion does it
    if is_clear and rows % size == 0 and all(is_held[i][i % size] for i in range(rows)):
        return held.image * (rows // size)
    image, count = [], 0
    for i in range(rows):
        candidates = {held.image[j] for j in range(size) if is_held[i][j]}
        candidates |= {OTHER} if is_other[i] else set()
        if not candidates:
            raise _unknown(text, caller, f"the text of row {i} is none that it holds")
        if OTHER in candidates and len(candidates) > 1:
            return _by_layout(text, held, caller, layout)
        if OTHER not in candidates:
            turn = count % held.images
            image.append(turn if turn in candidates else min(candidates))
            count += 1
        else:
            image.append(OTHER)
    return image


def _by_layout(text: Tensor, held: Held, caller: Caller, layout: Layout | None) -> list[int]:
    """Where the prompt and another text are equal: the known order of the branches."""
    n = held.images
    if layout is None or text.shape[0] != n * len(layout) or len(layout) == 1:
        raise _unknown(text, caller, "its prompt and another of its texts are equal")
    return [i % n if layout[i // n] else OTHER for i in range(text.shape[0])]


def _unknown(text: Tensor, caller: Caller, why: str) -> UnknownRows:
    return UnknownRows(
        f"nasa_diffusers: which rows of this call carry the prompt is not known: {caller.name} "
        f"calls the denoiser with {text.shape[0]} rows, and {why}; {HOW_TO_SAY}"
    )


def _lies_in(part: Tensor, whole: Tensor) -> int | None:
    """The row of `whole` at which `part` begins, where it is a slice of the same memory."""
    if part.is_meta or whole.is_meta or part.dtype != whole.dtype:
        return None
    if part.shape[1:] != whole.shape[1:] or part.stride() != whole.stride():
        return None
    if part.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
        return None
    offset = int(part.storage_offset()) - int(whole.storage_offset())
    begin, rest = divmod(offset, part.stride(0) or 1)
    fits = rest == 0 <= begin and begin + part.shape[0] <= whole.shape[0] and part.stride(0) > 0
    return begin if fits else None


@torch.no_grad()
def equal_rows(text: Tensor, others: Sequence[Tensor]) -> list[list[bool]]:
    """For each row of `text` and each row of all `others` whether they hold the same values."""
    rows = []
    for other in others:
        if text.is_meta or other.is_meta or other.shape[1:] != text.shape[1:]:
            continue
        # a pipeline may have cast one of them
        for row in other.to(text.device, text.dtype):
            rows.append((text == row).flatten(1).all(1))
    if not rows:
        return [[] for _ in range(text.shape[0])]
    # one synchronisation
    return torch.stack(rows, dim=1).tolist()
