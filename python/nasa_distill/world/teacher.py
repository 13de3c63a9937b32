"""The many-step teacher of the small world, a U-Net under the text tower of the world's CLIP."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from nasa_distill.train.losses import guide
from nasa_distill.train.seeds import generator
from nasa_distill.world import model
from nasa_distill.world.fit import Settings, fit
from nasa_distill.world.kinds import Code, World
from nasa_distill.world.model import alpha_sigma
from nasa_distill.world.own_paths import OwnPaths

CHUNK = 256  # images of the world, rendered and encoded at once
P_EMPTY = 0.1  # captions left empty, for classifier-free guidance


def posterior_mean(x_t: Tensor, alpha: Tensor, sigma: Tensor, known: Tensor, rates: Tensor):
    """`E[x_0 | x_t]` where `x_0` is one of finitely many: the denoiser that a network should be.

    As a target of training it has the mean of the images themselves and less variance (the stable
    target field of Xu, Tong and Jaakkola, 2023, over all images of the world).

    Args:
        x_t: `[b, ...]`, `alpha x_0 + sigma noise`.
        known: The latents `[n, ...]` that `x_0` may be, in the precision to compute in. At small
            sigma that is fp64: distances over sigma^2 reach 1e7, and small differences matter.
        rates: How often, `[b, n]`: 0 for those that a caption rules out; rows need not add up to 1.
    """
    weight = log_weights(x_t, alpha, sigma, known, rates).softmax(1)
    return (weight.to(x_t.dtype) @ known.flatten(1).to(x_t.dtype)).view_as(x_t)


def log_weights(x_t: Tensor, alpha: Tensor, sigma: Tensor, known: Tensor, rates: Tensor) -> Tensor:
    """How likely `x_0` is each of `known`, as a logarithm `[b, n]` up to a number of each row."""
    c = known.flatten(1)
    x, a, s = (part.to(c.dtype).flatten(1) for part in (x_t, alpha, sigma))
    fit_ = (a * (x @ c.T) - a**2 * c.square().sum(1) / 2) / s**2
    return fit_ + rates.to(c.dtype).log()


def whitening(known: Tensor, rates: Tensor, floor: float) -> Tensor:
    """`W`, symmetric `[d, d]`, for losses `|W (x_0 - target)|^2` in which small differences count.

        W^2 = g V diag(1 / (eigenvalue + floor)) V^T,    with g such that W keeps the mean variance

    The ground of an image is most of its variance and the colour of a small object a hundredth of
    it, so of the plain squared error a network learns the one long before the other. The target is
    exact, so the best network is the same.

    Args:
        known, rates: As of `posterior_mean`; rates `[n]`, adding up to 1.
        floor: Added to the variance in each direction.
    """
    x, r = known.flatten(1).double(), rates.double()
    x = x - r @ x
    eigenvalues, directions = torch.linalg.eigh((r[:, None] * x).T @ x)
    eigenvalues = eigenvalues.clamp(min=0)
    weight = 1 / (eigenvalues + floor)
    weight *= eigenvalues.sum() / (eigenvalues * weight).sum()
    return (directions * weight.sqrt() @ directions.T).float()


def train(
    cycles: Sequence[Settings],
    floors: Sequence[float | None],
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    out: Path,
    world: World,
    known: Tensor,
    code: Code,
    channels: tuple[int, ...] = model.CHANNELS_OF_UNET,
    own: int = 0,
) -> UNet2DConditionModel:
    """Train, or go on training, in the folder `out`; see `fit` for what it raises.

    Args:
        cycles: Each begins with the average of the one before, at a learning rate that rises again
            (Loshchilov and Hutter, 2017), and takes its images from a seed of its own.
        floors: Of the `whitening` of the loss in each cycle; None: the plain squared error.
        known: The `latents` of the world.
        own: In how many cycles, the last ones, half of each batch lies on the network's `OwnPaths`.
    """
    torch.manual_seed(cycles[0].seed)
    unet: Any = model.make_unet(channels)
    rates, known_64 = world.rates(), known.double()
    scheduler = DDIMScheduler(**model.NOISE)

    def encode(captions: list[str]) -> Tensor:
        return model.encode(tokenizer, text_encoder, captions)

    def check(unet: Any) -> list[dict[str, Any]]:
        return [
            {"prompt": prompt, "guidance": scale, **summary(codes, prompt, world, code)}
            for prompt in world.checks
            for scale in (1.0, 2.0)
            for codes in [draw(unet, encode([prompt, ""]), scale)]
        ]

    for number, (settings, floor) in enumerate(zip(cycles, floors, strict=True)):
        whiten, paths = weigher(known, rates, floor), None
        if number >= len(cycles) - own:
            paths = OwnPaths(unet, known, world, settings.batch // 2, settings.seed, P_EMPTY)

        def loss(
            unet: Any,
            step: int,
            random_: torch.Generator,
            how: Settings = settings,
            whiten: Callable[[Tensor], Tensor] = whiten,
            paths: OwnPaths | None = paths,
        ) -> Tensor:
            drawn = how.batch - (paths.count if paths else 0)
            rows = world.draw(drawn, random_)
            captions = world.captions(rows, random.Random(f"{how.seed} {step}"), P_EMPTY)
            timesteps = torch.randint(1000, (drawn,), generator=random_)
            noise = torch.randn(known[rows].shape, generator=random_)
            alpha, sigma = alpha_sigma(scheduler, timesteps)
            x_t = alpha * known[rows] + sigma * noise
            if paths:
                walk = paths.take(unet, step)
                x_t = torch.cat([x_t, walk.x_t])
                timesteps = torch.cat([timesteps, walk.timesteps])
                captions = captions + walk.captions
                alpha, sigma = alpha_sigma(scheduler, timesteps)
            x0 = posterior_mean(x_t, alpha, sigma, known_64, world.matches(captions) * rates)
            found = unet(x_t, timesteps, encode(captions)).sample
            if paths:
                paths.move(unet, walk, found[drawn:], random_)
            return whiten(found - x0).square().mean()

        folder = out / f"cycle-{number}"
        unet = fit(unet.requires_grad_(True), loss, settings, folder, "teacher", check)
        if paths:
            paths.leave(unet)
    return unet


def weigher(known: Tensor, rates: Tensor, floor: float | None) -> Callable[[Tensor], Tensor]:
    """`whitening` as a function of latents `[b, c, h, w]`; of None, of what does nothing."""
    if floor is None:
        return lambda x: x
    # made when it is first asked for: a stage that is finished needs none
    matrix = cache(lambda: whitening(known, rates, floor))
    return lambda x: (x.flatten(1) @ matrix()).view_as(x)


def latents(world: World, code: Code) -> Tensor:
    """Of every image of the world: `[n, c, h, w]`."""
    rows = torch.arange(len(world.rates()))
    return torch.cat([code.encode(world.images(part)) for part in rows.split(CHUNK)])


def draw(unet: Any, texts: Tensor, guidance: float, images: int = 64) -> Tensor:
    """Latents of the first text, against the second, from noise that is always the same."""
    config = unet.config
    shape = (images, config.in_channels, config.sample_size, config.sample_size)
    noise = torch.randn(shape, generator=generator(7, 0))
    *_, codes = ddim(unet, noise, texts[:1], texts[1:], guidance, steps=20)
    return codes


def summary(codes: Tensor, prompt: str, world: World, code: Code) -> dict[str, float]:
    """What the judge says of latents."""
    verdict = world.judge(code.decode(codes))
    valid = verdict.valid
    return {
        "valid": valid.float().mean().item(),
        "follows": verdict.follows(prompt)[valid].float().mean().item(),
        "residual": verdict.residual.median().item(),
    }


def summaries(draw: Callable[[str], Tensor], world: World, code: Code) -> list[dict[str, Any]]:
    """What the judge says of latents of each prompt that is drawn on the way."""
    return [
        {"prompt": prompt, **summary(draw(prompt), prompt, world, code)} for prompt in world.checks
    ]


@torch.no_grad()
def ddim(
    unet: Any,
    noise: Tensor,
    text: Tensor,
    text_neg: Tensor,
    guidance: float,
    steps: int,
    guided_from: int = 999,
) -> Iterator[Tensor]:
    """The teacher's latents after each step of deterministic sampling, x_0 the last.

        x_0 = (1 - guidance) x_0(text_neg) + guidance x_0(text)        (equation 5)

    Args:
        noise: `[b, c, 8, 8]`.
        text, text_neg: `[b or 1, n, c]`. At guidance 1 the second is not looked at.
        guided_from: The first timestep with guidance. Above it the noise hides the image, and
            guidance does more harm than good (Kynkäänniemi et al., 2024).
    """
    scheduler: Any = DDIMScheduler(**model.NOISE, timestep_spacing="trailing")
    scheduler.set_timesteps(steps, noise.device)
    text, text_neg = (x.expand(len(noise), -1, -1) for x in (text, text_neg))
    x = noise
    for t in scheduler.timesteps:
        if guidance == 1 or t > guided_from:
            x0 = unet(x, t, text).sample.float()
        else:
            both = unet(torch.cat([x, x]), t, torch.cat([text_neg, text])).sample
            x0_neg, x0_pos = both.float().chunk(2)
            x0 = guide(x0_pos, x0_neg, guidance)
        x = scheduler.step(x0, t, x).prev_sample
        yield x
