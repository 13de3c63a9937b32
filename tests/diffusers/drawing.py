"""How tests draw with the small pipelines, and when two images are the same."""

import torch

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
    """The final latents, the same for the same arguments; `seeds` of them for embeddings."""
    prompts = len(prompt) if isinstance(prompt, list) else 1
    images = options.pop("seeds", prompts) * options.get("num_images_per_prompt", 1)
    options = OPTIONS.get(type(pipe).__name__, {}) | {"output_type": "latent"} | options
    return pipe(
        prompt,
        generator=[torch.Generator().manual_seed(seed + i) for i in range(images)],
        num_inference_steps=steps,
        guidance_scale=guidance,
        **options,
    )[0]


def negative_embeds(pipe, prompt="blurry"):
    return pipe.encode_prompt(
        prompt=prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )[0]


def denoise(pipe, text, rows=2, seed=0):
    """One call of the denoiser, the smallest thing in which every layer takes part."""
    generator = torch.Generator().manual_seed(seed)
    # drawn in fp64, so that every dtype and device starts from the same numbers
    sample = torch.randn(rows, 4, 16, 16, generator=generator, dtype=torch.float64).to(text)
    added = None
    if pipe.unet.config.addition_embed_type == "text_time":
        added = {"text_embeds": text.new_ones(rows, 32), "time_ids": text.new_ones(rows, 6)}
    return pipe.unet(sample, 500, text.expand(rows, -1, -1), added_cond_kwargs=added).sample


def relative_error(actual, exact):
    return ((actual.double() - exact).norm() / exact.norm()).item()


def assert_same_image(actual, expected):
    """Equal but for fp32 roundings: a wrong row, token or alpha moves an image by over 1e-3."""
    assert relative_error(actual, expected) < 2e-5
