"""A run of a pipeline begins with its first step, guided or not: what was kept is looked at then.

Weights written through `.data` are counted by nothing; the next run must see them all the same.
"""

import pytest
import torch
from drawing import draw
from nasa_diffusers import enable_nasa, nasa, testing
from test_pipe_stale import FAMILIES, NEGATIVE, prompts, write_through_data

WINDOWS = [
    {},
    {"start": 1},
    {"start": 0.5},
    {"start": 1, "stop": 2},
    {"start": 0.25, "stop": 0.75},
    {"start": 3},
    {"stop": 1},
    {"stop": 0.5},
]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_window(family, window):
    """The prompt is the same object in both runs."""
    fresh, pipe, call = FAMILIES[family](), FAMILIES[family](), prompts(family)
    write_through_data(fresh)
    with nasa(fresh, **NEGATIVE, **window):
        expected = draw(fresh, steps=4, **call)
    with nasa(pipe, **NEGATIVE, **window):
        assert not torch.equal(draw(pipe, steps=4, **call), expected)
        write_through_data(pipe)
        assert torch.equal(draw(pipe, steps=4, **call), expected)


def test_alpha_0_in_the_first_steps():
    """Switched on by a callback, as where a window will not do."""
    call = prompts("sd")

    def run(pipe, handle):
        def switch_on(pipe, step, timestep, tensors):
            handle.alpha = 5.0
            return {}

        handle.alpha = 0
        return draw(pipe, steps=3, **call, callback_on_step_end=switch_on)

    fresh, pipe = testing.stable_diffusion(), testing.stable_diffusion()
    write_through_data(fresh)
    expected = run(fresh, enable_nasa(fresh, **NEGATIVE))
    handle = enable_nasa(pipe, **NEGATIVE)
    assert not torch.equal(run(pipe, handle), expected)
    write_through_data(pipe)
    assert torch.equal(run(pipe, handle), expected)


def test_a_denoiser_of_the_later_steps_only():
    """The second transformer of Wan 2.2 never sees the first step."""

    def write(pipe):
        pipe.transformer_2.condition_embedder.text_embedder.linear_1.weight.data.mul_(2)

    fresh, pipe, call = testing.wan(True), testing.wan(True), prompts("wan")
    write(fresh)
    with nasa(fresh, **NEGATIVE):
        expected = draw(fresh, steps=4, **call)
    with nasa(pipe, **NEGATIVE):
        assert not torch.equal(draw(pipe, steps=4, **call), expected)
        write(pipe)
        assert torch.equal(draw(pipe, steps=4, **call), expected)


class WithoutIndex(type(testing.stable_diffusion())):
    """A loop that does not count its steps."""

    @torch.no_grad()
    def __call__(self, text, steps):
        self.scheduler.set_timesteps(steps)
        timesteps = self.scheduler.timesteps
        latents = torch.ones(1, 4, 16, 16)
        for t in timesteps:
            noise = self.unet(latents, t, encoder_hidden_states=text).sample
            generator = torch.Generator().manual_seed(0)
            latents = self.scheduler.step(noise, t, latents, generator=generator).prev_sample
        return latents


def test_a_loop_that_does_not_count():
    def build():
        parts = testing.stable_diffusion().components
        parts = {name: part for name, part in parts.items() if part is not None}
        return WithoutIndex(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )

    fresh, pipe, text = build(), build(), prompts("sd")["prompt_embeds"]
    write_through_data(fresh)
    with nasa(fresh, **NEGATIVE, cfg=False):
        expected = fresh(text, 3)
    with nasa(pipe, **NEGATIVE, cfg=False):
        assert not torch.equal(pipe(text, 3), expected)
        write_through_data(pipe)
        assert torch.equal(pipe(text, 3), expected)
