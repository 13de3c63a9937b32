"""What differs between networks: how many attentions to text there are, which calls they are, and
what else must know that the text is several prompts.

A network that is not here is refused by its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .call import CURRENT, Guide

NET = "diffusion_model"


class Family:
    """A network whose text attentions pass through the attention override."""

    is_joint = False
    # where the text stands in a joint attention
    is_text_first: bool | None = True

    def __init__(self, net: Any):
        self.net = net

    def __deepcopy__(self, memo: dict) -> Family:
        return self

    def layers(self) -> int:
        """Attentions to text in one call of the network."""
        return len(self.net.blocks)

    def layers_in(self, conds: dict[str, Any]) -> int:
        """In a call with these conditions."""
        return self.layers()

    def image_tokens(self, x: Tensor) -> int | None:
        """Of a latent; None where no call could be taken for another."""
        return None

    def other_keys(self, x: Tensor, conds: dict[str, Any]) -> set[int]:
        """How many keys the attentions have that are none to the text; cross-attention only."""
        tokens = self.image_tokens(x)
        return set() if tokens is None else {tokens}

    def refuse(self, conds: dict[str, Any]) -> None:
        """Raise where a call has what is not known here."""

    def registers(self) -> int:
        """Tokens before the text of a joint attention that are no text."""
        return 0

    def lengths(self, lengths: list[int]) -> list[int]:
        """Of each prompt inside the network."""
        return lengths

    def patch(self, model: Any) -> None:
        """Patches beside those of the attention itself."""

    def owns(self, guide: Guide, lq: int, lk: int, mask: Tensor | None) -> bool:
        """Whether this attention is one to text."""
        text = sum(guide.lengths)
        if guide.is_aside:
            return False
        if not self.is_joint:
            return lk == text
        if mask is not None or lq != lk or lq <= text:
            return False
        return guide.image_tokens is None or lq == self.registers() + text + guide.image_tokens


def patches_of(x: Tensor, *sizes: int) -> int:
    """Tokens of a latent [b, c, ...] in patches of these sizes, the last ones for width."""
    return math.prod(-(-n // size) for n, size in zip(x.shape[-len(sizes) :], sizes, strict=True))


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


def position_patch(forward: Callable) -> Callable:
    """Positions of the text, where a network numbers it as one: each prompt from the first on."""

    def positions(ids: Tensor, *args, **kwargs):
        guide = CURRENT.get()
        if guide is not None:
            text, image = ids.split((sum(guide.lengths), ids.shape[1] - sum(guide.lengths)), dim=1)
            ids = torch.cat((*(text[:, :n] for n in guide.lengths), image), dim=1)
        return forward(ids, *args, **kwargs)

    return positions


class Flux(Family):
    """FLUX.1, FLUX.2, Chroma."""

    is_joint = True

    def layers(self):
        return len(self.net.double_blocks) + len(self.net.single_blocks)

    def patch(self, model):
        replace(model, "pe_embedder.forward", position_patch)


class Qwen(Flux):
    def layers(self):
        return len(self.net.transformer_blocks)


class Sd3(Family):
    """With dual attention the image attends to itself alone as well: told apart by its length."""

    is_joint = True

    def layers(self):
        return len(self.net.joint_blocks)

    def image_tokens(self, x):
        return patches_of(x, self.net.patch_size, self.net.patch_size)


class AuraFlow(Family):
    is_joint = True

    def layers(self):
        return len(self.net.double_layers) + len(self.net.single_layers)

    def registers(self):
        return self.net.register_tokens.shape[1]


class HunyuanVideo(Family):
    """The text is refined before the blocks, attending to itself: each prompt alone."""

    is_joint = True
    # of this ComfyUI; not known before the first call
    is_text_first = None

    def layers(self):
        return len(self.net.double_blocks) + len(self.net.single_blocks)

    def patch(self, model):
        replace(model, "txt_in.forward", _each_refined)
        replace(model, "pe_embedder.forward", _order_seen)

    def refuse(self, conds):
        refuse_beside("HunyuanVideo", conds, txt_byt5="glyphs", clip_fea="an image")


def _order_seen(forward: Callable) -> Callable:
    """ComfyUI had the text behind the image, and has it first now. Its positions are 0, and the
    last one of an image is not."""

    def positions(ids: Tensor, *args, **kwargs):
        guide = CURRENT.get()
        if guide is not None and guide.family.is_text_first is None:
            guide.family.is_text_first = bool(ids[0, -1].any())
        return forward(ids, *args, **kwargs)

    return positions


def refuse_beside(model: str, conds: dict[str, Any], **known: str) -> None:
    """Raise where one of these conditions brings tokens that are neither text nor image."""
    for key, name in known.items():
        if conds.get(key) is not None:
            raise ValueError(
                f"NASA negative prompt: this call has {name} ({key}) beside the text of {model}, "
                "which is not known to this node; leave it out, or guide with cfg"
            )


def _each_refined(forward: Callable) -> Callable:
    def refine(x: Tensor, *args, **kwargs):
        guide = CURRENT.get()
        if guide is None:
            return forward(x, *args, **kwargs)
        with guide.aside():
            return torch.cat(
                [forward(part, *args, **kwargs) for part in x.split(guide.lengths, 1)], dim=1
            )

    return refine


class Krea2(Family):
    """The text's layers are fused, attending to each other and to themselves: each prompt alone."""

    is_joint = True

    def patch(self, model):
        replace(model, "txtfusion.forward", _each_refined)


