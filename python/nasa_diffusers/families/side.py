"""What families with a side stream share: text and image in one attention, and a text that the
denoiser does more with than hand it on. See `nasa_diffusers/side.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nasa_diffusers import side as stream
from nasa_diffusers.chain import skipping_hooks
from nasa_diffusers.families.base import Denoiser, Layer
from nasa_diffusers.families.joint import Joint, token_flops
from nasa_diffusers.guided_text import GuidedText
from nasa_diffusers.prompts import Term
from nasa_diffusers.side import Layout, Side, SideAttentionHook, SideBlockHook
from nasa_diffusers.streams import Streams


class SideStream(Joint):
    """The answers for blocks with one attention over image and text."""

    is_beside = True
    # by the attribute of the denoiser that lists them, in the order in which it runs them
    block_lists: tuple[tuple[str, Layout], ...]
    # arguments of the denoiser that `prepare` and `arrange` read
    reads: tuple[str, ...] = ()

    # ---- hooks -------------------------------------------------------------------------------

    def blocks(self, denoiser: Denoiser) -> Iterator[tuple[str, Any]]:
        for attribute, _ in self.block_lists:
            for i, block in enumerate(getattr(denoiser, attribute)):
                yield f"{attribute}.{i}", block

    def layout(self, name: str) -> Layout:
        """Of the block, or of its attention."""
        return dict(self.block_lists)[name.split(".")[0]]

    def layers(self, denoiser):
        for name, block in self.blocks(denoiser):
            attention = self.layout(name).attention
            yield f"{name}.{attention}", getattr(block, attention)

    def layer_hook(self, denoiser, name, cache, guided):
        block = denoiser.get_submodule(name.rpartition(".")[0])
        flops = token_flops(block, self.text_layers(block))
        return SideAttentionHook(name, self.layout(name), self, guided, flops)

    def block_hooks(self, denoiser, guided):
        last = max(i for i, is_guided in enumerate(guided.values()) if is_guided)
        return [
            (block, SideBlockHook(name, block, self.layout(name), self, denoiser, i, last))
            for i, (name, block) in enumerate(self.blocks(denoiser))
        ]

    def hooked_modules(self, denoiser):
        blocks = dict(self.blocks(denoiser))
        return {
            name: (blocks[name.rpartition(".")[0]], attn) for name, attn in self.layers(denoiser)
        }

    # ---- a call ------------------------------------------------------------------------------

    def carry(self, denoiser, guided_text: GuidedText, inputs, is_guided=True):
        """The inputs stay as they are; the blocks find the negative prompts beside them."""
        read = {name: inputs.get(name) for name in self.reads}
        stream.CALL.side = Side(guided_text, is_guided, read)
        return {}

    def keeps_text(self, denoiser):
        """Whether a cache keeps the output of an attention, which has the negative tokens in it."""
        return any(skipping_hooks(attn) for _, attn in self.layers(denoiser))

    def check_call(self, denoiser, inputs):
        stream.refuse_checkpointing(denoiser)

    # ---- the first block ---------------------------------------------------------------------

    def begin(self, denoiser: Denoiser, side: Side, inputs: dict[str, Any]) -> Tensor:
        """The tokens of all negative prompts as the first block takes them, `[b, m, c]`; `inputs`
        are those of the block."""
        layout = self.block_lists[0][1]
        image = inputs[layout.image]
        side.lengths = [self.positive_tokens(side, inputs)]
        prompts = [self.prepare(denoiser, side, term) for term in side.text.terms]
        negatives = stream.side_by_side(side, prompts, image.shape[0])
        rope = inputs.get(layout.rope)
        if rope is not None:
            side.rope = self.arrange(denoiser, side, rope)
        return negatives.to(image.dtype)

    def positive_tokens(self, side: Side, inputs: dict[str, Any]) -> int:
        return side.text.text.shape[1]

    def prepare(self, denoiser: Denoiser, side: Side, term: Term) -> tuple[Tensor, Tensor | None]:
        """A negative prompt after the model's text projections, `[r, n, c]`, and its mask."""
        raise NotImplementedError

    def arrange(self, denoiser: Denoiser, side: Side, rope: Any) -> Any:
        """The block's positions as those of [image; positive; negatives]."""
        raise NotImplementedError

    def arriving(self, denoiser: Denoiser, side: Side, index: int, negatives: Tensor) -> Tensor:
        """What the denoiser does with its text before the block of this number, done with the
        negative prompts `[b, m, c]`."""
        return negatives

    # ---- a block of one sequence -------------------------------------------------------------

    def enter(self, side: Side, layout: Layout, given: Tensor, negatives: Tensor) -> Tensor:
        """The block's own tokens and the negative prompts as [image; positive; negatives]."""
        n, parts = side.lengths[0], [given, negatives]
        if layout.text_first:
            parts = [given[:, n:], given[:, :n], negatives]
        return torch.cat(parts, dim=1)

    def leave(self, side: Side, layout: Layout, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of what the block has made of them its own tokens, in its order, and the negatives."""
        n, own = side.lengths[0], x.shape[1] - side.m
        output = x[:, :own]
        if layout.text_first:
            output = torch.cat([output[:, own - n :], output[:, : own - n]], dim=1)
        return output, x[:, own:]

    def changes(self, layout: Layout, inputs: dict[str, Any], x: Tensor) -> dict[str, Any]:
        """The arguments of the block that change when `x` goes through it."""
        return {layout.image: x}

    # ---- one layer ---------------------------------------------------------------------------

    def called(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """What an attention is called with, under the names of image and text in a processor."""
        return args, kwargs

    def project(self, attn: Layer, image: Tensor, text: Tensor | None) -> tuple:
        """Q, K and V of [image; positive; negatives], `[b, l + n + m, h, d]` each, and whatever
        else `finish` needs of the layer's input."""
        heads = self.image_heads(attn, image)
        if text is None:
            return *heads, None
        of_text = self.text_heads(attn, text)
        return *(torch.cat(pair, dim=1) for pair in zip(heads, of_text, strict=True)), None

    def rotate(self, x: Tensor, rope: Any) -> Tensor:
        raise NotImplementedError

    def text_mask(self, side: Side, options: dict[str, Any]) -> Tensor | None:
        """That of the positive text, `[b, n]`, in the options of an attention."""
        return None

    def amend(self, side: Side, streams: Streams, o: Tensor) -> Tensor:
        """`o` `[b, l + n + m, h, d]` where a mask treats queries of the text otherwise."""
        return o

    def finish(self, attn: Layer, o: Tensor, image: int, layout: Layout, rest: Any) -> Any:
        """What the layer returns for `o` `[b, l + n + m, h * d]`."""
        if layout.text is None:
            return self.output(attn, o)
        return self.output(attn, o[:, :image]), attn.to_add_out(o[:, image:])

    def uses_fused_projection(self, attn: Layer) -> bool:
        return False


def complex_rotation(x: Tensor, turn: Tensor) -> Tensor:
    """`[b, n, h, d]` turned by complex numbers, `[n, d / 2]` or `[b, n, d / 2]`."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn.unsqueeze(-2)).flatten(3).type_as(x)


def matrix_rotation(x: Tensor, turn: Tensor) -> Tensor:
    """`[b, n, h, d]` turned pair by pair by matrices, `[b, n, 1, d / 2, 2, 2]`."""
    pairs = x.float().unflatten(-1, (-1, 1, 2))
    turned = turn[..., 0] * pairs[..., 0] + turn[..., 1] * pairs[..., 1]
    return turned.flatten(3).type_as(x)


def linears(block: nn.Module, *without: str) -> tuple[str, ...]:
    """Names of the children of a block that every token passes."""
    return tuple(name for name, _ in block.named_children() if name not in without)
