"""What equation 6 is made of for the student of a run, and what its LoRA teacher has learned.

    g = sigma^2 (eps_teacher - eps_lora)        v: g where nobody sees a negative prompt
    n: what the negative prompt adds to g where the teacher alone sees it

All are taken at the student's images, drawn as the run draws them, for several noises and timesteps
of each image. Their average for an image is what stays of many steps; the rest is noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nasa_distill.train import losses
from nasa_distill.train.draws import Draws
from nasa_distill.train.nasa_t import Run
from nasa_distill.train.networks import without_lora
from nasa_distill.train.seeds import generator

PARTS = (
    "rms of v",  # root mean squares over all latents
    "rms of n",
    "rms of v's average",  # over the noises of an image, without what the noise leaves in it
    "rms of n's average",
    "cosine of the averages",
    "teacher's loss",  # denoising the student's images for the prompt, guided by nothing
    "LoRA teacher's loss",
)


@torch.no_grad()
def parts(run: Run, images: int = 64, noises: int = 16, seed: int = 0) -> dict[str, float]:
    """`PARTS` of a run as it stands, by name."""
    settings, teacher = run.settings, run.teacher
    random = generator(seed, -2)
    alpha = sum(settings.alpha) / 2
    draws = Draws.of(
        settings.changed(teacher_negative=True),
        run.prompts, run.negatives, run.student.latent_shape, images, random, alpha,
    )  # fmt: skip
    text, null = teacher.encode(draws.prompts), run.null(images)
    against = teacher.encode(draws.negatives)
    x0 = run.draw(draws, len(run.stages) - 1)
    v, n, of_teacher, of_lora = [], [], [], []
    for _ in range(noises):
        timesteps = draws.timesteps(*settings.noise).to(x0.device)
        a, sigma = teacher.alpha_sigma(timesteps)
        noise = draws.normal(x0)
        x_t = a * x0 + sigma * noise

        def guided(negative, x_t=x_t, timesteps=timesteps):
            return teacher.guided_epsilon(
                teacher.denoiser, x_t, timesteps, text, negative, draws.kappa.to(x0.device)
            )

        def loss(x_t=x_t, timesteps=timesteps, noise=noise):
            return (teacher.epsilon(teacher.denoiser, x_t, timesteps, text) - noise).square().mean()

        with without_lora(teacher.denoiser):
            unseen, seen = guided(null), guided(against)
            of_teacher.append(loss())
        v.append(losses.vsd_gradient(unseen, guided(null), sigma**2))
        n.append(losses.vsd_gradient(seen, unseen, sigma**2))
        of_lora.append(loss())
    of_v, of_n = torch.stack(v), torch.stack(n)  # [noises, images, c, h, w]
    squares = {"v": product(of_v, of_v), "n": product(of_n, of_n), "vn": product(of_v, of_n)}
    values = (
        of_v.square().mean().sqrt(),
        of_n.square().mean().sqrt(),
        squares["v"].clamp(min=0).sqrt(),
        squares["n"].clamp(min=0).sqrt(),
        squares["vn"] / (squares["v"] * squares["n"]).clamp(min=1e-20).sqrt(),
        torch.stack(of_teacher).mean(),
        torch.stack(of_lora).mean(),
    )
    return {name: float(value) for name, value in zip(PARTS, values, strict=True)}


def product(x: Tensor, y: Tensor) -> Tensor:
    """The mean product of two averages over the first dimension, without bias: a noise's own
    product with itself is left out."""
    count = len(x)
    both = (x.sum(0) * y.sum(0) - (x * y).sum(0)) / (count * (count - 1))
    return both.mean()
