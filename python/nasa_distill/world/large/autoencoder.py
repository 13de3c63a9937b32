"""The larger world's autoencoder: an `AutoencoderKL` of diffusers, trained on the world's images.

It keeps an eighth of the width and 16 channels, as Stable Diffusion's keeps an eighth. Its latents
have mean 0 and variance 1 in each channel over the world, so their scaling factor is 1.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from nasa_distill.train.seeds import generator
from nasa_distill.world.draws import Draws
from nasa_distill.world.fit import Settings, fit, in_bf16
from nasa_distill.world.large.captions import matches
from nasa_distill.world.large.judge import VALID_BELOW, local_distance, nearest
from nasa_distill.world.large.scene import (
    IMAGE_RATES,
    OBJECT_RATES,
    SIZE,
    Scene,
    rates,
    render,
    scenes,
)

CHANNELS = 16
GRID = SIZE // 8
# of the divergence from a normal distribution, a number of each latent. The noise that the latents
# then have costs half of this in squared error, less than a bound of 41 dB
KL = 3e-4
ENCODED = 256  # images at once
NOISE, BLEND = 0.25, 0.5  # the most of either that the decoder sees
DRAWN = 2 / 3  # of a batch, where the decoder learns from draws
# weights beside the mean over all pixels: of the window where an image is worst, and of what comes
# near the share of images that are not valid
WORST, INVALID = 0.1, 0.02
MEASURED = 512  # images, for the mean and variance of latents


def make_autoencoder(channels: tuple[int, ...] = (16, 32, 64, 64)) -> AutoencoderKL:
    """1.0 M parameters, convolutions alone; `grown` makes 1.3 M of it."""
    levels = len(channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=8,
        sample_size=SIZE,
        scaling_factor=1.0,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def train(
    cycles: Sequence[Settings], out: Path, channels: tuple[int, ...] = (16, 32, 64, 64)
) -> AutoencoderKL:
    """Train, or go on training; see `fit` for what it raises. Convolutions multiply as `in_bf16`.

    Args:
        cycles: As of `teacher.train`.
    """

    def loss(model: Any, rows: Tensor, random_: torch.Generator) -> Tensor:
        images = render([scenes()[i] for i in rows.tolist()])
        with in_bf16():
            found = model.encode(images).latent_dist
            noise = torch.randn(found.mean.shape, generator=random_)
            drawn = model.decode(found.mean + found.std * noise).sample
        # `kl` adds up the latents of an image
        divergence = found.kl().mean() / found.mean[0].numel()
        return F.mse_loss(drawn.float(), images) + KL * divergence.float()

    torch.manual_seed(cycles[0].seed)
    model: Any = make_autoencoder(channels)
    for number, settings in enumerate(cycles):
        model.requires_grad_(True)
        model = _fit(model, loss, settings, out / f"cycle-{number}", "autoencoder")
    return normalised(model).eval().requires_grad_(False)


def train_decoder(
    model: Any,
    known: Tensor,
    cycles: Sequence[Settings],
    out: Path,
    draws: Sequence[Draws] = (),
) -> AutoencoderKL:
    """The same latents with a better decoder, which has seen latents that are a little wrong.

    What networks draw lies beside the latents of images, and often on the way to those of a scene
    that differs in one attribute. The decoder learns to give back the nearer image: one, not the
    mean of both, which the squared error alone would have it draw. Networks on the latents need not
    wait for it. The loss is `image_loss`.

    From `draws` it learns on the very latents that networks draw. The image of each is then the one
    that is nearest to what the decoder makes of it now, of those of which the caption is true.

    Args:
        model: An autoencoder of the world.
        known: The latents of all scenes, in their order.
        cycles: As of `teacher.train`.
        draws: Each is taken from equally often.

    See `fit` for what it raises.
    """
    where = {scene: i for i, scene in enumerate(scenes())}

    def beside(rows: Tensor, random_: torch.Generator) -> Tensor:
        seed = int(torch.randint(2**31, (), generator=random_))
        others = [where[other(scenes()[i], random.Random(seed + i))] for i in rows.tolist()]
        strength = torch.rand(2, len(rows), 1, 1, 1, generator=random_)
        blend, noise = BLEND * strength[0], NOISE * strength[1]
        codes = torch.lerp(known[rows], known[others], blend)
        return codes + noise * torch.randn(codes.shape, generator=random_)

    def loss(model: Any, rows: Tensor, random_: torch.Generator) -> Tensor:
        drawn = int(DRAWN * len(rows)) if draws else 0
        rows = rows[drawn:]
        codes, captions = _some(draws, drawn, random_)
        with in_bf16():
            decoded = model.decode(torch.cat([beside(rows, random_), *codes])).sample.float()
        if drawn:
            found = nearest(decoded[len(rows) :].detach().clamp(-1, 1), matches(captions))
            rows = torch.cat([rows, found])
        return image_loss(decoded, render([scenes()[i] for i in rows.tolist()]))

    for number, settings in enumerate(cycles):
        for part in (model.decoder, model.post_quant_conv):
            part.requires_grad_(True)
        model = _fit(model, loss, settings, out / f"cycle-{number}", "decoder")
    return model.eval().requires_grad_(False)


def _some(
    draws: Sequence[Draws], count: int, random_: torch.Generator
) -> tuple[list[Tensor], list[str]]:
    """Latents `[1, c, h, w]` and their captions."""
    codes, captions = [], []
    for _ in range(count):
        latents, said = draws[int(torch.randint(len(draws), (), generator=random_))]
        row = int(torch.randint(len(latents), (), generator=random_))
        codes.append(latents[row : row + 1])
        captions.append(said[row])
    return codes, captions


def image_loss(decoded: Tensor, images: Tensor) -> Tensor:
    """|x - image|^2 + WORST r + INVALID r / (r + VALID_BELOW),    r: what the judge looks at."""
    worst = local_distance(decoded, images)
    invalid = worst / (worst + VALID_BELOW)
    return F.mse_loss(decoded, images) + WORST * worst.mean() + INVALID * invalid.mean()


def loss_by(model: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """`image_loss` of latents `[b, c, h, w]` for numbers of scenes `[b]`."""

    def loss(codes: Tensor, rows: Tensor) -> Tensor:
        with in_bf16():
            decoded = model.decode(codes).sample.float()
        return image_loss(decoded, render([scenes()[i] for i in rows.tolist()]))

    return loss


def grown(model: Any) -> AutoencoderKL:
    """With a residual block more at each level, which adds nothing yet."""
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    larger: Any = AutoencoderKL(**config | {"layers_per_block": config["layers_per_block"] + 1})
    before = model.state_dict()
    for name, weight in larger.state_dict().items():
        if name in before:
            weight.copy_(before[name])
        elif ".conv2." in name:
            weight.zero_()
    return larger.eval().requires_grad_(False)


def other(scene: Scene, rng: random.Random) -> Scene:
    """One that differs in one attribute, of one object or of the image."""
    slot = rng.randrange(len(scene.objects))
    name = rng.choice([*OBJECT_RATES, *IMAGE_RATES])
    if name in IMAGE_RATES:
        changed: Any = {name: _another(getattr(scene, name), IMAGE_RATES[name], rng)}
        return scene._replace(**changed)
    things = list(scene.objects)
    value = _another(getattr(things[slot], name), OBJECT_RATES[name], rng)
    things[slot] = things[slot]._replace(**{name: value})
    return scene._replace(objects=tuple(things))


def _another(value: str, values: Iterable[str], rng: random.Random) -> str:
    return rng.choice([x for x in values if x != value])


def _fit(model: Any, loss: Callable, settings: Settings, out: Path, what: str) -> Any:
    def of_step(model: Any, step: int, random_: torch.Generator) -> Tensor:
        rows = torch.multinomial(rates(), settings.batch, replacement=True, generator=random_)
        return loss(model, rows, random_)

    def check(model: Any) -> dict[str, float]:
        rows = torch.multinomial(rates(), 200, replacement=True, generator=generator(7, 0))
        return quality(model, [scenes()[i] for i in rows.tolist()])

    return fit(model, of_step, settings, out, what, check, channels_last=False)


@torch.no_grad()
def quality(model: Any, drawn: list[Scene]) -> dict[str, float]:
    """Peak signal-to-noise ratio in dB of what is encoded and decoded again.

    `relevant` counts only the pixels at which an image differs from its bare ground: objects,
    marks and frame, which decide whether the image is a valid one of its scene.
    """
    images = render(drawn)
    code = TrainedCode(model)
    back = code.decode(code.encode(images))
    error = (back.clamp(-1, 1) - images).square()
    relevant = (images != images[:, :, SIZE // 2 : SIZE // 2 + 1, 6:7]).any(1, keepdim=True)
    relevant = relevant.expand_as(error)
    worst = error.mean((1, 2, 3)).max()
    return {
        "psnr": _decibel(error.mean()),
        "relevant": _decibel(error[relevant].mean()),
        "worst image": _decibel(worst),
    }


def load(folder: str, size: int) -> TrainedCode:
    """What `save_pretrained` wrote, of images of `size` pixels.

    Raises:
        ValueError: There is no `AutoencoderKL` in the folder, or it is of another size.
    """
    try:
        vae: Any = AutoencoderKL.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"autoencoder.load: {folder} holds no AutoencoderKL ({error}); give the folder vae of "
            "a pipeline"
        ) from error
    if vae.config.sample_size != size:
        raise ValueError(
            f"autoencoder.load: the autoencoder in {folder} must be of images of {size} pixels, "
            f"got {vae.config.sample_size}"
        )
    return TrainedCode(vae.eval().requires_grad_(False))


@torch.no_grad()
def encode(model: Any, images: Tensor) -> Tensor:
    """The mean of the latents `[b, 16, 8, 8]`."""
    return model.encode(images).latent_dist.mean


class TrainedCode:
    """A trained autoencoder as a `Code`: means of latents, and images from them."""

    def __init__(self, vae: Any):
        self.vae = vae

    def encode(self, images: Tensor) -> Tensor:
        return torch.cat([encode(self.vae, x) for x in images.split(ENCODED)])

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        return torch.cat([self.vae.decode(x).sample for x in codes.split(ENCODED)])


def _decibel(error: Tensor) -> float:
    """Pixels run from -1 to 1."""
    return float(10 * torch.log10(4 / error))


def normalised(model: Any) -> Any:
    """The same autoencoder, whose latents have mean 0 and variance 1 in each channel.

    The convolutions of width 1 at the latents take it up; they are linear.
    """
    rows = torch.multinomial(rates(), MEASURED, replacement=True, generator=generator(8, 0))
    drawn = [[scenes()[i] for i in part.tolist()] for part in rows.split(ENCODED)]
    with torch.no_grad():
        found = torch.cat([encode(model, render(part)) for part in drawn])
        mean, deviation = found.mean((0, 2, 3)), found.std((0, 2, 3))
        into, out_of = model.quant_conv, model.post_quant_conv
        shift = torch.cat([mean, 2 * deviation.log()])
        scale = torch.cat([deviation, torch.ones(CHANNELS)])
        into.weight.div_(scale[:, None, None, None])
        into.bias.sub_(shift).div_(scale)
        out_of.bias.add_(out_of.weight[:, :, 0, 0] @ mean)
        out_of.weight.mul_(deviation[None, :, None, None])
    return model
