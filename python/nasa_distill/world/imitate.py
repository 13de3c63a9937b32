"""A student that learns what another student draws from the latents that it walks to itself.

`students` has it learn from the other's own latents. In four steps it comes to others, and there it
is shown as well what to draw (Ross et al., 2011). It may be of another architecture. For the
PixArt of the larger world this gained nothing that could be told apart.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nasa_distill.train import losses
from nasa_distill.train.networks import Model
from nasa_distill.train.seeds import generator
from nasa_distill.world.fit import Settings, fit
from nasa_distill.world.kinds import Code, World
from nasa_distill.world.students import P_EMPTY, QUARTERS, begins, walk
from nasa_distill.world.teacher import summaries, weigher

CHECKED = 128  # images of each prompt that is drawn on the way


def train(
    model: Model,
    student: Any,
    shown: Model,
    cycles: Sequence[Settings],
    out: Path,
    world: World,
    code: Code,
    known: Tensor,
    floor: float | None = None,
) -> Any:
    """Train, or go on training; see `fit` for what it raises, and `students.train` for the rest.

    Args:
        shown: Of four steps as well, with the same latents and the same schedule.
        cycles: A batch has `batch // 4` walks, each with its latents at every step.
    """
    taught, whiten = begins(model, QUARTERS), weigher(known, world.rates(), floor)

    def loss(student: Any, step: int, random_: torch.Generator) -> Tensor:
        count = settings.batch // QUARTERS
        captions = world.captions(
            world.draw(count, random_), random.Random(f"{settings.seed} {step}"), P_EMPTY
        )
        noise = torch.randn(count, *model.latent_shape, generator=random_)
        text, text_shown = model.encode(captions), shown.encode(captions)
        states, _ = walk(model, student, noise, text, taught, random_)
        x_t, when = states.flatten(0, 1), taught.repeat_interleave(count)
        rows = torch.arange(count).repeat(QUARTERS)
        drawn = model.x0(student, x_t, when, text.rows(rows))
        with torch.no_grad():
            x0 = shown.x0(shown.denoiser, x_t, when, text_shown.rows(rows))
        return losses.regression_loss(whiten(drawn), whiten(x0))

    @torch.no_grad()
    def check(student: Any) -> list[dict[str, Any]]:
        """In all of its steps."""

        def drawn(prompt: str) -> Tensor:
            random_ = generator(7, 0)
            noise = torch.randn(CHECKED, *model.latent_shape, generator=random_)
            text = model.encode([prompt] * CHECKED)
            last = walk(model, student, noise, text, taught, random_)[0][-1]
            return model.x0(student, last, taught[-1:].expand(CHECKED), text)

        return summaries(drawn, world, code)

    student = copy.deepcopy(student)
    for number, settings in enumerate(cycles):
        student.requires_grad_(True)
        folder = out / f"shown-{number}"
        student = fit(student, loss, settings, folder, "student", check, check_every=500)
    return student
