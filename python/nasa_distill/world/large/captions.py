"""Captions of the larger world: written from a scene, drawn for training, and read back.

    a framed photo of a large red striped circle and a blue square on a white background with text
    red circle, blurry

"and" names two objects; without it, and without "single", a caption leaves a second one open.
Colour and shape that stand together are of one object; texture and size are of every object.
Between commas stand alternatives where they name the same attributes, as in "red, blue".
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from nasa_distill.world.large.scene import (
    IMAGE_RATES,
    NUMBERS,
    OBJECT_RATES,
    OBJECTS,
    Object,
    Scene,
    scenes,
)

OWNER = {
    value: name
    for rates in (OBJECT_RATES, IMAGE_RATES, {"number": NUMBERS})
    for name, values in rates.items()
    for value in values
}
FILLERS = ("a", "photo", "of", "shape", "and", "on", "background", "with", ",")
WORDS = (*FILLERS, *OWNER)
MAX_TOKENS = 24  # of the text encoder, with a start and an end token
ANY = Object("", "")  # an object of which nothing is said
# every object that a caption may name: colour, shape, or both
NAMES = tuple(
    Object(colour, shape)
    for colour in ("", *OBJECT_RATES["colour"])
    for shape in ("", *OBJECT_RATES["shape"])
    if colour or shape
)


class Item(NamedTuple):
    """What stands between two commas."""

    objects: tuple[Object, ...]  # none, one, or the two around "and"
    values: frozenset[str]  # of the whole image

    @property
    def attributes(self) -> frozenset[tuple[str, ...]]:
        """Which attributes it names; of objects, as often as it has objects."""
        said = {(f"objects {len(self.objects)}", *_said(x)) for x in self.objects}
        return frozenset(said | {(OWNER[value],) for value in self.values})


def _said(thing: Object) -> tuple[str, ...]:
    return tuple(name for name in Object._fields if getattr(thing, name))


def sentence(scene: Scene, named: Iterable[str], objects: Iterable[Object]) -> str:
    """The scene's attributes in `named`, and what `objects` say of its objects, as a sentence."""
    said = {
        name: getattr(scene, name) if name in named else "" for name in (*IMAGE_RATES, "number")
    }
    first, *more = objects
    before = ["a", said["defect"] if said["defect"] != "text" else "", said["frame"], "photo of a"]
    before += [said["number"] if said["number"] == "single" else "", said["size"], first.colour]
    words = [*before, said["texture"], first.shape or "shape"]
    for thing in more:
        words += ["and a", thing.colour, thing.shape or "shape"]
    if said["ground"]:
        words.append(f"on a {said['ground']} background")
    if said["defect"] == "text":
        words.append("with text")
    return " ".join(word for word in words if word)


def listing(scene: Scene, named: Iterable[str], thing: Object = ANY) -> str:
    """As one writes a negative prompt: "red circle, blurry"."""
    items = [" ".join(part for part in thing if part)]
    items += [getattr(scene, name) for name in (*IMAGE_RATES, "number") if name in named]
    return ", ".join(item for item in items if item)


def draw_caption(scene: Scene, rng: random.Random, p_empty: float = 0.0) -> str:
    """A caption that is true of the scene: mostly a sentence, sometimes a list, or nothing.

    A sentence names each attribute of the image with probability 1/2, those of an object with 1/2
    or 9/10, a list each with 1/4. Of a pair whose number is not named, a sentence speaks of one
    object, and a list always does.
    """
    if rng.random() < p_empty:
        return ""
    attributes = (*IMAGE_RATES, "number")
    if rng.random() < 0.7:
        named = [name for name in attributes if rng.random() < 0.5]
        things = list(scene.objects)
        rng.shuffle(things)
        things = things if "number" in named else things[:1]
        p = rng.choice((0.5, 0.9))  # else two objects in full would be one caption in a hundred
        return sentence(scene, named, [_part(thing, rng, p) for thing in things])
    named = [name for name in attributes if rng.random() < 0.25]
    thing = _part(rng.choice(scene.objects), rng, 0.25)
    if not named and thing == ANY:
        named = [rng.choice(attributes)]
    return listing(scene, named, thing)


