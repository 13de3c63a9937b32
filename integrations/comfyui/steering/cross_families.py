"""Networks that attend to the text in an attention of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .call import CURRENT
from .family import Family, patches_of, replace


class UNet(Family):
    """SD 1.5, 2.x, SDXL: through `attn2` patches, so that no other call can be meant."""

    def layers(self) -> int:
        return sum(getattr(module, "attn2", None) is not None for module in self.net.modules())

    def blocks(self) -> list[tuple[str, int]]:
        ends = ("input", self.net.input_blocks), ("output", self.net.output_blocks)
        return [(name, i) for name, blocks in ends for i in range(len(blocks))] + [("middle", 0)]


class Wan(Family):
    """An image to start from has an attention of its own, whose keys come in `clip_fea`."""

    def image_tokens(self, x):
        return patches_of(x, *self.net.patch_size)

    def other_keys(self, x, conds):
        found = {self.image_tokens(x)}
        if (image := conds.get("clip_fea")) is not None:
            found.add(image.shape[-2])
        if (reference := conds.get("reference_latent")) is not None:
            found.add(self.image_tokens(x) + patches_of(reference, *self.net.patch_size[1:]))
        return found


class Vace(Wan):
    """Each control video passes through blocks of its own, which attend to the text as well."""

    def layers(self):
        return len(self.net.blocks) + len(self.net.vace_blocks)

    def layers_in(self, conds):
        videos = conds["vace_context"].shape[1]
        return len(self.net.blocks) + videos * len(self.net.vace_blocks)


class Ltxv(Family):
    def layers(self):
        return len(self.net.transformer_blocks)

    def image_tokens(self, x):
        return patches_of(x, 1, 1, 1)


class Ltxav(Ltxv):
    """LTX-2: video and sound attend to the text, and to each other. They come packed in one."""

    def layers(self):
        return 2 * len(self.net.transformer_blocks)

    def layers_in(self, conds):
        return self.layers() if self._sound(conds) else self.layers() // 2

    def other_keys(self, x, conds):
        shapes = conds.get("latent_shapes") or [x.shape]
        return {math.prod(shapes[0][2:]), *self._sound(conds)}

    def _sound(self, conds: dict[str, Any]) -> set[int]:
        """Its tokens, with those of a reference."""
        shapes = conds.get("latent_shapes") or ()
        if len(shapes) < 2 or not shapes[1][2]:
            return set()
        reference = conds.get("ref_audio")
        return {shapes[1][2] + (0 if reference is None else reference["tokens"].shape[1])}


class Cosmos(Family):
    """Cosmos 1, Predict2 and Anima."""

    def image_tokens(self, x):
        size = self.net.patch_spatial
        return patches_of(x, self.net.patch_temporal, size, size)

    def refuse(self, conds):
        if conds.get("t5xxl_ids") is not None:
            raise ValueError(
                "NASA negative prompt: Anima prepares its text inside the network unless it runs "
                "under torch.inference_mode, as ComfyUI's own execution does; use that"
            )


class PixArt(Family):
    """Its cross-attention passes no options on: the layers' own forward is patched."""

    def patch(self, model):
        for i, block in enumerate(self.net.blocks):
            replace(model, f"blocks.{i}.cross_attn.forward", _pixart_forward(block.cross_attn))


def _pixart_forward(layer: Any) -> Callable:
    def patch(forward: Callable) -> Callable:
        def cross_attention(x: Tensor, cond: Tensor, mask: Tensor | None = None) -> Tensor:
            guide = CURRENT.get()
            if guide is None:
                return forward(x, cond, mask)
            b, _, c = x.shape
            heads = layer.num_heads
            q = layer.q_linear(x).unflatten(-1, (heads, -1))
            k, v = layer.kv_linear(cond).view(b, -1, 2, heads, c // heads).unbind(2)
            o = guide.cross(q, k, v, None)
            return layer.proj_drop(layer.proj(o.flatten(2)))

        return cross_attention

    return patch
