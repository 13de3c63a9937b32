"""The paper's metrics for images of any model: CLIP+, CLIP-, the rate of removal, and HPSv2.

A CSV file with the columns `image`, `prompt`, `negative` names the images, relative to itself; with
`present` and `absent` (say "a photo of a man", "a photo of a woman") CLIP also judges which of the
two an image is nearer to.
"""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from nasa_distill.intervals import Share
from nasa_distill.train.clip import Clip

REQUIRED = ("image", "prompt", "negative")


def read_pairs(path: Path) -> list[dict[str, str]]:
    """The rows of the CSV file.

    Raises:
        ValueError: It cannot be read, lacks a column, or has no rows or an empty field.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"pairs.read_pairs: cannot read {path}: {error}") from error
    if not rows:
        raise ValueError(f"pairs.read_pairs: {path} has no rows below its header")
    columns = [name for name in (*REQUIRED, "present", "absent") if name in rows[0]]
    if missing := set(REQUIRED) - set(columns):
        raise ValueError(f"pairs.read_pairs: {path} has no column {min(missing)!r}")
    if ("present" in columns) != ("absent" in columns):
        raise ValueError(f"pairs.read_pairs: {path} must have both present and absent, or none")
    for number, row in enumerate(rows, start=2):
        if empty := [name for name in columns if not (row[name] or "").strip()]:
            raise ValueError(f"pairs.read_pairs: line {number} of {path} has no {empty[0]}")
    return [{name: row[name] for name in columns} for row in rows]


def load_image(path: Path) -> Tensor:
    """`[1, 3, height, width]` in [-1, 1]."""
    with Image.open(path) as image:
        rgb = image.convert("RGB")
    pixels = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
    return pixels.view(1, rgb.height, rgb.width, 3).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def score(pairs: Path, clip: Clip, scorer: Clip | None = None) -> dict[str, Any]:
    """Cosines of each image to its prompt (CLIP+) and negative prompt (CLIP-), and their means.

    `removed` is the share of images nearer to `absent` than to `present`, with its interval;
    `hps`, where there is a scorer (`hps.load`), 100 times its cosine of image and prompt.
    """
    scored: list[dict[str, Any]] = []
    device = clip.mean.device
    for row in tqdm(read_pairs(pairs), "images"):
        pixels = load_image(pairs.parent / row["image"]).to(device)
        image = clip.images(pixels)
        texts = [row["prompt"], row["negative"]]
        if "present" in row:
            texts += [row["present"], row["absent"]]
        cosines = F.cosine_similarity(image, clip.texts(texts), dim=-1).tolist()
        values: dict[str, Any] = {"clip_pos": cosines[0], "clip_neg": cosines[1]}
        if "present" in row:
            values["removed"] = cosines[3] > cosines[2]
        if scorer is not None:
            own = F.cosine_similarity(scorer.images(pixels), scorer.texts([row["prompt"]]), dim=-1)
            values["hps"] = 100 * own.item()
        scored.append(row | values)
    names = ("clip_pos", "clip_neg", *(("hps",) if scorer is not None else ()))
    means: dict[str, Any] = {name: statistics.mean(row[name] for row in scored) for name in names}
    if "removed" in scored[0]:
        share = Share(sum(row["removed"] for row in scored), len(scored))
        means |= {"removed": share.value, "removed_interval": share.interval}
    return {"images": len(scored), **means, "rows": scored}


def write(result: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