class Lumina(Family):
    """Lumina 2 and Z-Image: each prompt is padded, positioned and refined as if it were alone."""

    is_joint = True

    def layers(self):
        return len(self.net.layers)

    def lengths(self, lengths):
        multiple = self.net.pad_tokens_multiple or 1
        return [-(-n // multiple) * multiple for n in lengths]

    def image_tokens(self, x):
        size, multiple = self.net.patch_size, self.net.pad_tokens_multiple or 1
        return -(-patches_of(x, size, size) // multiple) * multiple

    def refuse(self, conds):
        image = "an image to refer to"
        refuse_beside("Z-Image", conds, ref_latents=image, ref_contexts=image, siglip_feats=image)

    def patch(self, model):
        if not hasattr(self.net, "embed_all"):
            # before 2026 one step embeds, positions and refines
            replace(model, "patchify_and_embed", self._each_refined)
            return
        replace(model, "embed_all", self._each_embedded)
        for i in range(len(self.net.context_refiner)):
            replace(model, f"context_refiner.{i}.forward", _each_context_refined)

    def _each_embedded(self, embed_all: Callable) -> Callable:
        def embed(x, cap_feats=None, siglip_feats=None, **kwargs):
            guide = CURRENT.get()
            if guide is None:
                return embed_all(x, cap_feats, siglip_feats, **kwargs)
            pos, *negatives = cap_feats.split(guide.given, dim=1)
            (text, *rest), (freqs, *rest_freqs), offset = embed_all(x, pos, siglip_feats, **kwargs)
            texts, positions = [text], [freqs]
            for tokens in negatives:
                found, found_freqs, _ = self.net.embed_cap(
                    tokens, offset=kwargs.get("offset", 0), bsz=1, device=x.device, dtype=x.dtype
                )
                texts += found
                positions += found_freqs
            rows = max(part.shape[0] for part in texts)
            text = torch.cat([part.expand(rows, -1, -1) for part in texts], dim=1)
            return (text, *rest), (torch.cat(positions, dim=1), *rest_freqs), offset

        return embed

    def _each_refined(self, patchify_and_embed: Callable) -> Callable:
        def embed(x: Tensor, cap_feats: Tensor, *args, **kwargs):
            guide = CURRENT.get()
            if guide is None:
                return patchify_and_embed(x, cap_feats, *args, **kwargs)
            size = self.net.patch_size
            pos, *negatives = cap_feats.split(guide.given, dim=1)
            with guide.aside():
                both, mask, sizes, lengths, freqs = patchify_and_embed(x, pos, *args, **kwargs)
                texts, positions = [both[:, : lengths[0]]], [freqs[:, : lengths[0]]]
                for tokens in negatives:
                    # a text knows nothing of the image, of which one patch will do
                    one, _, _, (n, *_), its_freqs = patchify_and_embed(
                        x[..., :size, :size], tokens, *args, **kwargs
                    )
                    texts.append(one[:, :n])
                    positions.append(its_freqs[:, :n])
            both = torch.cat((*texts, both[:, lengths[0] :]), dim=1)
            freqs = torch.cat((*positions, freqs[:, lengths[0] :]), dim=1)
            return both, mask, sizes, [sum(guide.lengths)] * len(lengths), freqs

        return embed


def _each_context_refined(forward: Callable) -> Callable:
    def refine(x: Tensor, mask, freqs: Tensor, *args, **kwargs):
        guide = CURRENT.get()
        if guide is None:
            return forward(x, mask, freqs, *args, **kwargs)
        parts = zip(x.split(guide.lengths, 1), freqs.split(guide.lengths, 1), strict=True)
        with guide.aside():
            return torch.cat([forward(part, mask, f, *args, **kwargs) for part, f in parts], dim=1)

    return refine


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


def replace(model: Any, name: str, patch: Callable[[Callable], Callable]) -> None:
    """An object patch around what the model has by this name, once."""
    name = f"{NET}.{name}"
    original = model.get_model_object(name)
    if getattr(original, "is_of_nasa", False):
        return
    patched = patch(original)
    patched.is_of_nasa = True
    model.add_object_patch(name, patched)


# by the name of the network's class, so that a ComfyUI without one of them is served as well
FAMILIES: dict[str, type[Family]] = {
    "UNetModel": UNet,
    "WanModel": Wan,
    "VaceWanModel": Vace,
    "CameraWanModel": Wan,
    "LTXVModel": Ltxv,
    "LTXAVModel": Ltxav,
    "GeneralDIT": Cosmos,
    "MiniTrainDIT": Cosmos,
    "Anima": Cosmos,
    "Flux": Flux,
    "Chroma": Flux,
    "QwenImageTransformer2DModel": Qwen,
    "OpenAISignatureMMDITWrapper": Sd3,
    "MMDiT": AuraFlow,
    "HunyuanVideo": HunyuanVideo,
    "NextDiT": Lumina,
    "SingleStreamDiT": Krea2,
    "PixArt": PixArt,
    "PixArtMS": PixArt,
}


def family_of(net: Any) -> Family:
    kind = type(net).__name__
    if kind not in FAMILIES:
        raise ValueError(
            f"NASA negative prompt: the network {kind} is not known to this node; it knows "
            f"{', '.join(FAMILIES)}"
        )
    if getattr(net, "num_frames", None) is not None or getattr(net, "use_temporal_attention", 0):
        raise ValueError("NASA negative prompt: SVD has no text, so no negative prompt either")
    return FAMILIES[kind](net)
