"""Every number that people give may be Python's, NumPy's, or a tensor without dimensions."""

import nasa_diffusers
import numpy as np
import pytest
import torch
from drawing import draw
from nasa_diffusers import NAG, enable_nasa, nasa, testing

FLOATS = {
    "float32": np.float32,
    "float64": np.float64,
    "array": np.array,
    "torch32": torch.tensor,
    "torch64": lambda x: torch.tensor(x, dtype=torch.float64),
}
INTEGERS = {"int64": np.int64, "int32": np.int32, "array": np.array, "torch": torch.tensor}
# of each argument, a value exact in every dtype, for steps and lengths a whole one
FRACTIONS = [
    ("alpha", 0.5),
    ("start", 0.5),
    ("stop", 0.5),
    ("NASA.alpha", 0.5),
    ("VSF.alpha", 0.5),
    ("NAG.scale", 3.5),
    ("NAG.tau", 1.5),
    ("NAG.alpha", 0.5),
]
WHOLE = [
    ("alpha", 1),
    ("start", 1),
    ("stop", 1),
    ("NAG.scale", 3),
    ("NAG.tau", 2),
    ("NAG.norm", 2),
    ("NAG.alpha", 1),
]


def options(name, value):
    """What `enable_nasa` takes, for an argument of it or of a method."""
    method, _, argument = name.rpartition(".")
    if not method:
        return {argument: value}
    return {"method": getattr(nasa_diffusers, method)(**{argument: value})}


@pytest.fixture(scope="module")
def pipe():
    return testing.stable_diffusion()


def image(pipe, prompt="blurry", **options):
    with nasa(pipe, prompt, **options):
        return draw(pipe, steps=2)


@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize(("name", "value"), FRACTIONS)
def test_fractions(pipe, name, value, kind):
    typed = image(pipe, **options(name, FLOATS[kind](value)))
    assert torch.equal(typed, image(pipe, **options(name, value)))


@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize(("name", "value"), WHOLE)
def test_whole_numbers(pipe, name, value, kind):
    typed = image(pipe, **options(name, INTEGERS[kind](value)))
    assert torch.equal(typed, image(pipe, **options(name, value)))


@pytest.mark.parametrize("kind", FLOATS)
def test_alphas_of_several(pipe, kind):
    pairs = [("blurry", 0.5), ("red", -0.25)]
    expected = image(pipe, pairs)
    assert torch.equal(image(pipe, [(p, FLOATS[kind](x)) for p, x in pairs]), expected)
    both = ["a cat", "a dog"]
    with nasa(pipe, "blurry", alpha=[0.5, 0.25]) as handle:
        expected = draw(pipe, both)
        handle.alpha = [FLOATS[kind](0.5), FLOATS[kind](0.25)]
        assert torch.equal(draw(pipe, both), expected)


def test_arrays_as_alphas(pipe):
    both, per_image, region = ["a cat", "a dog"], [0.5, 0.25], torch.rand(16, 16)
    with nasa(pipe, "blurry", alpha=per_image) as handle:
        expected = draw(pipe, both)
        handle.alpha = np.array(per_image)
        assert torch.equal(draw(pipe, both), expected)
        handle.alpha = region
        expected = draw(pipe)
        # the values as they are now
        array = region.numpy().copy()
        handle.alpha = array
        array[:] = 0
        assert torch.equal(draw(pipe), expected)


@pytest.mark.parametrize("kind", INTEGERS)
def test_lengths_and_limits(kind):
    pipe = testing.pixart()
    with nasa(pipe, "blurry and red", max_sequence_length=INTEGERS[kind](5)) as handle:
        assert handle.report().keys_neg == 5
        handle.cache_limit = INTEGERS[kind](1000)
        assert handle.cache_limit == 1000 and type(handle.cache_limit) is int


@pytest.mark.parametrize("wrong", [True, np.True_, torch.tensor(True)], ids=["bool", "np", "torch"])
def test_true_is_no_number(pipe, wrong):
    for name, _ in (*WHOLE, *FRACTIONS):
        with pytest.raises(ValueError, match="(enable_nasa|NASA|NAG|VSF): "):
            enable_nasa(pipe, "blurry", **options(name, wrong))
    with pytest.raises(ValueError, match="alpha of a negative prompt must be a finite number"):
        enable_nasa(pipe, [("blurry", wrong)])
    with pytest.raises(ValueError, match="max_sequence_length must be a number of tokens"):
        enable_nasa(testing.pixart(), "blurry", max_sequence_length=wrong)
    with nasa(pipe, "blurry") as handle, pytest.raises(ValueError, match="cache_limit: "):
        handle.cache_limit = wrong


def test_a_number_that_learns_keeps_its_gradient():
    """As alpha it does; where there is none to give it is refused."""
    scale = torch.tensor(3.0, requires_grad=True)
    with pytest.raises(ValueError, match="NAG: scale must be a finite number"):
        NAG(scale=scale)
