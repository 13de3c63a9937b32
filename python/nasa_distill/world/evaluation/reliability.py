"""How far the judge can be trusted: its verdicts on images whose scene is known.

The images are renders, and renders that were changed as a network changes them: noise, patches of
colour, a blend with another scene, an autoencoder's reconstruction.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nasa_distill import tables
from nasa_distill.intervals import Share
from nasa_distill.train.seeds import generator
from nasa_distill.world.evaluation.progress import commit
from nasa_distill.world.kinds import Code, World

CHUNK = 256
PATCH = 8  # pixels: of noise that is smooth, as an error of latents is
STRENGTHS = (0.05, 0.1, 0.2)  # standard deviation of noise; pixels run from -1 to 1
BLENDS = (0.25, 0.5)  # share of the other scene


def run(world: World, images: int, seed: int, code: Code | None = None) -> dict[str, Any]:
    """Counts for `page`.

    Args:
        images: Drawn by the world's rates, for each kind of change; every scene once, unchanged.
        code: Also what this autoencoder makes of them.
    """
    random_ = generator(seed, 0)
    every = torch.arange(len(world.rates()))
    drawn = world.draw(images, random_)

    def add(strength: float, noise: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        return images + strength * noise(images)

    def white(images: Tensor) -> Tensor:
        return torch.randn(images.shape, generator=random_)

    def smooth(images: Tensor) -> Tensor:
        """Of variance 1 in patches, blended into each other."""
        side = images.shape[-1] // PATCH
        patches = torch.randn(*images.shape[:2], side, side, generator=random_)
        large = F.interpolate(patches, images.shape[-2:], mode="bicubic")
        return large / large.std()

    def blend(share: float, images: Tensor) -> Tensor:
        return torch.lerp(images, world.images(world.draw(len(images), random_)), share)

    changes: dict[str, Callable[[Tensor], Tensor]] = {}
    for strength in STRENGTHS:
        changes[f"noise of {strength:g}"] = partial(add, strength, white)
        changes[f"smooth noise of {strength:g}"] = partial(add, strength, smooth)
    for share in BLENDS:
        changes[f"{share:.0%} of another scene"] = partial(blend, share)
    if code is not None:
        changes["encoded and decoded"] = lambda images: code.decode(code.encode(images))
    rows = {"every render": judged(world, every, lambda x: x)}
    for name, change in changes.items():
        rows[name] = judged(world, drawn, change)
    return {"about": {"commit": commit(), "world": world.name, "seed": seed}, "rows": rows}


def judged(world: World, rows: Tensor, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """How many changed renders are misread, how many are valid, and both at once."""
    misread = dict.fromkeys(world.describe(0), 0)
    counts = {"images": len(rows), "misread": 0, "valid": 0, "misread and valid": 0}
    for part in rows.split(CHUNK):
        verdict = world.judge(change(world.images(part)))
        wrong = verdict.scene != part
        counts["misread"] += int(wrong.sum())
        counts["valid"] += int(verdict.valid.sum())
        counts["misread and valid"] += int((wrong & verdict.valid).sum())
        for true, found in zip(part[wrong].tolist(), verdict.scene[wrong].tolist(), strict=True):
            is_, seen = world.describe(true), world.describe(found)
            for name in misread:
                misread[name] += is_[name] != seen[name]
    return counts | {"by attribute": misread}


def page(found: dict[str, Any]) -> str:
    head = ("images", "count", "misread", "valid", "misread and valid", "what was misread")
    cells = []
    for name, row in found["rows"].items():
        shares = (Share(row[key], row["images"]) for key in ("misread", "valid"))
        both = Share(row["misread and valid"], row["images"])
        wrong = {key: count for key, count in row["by attribute"].items() if count}
        said = ", ".join(f"{key} {count}" for key, count in sorted(wrong.items())) or "-"
        cells.append((name, row["images"], *shares, both, said))
    about = "\n".join(f"- {name}: {value}" for name, value in found["about"].items())
    return (
        HEAD.format(world=found["about"]["world"])
        + about
        + "\n\n"
        + tables.markdown(head, cells)
        + "\n"
    )


HEAD = """# How far the judge of a world can be trusted: {world}

Made by `python -m nasa_distill judge`, which measured every number: verdicts on renders whose scene
is known, and on renders that were changed. In percent, with Wilson's 95 % interval; what was
misread, in images. A blend is no image of its scene, so there `valid` should be 0, and halfway a
third scene may well be the nearest. White noise is of every pixel by itself; smooth noise is of
patches of 8x8 pixels, as an error of latents is. Pixels run from -1 to 1.

"""


def write(found: dict[str, Any], out: Path, path: Path | None) -> None:
    """JSON, and the page if one is named."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if path is not None:
        path.write_text(page(found), encoding="utf-8")
