"""The losses, against what their equations say, and why NASA-T hides negatives from one network."""

import math

import pytest
import torch
from nasa_distill.train import losses
from nasa_distill.train.average import average_of, resume
from torch import Tensor


def schedule(rows, low=0.1, high=0.9):
    alpha = torch.linspace(low, high, rows).view(-1, 1, 1, 1)
    return alpha, (1 - alpha**2).sqrt()


@pytest.mark.parametrize("prediction", losses.PREDICTIONS)
def test_a_perfect_network_gives_back_image_and_noise(prediction):
    x0, noise = torch.randn(2, 5, 3, 4, 4)
    alpha, sigma = schedule(5)
    x_t = alpha * x0 + sigma * noise
    output = {"epsilon": noise, "v_prediction": alpha * noise - sigma * x0, "sample": x0}
    given = (output[prediction], x_t, alpha, sigma, prediction)
    torch.testing.assert_close(losses.to_x0(*given), x0, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(losses.to_epsilon(*given), noise, atol=1e-4, rtol=1e-4)
    assert losses.denoising_loss(output[prediction], x0, noise, alpha, sigma, prediction) < 1e-12
    off = losses.denoising_loss(output[prediction] + 0.1, x0, noise, alpha, sigma, prediction)
    assert off.item() == pytest.approx(0.01, rel=1e-3)


def test_half_precision_is_not_multiplied_by_the_last_step():
    """At alpha 0.07 bf16 arithmetic would be off by more than the image."""
    x0, noise = torch.randn(2, 1, 4, 8, 8)
    alpha = torch.tensor(0.0047).sqrt().view(1, 1, 1, 1)
    sigma = (1 - alpha**2).sqrt()
    x_t = alpha * x0 + sigma * noise
    ours = losses.to_x0(noise.bfloat16(), x_t, alpha, sigma, "epsilon")
    exact = (x_t.double() - sigma.double() * noise.bfloat16().double()) / alpha.double()
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, atol=1e-4, rtol=1e-4)


def test_epsilon_says_nothing_of_the_image_without_signal():
    x = torch.randn(1, 1, 2, 2)
    with pytest.raises(ValueError, match="rescale_betas_zero_snr"):
        losses.to_x0(x, x, torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1), "epsilon")
    with pytest.raises(ValueError, match="must be one of .* got 'flow'"):
        losses.to_x0(x, x, torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), "flow")


def test_the_gradient_of_the_vsd_loss_is_equation_6():
    x0 = torch.randn(2, 3, 4, 4, requires_grad=True)
    eps_teacher, eps_lora = torch.randn(2, 2, 3, 4, 4)
    _, sigma = schedule(2)
    gradient = losses.vsd_gradient(eps_teacher, eps_lora, sigma**2)
    losses.vsd_loss(x0, gradient).backward()
    expected = sigma**2 * (eps_teacher - eps_lora) / x0.numel()
    torch.testing.assert_close(x0.grad, expected)


def test_a_score_that_is_not_finite_moves_nothing():
    eps = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0])
    assert losses.vsd_gradient(eps, torch.zeros(4), torch.ones(4)).tolist() == [0, 0, 0, 1]


def test_clip_loss_is_clamped_per_image():
    text = torch.eye(3)
    image = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0.2, 0, 1]], requires_grad=True)
    loss = losses.clip_loss(image, text, 0.37)
    assert loss.item() == pytest.approx(0.37 / 3)  # only the second is below the threshold
    loss.backward()
    assert image.grad[1].abs().sum() > 0 and not image.grad[[0, 2]].any()
    assert losses.linear_decay(0.1, 0, 100) == 0.1
    assert losses.linear_decay(0.1, 50, 100) == pytest.approx(0.05)
    assert losses.linear_decay(0.1, 100, 100) == 0


def test_the_warmup_prefers_one_of_two_images_to_their_average():
    images = torch.stack([torch.ones(1, 2, 2), -torch.ones(1, 2, 2), torch.ones(1, 2, 2)])
    where = [losses.regression_loss(torch.full_like(images, x), images).item() for x in (1, 1 / 3)]
    squares = [(images - x).square().mean().item() for x in (1, 1 / 3)]
    assert where[0] < where[1] and squares[0] > squares[1]


# ---- the cancellation ----------------------------------------------------------------------------
#
# Every distribution is a normal one, N(mean, 1), so all scores are known. The student draws from
# N(theta, 1), and a LoRA teacher that has learnt this says so for the prompt.

MEAN = {"y": 1.0, "y-": -2.0, "": 0.0}


def epsilon(x_t: Tensor, alpha: Tensor, sigma: Tensor, mean: float | Tensor) -> Tensor:
    """Of N(mean, 1): -sigma times the score of N(alpha mean, alpha^2 + sigma^2)."""
    return sigma * (x_t - alpha * mean) / (alpha**2 + sigma**2)


