"""Alpha: a number, one number per image, or a map over the image."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nasa_diffusers.scalars import is_real, scalar

# frames, height, width of the image tokens of a layer; l is their product
Grid = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Targets:
    """Which image tokens of a layer are the image that is made; the others are references."""

    are: Tensor  # [l] bool

    def place(self, values: Tensor) -> Tensor:
        """`[b, 1, 1]` for all tokens, `[b, l, 1]`: 0 for references."""
        return values * self.are[:, None]

    def to(self, *args, **kwargs) -> Targets:
        return Targets(self.are.to(*args, **kwargs))


@dataclass(frozen=True, eq=False)
class LayerAlpha:
    """Alpha of one denoiser call, for layers of any number of queries."""

    rows: Tensor  # [b, 1, 1] fp32; 0 for rows that are not guided
    region: Tensor | None = None  # [height, width] fp32, a factor over the image
    grids: tuple[Grid, ...] = ()
    resized: dict[int, Tensor] = field(default_factory=dict)
    guided: Tensor | None = None  # [b] bool, where alpha is not 0; None: the same for all rows
    targets: Targets | None = None  # None: all tokens
    padding: int = 0  # tokens that follow those of a grid, which the region leaves alone
    leading: int = 0  # and tokens before them

    @property
    def learns(self) -> bool:
        return any(x is not None and x.requires_grad for x in (self.rows, self.region))

    def at(self, queries: int) -> Tensor:
        """Alpha for a layer of `queries` image tokens, broadcastable to `[b, l, h]`."""
        if self.region is None and self.targets is None:
            return self.rows
        if torch.compiler.is_compiling():
            return self._place(queries)
        found = self.resized.get(queries)
        if found is None:
            found = self.resized[queries] = self._place(queries)
        return found

    def parts(self, rows: int, chunks: int) -> list[LayerAlpha]:
        """For parts of the batch of `rows`."""
        if self.rows.shape[0] != rows:
            return [self] * chunks
        guided = [None] * chunks if self.guided is None else self.guided.chunk(chunks)
        return [
            replace(self, rows=values, guided=which, resized={})
            for values, which in zip(self.rows.chunk(chunks), guided, strict=True)
        ]

    def repeated(self, times: int) -> LayerAlpha:
        """For a batch that has each row so many times, one after the other."""
        rows = self.rows.repeat_interleave(times, dim=0)
        guided = None if self.guided is None else self.guided.repeat_interleave(times, dim=0)
        return LayerAlpha(rows, self.region, self.grids, guided=guided, targets=self.targets)

    def to(self, *args, **kwargs) -> LayerAlpha:
        """The same alpha on another device."""
        region = None if self.region is None else self.region.to(*args, **kwargs)
        guided = None if self.guided is None else self.guided.to(*args, **kwargs)
        targets = None if self.targets is None else self.targets.to(*args, **kwargs)
        rows = self.rows.to(*args, **kwargs)
        return replace(self, rows=rows, region=region, guided=guided, targets=targets, resized={})

    def _place(self, queries: int) -> Tensor:
        if self.region is not None:
            return self._resize(self.region, queries)
        assert self.targets is not None
        # a layer of other queries, as those of the sound beside a video, has no references
        is_over = self.targets.are.shape[0] == queries
        return self.targets.place(self.rows) if is_over else self.rows

    def _resize(self, region: Tensor, queries: int) -> Tensor:
        for frames, height, width in self.grids:
            if self.leading + frames * height * width + self.padding == queries:
                # [1, 1, height, width]
                region = F.adaptive_avg_pool2d(region[None, None], (height, width))
                # [b, l, 1]: tokens are frame by frame, row by row
                values = self.rows * region.flatten(1).repeat(1, frames)[..., None]
                around = self.leading, self.padding
                return F.pad(values, (0, 0, *around)) if any(around) else values
        raise ValueError(
            f"nasa_diffusers: a layer has {queries} image tokens, which is none of the grids "
            f"(frames, height, width) {self.grids} of this call; use one alpha per image"
        )


@dataclass(frozen=True, eq=False)
class Alpha:
    """What the user asked for, checked: `values` per image, times `region` over the image."""

    given: float | Sequence[float] | Tensor  # as it was set, a mask as its map
    values: Tensor  # [m] fp32: m = 1 for all images
    region: Tensor | None = None  # [height, width] fp32

    @staticmethod
    def parse(alpha: Any, default: float, method: str) -> Alpha:
        """Read the `alpha` of a method. A PIL mask is white where `default` holds."""
        if hasattr(alpha, "convert"):
            alpha = _mask_values(alpha) * default
        if hasattr(alpha, "__array_interface__") and scalar(alpha) is alpha:
            alpha = torch.tensor(alpha)  # a NumPy array; its values, as whoever has it may write
        if not isinstance(alpha, Tensor) or (alpha.dim() == 0 and alpha.dtype == torch.bool):
            numbers = alpha if isinstance(alpha, Sequence) else [alpha]
            return Alpha(alpha, torch.tensor([_number(value, method) for value in numbers]))
        # the values as they are now; an alpha that learns is used as it is in each call
        values = alpha.float() if alpha.requires_grad else alpha.detach().float().clone()
        if values.dim() > 2 or values.numel() == 0 or not values.isfinite().all():
            raise ValueError(
                f"{method}: a tensor alpha must be one finite number, one per image [m], or a "
                f"map over the image [height, width]; got shape {list(alpha.shape)}"
            )
        if values.dim() == 2:
            return Alpha(alpha, torch.ones(1, device=values.device), values)
        return Alpha(alpha, values.reshape(-1))

    @property
    def is_learned(self) -> bool:
        """True when a gradient flows into it: then it is used as it is in every call."""
        return any(x is not None and x.requires_grad for x in (self.values, self.region))

    @functools.cached_property
    def is_zero(self) -> bool:
        """True when nothing would be subtracted anywhere: then the stock path runs."""
        if self.is_learned:
            return False
        region_is_zero = self.region is not None and not self.region.any()
        return region_is_zero or not self.values.any()

    def __str__(self) -> str:
        if self.region is not None:
            low, high = self.region.min().item(), self.region.max().item()
            return f"map {list(self.region.shape)} from {low:g} to {high:g}"
        return ", ".join(f"{value:g}" for value in self.values.tolist())


def _number(given: Any, method: str) -> float:
    value = scalar(given)
    if not is_real(value) or not math.isfinite(value):
        raise ValueError(
            f"{method}: alpha must be a finite number, one per image, a 2-D tensor or a PIL mask; "
            f"got {given!r}"
        )
    return float(value)


def _mask_values(mask: Any) -> Tensor:
    """A PIL image as `[height, width]` in 0 to 1."""
    width, height = mask.size
    pixels = torch.frombuffer(bytearray(mask.convert("L").tobytes()), dtype=torch.uint8)
    return pixels.reshape(height, width).float() / 255
