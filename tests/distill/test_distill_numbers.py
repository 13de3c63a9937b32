"""The numbers of a run may be Python's, NumPy's, or tensors without dimensions."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from nasa_distill.train import config
from nasa_distill.world import fit

RUNS = [
    config.Settings(steps=4, batch=2, lora_rank=4, student_rate=0.5, kappa=(0.5, 2.0)),
    fit.Settings(steps=4, learning_rate=0.5),
]
KINDS = {"numpy": (np.int64, np.float32), "torch": (torch.tensor, torch.tensor)}


def typed(settings, kind):
    whole, real = KINDS[kind]

    def change(value):
        if isinstance(value, tuple) and not isinstance(value[0], str):
            return tuple(map(change, value))
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return value
        return whole(value) if isinstance(value, int) else real(value)

    return {name: change(value) for name, value in asdict(settings).items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", RUNS, ids=lambda s: type(s).__module__)
def test_numbers_become_plain(settings, kind):
    made = type(settings)(**typed(settings, kind))
    # they are written to a run's records
    plain = json.loads(json.dumps(asdict(made)))
    expected = json.loads(json.dumps(asdict(settings)))
    assert plain.keys() == expected.keys()
    for name, value in expected.items():
        assert plain[name] == (pytest.approx(value) if not isinstance(value, str) else value), name


@pytest.mark.parametrize("wrong", [True, np.True_, torch.tensor(True), "3", None], ids=str)
@pytest.mark.parametrize("settings", RUNS, ids=lambda s: type(s).__module__)
def test_what_is_no_number(settings, wrong):
    for name in ("steps", "seed", "weight_decay"):
        with pytest.raises(ValueError, match=f"Settings: {name} must be a"):
            replace(settings, **{name: wrong})


def test_a_range_is_two_numbers():
    for wrong in ((0.5,), (0.5, True), (0.5, 1.0, 2.0)):
        with pytest.raises(ValueError, match="kappa must be two numbers"):
            replace(RUNS[0], kappa=wrong)
    with pytest.raises(ValueError, match="noise must be two integers"):
        replace(RUNS[0], noise=(0.5, 10))
