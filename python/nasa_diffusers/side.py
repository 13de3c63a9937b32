"""The side stream: negative prompts beside a call whose text stays what it is.

Some denoisers do more with their text than hand it on: they concatenate it with the image, count
its positions, slice it off again. There the prompt stays in its argument, and a per-call object,
`Side`, holds the negative prompts. The first block's hook sends them through the model's own text
projections; each block's hook appends their tokens to those of the block, so that its norms, its
projections and its feed-forward treat them as they treat the prompt, and takes them out of what the
block returns. The hook on the attention keeps the prompts apart (`streams.py`). What the denoiser
does between its blocks it does with its own tokens only.

How a block holds its tokens is data of the family, `Layout`. Blocks after the last guided layer,
and calls without a negative prompt, run as they are.

Names: b batch, l image tokens, n text tokens, m tokens of all negative prompts, c channels.
"""

from __future__ import annotations

import inspect
import threading
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from nasa_diffusers.chain import as_called, may_skip
from nasa_diffusers.guided_text import GuidedText
from nasa_diffusers.joint import JointCall, refuse_skipped_scores
from nasa_diffusers.layer import Hook
from nasa_diffusers.prompts import Term
from nasa_diffusers.streams import Streams, keep_apart
from nasa_diffusers.weights import Fingerprint

Rope = Any  # a tensor, or a tuple of them, each [tokens, ...] or [b, tokens, ...]


class Layout(NamedTuple):
    """How a block holds its tokens."""

    image: str = "hidden_states"  # the argument that holds the image's
    text: str | None = None  # the text's; None: both are one sequence in `image`
    text_first: bool = True  # in that sequence, or in the pair that the block returns
    rope: str = "image_rotary_emb"  # the argument with their positions
    attention: str = "attn"  # the block's attention
    joins: bool = False  # it puts its two arguments one behind the other by itself
    fixed: bool = False  # its text is keys only, and goes through the blocks as it is


@dataclass(eq=False)
class Side:
    """The negative prompts of one call of a denoiser."""

    text: GuidedText  # as the text encoder made them
    is_guided: bool  # False: they are carried, and change nothing
    inputs: dict[str, Any]  # of the denoiser: those that the family asks for
    lengths: list[int] = field(default_factory=list)  # n, then that of each negative prompt
    terms: tuple[Term, ...] = ()  # after the text projections
    rope: Rope | None = None  # of [image; positive; negatives]
    # of cross-attention: what texts passed before the blocks, where keys and values are kept
    made_by: Fingerprint | None = None
    # by the argument of a block: the negative prompts, [b, m, c]
    texts: dict[str, Tensor] = field(default_factory=dict)
    # by the block that takes them, the tokens of all negative prompts, [b, m, c]
    states: dict[int, Tensor] = field(default_factory=dict)
    block: str | None = None  # the one that runs
    attended: str | None = None  # the last block whose attention has kept the prompts apart
    # what the last block of one sequence returned, and the same with the negative prompts
    returned: Tensor | None = None
    behind: Tensor | None = None

    @property
    def m(self) -> int:
        return sum(self.lengths[1:])


class Call(threading.local):
    """The side stream of the denoiser call that runs in this thread."""

    side: Side | None = None


CALL = Call()


def end(*_: Any) -> None:
    """A forward hook of the denoiser: the call is over, also where it failed."""
    CALL.side = None


def refuse_checkpointing(denoiser: Any) -> None:
    if torch.is_grad_enabled() and getattr(denoiser, "gradient_checkpointing", False):
        raise RuntimeError(
            f"nasa_diffusers: gradient checkpointing of {type(denoiser).__name__} runs blocks "
            "again without the negative prompt beside them; call disable_gradient_checkpointing()"
        )


