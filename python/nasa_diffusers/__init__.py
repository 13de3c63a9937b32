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
except ImportError as error:
    name = error.name or ""
    if name in ("diffusers", "transformers", "accelerate", "peft", "PIL", "tqdm"):
        raise ModuleNotFoundError(
            f'nasa_diffusers needs {name}; pip install "nasa-kernels[diffusers]"', name=name
        ) from error
    # a name that the other half does not have; not what a copy of it says of itself
    if name.partition(".")[0] == "nasa_kernels":
        raise ImportError(
            f"nasa_diffusers in {__path__[0]} belongs with a nasa_kernels of the same version, and "
            f"found: {error}; install nasa-kernels again, and where two are installed keep one",
            name=name,
        ) from error
    raise

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
