"""Small pipelines, one per family, and how to draw with them."""

import warnings

import pytest
import torch
from nasa_diffusers import testing

warnings.filterwarnings("ignore", category=FutureWarning)

torch.set_num_threads(1)

STABLE_DIFFUSION = {
    "sd": testing.stable_diffusion,
    "sdxl": testing.stable_diffusion_xl,
}


@pytest.fixture(params=STABLE_DIFFUSION)
def pipe(request):
    """A fresh pipeline of each kind of Stable Diffusion."""
    return STABLE_DIFFUSION[request.param]()


@pytest.fixture
def sd():
    return testing.stable_diffusion()


# what a call needs besides prompt, steps, guidance and generators
OPTIONS = {
    "PixArtAlphaPipeline": {"use_resolution_binning": False, "clean_caption": False},
    "PixArtSigmaPipeline": {"use_resolution_binning": False, "clean_caption": False},
    "SanaPipeline": {
        "height": 32,
        "width": 32,
        "use_resolution_binning": False,
        "complex_human_instruction": None,
    },
    "WanPipeline": {"height": 16, "width": 32, "num_frames": 5},
}


def draw(pipe, prompt="a cat", *, steps=1, guidance=0.0, seed=0, **options):
    """The final latents, the same for the same arguments."""
    prompts = len(prompt) if isinstance(prompt, list) else 1
    images = prompts * options.get("num_images_per_prompt", 1)
    options = OPTIONS.get(type(pipe).__name__, {}) | {"output_type": "latent"} | options
    return pipe(
        prompt,
        generator=[torch.Generator().manual_seed(seed + i) for i in range(images)],
        num_inference_steps=steps,
        guidance_scale=guidance,
        **options,
    )[0]


@pytest.fixture(name="draw")
def _draw():
    return draw


def relative_error(actual, exact):
    return ((actual.double() - exact).norm() / exact.norm()).item()


def assert_same_image(actual, expected):
    """Equal but for fp32 roundings: a wrong row, token or alpha moves an image by over 1e-3."""
    assert relative_error(actual, expected) < 2e-5
