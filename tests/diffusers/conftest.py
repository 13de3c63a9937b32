"""Small pipelines, one per family, and how to draw with them."""

import drawing
import pytest
import torch
from nasa_diffusers import testing

STABLE_DIFFUSION = {
    "sd": testing.stable_diffusion,
    "sdxl": testing.stable_diffusion_xl,
}


@pytest.fixture(autouse=True)
def one_thread():
    """The models are too small to share between threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=STABLE_DIFFUSION)
def pipe(request):
    """A fresh pipeline of each kind of Stable Diffusion."""
    return STABLE_DIFFUSION[request.param]()


@pytest.fixture
def sd():
    return testing.stable_diffusion()


@pytest.fixture(name="draw")
def _draw():
    return drawing.draw
