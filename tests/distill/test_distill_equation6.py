"""What `ablate` says of a run's gradient, where its parts are known."""

import pytest
import torch
from nasa_distill.world.evaluation import equation6
from test_distill_training import make_run


def test_what_equation_6_is_made_of(tmp_path):
    """Before its first step a LoRA teacher is the teacher, and only the negative prompt adds."""
    run = make_run(tmp_path)
    found = equation6.parts(run, images=4, noises=3)
    assert found["rms of v"] == 0 < found["rms of n"] >= found["rms of n's average"]
    assert found["teacher's loss"] == found["LoRA teacher's loss"] > 0
    run.settings = run.settings.changed(kappa=(1.0, 1.0))
    assert equation6.parts(run, images=4, noises=3)["rms of n"] == 0
    run.step(0)
    assert equation6.parts(run, images=4, noises=3)["rms of v"] > 0


def test_the_noise_of_an_average_is_left_out():
    random_ = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 8, 100_000, generator=random_)
    assert equation6.product(x, x).item() == pytest.approx(0, abs=0.01)  # the biased one: 0.125
    assert equation6.product(x + 0.3, y - 0.2).item() == pytest.approx(-0.06, abs=0.01)
