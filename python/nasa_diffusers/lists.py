"""Which rows of a call carry the prompt, where its texts are a list: one text `[n, c]` for a row.

The pipeline that runs holds its prompts and its other texts as lists of the same tensors, in
whatever order it calls with them. So a row is known by its object, and no value is compared.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nasa_diffusers.caller import OTHERS, PROMPTS, Caller
from nasa_diffusers.rows import HOW_TO_SAY, OTHER, Cfg, Rows, UnknownRows, as_said, check_said


def find_listed_rows(
    texts: Sequence[Tensor], samples: Sequence[Tensor], caller: Caller | None, cfg: Cfg
) -> Rows:
    count = len(texts)
    if caller is None:
        if cfg is None and count % 2 == 0 and _are_doubled(samples):
            raise UnknownRows(
                "nasa_diffusers: both halves of the batch have the same latents, so this may be "
                f"classifier-free guidance, and no pipeline in the call stack says; {HOW_TO_SAY}"
            )
        return as_said(cfg or False, count, None)
    if isinstance(cfg, tuple):
        return as_said(cfg, count, caller.prompts)
    held_lists = (caller.variables.get(name) for name in PROMPTS)
    prompts: list[Tensor] = next((x for x in held_lists if _is_list(x)), [])  # type: ignore[misc]
    others = [
        text
        for name, held in caller.variables.items()
        if OTHERS & set(name.split("_")) and _is_list(held)
        for text in held
    ]
    image, turn = [], 0
    for i, text in enumerate(texts):
        places = [j for j, prompt in enumerate(prompts) if prompt is text]
        is_other = any(other is text for other in others)
        if bool(places) == is_other:
            if cfg is not None:
                return as_said(cfg, count, caller.prompts)
            why = "several things at once" if places else "none that it holds"
            raise UnknownRows(
                "nasa_diffusers: which rows of this call carry the prompt is not known: "
                f"{caller.name} calls the denoiser with {count} texts, and that of row {i} is {why}"
                f"; {HOW_TO_SAY}"
            )
        if is_other:
            image.append(OTHER)
            continue
        image.append(turn if turn in places else places[0])
        turn = (turn + 1) % len(prompts)
    found = Rows(tuple(image), len(prompts), caller.prompts)
    check_said(found, cfg, caller)
    return found


def _is_list(held: object) -> bool:
    return isinstance(held, list) and bool(held) and all(isinstance(x, Tensor) for x in held)


def _are_doubled(samples: Sequence[Tensor]) -> bool:
    half = len(samples) // 2
    pairs = zip(samples[:half], samples[half:], strict=True)
    return all(a is b or a.is_meta or torch.equal(a, b) for a, b in pairs)
