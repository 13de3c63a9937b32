"""The student's start: regression on what the teacher draws from the same noise, as in DMD.

Variational score distillation from the teacher's own weights begins with averages of images, which
have no direction to the nearest one; a student that has seen pairs of noise and image begins with
images.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from nasa_distill import checkpoint, losses
from nasa_distill.fit import Settings, fit, generator
from nasa_distill.networks import Model, Text
from nasa_distill.teacher import CHECKS, ddim, summary
from nasa_distill.world.captions import draw_caption
from nasa_distill.world.scene import scenes

CHUNK = 128


def make_pairs(
    teacher: Model,
    count: int,
    out: Path,
    guidance: float,
    steps: int,
    guided_from: int = 999,
    seed: int = 0,
) -> tuple[Tensor, Tensor, list[str]]:
    """Noise, the teacher's latents for it, and the captions; what is in `out` is not made again.

    The teacher runs in bf16: its images are told apart, or not, long before its rounding matters.

    Raises:
        ValueError: `out` holds pairs that were made otherwise.
    """
    made: list[dict[str, Any]] = []
    teacher.denoiser.to(memory_format=torch.channels_last)
    null = teacher.encode([""]).embeds
    rates = torch.tensor([scene.rate for scene in scenes()], dtype=torch.float64)
    for number in tqdm(range(-(-count // CHUNK)), "pairs"):
        path = out / "pairs" / f"{number:04d}.pt"
        identity = {"guidance": guidance, "steps": steps, "seed": seed, "number": number}
        identity["guided_from"] = guided_from
        chunk = checkpoint.load(path, identity)
        if chunk is None:
            rng, noise_of = random.Random(f"{seed} {number}"), generator(seed, number)
            rows = torch.multinomial(rates, CHUNK, replacement=True, generator=noise_of)
            captions = [draw_caption(scenes()[i], rng, 0.02) for i in rows.tolist()]
            noise = torch.randn(CHUNK, *teacher.latent_shape, generator=noise_of)
            text = teacher.encode(captions).embeds
            with torch.autocast(noise.device.type, torch.bfloat16):
                *_, x0 = ddim(teacher.denoiser, noise, text, null, guidance, steps, guided_from)
            chunk = {"settings": identity, "noise": noise, "x0": x0, "captions": captions}
            checkpoint.save(chunk, path)
        made.append(chunk)
    captions = [caption for chunk in made for caption in chunk["captions"]]
    return torch.cat([c["noise"] for c in made]), torch.cat([c["x0"] for c in made]), captions


def train(
    teacher: Model,
    pairs: tuple[Tensor, Tensor, list[str]],
    cycles: Sequence[Settings],
    out: Path,
) -> Any:
    """A one-step student, begun with the teacher's weights; see `fit` for what it raises.

    Args:
        cycles: As of `teacher.train`.
    """
    noise, x0, captions = pairs
    words = sorted(set(captions))
    index = {caption: i for i, caption in enumerate(words)}
    texts = teacher.encode(words).embeds
    rows_of = torch.tensor([index[caption] for caption in captions])

    def draw(student: Any, z: Tensor, text: Tensor) -> Tensor:
        last = torch.full((len(z),), teacher.last_timestep)
        return teacher.x0(student, z, last, Text(text, None))

    def loss(student: Any, step: int, random_: torch.Generator) -> Tensor:
        rows = torch.randint(len(noise), (settings.batch,), generator=random_)
        drawn = draw(student, noise[rows], texts[rows_of[rows]])
        return losses.regression_loss(drawn, x0[rows])

    @torch.no_grad()
    def check(student: Any) -> list[dict[str, Any]]:
        found = []
        for prompt in CHECKS:
            z = torch.randn(256, *teacher.latent_shape, generator=generator(7, 0))
            text = teacher.encode([prompt]).embeds.expand(len(z), -1, -1)
            found.append({"prompt": prompt, **summary(draw(student, z, text), prompt)})
        return found

    student = copy.deepcopy(teacher.denoiser)
    for number, settings in enumerate(cycles):
        student.requires_grad_(True)
        folder = out / f"cycle-{number}"
        student = fit(student, loss, settings, folder, "student", check, check_every=250)
    return student
