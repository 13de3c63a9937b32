"""Students by regression: from noise, learn the image that the teacher draws from it, as in DMD.

NASA-T starts from such a student. In one step the teacher's own weights draw averages of many
images, and variational score distillation does not lead from there to a single one.

A student of one step learns the end of the teacher's path from its beginning; a student of four
steps learns it from the beginning of each quarter.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DDIMScheduler
from torch import Tensor
from tqdm import tqdm

from nasa_distill.scalars import plain
from nasa_distill.train import checkpoint, losses
from nasa_distill.train.networks import Model, Text
from nasa_distill.train.seeds import generator
from nasa_distill.world.fit import Settings, fit
from nasa_distill.world.kinds import SMALL, Code, World
from nasa_distill.world.model import NOISE, alpha_sigma
from nasa_distill.world.teacher import ddim, posterior_mean, summaries, weigher

CHUNK = 128
QUARTERS = 4


class Pairs(NamedTuple):
    """The teacher's paths: n of them."""

    states: Tensor  # [4, n, c, h, w]: noise, then the latents after a quarter, a half, ...
    x0: Tensor  # [n, c, h, w], where the path ends
    captions: list[str]


def make_pairs(
    teacher: Model,
    count: int,
    out: Path,
    guidance: float,
    steps: int,
    guided_from: int = 999,
    seed: int = 0,
    world: World = SMALL,
) -> Pairs:
    """Noise, the teacher's latents for it, and the captions; what is in `out` is not made again.

    The teacher runs in bf16: its rounding is small beside the distances between images.

    Raises:
        ValueError: `out` holds pairs that were made otherwise, or `steps` has no quarters.
    """
    count, guidance, steps, guided_from, seed = plain([count, guidance, steps, guided_from, seed])
    _check_quarters("make_pairs", steps)
    teacher.denoiser.to(memory_format=torch.channels_last)
    null = teacher.encode([""]).embeds

    def draw(captions: list[str], noise: Tensor) -> Iterator[Tensor]:
        text = teacher.encode(captions).embeds
        with torch.autocast(noise.device.type, torch.bfloat16):
            yield from ddim(teacher.denoiser, noise, text, null, guidance, steps, guided_from)

    identity = {"guidance": guidance, "steps": steps, "seed": seed, "guided_from": guided_from}
    return _pairs(draw, teacher.latent_shape, world, count, out, identity)


def exact_pairs(
    known: Tensor, world: World, count: int, out: Path, steps: int, seed: int = 0
) -> Pairs:
    """As `make_pairs`, of the teacher that a network only comes near: `posterior_mean` itself.

    Every path ends at an image of the world of which the caption is true, so no guidance is needed.
    """
    count, steps, seed = plain([count, steps, seed])
    _check_quarters("exact_pairs", steps)
    exact = known.double()

    def draw(captions: list[str], noise: Tensor) -> Iterator[Tensor]:
        yield from exact_path(noise, world.matches(captions) * world.rates(), exact, steps)

    identity = {"teacher": "exact", "steps": steps, "seed": seed}
    return _pairs(draw, known.shape[1:], world, count, out, identity)


