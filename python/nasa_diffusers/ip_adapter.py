"""The image prompts of an IP-Adapter, beside a guided text.

    O = (Z+ - alpha * Z-) + sum of scale_i * Z_i        (Z_i: attention over image prompt i)

diffusers keeps an IP-Adapter's weights in the layer's processor. The terms are the ones its own
processor adds. The images of a single adapter without a mask are a third segment of the call for
the text, their scale in their values. Every other image, and all of them in NAG, is a call of the
operator: the scale, and a mask over the image, are its alpha. Keys and values of an image are
projected once, as those of the text are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers.image_processor import IPAdapterMaskProcessor
from diffusers.models import attention_processor as stock
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from torch import Tensor

from nasa_diffusers.guided_text import GuidedText
from nasa_diffusers.prompts import KeysValues

PROCESSORS = (
    stock.IPAdapterAttnProcessor,
    stock.IPAdapterXFormersAttnProcessor,
    stock.IPAdapterAttnProcessor2_0,
)
# in joint attention
JOINT_PROCESSORS = (FluxIPAdapterAttnProcessor,)


def image_beside(
    attn: Any,
    images: list[Tensor],
    masks: Sequence[Tensor | None] | Tensor | None,
    text: GuidedText,
    rows: int,
) -> KeysValues | None:
    """The images as one more segment of the call for the text, which adds their attention.

    None where there is more than one adapter, a mask, a scale that is no number, or 0; and where
    the method does not take them.
    """
    scale = attn.processor.scale[0]
    is_one = len(images) == len(attn.processor.scale) == 1 and masks is None
    if (
        not is_one
        or not text.method.adds_images
        or not isinstance(scale, (int, float))
        or scale == 0
    ):
        return None
    ((k, v),) = _keys_values(attn, images, text, scale)
    return of_all_images(k, v, rows)


def image_terms(
    attn: Any,
    q: Tensor,  # [b, l, h, d]
    images: list[Tensor],  # per adapter [b, n, c], or with masks [b, images, n, c]
    masks: Sequence[Tensor | None] | Tensor | None,  # per adapter [1, images, height, width]
    text: GuidedText,
) -> Iterator[tuple[KeysValues, float | Tensor]]:
    """Every image as one more prompt, with its alpha: to add it is to subtract -scale of it."""
    processor = attn.processor
    if isinstance(masks, Tensor):
        masks = list(masks.unsqueeze(1))
    if masks is None:
        masks = [None] * len(processor.scale)
    if not len(masks) == len(processor.scale) == len(images):
        raise ValueError(
            f"nasa_diffusers: the IP-Adapter has {len(processor.scale)} scales, the call brings "
            f"{len(images)} image prompts and {len(masks)} ip_adapter_masks; give one of each"
        )
    made = _keys_values(attn, images, text)
    for image, scale, (k, v), mask in zip(images, processor.scale, made, masks, strict=True):
        if mask is None:
            if scale != 0:
                yield of_all_images(k, v, q.shape[0]), -scale
            continue
        scales = scale if isinstance(scale, list) else [scale] * mask.shape[1]
        if not len(scales) == mask.shape[1] == image.shape[1]:
            raise ValueError(
                f"nasa_diffusers: an IP-Adapter has {image.shape[1]} images, {mask.shape[1]} masks "
                f"and {len(scales)} scales; give one mask and one scale per image"
            )
        for i, image_scale in enumerate(scales):
            if image_scale != 0:
                # [b, l, 1]
                where = IPAdapterMaskProcessor.downsample(mask[:, i], *q.shape[:2], 1)
                one = of_all_images(k[:, i], v[:, i], q.shape[0])
                yield one, -image_scale * where.float()


def of_all_images(k: Tensor, v: Tensor, rows: int) -> KeysValues:
    """`[r, ..., n, h, d]` as `[b, tokens, h, d]`, the tokens of all images side by side.

    As the stock processors do it: images that a call without classifier-free guidance brings for
    both its halves (LCM's takes them) are tokens of the one half that there is.
    """
    return KeysValues(*(x.reshape(rows, -1, *x.shape[-2:]) for x in (k, v)))


def _keys_values(
    attn: Any, images: list[Tensor], text: GuidedText, scale: float = 1.0
) -> list[tuple[Tensor, ...]]:
    """K and `scale` times V of each adapter's images, `[b, ..., n, h, d]`, kept like the text's."""
    processor = attn.processor

    def project() -> list[tuple[Tensor, ...]]:
        made = []
        layers = zip(images, processor.to_k_ip, processor.to_v_ip, strict=True)
        for image, to_k, to_v in layers:
            k, v = to_k(image), to_v(image)
            if scale != 1:
                v = v * scale
            made.append(tuple(x.unflatten(-1, (attn.heads, -1)) for x in (k, v)))
        return made

    if text.images is None or torch.compiler.is_compiling():
        return project()
    images_seen = text.images
    modules = (*processor.to_k_ip, *processor.to_v_ip)
    made, _ = images_seen.cache.through(
        processor, modules, images_seen.made_by, images_seen.prompts, project, scale
    )
    return made
