"""The image prompts of an IP-Adapter, beside a steered text.

    O = (Z+ - alpha * Z-) + sum of scale_i * Z_i        (Z_i: attention over image prompt i)

diffusers keeps an IP-Adapter's weights in the layer's processor. The terms below are the ones
its own processor adds; only the text part of the layer is NASA's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.image_processor import IPAdapterMaskProcessor
from diffusers.models import attention_processor as stock
from torch import Tensor

PROCESSORS = (
    stock.IPAdapterAttnProcessor,
    stock.IPAdapterXFormersAttnProcessor,
    stock.IPAdapterAttnProcessor2_0,
)


def image_terms(
    attn: Any,
    q: Tensor,  # [b, l, h, d]
    images: list[Tensor],  # per adapter [b, n, c], or with masks [b, images, n, c]
    masks: Sequence[Tensor | None] | Tensor | None,  # per adapter [1, images, height, width]
) -> Tensor:
    """The sum over adapters and their images, `[b, l, h * d]`."""
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
    total = torch.zeros((), dtype=q.dtype, device=q.device)
    adapters = zip(
        images, processor.scale, processor.to_k_ip, processor.to_v_ip, masks, strict=True
    )
    for image, scale, to_k, to_v, mask in adapters:
        if mask is None:
            if scale != 0:
                total = total + scale * _attend(q, to_k(image), to_v(image))
            continue
        scales = scale if isinstance(scale, list) else [scale] * mask.shape[1]
        if not len(scales) == mask.shape[1] == image.shape[1]:
            raise ValueError(
                f"nasa_diffusers: an IP-Adapter has {image.shape[1]} images, {mask.shape[1]} masks "
                f"and {len(scales)} scales; give one mask and one scale per image"
            )
        for i, image_scale in enumerate(scales):
            if image_scale == 0:
                continue
            z = _attend(q, to_k(image[:, i]), to_v(image[:, i]))
            where = IPAdapterMaskProcessor.downsample(
                mask[:, i], z.shape[0], z.shape[1], z.shape[2]
            )
            total = total + image_scale * (z * where.to(z))
    return total


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of `q` over one image prompt `[b, n, h * d]`, as `[b, l, h * d]`."""
    heads = q.shape[2]
    k, v = (x.unflatten(-1, (heads, -1)).flatten(1, -3).transpose(1, 2) for x in (k, v))
    z = F.scaled_dot_product_attention(q.transpose(1, 2), k, v)
    return z.transpose(1, 2).flatten(2)
