"""What travels through the denoiser in place of `encoder_hidden_states`.

A guided forward pass replaces the text by one `GuidedText` object, and every text cross-attention
layer takes it apart again. So the negative prompt, its alpha and its mask are arguments of each
block: a block that gradient checkpointing runs a second time sees what it saw the first time,
and two threads, or two pipelines that share a denoiser, never share a setting.

Names: b batch, l image queries, n text tokens, c channels, r rows of a prompt (b, or 1 for all).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from nasa_diffusers.cache import Prompts, TextCache
from nasa_diffusers.methods import Method
from nasa_diffusers.prompts import KeysValues, Term
from nasa_diffusers.weights import Fingerprint


@dataclass(frozen=True, eq=False)
class Prepared:
    """What a compiled denoiser is handed instead of projecting text: inputs of its graph, so that
    another prompt is other data."""

    text: Tensor  # the positive one, after the text projections before the blocks
    keys_values: dict[str, list[KeysValues]]  # by the name of the layer


@dataclass(frozen=True, eq=False)
class Images:
    """The image prompts of an IP-Adapter, as the pipeline gave them."""

    prompts: Prompts
    made_by: Fingerprint  # the projection before the blocks
    cache: TextCache


@dataclass(frozen=True, eq=False)
class GuidedText:
    """The positive text and the negative ones, on their way to the cross-attention layers."""

    text: Tensor  # [b, n_pos, c]
    terms: tuple[Term, ...]
    method: Method  # its alpha is in the terms
    backend: str | None
    prompts: Prompts | None  # where their keys and values are kept; None: nowhere
    made_by: Fingerprint | None = None  # the text projections passed so far
    prepared: Prepared | None = None
    images: Images | None = None  # image prompts whose keys and values may be kept
    # [b, n, c]: image tokens that layers attend to besides the text, and which are not guided
    beside: Tensor | None = None
    # the layers that this call of the denoiser has come to
    reached: set[str] = field(default_factory=set)

    @property
    def is_cached(self) -> bool:
        """Whether projections may be kept: no gradient is recorded, and this is not a trace."""
        return self.prompts is not None and not torch.compiler.is_compiling()

    @property
    def texts(self) -> list[Tensor]:
        return [self.text, *(term.text for term in self.terms)]

    def projected(self, texts: Sequence[Tensor], made_by: Fingerprint | None) -> GuidedText:
        """The same prompts after one of the model's own text projections."""
        text, *negatives = texts
        terms = tuple(replace(t, text=x) for t, x in zip(self.terms, negatives, strict=True))
        return replace(self, text=text, terms=terms, made_by=made_by)

    def as_prepared(self) -> GuidedText:
        """After one of the text projections, whose work `prepared` already holds."""
        assert self.prepared is not None
        return replace(self, text=self.prepared.text)

    @property
    def shape(self) -> torch.Size:
        """Of the positive text, whose rows and channels all prompts share."""
        return self.text.shape

    def view(self, *shape: int) -> GuidedText:
        """PixArt and Sana fold the projected text to `[b, n, c]`, which it already is."""
        return replace(self, text=self.text.view(*shape))

    def chunk(self, chunks: int, dim: int = 0) -> tuple[GuidedText, ...]:
        """Parts of the batch: FasterCache leaves the unconditional rows out of some calls."""
        assert dim == 0
        rows = self.text.shape[0]

        def parts(x: Tensor | None) -> Sequence[Tensor | None]:
            return x.chunk(chunks) if x is not None and x.shape[0] == rows else [x] * chunks

        def part_of(term: Term) -> list[Term]:
            columns = (parts(term.text), parts(term.mask), term.alpha.parts(rows, chunks))
            return [Term(*each) for each in zip(*columns, strict=True)]  # type: ignore[arg-type]

        terms = zip(*map(part_of, self.terms), strict=True)
        # what is kept of a text, or made of it, is kept and made of all its rows
        alone = replace(self, prompts=None, prepared=None, images=None)
        columns = (self.text.chunk(chunks), terms, parts(self.beside))
        return tuple(
            replace(alone, text=text, terms=terms, beside=beside)
            for text, terms, beside in zip(*columns, strict=True)
        )

    def repeat_interleave(self, times: int, dim: int = 0, **_: Any) -> GuidedText:
        """Each row so many times: Latte makes rows of its frames."""
        assert dim == 0
        rows = self.text.shape[0]

        def each(x: Any) -> Any:
            is_shared = x is None or x.shape[0] == 1 or x.shape[0] != rows
            return x if is_shared else x.repeat_interleave(times, dim=0)

        text = self.text.repeat_interleave(times, dim=0)
        if self.prepared is not None:
            keys_values = {
                name: [KeysValues(*map(each, prompt)) for prompt in prompts]
                for name, prompts in self.prepared.keys_values.items()
            }
            # their texts are not looked at any more, so that they may have any length
            terms = tuple(Term(text[:, :0], None, t.alpha.repeated(times)) for t in self.terms)
            return replace(self, text=text, terms=terms, prepared=Prepared(text, keys_values))
        terms = tuple(Term(each(t.text), each(t.mask), t.alpha.repeated(times)) for t in self.terms)
        prompts = self.prompts
        if prompts is not None and not all(prompts.are_uniform):
            # what is kept has a row for each of the rows before
            prompts = None
        return replace(self, text=text, terms=terms, prompts=prompts)

    def to(self, *args, **kwargs) -> GuidedText:
        """Follows a model that offloading or sharding keeps on another device than its caller."""
        terms = tuple(
            Term(
                term.text.to(*args, **kwargs),
                None if term.mask is None else term.mask.to(*args, **kwargs),
                term.alpha.to(*args, **kwargs),
            )
            for term in self.terms
        )
        beside = None if self.beside is None else self.beside.to(*args, **kwargs)
        return replace(self, text=self.text.to(*args, **kwargs), terms=terms, beside=beside)

    # Blocks of these families leave the text as it is. A cache around several blocks keeps what
    # they add to the text, which is 0 here, and adds it in a later step.

    def contiguous(self) -> GuidedText:
        return self

    def __sub__(self, other: Any) -> Tensor:
        return self.text.new_zeros(()) if other is self else NotImplemented

    def __radd__(self, difference: Any) -> GuidedText:
        return self if isinstance(difference, Tensor) else NotImplemented

    def __getattr__(self, name: str):
        raise AttributeError(_not_prepared(repr(name)))

    @classmethod
    def __torch_function__(cls, function: Any, _: Any, args: tuple = (), *__: Any) -> Any:
        """An operator of PyTorch was given the guided text in place of a tensor."""
        if function is Tensor.add and isinstance(args[-1], cls):
            return args[-1].__radd__(args[0])
        raise AttributeError(_not_prepared(getattr(function, "__name__", repr(function))))


def _not_prepared(what: str) -> str:
    return (
        f"nasa_diffusers: a module asked the guided text for {what}, so it is not one that "
        "enable_nasa prepared: its forward was replaced, or it was added later. Call "
        "disable_nasa(pipe), make that change, then call enable_nasa again."
    )