class SideMaths(Protocol):
    """What a family says of its blocks and of their attention."""

    def begin(self, denoiser: Any, side: Side, inputs: dict[str, Any]) -> Tensor: ...
    def check_attention(self, name: str, attn: Any, attention_mask: Tensor | None) -> None: ...
    def called(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]: ...
    def project(self, attn: Any, image: Tensor, text: Tensor | None) -> tuple: ...
    def rotate(self, x: Tensor, rope: Rope) -> Tensor: ...
    def text_mask(self, side: Side, options: dict[str, Any]) -> Tensor | None: ...
    def arriving(self, denoiser: Any, side: Side, index: int, negatives: Tensor) -> Tensor: ...
    def enter(self, side: Side, layout: Layout, given: Tensor, negatives: Tensor) -> Tensor: ...
    def leave(self, side: Side, layout: Layout, x: Tensor) -> tuple[Tensor, Tensor]: ...
    def changes(self, layout: Layout, inputs: dict[str, Any], x: Tensor) -> dict[str, Any]: ...
    def amend(self, side: Side, streams: Streams, o: Tensor) -> Tensor: ...
    def finish(self, attn: Any, o: Tensor, image: int, layout: Layout, rest: Any) -> Any: ...


class SideBlockHook(Hook):
    """Runs a block with the tokens of the negative prompts appended to its own."""

    def __init__(
        self, name: str, block: nn.Module, layout: Layout, family: SideMaths, denoiser: nn.Module,
        index: int, last: int,
    ):  # fmt: skip
        super().__init__()
        self.name, self.layer = name, f"{name}.{layout.attention}"
        self.layout, self.family, self.denoiser = layout, family, denoiser
        # among the blocks, and the last one whose attention is guided
        self.index, self.last = index, last
        # of the class: another hook may hide the signature of the module's own forward
        self.parameters = list(inspect.signature(type(block).forward).parameters)[1:]

    def new_forward(self, block: nn.Module, *args, **kwargs) -> Any:
        side = CALL.side
        if side is None:
            return self.stock(*args, **kwargs)
        if self.index > self.last:
            # the negative prompts have ended
            if not torch.compiler.is_compiling():
                side.text.reached.add(self.layer)
            return self.stock(*args, **kwargs)
        inputs = dict(zip(self.parameters, args, strict=False)) | kwargs
        negatives = self.arriving(side, inputs)
        side.block = self.name
        run = self.one_sequence if self.layout.text is None else self.two_streams
        output, negatives = run(side, args, inputs, negatives)
        side.block = None
        self.check_attended(block, side)
        side.states.setdefault(self.index + 1, negatives)
        if not torch.is_grad_enabled():
            del side.states[self.index]
        return output

    def arriving(self, side: Side, inputs: dict[str, Any]) -> Tensor:
        """The negative prompts as the block before has left them."""
        if self.index == 0 and not side.states:
            side.states[0] = self.family.begin(self.denoiser, side, inputs)
        if self.index not in side.states:
            raise RuntimeError(
                f"nasa_diffusers: block {self.name!r} runs and the one before it was left out, so "
                "the negative prompt has not passed it; take off the cache that skips single "
                "blocks, or call disable_nasa(pipe)"
            )
        return self.family.arriving(self.denoiser, side, self.index, side.states[self.index])

    def two_streams(
        self, side: Side, args: tuple, inputs: dict[str, Any], negatives: Tensor
    ) -> tuple[Any, Tensor]:
        """A block that has arguments of their own for image and text."""
        text = self.layout.text
        assert text is not None
        n = side.lengths[0]
        both = torch.cat([inputs[text], negatives], dim=1)
        changes = {text: both}
        if self.layout.joins:
            # the first of the two in place of the second: [image; positive; negatives]
            changes = {text: inputs[self.layout.image], self.layout.image: both}
        args, kwargs = as_called(self.parameters, args, inputs | changes)
        output = self.stock(*args, **kwargs)
        if self.layout.fixed:
            return output, negatives
        if self.layout.joins:
            output = output[::-1]
        at = 0 if self.layout.text_first else 1
        both = output[at]
        parts = list(output)
        parts[at] = both[:, :n]
        return tuple(parts), both[:, n:]

    def one_sequence(
        self, side: Side, args: tuple, inputs: dict[str, Any], negatives: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A block for which image and text are one sequence; here [image; positive; negatives]."""
        given = inputs[self.layout.image]
        if given is side.returned and side.behind is not None:
            # nothing lies between the two blocks: no copy
            x = side.behind
        else:
            x = self.family.enter(side, self.layout, given, negatives)
        changes = self.family.changes(self.layout, inputs, x)
        args, kwargs = as_called(self.parameters, args, inputs | changes)
        x = self.stock(*args, **kwargs)
        output, negatives = self.family.leave(side, self.layout, x)
        side.returned, side.behind = output, x
        return output, negatives

    def check_attended(self, block: nn.Module, side: Side) -> None:
        attention = getattr(block, self.layout.attention)
        if side.attended != self.name and not may_skip(attention):
            raise RuntimeError(
                f"nasa_diffusers: the attention of block {self.name!r} is not the one that "
                "enable_nasa prepared. Call disable_nasa(pipe), make that change, then call "
                "enable_nasa again"
            )


class SideAttentionHook(Hook):
    """Keeps the prompts of a block apart in its attention."""

    def __init__(
        self, name: str, layout: Layout, family: SideMaths, guided: bool, token_flops: int
    ):
        super().__init__()
        self.name, self.layout, self.family, self.guided = name, layout, family, guided
        self.token_flops = token_flops
        self.last_call: JointCall | None = None

    def new_forward(self, attn: Any, *args, **kwargs) -> Any:
        side = CALL.side
        if side is None or side.block is None:
            return self.stock(*args, **kwargs)
        refuse_skipped_scores(self.name, attn)
        side.attended = side.block
        if not torch.compiler.is_compiling():
            side.text.reached.add(self.name)
        args, kwargs = self.family.called(args, kwargs)
        return self.attend(attn, side, *args, **kwargs)

    def attend(
        self,
        attn: Any,
        side: Side,
        hidden_states: Tensor,  # [b, l, c], of one sequence [b, l + n + m, c]
        encoder_hidden_states: Tensor | None = None,  # [b, n + m, c]
        **options,
    ) -> Any:
        self.family.check_attention(self.name, attn, None)
        # each [b, l + n + m, h, d], k and v perhaps of fewer heads
        q, k, v, rest = self.family.project(attn, hidden_states, encoder_hidden_states)
        if side.rope is not None:
            q, k = (self.family.rotate(x, side.rope) for x in (q, k))
        text, is_guided = side.text, self.guided and side.is_guided
        mask = self.family.text_mask(side, options)
        with_text = not self.layout.fixed
        streams = Streams(q, k, v, side.lengths, side.terms, with_text, text.backend, mask)
        if not torch.compiler.is_compiling():
            b, _, h, d = q.shape
            self.last_call = JointCall(
                torch.Size((b, k.shape[1], h, d)), side.lengths, hidden_states.shape[2],
                self.token_flops, with_text,
                attends_twice=is_guided and text.method.attends_image_twice(streams),
            )  # fmt: skip
        o = text.method.joint(streams) if is_guided else keep_apart(streams)
        o = self.family.amend(side, streams, o).flatten(2)
        return self.family.finish(attn, o, streams.image_tokens, self.layout, rest)


def side_by_side(side: Side, prompts: list[tuple[Tensor, Tensor | None]], rows: int) -> Tensor:
    """The negative prompts `[r, n, c]` after the text projections, with their masks, as the tokens
    that the blocks carry, `[b, m, c]`."""
    side.terms = tuple(
        replace(term, text=x, mask=mask)
        for term, (x, mask) in zip(side.text.terms, prompts, strict=True)
    )
    side.lengths += [x.shape[1] for x, _ in prompts]
    return torch.cat([x.expand(rows, -1, -1) for x, _ in prompts], dim=1)