def pull(theta: float, teacher_negative: bool, lora_negative: bool, rows: int = 20_000) -> float:
    """The average of equation 6 in x_0: the student goes the other way."""
    random_ = torch.Generator().manual_seed(0)
    shape = (rows, 1, 1, 1)
    x0 = theta + torch.randn(shape, generator=random_)
    alpha = 0.1 + 0.8 * torch.rand(shape, generator=random_)
    sigma = (1 - alpha**2).sqrt()
    kappa = 0.5 + 3.5 * torch.rand(shape, generator=random_)
    x_t = alpha * x0 + sigma * torch.randn(shape, generator=random_)

    def guided(mean_of_y: float, sees_negative: bool) -> Tensor:
        eps_pos = epsilon(x_t, alpha, sigma, mean_of_y)
        eps_neg = epsilon(x_t, alpha, sigma, MEAN["y-" if sees_negative else ""])
        return losses.guide(eps_pos, eps_neg, kappa)

    gradient = losses.vsd_gradient(
        guided(MEAN["y"], teacher_negative), guided(theta, lora_negative), sigma**2
    )
    return gradient.mean().item()


@pytest.mark.parametrize("sees", [False, True], ids=["nobody", "both"])
def test_negatives_cancel_where_both_or_none_see_them(sees):
    """The student stays at the unguided p(x | y), whatever the negative prompt is."""
    assert pull(MEAN["y"], sees, sees) == pytest.approx(0, abs=1e-6)
    # and comes back to it
    assert pull(MEAN["y"] + 0.5, sees, sees) > 0 > pull(MEAN["y"] - 0.5, sees, sees)


def test_a_negative_that_only_the_teacher_sees_pushes_away():
    """y- lies below y: the student is sent up, the more the larger kappa - 1 is on average."""
    assert pull(MEAN["y"], True, False) < -0.1
    assert pull(MEAN["y"], False, True) > 0.1
    # E[1 - kappa] of U(0.5, 4)
    expected = -1.25 * (MEAN[""] - MEAN["y-"])
    measured = pull(MEAN["y"], True, False) - pull(MEAN["y"], False, False)
    weight = average_weight()
    assert measured == pytest.approx(expected * weight, rel=0.05)


def average_weight(steps: int = 10_000) -> float:
    """E[sigma^2 * sigma * alpha / (alpha^2 + sigma^2)] of alpha in U(0.1, 0.9), in closed sum."""
    values = []
    for i in range(steps):
        alpha = 0.1 + 0.8 * (i + 0.5) / steps
        sigma = math.sqrt(1 - alpha**2)
        values.append(sigma**3 * alpha)
    return sum(values) / steps


# ---- how far NASA-T goes -------------------------------------------------------------------------
#
# The student sees the negative prompt, the paper's LoRA teacher does not. Of two negative prompts,
# N(-m, 1) and N(m, 1), the student draws from N(shift, 1) and N(-shift, 1); y is N(0, 1). The LoRA
# teacher learns both together, and its score pulls each half towards the other less than a score of
# that half alone would.


def outward(shift: float, push: float, lora_has_nasa: bool, rows: int = 400_000) -> float:
    """The average of equation 6 for the half that goes up. push: (kappa - 1) m, at which the
    teacher's own guided distribution has its mean. Positive: the student goes on outward."""
    random_ = torch.Generator().manual_seed(0)
    alpha = 0.1 + 0.8 * torch.rand(rows, generator=random_)
    sigma = (1 - alpha**2).sqrt()
    x_t = alpha * shift + torch.randn(rows, generator=random_)
    # where the LoRA teacher expects the middle of what it was shown
    middle = shift if lora_has_nasa else shift * (alpha * shift * x_t).tanh()
    gradient = sigma**2 * (epsilon(x_t, alpha, sigma, push) - epsilon(x_t, alpha, sigma, middle))
    return -gradient.mean().item()


def settles_at(push: float, lora_has_nasa: bool) -> float:
    low, high = 0.0, 4.0
    for _ in range(30):
        shift = (low + high) / 2
        low, high = (shift, high) if outward(shift, push, lora_has_nasa) > 0 else (low, shift)
    return low


@pytest.mark.parametrize("push", [0.05, 0.2])
def test_a_lora_teacher_that_never_sees_the_negatives_lets_the_student_go_too_far(push):
    assert settles_at(push, lora_has_nasa=True) == pytest.approx(push, rel=1e-3)
    assert settles_at(push, lora_has_nasa=False) > 4 * push


# ---- the average of the weights ------------------------------------------------------------------


def test_an_average_is_the_sum_of_what_it_followed():
    """Against the sum written out: weight i counts 1 - decay_i, times all decays behind it."""
    network = torch.nn.Linear(2, 1, bias=False).double()
    seen, decays = [network.weight.detach().clone()], []

    def decay(count):
        decays.append(count / (count + 9))
        return decays[-1]

    average = average_of(network, decay)
    for step in range(5):
        with torch.no_grad():
            network.weight += step + 1
        average.update_parameters(network)
        seen.append(network.weight.detach().clone())
        if step == 2:  # another process goes on with it
            before, average = average, average_of(network, decay)
            average.module.load_state_dict(before.module.state_dict())
            resume(average, step + 1)
    assert decays == [n / (n + 9) for n in range(1, 6)]
    shares = [1.0] + [1 - d for d in decays]
    expected = sum(
        share * math.prod(decays[i:]) * weight
        for i, (share, weight) in enumerate(zip(shares, seen, strict=True))
    )
    torch.testing.assert_close(average.module.weight, expected, rtol=1e-12, atol=0)
    assert not average.module.weight.requires_grad
