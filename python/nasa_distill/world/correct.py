"""A student of four steps that learns what to make of its own latents.

In the first half of the path a student begins at the states of its teacher's, in the second at what
its own first steps came to, with new noise, as the pipeline's scheduler adds it. There the exact
denoiser says what to draw. On the teacher's path alone it never sees latents between two images,
which its own are, and does not learn to decide for one (Ross et al., 2011, for imitation).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nasa_distill.train import losses
from nasa_distill.train.networks import Model, Text
from nasa_distill.world.fit import Settings, fit
from nasa_distill.world.kinds import Code, World
from nasa_distill.world.students import QUARTERS, Pairs, begins, texts_of
from nasa_distill.world.teacher import posterior_mean, summaries, weigher

CHECKED = 128  # images of each prompt that is drawn on the way


def train(
    model: Model,
    student: Any,
    pairs: Pairs,
    cycles: Sequence[Settings],
    out: Path,
    world: World,
    code: Code,
    known: Tensor,
    floor: float | None = None,
) -> Any:
    """Train, or go on training; see `fit` for what it raises, and `students.train` for the rest."""
    texts, rows_of = texts_of(model, pairs)
    taught, exact = begins(model, QUARTERS), known.double()
    whiten = weigher(known, world.rates(), floor)

    def loss(student: Any, step: int, random_: torch.Generator) -> Tensor:
        rows = torch.randint(len(pairs.x0), (settings.batch,), generator=random_)
        text, half = texts.rows(rows_of[rows]), settings.batch // 2
        # the teacher's states
        quarter = torch.randint(QUARTERS // 2, (half,), generator=random_)
        states, ends = pairs.states[quarter, rows[:half]], pairs.x0[rows[:half]]
        # its own
        later = int(torch.randint(QUARTERS // 2, (), generator=random_)) + QUARTERS // 2
        own = text.rows(torch.arange(half, len(rows)))
        x_t = walk(model, student, pairs.states[0, rows[half:]], own, taught[: later + 1], random_)
        when = taught[later].expand(len(x_t))
        allowed = world.matches([pairs.captions[i] for i in rows[half:].tolist()]) * world.rates()
        right = posterior_mean(x_t, *model.alpha_sigma(when), exact, allowed)
        drawn = model.x0(
            student, torch.cat([states, x_t]), torch.cat([taught[quarter], when]), text
        )
        return losses.regression_loss(whiten(drawn), whiten(torch.cat([ends, right])))

    @torch.no_grad()
    def check(student: Any) -> list[dict[str, Any]]:
        """In four steps."""

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
        folder = out / f"corrected-{number}"
        student = fit(student, loss, settings, folder, "student", check, check_every=500)
    return student


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
