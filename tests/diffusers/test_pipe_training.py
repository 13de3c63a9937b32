"""Gradients through a guided denoiser, with and without gradient checkpointing."""

import pytest
import torch
from drawing import negative_embeds, relative_error
from nasa_diffusers import NAG, NASA, VSF, ProjectedNASA, enable_nasa, testing
from oracle import algorithm_1


@pytest.fixture(params=["sd", "pixart", "sana", "wan"])
def model(request):
    """A pipeline with trainable weights, and one call of its denoiser."""
    generator = torch.Generator().manual_seed(0)
    build = {
        "sd": testing.stable_diffusion,
        "pixart": testing.pixart,
        "sana": testing.sana,
        "wan": testing.wan,
    }
    pipe = build[request.param]()
    denoiser = pipe.unet if request.param == "sd" else pipe.transformer
    denoiser.train().requires_grad_(True)
    shape = (2, 16, 2, 4, 4) if request.param == "wan" else (2, 4, 16, 16)
    text = torch.randn(2, 9, 32, generator=generator)
    sample = torch.randn(shape, generator=generator)
    options = {"added_cond_kwargs": {}} if request.param == "pixart" else {}

    def loss():
        output = denoiser(
            sample,
            timestep=torch.tensor([500, 500]),
            encoder_hidden_states=text,
            return_dict=False,
            **options,
        )
        return output[0].square().mean()

    return pipe, denoiser, loss


def gradients(denoiser):
    found = {name: p.grad for name, p in denoiser.named_parameters() if p.grad is not None}
    denoiser.zero_grad()
    return found


def negative(seed=1):
    return torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(seed))


METHODS = {
    "nasa": NASA(0.5),
    "nag": NAG(alpha=0.5),
    "vsf": VSF(0.5),
    "projected": ProjectedNASA(0.5),
}


@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_changes_no_gradient(model, method):
    pipe, denoiser, loss = model
    enable_nasa(pipe, method=METHODS[method], negative_prompt_embeds=negative())
    loss().backward()
    plain = gradients(denoiser)
    denoiser.enable_gradient_checkpointing()
    loss().backward()
    checkpointed = gradients(denoiser)
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def change_alpha(handle):
    handle.alpha = 5.0


def change_negative(handle):
    handle.set_negative_prompt(negative_prompt_embeds=negative(seed=2))


def switch_off(handle):
    handle.alpha = 0


CHANGES = [change_alpha, change_negative, switch_off]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_recomputation_sees_the_settings_of_its_forward(model, change):
    """Backward runs the blocks again, after the settings have changed."""
    pipe, denoiser, loss = model
    handle = enable_nasa(pipe, negative_prompt_embeds=negative(), alpha=0.5)
    denoiser.enable_gradient_checkpointing()
    loss().backward()
    expected = gradients(denoiser)
    value = loss()
    change(handle)
    value.backward()
    actual = gradients(denoiser)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    # and the next call sees the change
    loss().backward()
    assert any(not torch.equal(expected[n], g) for n, g in gradients(denoiser).items())


def test_gradients_are_those_of_algorithm_1():
    sample, text = torch.randn(2, 4, 16, 16), torch.randn(2, 9, 32)
    pipe = testing.stable_diffusion()
    pipe.unet.requires_grad_(True)
    text_negative = negative_embeds(pipe)

    def backward(dtype):
        pipe.unet.to(dtype)
        pipe.unet(sample.to(dtype), 500, text.to(dtype)).sample.square().mean().backward()
        return torch.cat([g.flatten() for g in gradients(pipe.unet).values()])

    with algorithm_1(pipe.unet, [(text_negative, None, 0.5)]):
        exact, eager = backward(torch.float64), backward(torch.float32)
    enable_nasa(pipe, "blurry", alpha=0.5)
    ours = backward(torch.float32)
    assert relative_error(ours, exact) <= 2 * relative_error(eager, exact)


def test_alpha_learns(sd):
    """A tensor alpha that requires a gradient gets one, also under checkpointing."""
    alpha = torch.tensor([0.3, 0.6], requires_grad=True)
    sample, text = torch.randn(2, 4, 16, 16), torch.randn(2, 9, 32)
    enable_nasa(sd, "blurry", alpha=alpha)
    sd.unet(sample, 500, text).sample.square().mean().backward()
    plain, alpha.grad = alpha.grad, None
    assert plain.abs().min() > 0
    sd.unet.train().enable_gradient_checkpointing()
    sd.unet(sample, 500, text).sample.square().mean().backward()
    assert torch.equal(alpha.grad, plain)


def test_embeddings_learn(sd):
    """As textual inversion of a negative prompt; each step sees what the optimiser wrote."""
    embeds = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    sample, text = torch.randn(2, 4, 16, 16), torch.randn(2, 9, 32)
    optimiser = torch.optim.SGD([embeds], lr=10.0)
    enable_nasa(sd, negative_prompt_embeds=embeds, alpha=0.5)
    losses = []
    for _ in range(3):
        loss = sd.unet(sample, 500, text).sample.square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]
    with torch.no_grad():
        assert sd.unet(sample, 500, text).sample.square().mean() < losses[2]


def test_training_after_drawing_in_inference_mode(sd, draw):
    """What was prepared for a call in inference mode is not used where gradients flow."""
    sd.unet.requires_grad_(True)
    sample, text = torch.randn(2, 4, 16, 16), negative_embeds(sd, ["a cat", "a dog"])
    enable_nasa(sd, ["blurry", "red"], alpha=[0.3, 0.6])
    with torch.inference_mode():
        sd.unet(sample, 500, text.clone())
    sd.unet(sample, 500, text).sample.square().mean().backward()
