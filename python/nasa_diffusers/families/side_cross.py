"""What families share that attend to a text by cross-attention, and do more with it before than
hand it on. See `nasa_diffusers/side_cross.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from nasa_diffusers import side as stream
from nasa_diffusers.chain import check_own_forward
from nasa_diffusers.families.base import Denoiser, Family, Layer
from nasa_diffusers.layer import key_mask
from nasa_diffusers.side import Side
from nasa_diffusers.side_cross import CrossBlockHook, SideCrossHook


class SideCross(Family):
    """The answers for blocks that take their text as an argument."""

    is_beside = True
    # the attribute of the denoiser that lists its blocks
    block_list = "transformer_blocks"
    # of a block: its layers, and the arguments that hold its texts
    attentions: tuple[str, ...] = ("attn2",)
    text_arguments: tuple[str, ...] = ("encoder_hidden_states",)
    # of the denoiser: those that `begin` reads
    reads: tuple[str, ...] = ()

    def begin(self, denoiser: Denoiser, side: Side, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """The negative prompts as a block takes them, by the argument they go into; `inputs` are
        those of the first block."""
        raise NotImplementedError

    def before_blocks(self, denoiser: Denoiser) -> list[nn.Module]:
        """What the negative prompts pass there, and what else a block does to them depends on."""
        return []

    def in_block(self, block: Any) -> list[nn.Module]:
        """What a block does to its texts before its layers project them."""
        return []

    def kept_with(self, denoiser, inputs):
        return []

    # ---- hooks -------------------------------------------------------------------------------

    def blocks(self, denoiser: Denoiser) -> Iterator[tuple[str, Any]]:
        for i, block in enumerate(getattr(denoiser, self.block_list)):
            yield f"{self.block_list}.{i}", block

    def layers(self, denoiser):
        for name, block in self.blocks(denoiser):
            for attention in self.attentions:
                yield f"{name}.{attention}", getattr(block, attention)

    def layer_hook(self, denoiser, name, cache, guided):
        block = denoiser.get_submodule(name.rpartition(".")[0])
        return SideCrossHook(name, block, self, cache, guided)

    def block_hooks(self, denoiser, guided):
        return [
            (block, CrossBlockHook(name, block, self, denoiser))
            for name, block in self.blocks(denoiser)
        ]

    def hooked_modules(self, denoiser):
        blocks: dict[str, nn.Module] = dict(self.blocks(denoiser))
        return {
            name: (blocks[name.rpartition(".")[0]], attn) for name, attn in self.layers(denoiser)
        }

    def carry(self, denoiser, guided_text, inputs, is_guided=True):
        read = {name: inputs.get(name) for name in self.reads}
        stream.CALL.side = Side(guided_text, is_guided, read)
        return {}

    def check_call(self, denoiser, inputs):
        stream.refuse_checkpointing(denoiser)

    # ---- one layer ---------------------------------------------------------------------------

    def check_layer(self, name, attn):
        check_own_forward(name, attn)
        self.check_processor(name, attn)

    def check_processor(self, name: str, attn: Layer) -> None:
        if type(attn.processor) not in self.processors:
            raise RuntimeError(
                f"nasa_diffusers: layer {name!r} has the processor "
                f"{type(attn.processor).__name__}, whose computation NASA does not know and would "
                f"replace. Restore a stock one, set_attn_processor({self.processors[0].__name__}())"
            )

    def check_alpha(self, name: str, side: Side) -> None:
        """Raise where alpha cannot act in this layer."""

    def turn(self, q: Tensor, options: dict[str, Any]) -> Tensor:
        """Queries `[b, l, h, d]` at the positions in the options of an attention."""
        return q

    def text_mask(self, name: str, mask: Tensor, tokens: int) -> Tensor:
        """That of the positive text, which a block gives to the layer `name`, as `[b, n]`."""
        return key_mask(name, mask, tokens)

    def finish(self, attn: Layer, o: Tensor, hidden_states: Tensor) -> Tensor:
        return self.output(attn, o)