def _part(thing: Object, rng: random.Random, p: float) -> Object:
    return Object(*(value if rng.random() < p else "" for value in thing))


@cache
def read(caption: str) -> tuple[Item, ...]:
    """What a caption names, item by item; nothing where it names nothing.

    Raises:
        ValueError: A word is not in the vocabulary, or an object has two colours or shapes.
    """
    items = []
    for text in caption.lower().split(","):
        parts: list[dict[str, str]] = [{}]
        values = set()
        for word in text.split():
            if word not in WORDS:
                raise ValueError(
                    f"captions.read: {word!r} in {caption!r} is not a word of this world; its "
                    f"words are {' '.join(WORDS)}"
                )
            owner = OWNER.get(word)
            if word == "and":
                parts.append({})
            elif owner in OBJECT_RATES:
                if owner in parts[-1]:
                    raise ValueError(
                        f"captions.read: {caption!r} gives one object two of {owner}; put 'and "
                        "a' or a comma between them"
                    )
                parts[-1][owner] = word
            elif owner is not None:
                values.add(word)
        if len(parts) > 2:
            raise ValueError(f"captions.read: {caption!r} has more than two objects in one item")
        objects = tuple(Object(x.get("colour", ""), x.get("shape", "")) for x in parts)
        if len(parts) == 1 and objects[0] == ANY:
            objects = ()
        if objects or values:
            items.append(Item(objects, frozenset(values)))
    return tuple(items)


@cache
def _has(name: Object) -> Tensor:
    """Whether the left and the right object is one of that name: `[2, 9984]`; none has no name."""
    rows = torch.zeros(2, len(scenes()), dtype=torch.bool)
    fits = {x: all(a in ("", b) for a, b in zip(name, x, strict=True)) for x in OBJECTS}
    for slot in range(2):
        there = [len(s.objects) > slot and fits[s.objects[slot]] for s in scenes()]
        rows[slot] = torch.tensor(there)
    return rows


@cache
def _is(value: str) -> Tensor:
    return torch.tensor([getattr(scene, OWNER[value]) == value for scene in scenes()])


@functools.lru_cache(maxsize=4096)
def _item_holds(item: Item) -> Tensor:
    """Whether all of an item is true of each scene: `[9984]`."""
    true = torch.ones(len(scenes()), dtype=torch.bool)
    for value in item.values:
        true = true & _is(value)
    if len(item.objects) == 1:
        true = true & _has(item.objects[0]).any(0)
    elif item.objects:
        (a_left, a_right), (b_left, b_right) = map(_has, item.objects)
        # one object each
        true = true & (a_left & b_right | a_right & b_left)
    return true


def holds(caption: str) -> Tensor:
    """Whether a caption is true of each scene: `[9984]`."""
    alternatives: dict[frozenset, Tensor] = {}
    for item in read(caption):
        true = _item_holds(item)
        before = alternatives.get(item.attributes)
        alternatives[item.attributes] = true if before is None else before | true
    true = torch.ones(len(scenes()), dtype=torch.bool)
    for either in alternatives.values():
        true = true & either
    return true


def shown(caption: str) -> Tensor:
    """Whether any item of a caption is true of each scene: `[9984]`."""
    rows = [_item_holds(item) for item in read(caption)]
    return torch.stack(rows).any(0) if rows else torch.zeros(len(scenes()), dtype=torch.bool)


def matches(captions: list[str]) -> Tensor:
    """Whether each caption is true of each scene, as numbers: `[captions, scenes]`."""
    return torch.stack([holds(caption) for caption in captions]).float()


# what `mentions` tells apart: values of the image, one of two objects, an object by its name
MENTIONED = (*(value for value in OWNER if OWNER[value] not in OBJECT_RATES), *NAMES)


def mentions(captions: list[str]) -> Tensor:
    """Whether each caption names each of `MENTIONED`, as numbers: `[captions, MENTIONED]`."""
    rows = []
    for caption in captions:
        items = read(caption)
        named: set[str | Object] = {value for item in items for value in item.values}
        named |= {thing for item in items for thing in item.objects}
        if any(len(item.objects) == 2 for item in items):
            named.add("pair")
        rows.append([float(what in named) for what in MENTIONED])
    return torch.tensor(rows)
