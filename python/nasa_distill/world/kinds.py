"""The worlds, as what training needs of one.

    SMALL   32x32 images, one object: 288 scenes, a latent code set by hand
    LARGE   64x64 images, one object or two, text and frame: 9984 scenes, a trained autoencoder

Their latents have one shape, and the networks above them one kind.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from nasa_distill.world import captions as small_captions
from nasa_distill.world import judge as small_judge
from nasa_distill.world import scene as small_scene
from nasa_distill.world.large import captions as large_captions
from nasa_distill.world.large import judge as large_judge
from nasa_distill.world.large import scene as large_scene


class Verdict(Protocol):
    """What a judge says of images."""

    @property
    def scene(self) -> Tensor: ...
    @property
    def residual(self) -> Tensor: ...
    @property
    def valid(self) -> Tensor: ...
    def shows(self, caption: str) -> Tensor: ...
    def follows(self, caption: str) -> Tensor: ...


class Code(Protocol):
    """Between images and latents of mean 0 and variance 1."""

    @property
    def vae(self) -> Any: ...  # the same, for a pipeline
    def encode(self, images: Tensor) -> Tensor: ...
    def decode(self, codes: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class World:
    """Scenes are numbered; captions are texts."""

    name: str
    size: int  # of images, in pixels
    words: tuple[str, ...]
    max_tokens: int
    rates: Callable[[], Tensor]  # how often each scene occurs, `[n]` in float64
    images: Callable[[Tensor], Tensor]  # of numbered scenes `[b]`: `[b, 3, size, size]` in [-1, 1]
    caption: Callable[[int, random.Random, float], str]  # a scene's; the last number: left empty
    matches: Callable[[list[str]], Tensor]  # `[captions, scenes]`
    mentions: Callable[[list[str]], Tensor]  # `[captions, mentioned]`
    mentioned: int
    read: Callable[[str], Any]  # raises ValueError for a word that the world lacks
    judge: Callable[[Tensor], Verdict]
    describe: Callable[[int], dict[str, str]]  # a scene's value of each attribute
    checks: tuple[str, ...]  # prompts that are drawn and judged on the way
    owner: dict[str, str]  # the attribute that each value is one of

    @property
    def negatives(self) -> tuple[str, ...]:
        """What a negative prompt of NASA-T may name, alone or by twos."""
        return tuple(self.owner)

    def draw(self, count: int, random_: torch.Generator) -> Tensor:
        """Numbers of scenes, by their rates: `[count]`."""
        return torch.multinomial(self.rates(), count, replacement=True, generator=random_)

    @cached_property
    def shares(self) -> dict[str, float]:
        """How often each value is that of its attribute, by both: `{"colour red": 0.25, ...}`."""
        found: dict[str, dict[str, float]] = {}
        for scene, rate in enumerate(self.rates().tolist()):
            for attribute, of_objects in self.describe(scene).items():
                values = found.setdefault(attribute, {})
                for value in of_objects.split():
                    values[value] = values.get(value, 0.0) + rate
        return {
            f"{attribute} {value}": rate / sum(values.values())
            for attribute, values in found.items()
            for value, rate in values.items()
        }

    def captions(self, rows: Tensor, rng: random.Random, p_empty: float = 0.0) -> list[str]:
        """One of each scene in `rows`."""
        return [self.caption(i, rng, p_empty) for i in rows.tolist()]


def _small_images(rows: Tensor) -> Tensor:
    return small_scene.renders()[0][rows]


def _small_caption(scene: int, rng: random.Random, p_empty: float) -> str:
    return small_captions.draw_caption(small_scene.scenes()[scene], rng, p_empty)


def _large_images(rows: Tensor) -> Tensor:
    return large_scene.render([large_scene.scenes()[i] for i in rows.tolist()])


def _large_caption(scene: int, rng: random.Random, p_empty: float) -> str:
    return large_captions.draw_caption(large_scene.scenes()[scene], rng, p_empty)


SMALL = World(
    name="small",
    size=small_scene.SIZE,
    words=small_captions.WORDS,
    max_tokens=small_captions.MAX_TOKENS,
    rates=lambda: small_scene.renders()[1],
    images=_small_images,
    caption=_small_caption,
    matches=small_captions.matches,
    mentions=small_captions.mentions,
    mentioned=len(small_captions.OWNER),
    read=small_captions.read,
    judge=small_judge.judge,
    describe=lambda scene: small_scene.scenes()[scene]._asdict(),
    checks=(
        "a photo of a shape",
        "a photo of a red circle",
        "a clean photo of a large blue striped triangle on a white background",
    ),
    owner=small_captions.OWNER,
)
LARGE = World(
    name="large",
    size=large_scene.SIZE,
    words=large_captions.WORDS,
    max_tokens=large_captions.MAX_TOKENS,
    rates=large_scene.rates,
    images=_large_images,
    caption=_large_caption,
    matches=large_captions.matches,
    mentions=large_captions.mentions,
    mentioned=len(large_captions.MENTIONED),
    read=large_captions.read,
    judge=large_judge.judge,
    describe=lambda scene: large_scene.scenes()[scene].described(),
    checks=(
        "a photo of a shape",
        "a photo of a red circle and a blue square",
        "a clean photo of a single large blue striped triangle on a white background",
        "a framed photo of a circle on a black background with text",
    ),
    owner=large_captions.OWNER,
)
WORLDS = {world.size: world for world in (SMALL, LARGE)}


def of_images(images: Tensor) -> World:
    """The world that images are of, by their size.

    Raises:
        ValueError: No world has images of that size.
    """
    size = images.shape[-1] if images.dim() else 0
    if size not in WORLDS:
        raise ValueError(
            f"kinds.of_images: images must be {' or '.join(map(str, WORLDS))} pixels wide, got "
            f"{list(images.shape)}"
        )
    return WORLDS[size]


def world_of(model: Any) -> World:
    """The world of a `train.networks.Model`, by the size of its images.

    Raises:
        ValueError: It draws images of another size.
    """
    return _of_size(model.latent_shape[-1] * model.pipe.vae_scale_factor, "world_of")


def world_at(folder: Path) -> World:
    """The world of the pipeline in a folder; no weights are read.

    Raises:
        ValueError: There is no pipeline, or it draws images of another size.
    """
    try:
        denoisers = [folder / name / "config.json" for name in ("unet", "transformer")]
        denoiser = next((path for path in denoisers if path.exists()), denoisers[0])
        latents = json.loads(denoiser.read_text(encoding="utf-8"))["sample_size"]
        vae = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
        size = latents * 2 ** (len(vae["block_out_channels"]) - 1)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"kinds.world_at: {folder} must hold a pipeline of a small world ({error}); give a "
            "folder that the command world made"
        ) from error
    return _of_size(size, "world_at")


def _of_size(size: int, function: str) -> World:
    if size not in WORLDS:
        raise ValueError(
            f"kinds.{function}: the model must draw images of {' or '.join(map(str, WORLDS))} "
            f"pixels, got {size}; it is none of a small world"
        )
    return WORLDS[size]
