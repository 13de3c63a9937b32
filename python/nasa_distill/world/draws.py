"""Latents that networks draw, for a decoder that learns to decide what they leave open."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nasa_distill.train import checkpoint
from nasa_distill.train.networks import Model
from nasa_distill.train.seeds import generator
from nasa_distill.world.kinds import World
from nasa_distill.world.students import begins, walk
from nasa_distill.world.teacher import ddim

CHUNK = 64  # drawn at once
GUIDANCES = (1.0, 2.0)  # of a teacher, in turn
TEACHER_STEPS = 25


class Draws(NamedTuple):
    """Latents, and what they were to show."""

    latents: Tensor  # [n, c, h, w]
    captions: list[str]


def of_student(
    model: Model, student: Any, steps: int, count: int, world: World, path: Path, seed: int
) -> list[Draws]:
    """`count` after one step, after two, and so on up to `steps`. What is in `path` is kept.

    Args:
        model: Encodes text for the student, and says how it is called.

    Raises:
        ValueError: `path` holds others.
    """

    def chunk(captions: list[str], x: Tensor, random_: torch.Generator) -> list[Tensor]:
        text, timesteps = model.encode(captions), begins(model, steps)
        states, drawn = walk(model, student, x, text, timesteps, random_)
        return [*drawn, model.x0(student, states[-1], timesteps[-1:].expand(len(x)), text)]

    return _draws(chunk, model, count, world, path, {"student": steps, "seed": seed})


def of_teacher(model: Model, count: int, world: World, path: Path, seed: int) -> list[Draws]:
    """By DDIM, without guidance and with it in turn. What is in `path` is kept.

    Raises:
        ValueError: `path` holds others.
    """
    null = model.encode([""]).embeds

    def chunk(captions: list[str], x: Tensor, random_: torch.Generator) -> list[Tensor]:
        text = model.encode(captions).embeds
        parts = [
            list(ddim(model.denoiser, x[i::2], text[i::2], null, guidance, TEACHER_STEPS))[-1]
            for i, guidance in enumerate(GUIDANCES)
        ]
        drawn = torch.empty_like(x)
        drawn[0::2], drawn[1::2] = parts
        return [drawn]

    return _draws(chunk, model, count, world, path, {"teacher": TEACHER_STEPS, "seed": seed})


@torch.no_grad()
def _draws(
    chunk: Callable[[list[str], Tensor, torch.Generator], list[Tensor]],
    model: Model,
    count: int,
    world: World,
    path: Path,
    identity: dict[str, Any],
) -> list[Draws]:
    identity = identity | {"count": count}
    made = checkpoint.load(path, identity)
    if made is None:
        parts, captions = [], []
        for number in range(-(-count // CHUNK)):
            random_ = generator(identity["seed"], number)
            rows = world.draw(CHUNK, random_)
            captions += world.captions(rows, random.Random(f"{identity['seed']} {number}"))
            noise = torch.randn(CHUNK, *model.latent_shape, generator=random_)
            parts.append(torch.stack(chunk(captions[-CHUNK:], noise, random_)))
        made = {"latents": torch.cat(parts, dim=1)[:, :count], "captions": captions[:count]}
        made["settings"] = identity
        checkpoint.save(made, path)
    return [Draws(latents, made["captions"]) for latents in made["latents"]]
