"""Negative prompts on stock diffusers pipelines, in one or a few steps and at any guidance scale.

from nasa_diffusers import NAG, enable_nasa

handle = enable_nasa(pipe, "blurry", alpha=0.2)
image = pipe("a cat", num_inference_steps=1, guidance_scale=0).images[0]
handle.method = NAG(scale=3)
handle.disable()
"""

try:
    from nasa_diffusers.api import Handle, disable_nasa, enable_nasa, nasa
    from nasa_diffusers.methods import NAG, NASA, VSF, Method, ProjectedNASA
    from nasa_diffusers.report import Report
except ModuleNotFoundError as error:
    if error.name not in ("diffusers", "transformers", "accelerate", "peft", "PIL", "tqdm"):
        raise
    raise ModuleNotFoundError(
        f'nasa_diffusers needs {error.name}; pip install "nasa-kernels[diffusers]"',
        name=error.name,
    ) from error

__all__ = [
    "NAG",
    "NASA",
    "VSF",
    "Handle",
    "Method",
    "ProjectedNASA",
    "Report",
    "disable_nasa",
    "enable_nasa",
    "nasa",
]
