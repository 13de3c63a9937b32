"""Two texts of a prompt as one: a token has the channels of the first text's i-th token and then
those of the second's. Where it has one of them only, the others are zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def as_one(
    texts: Sequence[Tensor], masks: Sequence[Tensor | None] | None
) -> tuple[Tensor, Tensor | None]:
    """Texts `[m, n, c]` of several lengths, whose masked tokens are nothing, as one of all their
    channels, and the mask of its tokens."""
    masks = [None] * len(texts) if masks is None else masks
    own = [
        text if mask is None else text * mask.to(text.dtype)[..., None]
        for text, mask in zip(texts, masks, strict=True)
    ]
    length = max(x.shape[1] for x in own)
    one = torch.cat([nn.functional.pad(x, (0, 0, 0, length - x.shape[1])) for x in own], dim=2)
    return one, None if one.is_meta else present(one)


def present(text: Tensor) -> Tensor:
    """`[r, n]`: which tokens are there."""
    return (text != 0).any(2)


def read_two(family: str, embeds: Any, mask: Any) -> tuple[Any, Tensor | None]:
    """What a user gives as `negative_prompt_embeds` of two texts, and their masks, as one."""
    if not isinstance(embeds, (tuple, list)) or len(embeds) != 2 or isinstance(mask, Tensor):
        got = f"{len(embeds)} texts" if isinstance(embeds, (tuple, list)) else "one"
        raise ValueError(
            f"enable_nasa: {family} has two texts with a mask of each: negative_prompt_embeds must "
            "be (prompt_embeds, prompt_embeds_2) as encode_prompt makes them, and "
            f"negative_prompt_attention_mask both masks, or None; got {got}"
        )
    one, own = as_one(embeds, mask)
    if own is not None and not present(one[..., : embeds[0].shape[2]]).any(1).all():
        raise ValueError(
            "enable_nasa: negative_prompt_attention_mask leaves the first text of a negative "
            "prompt without any token; 1 keeps a token, 0 drops it"
        )
    return one, own
