"""A student that settles each of its own draws on one image of the world.

Regression on paths from noise to images (`students`) draws averages wherever a little noise decides
between two images. Which of the two it is does not matter there, so the student's own draw decides:
it also learns to draw, of the images c of which the caption is true, the likeliest one by its
latents x_t and by what it drew from them, each taken for a noisy c:

    argmax_c  log rate(c) - |x_t - alpha c|^2 / 2 sigma^2 - TAIL log |x_0 - c|^2 - price(c)

The noise of x_0 has long tails, as Student's t: half of the way counts the same between two colours
as between two grounds, which lie ten times as far apart, and one price can turn either.

Alone this ends with one image for each caption. Two things keep them apart. A value that is chosen
more often than the world has it becomes dearer until it is not (`raise_prices`), so what is
ambiguous goes to the others. Its price depends on what the caption mentions, or one caption could
have it always and another never. And beside the choice the student learns the end of the exact path
from x_t. The latents are its own: it walks to each timestep as the pipeline does, with new noise,
and sees what its own steps get wrong (Ross et al., 2011, for imitation).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nasa_distill.train import losses
from nasa_distill.train.networks import Model
from nasa_distill.world.fit import Settings, fit
from nasa_distill.world.kinds import Code, World
from nasa_distill.world.students import Pairs, begins, exact_path, texts_of, walk
from nasa_distill.world.teacher import log_weights, summaries, weigher

CHECKED = 128  # images of each prompt that is drawn on the way
TAIL = 5.0  # half the power with which an image becomes less likely by its distance from a draw
LEAST = 1e-3  # of squared distances, whose logarithm is taken
ANCHOR = 0.5  # weight of the path's end, of that of the choice
RISE = 5.0  # of a value's price, for each step in which all images have it too much
PATH_STEPS = 8  # of the whole path
SEEN, PIXELS = 24, 1.0  # how many of a batch count as images too, and their weight


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
    last_anchor: float = ANCHOR,
    image_loss: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Any:
    """Train, or go on training; see `fit` for what it raises, and `students.train` for the rest.

    Args:
        last_anchor: Weight of the path's end in the last cycle, in the place of `ANCHOR`.
        image_loss: Of latents `[b, c, h, w]` for numbers of scenes `[b]`, added for some.
    """
    texts, rows_of = texts_of(model, pairs)
    taught, rates = begins(model, steps), world.rates()
    whiten = weigher(known, rates, floor)
    # twice the first, from which one step must do, and the last, which decides what is seen
    turns = [0, *range(steps), steps - 1]
    values = values_of(world)

    def loss(student: Any, step: int, random_: torch.Generator) -> Tensor:
        rows = torch.randint(len(pairs.x0), (settings.batch,), generator=random_)
        text = texts.rows(rows_of[rows])
        turn = turns[int(torch.randint(len(turns), (), generator=random_))]
        when = taught[turn].expand(len(rows))
        noise, times = pairs.states[0, rows], taught[: turn + 1]
        x_t = walk(model, student, noise, text, times, random_)[0][-1]
        drawn = model.x0(student, x_t, when, text)
        captions = [pairs.captions[i] for i in rows.tolist()]
        allowed, features = world.matches(captions) * rates, features_of(captions, world)
        given = (x_t, drawn.detach(), *model.alpha_sigma(when), known, allowed)
        prices = student.prices[turn]
        scenes = likeliest(*given, features @ prices @ values.T)
        raise_prices(prices, features, values, scenes, allowed)
        chosen = known[scenes]
        *_, end = exact_path(x_t, allowed, known, PATH_STEPS, turn) if turn else [pairs.x0[rows]]
        pulls = [losses.regression_loss(whiten(drawn), whiten(x)) for x in (chosen, end)]
        value = (pulls[0] + anchor * pulls[1]) / (1 + anchor)
        if image_loss:
            value = value + PIXELS * image_loss(drawn[:SEEN], scenes[:SEEN])
        return value

    @torch.no_grad()
    def check(student: Any) -> list[dict[str, Any]]:
        """In all of its steps."""

        def drawn(prompt: str) -> Tensor:
            random_ = torch.Generator().manual_seed(7)
            z = torch.randn(CHECKED, *model.latent_shape, generator=random_)
            text = model.encode([prompt] * len(z))
            x_t = walk(model, student, z, text, taught, random_)[0][-1]
            return model.x0(student, x_t, taught[-1:].expand(len(z)), text)

        return summaries(drawn, world, code)

    student = copy.deepcopy(student)
    for number, settings in enumerate(cycles):
        student.requires_grad_(True)
        anchor = last_anchor if number == len(cycles) - 1 else ANCHOR
        # with its weights in the checkpoint; of each timestep
        student.register_buffer("prices", torch.zeros(steps, 1 + world.mentioned, values.shape[1]))
        folder = out / f"settled-{number}"
        student = fit(student, loss, settings, folder, "student", check, check_every=500)
        del student.prices
    return student


def values_of(world: World) -> Tensor:
    """Which values each scene has: `[scenes, values]`. Objects of a pair are told apart."""
    said = [
        {
            (name, n, value)
            for name, x in world.describe(i).items()
            for n, value in enumerate(x.split())
        }
        for i in range(len(world.rates()))
    ]
    every = sorted(set().union(*said))
    return torch.tensor([[float(value in values) for value in every] for values in said])


def features_of(captions: list[str], world: World) -> Tensor:
    """What the prices for captions depend on, linearly: `[captions, 1 + mentioned]`, of norm 1."""
    said = world.mentions(captions)
    return F.normalize(torch.cat([torch.ones(len(said), 1), said], dim=1))


def raise_prices(
    prices: Tensor, features: Tensor, values: Tensor, scenes: Tensor, rates: Tensor
) -> None:
    """In place, by how much oftener each value is in `scenes` `[b]` than in draws at `rates`.

    It is the dual ascent of a choice of scenes whose values have given shares: those of the world,
    for the same captions.

    Args:
        prices: `[features, values]`.
        features: Of the caption of each of `scenes`, see `features_of`.
    """
    due = (rates / rates.sum(1, keepdim=True)).float() @ values
    prices += RISE * features.T @ (values[scenes] - due) / len(scenes)


def likeliest(
    x_t: Tensor,
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    known: Tensor,
    rates: Tensor,
    prices: Tensor | float = 0.0,
) -> Tensor:
    """Which image of the world each draw `x0` from `x_t` is to become: `[b]`.

    Args:
        x_t, alpha, sigma, known, rates: As of `teacher.posterior_mean`.
        prices: Of each of `known`, `[n]` or `[b, n]`, in units of a logarithm.
    """
    by_latents = log_weights(x_t, alpha, sigma, known, rates)
    # by a product: the difference of all pairs would take gigabytes
    distance = torch.cdist(
        x0.flatten(1), known.flatten(1), compute_mode="use_mm_for_euclid_dist"
    ).square()
    by_draw = -TAIL * distance.clamp(min=LEAST).log()
    return (by_latents + by_draw - prices).argmax(1)
