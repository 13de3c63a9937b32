"""Small pipelines, one per family, and how to draw with them."""

import drawing
import joint_cases
import pytest
import torch
from nasa_diffusers import testing

STABLE_DIFFUSION = {
    "sd": testing.stable_diffusion,
    "sdxl": testing.stable_diffusion_xl,
}

# files about what diffusers does and calls things: these hold for the oldest versions as well
CONTRACT = (
    "adapters", "branches", "causal", "encoding", "exactness", "families", "flux", "hooks",
    "joint", "layers", "rows", "runs", "sd3", "settings", "text", "together", "videos",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem.removeprefix("test_pipe_") in CONTRACT:
            item.add_marker(pytest.mark.contract)


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


@pytest.fixture(params=joint_cases.ONE_EACH)
def one_each(request):
    """A case of FLUX.1 and one of SD3."""
    return joint_cases.CASES[request.param]()
