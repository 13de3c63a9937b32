"""What a method is: how a negative prompt acts on the attention to a positive one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from nasa_diffusers.alpha import Alpha
from nasa_diffusers.prompts import KeysValues, Signed
from nasa_diffusers.scalars import is_real, scalar
from nasa_diffusers.streams import Streams

# a number, one per image, a map over the image, or a PIL mask
Strength = float | Sequence[float] | Tensor | Any


class FamilyDefaults(Protocol):
    """What a method asks the family of the model."""

    name: str
    rules: tuple[str, ...]  # of NASA, the default first
    is_joint: bool  # text and image share one attention

    def default_alpha(self, denoiser: Any) -> float: ...
    def default_nag(self, denoiser: Any) -> tuple[float, float, float]: ...


class Method:
    """One way to guide by a negative prompt. A subclass is a frozen dataclass of its settings,
    of which `alpha` is the strength: at 0 the stock code runs. `None` stands for a default.
    """

    # as messages and reports call it
    name: ClassVar[str]
    # whether its cross-attention can add an image's attention in the same call of the op
    adds_images: ClassVar[bool] = True
    # in one softmax over all prompts padding would take weight
    drops_padding: ClassVar[bool] = False
    alpha: Strength | None

    def __post_init__(self) -> None:
        if self.alpha is not None:
            Alpha.parse(self.alpha, 1.0, self.name)

    def filled_in(self, family: FamilyDefaults, denoiser: Any) -> Method:
        """With the family's defaults for every setting but alpha."""
        return self

    def default_alpha(
        self, family: FamilyDefaults, denoiser: Any, has_own_alphas: bool = False
    ) -> float:
        """Negative prompts with alphas of their own need no other."""
        return 1.0 if has_own_alphas else family.default_alpha(denoiser)

    def check(self, family: FamilyDefaults, alpha: Alpha, has_own_alphas: bool) -> None:
        """Raise if it cannot act in this family with such an alpha, or on such prompts."""

    def check_references(self) -> None:
        """Raise if it cannot leave out reference images beside the image that is made."""

    def cross(
        self,
        q: Tensor,  # [b, l, h, d]
        pos: KeysValues,
        negatives: Sequence[Signed],
        backend: str | None,
        image: KeysValues | None = None,
    ) -> Tensor:
        """Guided cross-attention to the text, `[b, l, h, d]`, plus the attention to `image`."""
        raise NotImplementedError(f"{self.name}: it has no cross-attention; write its `cross`")

    def joint(self, streams: Streams) -> Tensor:
        """Guided attention of a block over text and image, `[b, l + n, h, d]`."""
        raise NotImplementedError(f"{self.name}: it has no joint attention; write its `joint`")

    def attends_image_twice(self, streams: Streams) -> bool:
        """Whether joint attention visits the image keys once for each prompt."""
        return False

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(_equal(getattr(self, f.name), getattr(other, f.name)) for f in _fields(self))

    # alpha may be a tensor or a list
    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        return self.name

    def _set(self, name: str, value: Any) -> None:
        """A field of a frozen dataclass, while it is made."""
        object.__setattr__(self, name, value)

    def _number(self, name: str) -> Any:
        """The field as a finite number of Python's; None stays."""
        given = getattr(self, name)
        value = scalar(given)
        if value is not None and not (is_real(value) and math.isfinite(value)):
            raise ValueError(f"{self.name}: {name} must be a finite number, got {given!r}")
        self._set(name, value)
        return value


def with_alpha(method: Method, alpha: Strength | None) -> Method:
    """The same method with another strength."""
    return replace(method, alpha=alpha)  # type: ignore[type-var]


def _fields(method: Method) -> tuple:
    return fields(method)  # type: ignore[arg-type]


def _equal(mine: Any, other: Any) -> bool:
    if isinstance(mine, Tensor) or isinstance(other, Tensor):
        are_tensors = isinstance(mine, Tensor) and isinstance(other, Tensor)
        return are_tensors and mine.shape == other.shape and torch.equal(mine, other)
    return bool(mine == other)
