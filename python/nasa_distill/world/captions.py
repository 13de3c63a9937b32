"""Captions: written from a scene, drawn for training, and read back.

    a blurry photo of a large red striped circle on a white background
    red, blurry

Words come from a closed vocabulary. A sentence or list names some attributes and leaves the others
open; "a photo of a shape" names none.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from functools import cache

import torch
from torch import Tensor

from nasa_distill.world.scene import ATTRIBUTES, RATES, Scene, scenes

OWNER = {value: name for name, values in RATES.items() for value in values}
FILLERS = ("a", "photo", "of", "shape", "on", "background", ",")
WORDS = (*FILLERS, *OWNER)
MAX_TOKENS = 16  # of the text encoder, with a start and an end token


def sentence(scene: Scene, named: Collection[str]) -> str:
    """The scene's attributes in `named`, as a sentence."""
    said = {name: getattr(scene, name) if name in named else "" for name in ATTRIBUTES}
    words = ["a", said["defect"], "photo of a", said["size"], said["colour"], said["texture"]]
    words.append(said["shape"] or "shape")
    if said["ground"]:
        words.append(f"on a {said['ground']} background")
    return " ".join(word for word in words if word)


def listing(scene: Scene, named: Collection[str]) -> str:
    """The scene's attributes in `named`, as one writes a negative prompt: "red, blurry"."""
    return ", ".join(getattr(scene, name) for name in ATTRIBUTES if name in named)


def draw_caption(scene: Scene, rng: random.Random, p_empty: float = 0.0) -> str:
    """A caption that is true of the scene: mostly a sentence, sometimes a list, or nothing.

    Each attribute is named with probability 1/2 in a sentence and 1/4 in a list.
    """
    if rng.random() < p_empty:
        return ""
    if rng.random() < 0.7:
        return sentence(scene, [name for name in ATTRIBUTES if rng.random() < 0.5])
    named = [name for name in ATTRIBUTES if rng.random() < 0.25]
    return listing(scene, named or [rng.choice(ATTRIBUTES)])


def read(caption: str) -> dict[str, set[str]]:
    """The values that a caption names, by attribute.

    Raises:
        ValueError: A word is not in the vocabulary.
    """
    named: dict[str, set[str]] = {}
    for word in caption.lower().replace(",", " , ").split():
        if word not in WORDS:
            raise ValueError(
                f"captions.read: {word!r} in {caption!r} is not a word of the small world; its "
                f"words are {' '.join(WORDS)}"
            )
        if word in OWNER:
            named.setdefault(OWNER[word], set()).add(word)
    return named


@cache
def _truth() -> Tensor:
    """Whether each value is in each scene: `[values, scenes]`."""
    return torch.tensor(
        [[getattr(scene, OWNER[value]) == value for scene in scenes()] for value in OWNER]
    )


def matches(captions: list[str]) -> Tensor:
    """Whether each caption is true of each scene, as numbers: `[captions, scenes]`."""
    values = list(OWNER)
    rows = []
    for caption in captions:
        true = torch.ones(len(scenes()), dtype=torch.bool)
        for named in read(caption).values():
            true &= _truth()[[values.index(value) for value in named]].any(0)
        rows.append(true)
    return torch.stack(rows).float()


def mentions(captions: list[str]) -> Tensor:
    """Whether each caption names each value, as numbers: `[captions, values]`."""
    named = [set().union(*read(caption).values()) for caption in captions]
    return torch.tensor([[float(value in words) for value in OWNER] for words in named])
