"""Latents that go from noise to images by a network's own steps, and what it learns there.

Noise around images of the world shows a network no latents that it would only come to by mistakes,
such as those between two colours; but there it is decided what it draws (Ross et al., 2011, for
imitation). So some latents of each batch walk on by its own steps of DDIM. A walk costs nothing:
a step needs the network's x_0, and so does the loss.

    x <- alpha' x_0 + sigma' (x - alpha x_0) / sigma,    alpha' and sigma' of the next timestep
"""

from __future__ import annotations

import random
from functools import cache
from typing import Any, NamedTuple

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from nasa_distill.train.seeds import generator
from nasa_distill.world.kinds import World
from nasa_distill.world.model import NOISE, alpha_sigma

ROUNDS = 8  # after so many steps of training each has made one of its own
STEPS = 25  # of a path


class Walk(NamedTuple):
    """Some of them, before a step."""

    rows: Tensor  # [b], which ones
    x_t: Tensor  # [b, c, h, w]
    timesteps: Tensor  # [b]
    captions: list[str]


class OwnPaths:
    """Kept in buffers of the network, so that a run that was stopped goes on with them."""

    def __init__(
        self, network: nn.Module, known: Tensor, world: World, count: int, seed: int, p_empty: float
    ):
        """Begin all over their paths, from noise around images of the world.

        Args:
            known: The latents of the world.
            count: How many make a step at a time.
            p_empty: Of captions.
        """
        scheduler: Any = DDIMScheduler(**NOISE, timestep_spacing="trailing")
        scheduler.set_timesteps(STEPS)
        self.scheduler = scheduler
        self.count, walkers = count, count * ROUNDS
        random_ = generator(seed, 0)
        scenes = world.draw(walkers, random_)
        turns = torch.randint(STEPS, (walkers,), generator=random_)
        noise = torch.randn(known[scenes].shape, generator=random_)
        alpha, sigma = self._alpha_sigma(turns)
        network.register_buffer("own_latents", alpha * known[scenes] + sigma * noise)
        network.register_buffer("own_turns", turns)
        network.register_buffer("own_laps", torch.zeros_like(turns))

        @cache
        def caption(walker: int, lap: int) -> str:
            if lap == 0:
                scene = int(scenes[walker])
            else:
                scene = int(world.draw(1, generator(seed, lap, walker)))
            return world.caption(scene, random.Random(f"{seed} {lap} {walker}"), p_empty)

        self.caption = caption

    def take(self, network: Any, step: int) -> Walk:
        rows = torch.arange(self.count) + self.count * (step % ROUNDS)
        laps = network.own_laps[rows].tolist()
        captions = [self.caption(*x) for x in zip(rows.tolist(), laps, strict=True)]
        timesteps = self.scheduler.timesteps[network.own_turns[rows]]
        return Walk(rows, network.own_latents[rows], timesteps, captions)

    @torch.no_grad()
    def move(self, network: Any, walk: Walk, x0: Tensor, random_: torch.Generator) -> None:
        """A step on from `x0`. Who is at the end begins again, with noise and another caption."""
        turns = network.own_turns[walk.rows]
        is_last = turns == STEPS - 1
        following = torch.where(is_last, 0, turns + 1)
        (alpha, sigma), (alpha_next, sigma_next) = map(self._alpha_sigma, (turns, following))
        x = alpha_next * x0 + sigma_next * (walk.x_t - alpha * x0) / sigma
        noise = torch.randn(x.shape, generator=random_)
        network.own_latents[walk.rows] = torch.where(is_last[:, None, None, None], noise, x)
        network.own_turns[walk.rows] = following
        network.own_laps[walk.rows] += is_last.long()

    def leave(self, network: Any) -> None:
        """The network as it was."""
        for name in ("own_latents", "own_turns", "own_laps"):
            delattr(network, name)

    def _alpha_sigma(self, turns: Tensor) -> tuple[Tensor, Tensor]:
        return alpha_sigma(self.scheduler, self.scheduler.timesteps[turns])
