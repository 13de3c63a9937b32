"""The losses of NASA-T, as functions of tensors. Equation numbers are those of the NASA paper.

Names: b batch, alpha and sigma the schedule's `x_t = alpha x_0 + sigma noise`, both `[b, 1, 1, 1]`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

PREDICTIONS = ("epsilon", "v_prediction", "sample")


def to_x0(output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, prediction: str) -> Tensor:
    """The clean latents that a denoiser's output stands for, in fp32.

        epsilon: (x_t - sigma output) / alpha        v: alpha x_t - sigma output

    Raises:
        ValueError: An unknown prediction; or epsilon where alpha is 0, which says nothing of x_0.
    """
    output, x_t = output.float(), x_t.float()
    if prediction == "sample":
        return output
    if prediction == "v_prediction":
        return alpha * x_t - sigma * output
    if prediction == "epsilon":
        if not alpha.all():
            raise ValueError(
                "losses.to_x0: an epsilon-predicting network cannot start where the schedule has "
                "no signal left (alpha 0); use a scheduler without rescale_betas_zero_snr"
            )
        return (x_t - sigma * output) / alpha
    raise ValueError(f"losses.to_x0: prediction must be one of {PREDICTIONS}, got {prediction!r}")


def to_epsilon(
    output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, prediction: str
) -> Tensor:
    """The noise that a denoiser's output stands for, in fp32; sigma must not be 0."""
    if prediction == "epsilon":
        return output.float()
    if prediction == "v_prediction":
        return alpha * output.float() + sigma * x_t.float()
    return (x_t.float() - alpha * to_x0(output, x_t, alpha, sigma, prediction)) / sigma


def guide(eps_pos: Tensor, eps_neg: Tensor, kappa: Tensor | float) -> Tensor:
    """Classifier-free guidance with a negative prompt (equation 5).

    `(1 - kappa) eps_neg + kappa eps_pos`
    """
    return (1 - kappa) * eps_neg + kappa * eps_pos


def vsd_gradient(eps_teacher: Tensor, eps_lora: Tensor, weight: Tensor) -> Tensor:
    """The gradient in x_0 of variational score distillation (equation 6), in fp32.

    `weight * (eps_teacher - eps_lora)`; values that are not finite count as 0.
    """
    return torch.nan_to_num(weight * (eps_teacher.float() - eps_lora.float()), posinf=0, neginf=0)


def vsd_loss(x0: Tensor, gradient: Tensor) -> Tensor:
    """A scalar whose gradient in `x0` is `gradient / x0.numel()`.

    Its value means little: log the norm of the gradient instead.
    """
    target = (x0.float() - gradient).detach()
    return 0.5 * F.mse_loss(x0.float(), target)


def denoising_loss(
    output: Tensor, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor, prediction: str
) -> Tensor:
    """Of the LoRA teacher, which learns the student's distribution.

    The squared error of what the network predicts, so for epsilon `|| output - noise ||^2`. Of an
    error in the image epsilon would make `alpha^2 / sigma^2` as much, ten thousand times at t = 0.
    """
    target = {"epsilon": noise, "v_prediction": alpha * noise - sigma * x0, "sample": x0}
    return F.mse_loss(output.float(), target[prediction].float())


def clip_loss(image_embeds: Tensor, text_embeds: Tensor, threshold: float) -> Tensor:
    """The clamped CLIP loss: `mean(max(0, threshold - cos(image, text)))`, per image.

    Images that match their prompt well enough give no gradient (SwiftBrush v2, equation 5).
    """
    cosine = F.cosine_similarity(image_embeds.float(), text_embeds.float(), dim=-1)
    return F.relu(threshold - cosine).mean()


def linear_decay(weight: float, step: int, steps: int) -> float:
    """The weight of the CLIP loss: `weight` at the first step, 0 after the last."""
    return weight * max(0.0, 1 - step / steps)


def regression_loss(x0: Tensor, x0_teacher: Tensor, smooth: float = 0.03) -> Tensor:
    """Of the warm-up on ODE pairs (as DMD's), with the pseudo-Huber distance of each image.

        mean(sqrt(|x0 - x0_teacher|^2 + c^2) - c) / sqrt(d),    c = smooth * sqrt(d)

    Where the teacher's map from noise to image jumps, the squared distance asks for the average of
    two images, this one for the likelier of them (Song and Dhariwal, 2023, for consistency models).
    """
    squared = (x0.float() - x0_teacher.float()).square().flatten(1).mean(1)
    return ((squared + smooth**2).sqrt() - smooth).mean()
