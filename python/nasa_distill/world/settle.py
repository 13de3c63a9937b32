"""A student that settles each of its own draws on one image of the world.

Regression on paths from noise to images (`students`) draws averages wherever a little noise decides
between two images. Which of the two it is does not matter, so here the student's own draw decides:
it learns to draw, of the images c of the world of which the caption is true, the likeliest one by
its latents x_t and by what it drew from them, each taken for a noisy c:

    argmax_c  log rate(c) - |x_t - alpha c|^2 / 2 sigma^2 - |x_0 - c|^2 / 2 NEAR^2

At the first timestep x_t says nothing of c and the draw decides; at the last x_t does. The latents
are its own: it walks to each timestep as the pipeline does, with new noise. So it also sees what
its own steps get wrong (Ross et al., 2011, for imitation). A part of the regression stays, so that
no image falls out of use.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nasa_distill.train import losses
from nasa_distill.train.networks import Model, Text
from nasa_distill.train.seeds import generator
from nasa_distill.world.fit import Settings, fit
from nasa_distill.world.kinds import Code, World
from nasa_distill.world.students import CHUNK, QUARTERS, Pairs, begins, texts_of
from nasa_distill.world.teacher import log_weights, summaries, weigher

CHECKED = 128  # images of each prompt that is drawn on the way
NEAR = 0.3  # noise through which a draw is taken for an image
ANCHOR = 0.25  # weight of the regression
FIRST = 2  # how often the first timestep, from which one step must do, beside each other one


def train(
    model: Model,
    student: Any,
    pairs: Pairs,
    steps: int,
    cycles: Sequence[Settings],
    out: Path,
    world: World,
    code: Code,
    known: Tensor,
    floor: float | None = None,
    half: bool = False,
) -> Any:
    """Train, or go on training; see `fit` for what it raises, and `students.train` for the rest."""
    texts, rows_of = texts_of(model, pairs)
    taught, rates = begins(model, steps), world.rates()
    whiten = weigher(known, rates, floor)
    turns = [0] * (FIRST - 1) + list(range(steps))

    def loss(student: Any, step: int, random_: torch.Generator) -> Tensor:
        rows = torch.randint(len(pairs.x0), (settings.batch,), generator=random_)
        text = texts.rows(rows_of[rows])
        turn = turns[int(torch.randint(len(turns), (), generator=random_))]
        when = taught[turn].expand(len(rows))
        with torch.autocast(text.embeds.device.type, torch.bfloat16, enabled=half):
            x_t = walk(model, student, pairs.states[0, rows], text, taught[: turn + 1], random_)
            drawn = model.x0(student, x_t, when, text)
        allowed = world.matches([pairs.captions[i] for i in rows.tolist()]) * rates
        alpha_sigma = model.alpha_sigma(when)
        right = known[likeliest(x_t, drawn.detach(), *alpha_sigma, known, allowed)]
        value = losses.regression_loss(whiten(drawn), whiten(right))
        if turn == 0:
            value = value + ANCHOR * losses.regression_loss(whiten(drawn), whiten(pairs.x0[rows]))
        return value

    @torch.no_grad()
    def check(student: Any) -> list[dict[str, Any]]:
        """In all of its steps."""

        def drawn(prompt: str) -> Tensor:
            random_ = torch.Generator().manual_seed(7)
            z = torch.randn(CHECKED, *model.latent_shape, generator=random_)
            text = model.encode([prompt] * len(z))
            x_t = walk(model, student, z, text, taught, random_)
            return model.x0(student, x_t, taught[-1:].expand(len(z)), text)

        return summaries(drawn, world, code)

    student = copy.deepcopy(student)
    for number, settings in enumerate(cycles):
        student.requires_grad_(True)
        folder = out / f"settled-{number}"
        student = fit(student, loss, settings, folder, "student", check, check_every=500)
    return student


class Drawn(NamedTuple):
    """What a student draws, and what it should have drawn."""

    latents: Tensor  # [n, c, h, w]
    scenes: Tensor  # [n], the likeliest ones


@torch.no_grad()
def draw(
    model: Model,
    student: Any,
    pairs: Pairs,
    count: int,
    world: World,
    known: Tensor,
    seed: int = 0,
) -> Drawn:
    """From the noise and the captions of `count` pairs, in one step and in four: `2 count`."""
    texts, rows_of = texts_of(model, pairs)
    parts = []
    for rows in torch.arange(min(count, len(pairs.x0))).split(CHUNK):
        text, random_ = texts.rows(rows_of[rows]), generator(seed, int(rows[0]))
        allowed = world.matches([pairs.captions[i] for i in rows.tolist()]) * world.rates()
        for steps in (1, QUARTERS):
            taught = begins(model, steps)
            when = taught[-1].expand(len(rows))
            x_t = walk(model, student, pairs.states[0, rows], text, taught, random_)
            x0 = model.x0(student, x_t, when, text)
            scenes = likeliest(x_t, x0, *model.alpha_sigma(when), known, allowed)
            parts.append(Drawn(x0, scenes))
    return Drawn(*map(torch.cat, zip(*parts, strict=True)))


def likeliest(
    x_t: Tensor, x0: Tensor, alpha: Tensor, sigma: Tensor, known: Tensor, rates: Tensor
) -> Tensor:
    """Which image of the world each draw `x0` from `x_t` is to become: `[b]`.

    Args:
        x_t, alpha, sigma, known, rates: As of `teacher.posterior_mean`.
    """
    one = torch.ones_like(alpha)
    by_draw = log_weights(x0, one, NEAR * one, known, rates)
    return (log_weights(x_t, alpha, sigma, known, torch.ones_like(rates)) + by_draw).argmax(1)


@torch.no_grad()
def walk(
    model: Model,
    student: Any,
    noise: Tensor,
    text: Text,
    timesteps: Tensor,
    random_: torch.Generator,
) -> Tensor:
    """Its latents at the last of the timesteps: all but the last are steps of LCM's scheduler.

    x <- alpha x_0 + sigma noise,    with alpha and sigma of the next timestep
    """
    x = noise
    for now, following in zip(timesteps[:-1], timesteps[1:], strict=True):
        x0 = model.x0(student, x, now.expand(len(x)), text)
        alpha, sigma = model.alpha_sigma(following.expand(len(x)))
        x = alpha * x0 + sigma * torch.randn(x.shape, generator=random_)
    return x
