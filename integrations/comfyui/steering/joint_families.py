"""Networks in whose attention text and image are together."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .call import CURRENT
from .family import Family, patches_of, refuse_beside, replace


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
        multiple = self._multiple()
        return [-(-n // multiple) * multiple for n in lengths]

    def _multiple(self) -> int:
        # Z-Image's, which a ComfyUI before it does not know
        return getattr(self.net, "pad_tokens_multiple", None) or 1

    def image_tokens(self, x):
        size, multiple = self.net.patch_size, self._multiple()
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
