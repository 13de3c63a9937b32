"""What only a GPU can show: fp16 kernels, weights that really move, CUDA graphs."""

import pytest
import torch
from drawing import assert_same_image, denoise, negative_embeds, relative_error
from nasa_diffusers import NAG, NASA, VSF, ProjectedNASA, enable_nasa, nasa, testing
from oracle import algorithm_1

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_guided_call_is_algorithm_1(pipe, dtype):
    """Against fp64 on the CPU, no worse than the eager computation, and a rounding."""
    positive, negative = negative_embeds(pipe, "a cat"), negative_embeds(pipe)

    def call(device, dtype):
        pipe.unet.to(device, dtype)
        with torch.no_grad():
            return denoise(pipe, positive.to(device, dtype)).double().cpu()

    with algorithm_1(pipe.unet, [(negative.double(), None, 0.5)]):
        exact = call("cpu", torch.float64)
    with algorithm_1(pipe.unet, [(negative.to("cuda", dtype), None, 0.5)]):
        eager = call("cuda", dtype)
    with nasa(pipe, negative_prompt_embeds=negative, alpha=0.5):
        ours = call("cuda", dtype)
    assert relative_error(ours, exact) <= 1.5 * relative_error(eager, exact)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("kind", ["model", "sequential", "group"])
def test_offloaded_weights(draw, kind, order):
    def offload(pipe):
        if kind == "group":
            pipe.unet.enable_group_offload(torch.device("cuda"), offload_type="leaf_level")
            for module in (pipe.text_encoder, pipe.vae):
                module.to("cuda")
        else:
            getattr(pipe, f"enable_{kind}_cpu_offload")()

    resident, pipe = testing.stable_diffusion().to("cuda"), testing.stable_diffusion()
    with nasa(resident, "blurry", alpha=0.5):
        expected = draw(resident, steps=2)
    if order == "before":
        offload(pipe)
    enable_nasa(pipe, "blurry", alpha=0.5)
    if order == "after":
        offload(pipe)
    for _ in range(2):
        assert_same_image(draw(pipe, steps=2), expected)


METHODS = {
    "nasa": NASA(0.5),
    "nag": NAG(scale=5.0, alpha=0.5),
    "vsf": VSF(0.5),
    "projected": ProjectedNASA(2.0),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_that_of_the_cpu(draw, method):
    with nasa(testing.pixart(), "blurry", METHODS[method]) as handle:
        expected = draw(handle._guidances[0].pipe, steps=2)
    with nasa(testing.pixart().to("cuda"), "blurry", METHODS[method]) as handle:
        ours = draw(handle._guidances[0].pipe, steps=2)
    assert relative_error(ours.cpu(), expected) < 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_cuda_graphs_see_a_new_alpha_and_a_new_prompt(draw, method):
    plain, pipe = testing.stable_diffusion().to("cuda"), testing.stable_diffusion().to("cuda")
    pipe.unet.compile(fullgraph=True, mode="reduce-overhead")
    handles = [enable_nasa(p, "blurry", METHODS[method]) for p in (plain, pipe)]
    calls = [(0.5, "a cat", "blurry"), (0.1, "a dog", "blurry"), (0.9, "a dog", "red")]
    for alpha, prompt, negative in calls:
        for handle in handles:
            handle.alpha = alpha
            handle.set_negative_prompt(negative)
        assert relative_error(draw(pipe, prompt), draw(plain, prompt)) < 1e-3