def exact_path(
    x: Tensor, rates: Tensor, known: Tensor, steps: int, quarter: int = 0
) -> Iterator[Tensor]:
    """The latents after each of `steps` deterministic steps of `posterior_mean`.

    Args:
        rates, known: As of `posterior_mean`.
        quarter: Where `x` stands on the path: the steps before it are not made.
    """
    scheduler: Any = DDIMScheduler(**NOISE, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps[quarter * steps // QUARTERS :]:
        alpha, sigma = alpha_sigma(scheduler, t.expand(len(x)))
        x0 = posterior_mean(x, alpha, sigma, known, rates)
        x = scheduler.step(x0, t, x).prev_sample
        yield x


def _pairs(
    draw: Callable[[list[str], Tensor], Iterable[Tensor]],
    shape: Sequence[int],
    world: World,
    count: int,
    out: Path,
    identity: dict[str, Any],
) -> Pairs:
    """Of what `draw` gives after each step, for captions and noise."""
    made: list[dict[str, Any]] = []
    seed, steps = identity["seed"], identity["steps"]
    for number in tqdm(range(-(-count // CHUNK)), "pairs"):
        path, named = out / "pairs" / f"{number:04d}.pt", identity | {"number": number}
        chunk = checkpoint.load(path, named)
        if chunk is None:
            rng, noise_of = random.Random(f"{seed} {number}"), generator(seed, number)
            captions = world.captions(world.draw(CHUNK, noise_of), rng, 0.02)
            noise = torch.randn(CHUNK, *shape, generator=noise_of)
            *states, x0 = [noise, *draw(captions, noise)][:: steps // QUARTERS]
            chunk = {"states": torch.stack(states), "x0": x0, "captions": captions}
            chunk["settings"] = named
            checkpoint.save(chunk, path)
        made.append(chunk)
    return Pairs(
        torch.cat([chunk["states"] for chunk in made], dim=1),
        torch.cat([chunk["x0"] for chunk in made]),
        [caption for chunk in made for caption in chunk["captions"]],
    )


def _check_quarters(function: str, steps: int) -> None:
    if steps % QUARTERS:
        raise ValueError(
            f"students.{function}: steps must be a multiple of {QUARTERS}, got {steps}"
        )


def begins(model: Model, steps: int) -> Tensor:
    """The timesteps at which the quarters of the path begin, the first `steps` of them."""
    quarter = len(model.alphas_cumprod) // QUARTERS
    return model.last_timestep - quarter * torch.arange(steps)


def texts_of(model: Model, pairs: Pairs) -> tuple[Text, Tensor]:
    """The captions, each once, and which of them each pair has: `[n]`."""
    captions = sorted(set(pairs.captions))
    index = {caption: i for i, caption in enumerate(captions)}
    return model.encode(captions), torch.tensor([index[caption] for caption in pairs.captions])


def train(
    model: Model,
    student: Any,
    pairs: Pairs,
    steps: int,
    cycles: Sequence[Settings],
    out: Path,
    world: World,
    code: Code,
    half: bool = False,
    known: Tensor | None = None,
    floor: float | None = None,
) -> Any:
    """A student of one step or of four; see `fit` for what it raises.

    Args:
        model: Encodes text for the student, and says how it is called. With the schedule of the
            teacher of the pairs, and the same latents, but it may be of another architecture.
        student: Where it begins, a network of the kind of the model's. It is not changed.
        steps: 1 or 4: how many quarters of the path it learns to begin at.
        cycles: As of `teacher.train`.
        half: Multiply matrices in bf16.
        known: The `latents` of the world, for `floor`.
        floor: Of the `teacher.whitening` of the loss; None: the plain squared error.

    Raises:
        ValueError: `floor` is set without `known`.
    """
    if known is None:
        if floor is not None:
            raise ValueError("students.train: floor needs known, the world's latents")
        known = torch.empty(0)
    texts, rows_of = texts_of(model, pairs)
    taught = begins(model, steps)
    whiten = weigher(known, world.rates(), floor)

    def draw(student: Any, x_t: Tensor, timesteps: Tensor, text: Text) -> Tensor:
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=half):
            return model.x0(student, x_t, timesteps, text)

    def loss(student: Any, step: int, random_: torch.Generator) -> Tensor:
        rows = torch.randint(len(pairs.x0), (settings.batch,), generator=random_)
        quarter = torch.randint(steps, (settings.batch,), generator=random_)
        x_t, text = pairs.states[quarter, rows], texts.rows(rows_of[rows])
        drawn = draw(student, x_t, taught[quarter], text)
        return losses.regression_loss(whiten(drawn), whiten(pairs.x0[rows]))

    @torch.no_grad()
    def check(student: Any) -> list[dict[str, Any]]:
        def drawn(prompt: str) -> Tensor:
            z = torch.randn(256, *model.latent_shape, generator=generator(7, 0))
            return draw(student, z, taught[:1].expand(len(z)), model.encode([prompt] * len(z)))

        return summaries(drawn, world, code)

    student = copy.deepcopy(student)
    for number, settings in enumerate(cycles):
        student.requires_grad_(True)
        folder = out / f"cycle-{number}"
        student = fit(student, loss, settings, folder, "student", check, check_every=250)
    return student
