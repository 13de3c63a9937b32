"""The side stream of text cross-attention: for blocks that calculate with their text before they
attend to it, or that have several texts.

As in `side.py`, the prompt stays in its argument. Each block's hook appends the negative prompts to
the block's texts, so that the block modulates them as it does the prompt; the hook on the attention
takes them apart again. These texts do not change from block to block, so keys and values are
kept, of those that are modulated by the time for each time.

Names: b batch, l queries, n text tokens, m tokens of all negative prompts, h heads, d head_dim.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nasa_diffusers.cache import TextCache
from nasa_diffusers.chain import as_called
from nasa_diffusers.layer import Hook
from nasa_diffusers.prompts import KeysValues, Signed
from nasa_diffusers.side import CALL, Side
from nasa_diffusers.weights import Fingerprint


class CrossMaths(Protocol):
    """What a family says of its blocks and of their text cross-attention."""

    text_arguments: tuple[str, ...]  # of a block

    def begin(self, denoiser: Any, side: Side, inputs: dict[str, Any]) -> dict[str, Tensor]: ...
    def before_blocks(self, denoiser: Any) -> list[nn.Module]: ...
    def in_block(self, block: Any) -> list[nn.Module]: ...
    def projections(self, attn: Any) -> tuple[nn.Module | None, ...]: ...
    def check_processor(self, name: str, attn: Any) -> None: ...
    def check_alpha(self, name: str, side: Side) -> None: ...
    def queries(self, attn: Any, hidden_states: Tensor) -> Tensor: ...
    def turn(self, q: Tensor, options: dict[str, Any]) -> Tensor: ...
    def text_mask(self, name: str, mask: Tensor, tokens: int) -> Tensor: ...
    def keys_values(self, attn: Any, text: Tensor) -> tuple[Tensor, Tensor]: ...
    def finish(self, attn: Any, o: Tensor, hidden_states: Tensor) -> Tensor: ...


class CrossBlockHook(Hook):
    """Runs a block with the negative prompts appended to its texts."""

    def __init__(self, name: str, block: nn.Module, family: CrossMaths, denoiser: nn.Module):
        super().__init__()
        self.name, self.family, self.denoiser = name, family, denoiser
        # of the class: another hook may hide the signature of the module's own forward
        self.parameters = list(inspect.signature(type(block).forward).parameters)[1:]

    def new_forward(self, block: nn.Module, *args, **kwargs) -> Any:
        side = CALL.side
        if side is None:
            return self.stock(*args, **kwargs)
        inputs = dict(zip(self.parameters, args, strict=False)) | kwargs
        if not side.texts:
            side.texts = self.family.begin(self.denoiser, side, inputs)
            if side.text.is_cached:
                side.made_by = Fingerprint(self.family.before_blocks(self.denoiser))
        both = {
            name: torch.cat([inputs[name], side.texts[name]], dim=1)
            for name in self.family.text_arguments
        }
        side.block = self.name
        args, kwargs = as_called(self.parameters, args, inputs | both)
        output = self.stock(*args, **kwargs)
        side.block = None
        return output


class SideCrossHook(Hook):
    """Guided attention to a text with the negative prompts behind it."""

    def __init__(
        self, name: str, block: nn.Module, family: CrossMaths, cache: TextCache, guided: bool
    ):
        super().__init__()
        self.name, self.family, self.cache, self.guided = name, family, cache, guided
        self.block = block
        self.last_call: CrossCall | None = None

    def new_forward(
        self,
        attn: Any,
        hidden_states: Tensor,  # [b, l, c]
        encoder_hidden_states: Tensor | None = None,  # [b, n + m, c]
        attention_mask: Tensor | None = None,  # as the block gives it, over the positive text
        **kwargs,
    ) -> Tensor:
        side = CALL.side
        if side is None or side.block is None or encoder_hidden_states is None:
            return self.stock(hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        if not torch.compiler.is_compiling():
            side.text.reached.add(self.name)
        if not (self.guided and side.is_guided):
            text = encoder_hidden_states[:, : side.lengths[0]]
            return self.stock(hidden_states, text, attention_mask, **kwargs)
        self.family.check_processor(self.name, attn)
        self.family.check_alpha(self.name, side)
        q = self.family.turn(self.family.queries(attn, hidden_states), kwargs)
        pos, *negatives = self.keys_values(attn, side, encoder_hidden_states)
        if attention_mask is not None:
            mask = self.family.text_mask(self.name, attention_mask, side.lengths[0])
            pos = pos._replace(mask=mask)
        if not torch.compiler.is_compiling():
            rows = negatives[0].k.shape[0]
            self.last_call = CrossCall(
                q.shape, side.lengths, encoder_hidden_states.shape[2], rows,
                is_kept=side.made_by is not None,
            )  # fmt: skip
        signed = [
            Signed(prompt._replace(mask=term.mask), term.alpha)
            for prompt, term in zip(negatives, side.terms, strict=True)
        ]
        o = side.text.method.cross(q, pos, signed, side.text.backend)
        return self.family.finish(attn, o.flatten(2), hidden_states)

    def keys_values(self, attn: Any, side: Side, text: Tensor) -> list[KeysValues]:
        """Of `[b, n + m, c]`, the prompt's and those of each negative prompt."""
        prompts = side.text.prompts
        if side.made_by is None or prompts is None:
            k, v = self.family.keys_values(attn, text)
            return _apart(k, v, side.lengths)
        # one row for all where they are equal
        rows = 1 if all(prompts.are_uniform) else text.shape[0]
        made_with = [*self.family.in_block(self.block), *self.family.projections(attn)]
        ((k, v),), _ = self.cache.through(
            attn, made_with, side.made_by, prompts,
            lambda: [self.family.keys_values(attn, text[:rows])],
        )  # fmt: skip
        return _apart(k, v, side.lengths)


def _apart(k: Tensor, v: Tensor, lengths: list[int]) -> list[KeysValues]:
    parts = zip(k.split(lengths, dim=1), v.split(lengths, dim=1), strict=True)
    return [KeysValues(*part) for part in parts]


@dataclass(frozen=True)
class CrossCall:
    """The sizes of a layer's last call, for the report. FLOPs count a multiply-add as 2."""

    q: torch.Size  # [b, l, h, d]
    lengths: list[int]  # n_pos, then n_neg of each negative prompt
    channels: int
    rows: int  # of K and V of the negative prompts: b, or 1 for all
    is_kept: bool  # they are

    @property
    def texts(self) -> list[tuple[int, int, int]]:
        return [(self.q[0], n, self.channels) for n in self.lengths]

    @property
    def attention_flops(self) -> int:
        """Q K-^T and P- V-, and to_k and to_v of the negative texts where nothing is kept."""
        b, queries, h, d = self.q
        each_call = sum(4 * b * n * h * d * queries for n in self.lengths[1:])
        return each_call if self.is_kept else each_call + self._projections

    @property
    def projection_flops(self) -> int:
        """to_k and to_v of the negative texts, once for each prompt and time."""
        return self._projections if self.is_kept else 0

    @property
    def _projections(self) -> int:
        _, _, h, d = self.q
        return sum(4 * self.rows * n * self.channels * h * d for n in self.lengths[1:])
