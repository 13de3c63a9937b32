"""Students by regression: from noise, learn the image that the teacher draws from it, as in DMD.

NASA-T starts from such a student. In one step the teacher's own weights draw averages of many
images, and variational score distillation does not lead from there to a single one.

A student of one step learns the end of the teacher's path from its beginning; a student of four
steps learns it from the beginning of each quarter. One of another architecture learns from a
student of four steps, and from each of its steps what it draws there: a function of one network,
where the end of a path is one of four after another.
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
from nasa_distill.world.fit import Settings, fit, in_bf16
from nasa_distill.world.kinds import SMALL, Code, World
from nasa_distill.world.model import NOISE, alpha_sigma
from nasa_distill.world.teacher import ddim, posterior_mean, summaries, weigher

CHUNK = 128
QUARTERS = 4
P_EMPTY = 0.02  # captions left empty, for classifier-free guidance
_Path = tuple[Tensor, Tensor]  # states and images, as of `Pairs`


class Pairs(NamedTuple):
    """The teacher's paths: n of them."""

    states: Tensor  # [4, n, c, h, w]: noise, then the latents after a quarter, a half, ...
    x0: Tensor  # [n, c, h, w], where the path ends; of a student [4, n, ...], what it draws there
    captions: list[str]

    def lessons(self, quarters: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Latents, and the image to draw from them: `[b, c, h, w]` each."""
        x0 = self.x0[rows] if self.x0.dim() == 4 else self.x0[quarters, rows]
        return self.states[quarters, rows], x0


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

    The teacher runs as `in_bf16`: the rounding is small beside the distances between images.

    Raises:
        ValueError: `out` holds pairs that were made otherwise, or `steps` has no quarters.
    """
    count, guidance, steps, guided_from, seed = plain([count, guidance, steps, guided_from, seed])
    _check_quarters("make_pairs", steps)
    teacher.denoiser.to(memory_format=torch.channels_last)
    null = teacher.encode([""]).embeds

    def draw(captions: list[str], noise: Tensor, random_: torch.Generator) -> _Path:
        text = teacher.encode(captions).embeds
        with in_bf16(noise.device.type):
            path = ddim(teacher.denoiser, noise, text, null, guidance, steps, guided_from)
            return _quartered(noise, path, steps)

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

    def draw(captions: list[str], noise: Tensor, random_: torch.Generator) -> _Path:
        rates = world.matches(captions) * world.rates()
        return _quartered(noise, exact_path(noise, rates, exact, steps), steps)

    identity = {"teacher": "exact", "steps": steps, "seed": seed}
    return _pairs(draw, known.shape[1:], world, count, out, identity)


def shown_pairs(
    shown: Model, which: str, world: World, count: int, out: Path, seed: int = 0
) -> Pairs:
    """As `make_pairs`, of a student of four steps, which walks as LCM's scheduler has it walk.

    Args:
        which: Tells one student from another: what `out` holds of another is not taken.
    """
    count, seed = plain([count, seed])
    taught = begins(shown, QUARTERS)
    shown.denoiser.to(memory_format=torch.channels_last)

    def draw(captions: list[str], noise: Tensor, random_: torch.Generator) -> _Path:
        text = shown.encode(captions)
        states, x0 = walk(shown, shown.denoiser, noise, text, taught, random_)
        last = shown.x0(shown.denoiser, states[-1], taught[-1:].expand(len(noise)), text)
        return states, torch.stack([*x0, last])

    identity = {"teacher": which, "steps": QUARTERS, "seed": seed}
    return _pairs(draw, shown.latent_shape, world, count, out, identity)


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


@torch.no_grad()
def walk(
    model: Model,
    student: Any,
    noise: Tensor,
    text: Text,
    timesteps: Tensor,
    random_: torch.Generator,
) -> tuple[Tensor, list[Tensor]]:
    """Its latents at each of the timesteps, `[t, b, c, h, w]`, by steps of LCM's scheduler.

    And what it draws there, at all but the last.
    """
    states, drawn = [noise], []
    for now, following in zip(timesteps[:-1], timesteps[1:], strict=True):
        drawn.append(model.x0(student, states[-1], now.expand(len(noise)), text))
        states.append(renoised(model, drawn[-1], following, random_))
    return torch.stack(states), drawn


def renoised(model: Model, x0: Tensor, timestep: Tensor, random_: torch.Generator) -> Tensor:
    """The latents `[b, c, h, w]` at a timestep, as of a step of LCM's scheduler.

    alpha x_0 + sigma noise
    """
    alpha, sigma = model.alpha_sigma(timestep.expand(len(x0)))
    return alpha * x0 + sigma * torch.randn(x0.shape, generator=random_)


def _quartered(noise: Tensor, path: Iterable[Tensor], steps: int) -> _Path:
    *states, x0 = [noise, *path][:: steps // QUARTERS]
    return torch.stack(states), x0


def _pairs(
    draw: Callable[[list[str], Tensor, torch.Generator], _Path],
    shape: Sequence[int],
    world: World,
    count: int,
    out: Path,
    identity: dict[str, Any],
) -> Pairs:
    """Of the states and the images that `draw` gives for captions and noise."""
    made: list[dict[str, Any]] = []
    seed = identity["seed"]
    for number in tqdm(range(-(-count // CHUNK)), "pairs"):
        path, named = out / "pairs" / f"{number:04d}.pt", identity | {"number": number}
        chunk = checkpoint.load(path, named)
        if chunk is None:
            rng, noise_of = random.Random(f"{seed} {number}"), generator(seed, number)
            captions = world.captions(world.draw(CHUNK, noise_of), rng, P_EMPTY)
            noise = torch.randn(CHUNK, *shape, generator=noise_of)
            states, x0 = draw(captions, noise, noise_of)
            chunk = {"states": states, "x0": x0, "captions": captions}
            chunk["settings"] = named
            checkpoint.save(chunk, path)
        made.append(chunk)
    return Pairs(
        torch.cat([chunk["states"] for chunk in made], dim=1),
        torch.cat([chunk["x0"] for chunk in made], dim=-4),
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

    def loss(student: Any, step: int, random_: torch.Generator) -> Tensor:
        rows = torch.randint(len(pairs.captions), (settings.batch,), generator=random_)
        quarter = torch.randint(steps, (settings.batch,), generator=random_)
        x_t, x0 = pairs.lessons(quarter, rows)
        drawn = model.x0(student, x_t, taught[quarter], texts.rows(rows_of[rows]))
        return losses.regression_loss(whiten(drawn), whiten(x0))

    @torch.no_grad()
    def check(student: Any) -> list[dict[str, Any]]:
        def drawn(prompt: str) -> Tensor:
            z = torch.randn(256, *model.latent_shape, generator=generator(7, 0))
            when, text = taught[:1].expand(len(z)), model.encode([prompt] * len(z))
            return model.x0(student, z, when, text)

        return summaries(drawn, world, code)

    student = copy.deepcopy(student)
    for number, settings in enumerate(cycles):
        student.requires_grad_(True)
        folder = out / f"cycle-{number}"
        student = fit(student, loss, settings, folder, "student", check, check_every=250)
    return student
