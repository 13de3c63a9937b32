"""Who is calling the denoiser, and for which rows and which step.

A denoiser is told neither whether its batch is doubled for classifier-free guidance nor which
step it computes, and pipelines made with `from_pipe` share it. The pipeline in the call stack
knows all of this, so it is read there: no value is compared and no device is synchronised.
The names read are those of every diffusers pipeline: `do_classifier_free_guidance` (a property,
in PixArt a local variable), `i` and `timesteps` of the loop, `batch_size` (the prompts),
`clip_skip` and `lora_scale`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from nasa_diffusers.encoding import call_defaults

# their guidance is an input of the model
WITHOUT_CFG = ("SanaSprintPipeline", "SanaSprintImg2ImgPipeline")


@dataclass(frozen=True)
class Caller:
    """A pipeline that is running, and the variables of the function that runs it."""

    pipe: Any
    variables: Mapping[str, Any]

    @property
    def uses_cfg(self) -> bool | None:
        """None where the pipeline does not say."""
        if type(self.pipe).__name__ in WITHOUT_CFG:
            return False
        name = "do_classifier_free_guidance"
        return self.variables.get(name, getattr(self.pipe, name, None))

    @property
    def step(self) -> tuple[int, int]:
        """The step in progress, from 0, and how many there are."""
        index, timesteps = self.variables.get("i"), self.variables.get("timesteps")
        # under diffusion forcing a row of it holds the timesteps of all frames
        timesteps = self.variables.get("step_matrix", timesteps)
        if not isinstance(index, int) or timesteps is None:
            raise RuntimeError(
                f"nasa_diffusers: start and stop need to know the step, and "
                f"{type(self.pipe).__name__} has no loop `for i, t in enumerate(timesteps)`; "
                "leave them out, and set handle.alpha in a callback_on_step_end instead"
            )
        # second-order schedulers visit two timesteps in a step
        order = getattr(self.pipe.scheduler, "order", 1)
        return index // order, -(-len(timesteps) // order)

    @property
    def begins(self) -> bool:
        """True in the first step of its loop."""
        return self.variables.get("i") == 0

    @property
    def prompts(self) -> int | None:
        """How many prompts the call has; each one gives `num_images_per_prompt` rows."""
        return self.variables.get("batch_size")

    def text_options(self, names: Sequence[str]) -> dict[str, Any]:
        """The options `names` of `encode_prompt` with which this call encodes its prompt."""
        # what this function does not name has the value that a call has by default
        given = call_defaults(self.pipe, names)
        given |= {name: self.variables[name] for name in names if name in self.variables}
        if "lora_scale" in names and given.get("lora_scale") is None:
            # its name in image-to-image, inpainting and ControlNet pipelines
            given["lora_scale"] = self.variables.get("text_encoder_lora_scale")
        return {name: value for name, value in given.items() if value is not None}

    def is_unconditional(self, text: Tensor) -> bool:
        """True for the second of two calls a step, the one with the pipeline's own negative."""
        return text is self.variables.get("negative_prompt_embeds")


def find_caller() -> Caller | None:
    """The innermost pipeline in the call stack; None in a loop of the user's own."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_varnames[:1] == ("self",):
            owner = frame.f_locals.get("self")
            if isinstance(owner, DiffusionPipeline):
                return Caller(owner, frame.f_locals)
        frame = frame.f_back
    return None


def first_guided_row(caller: Caller | None, cfg: bool | None, sample: Tensor) -> int:
    """0, or half the batch where it is `[unconditional | conditional]`."""
    if caller is not None and _has_other_rows(caller.pipe):
        raise RuntimeError(
            f"nasa_diffusers: {type(caller.pipe).__name__} batches more than [unconditional | "
            "conditional] rows; switch its extra guidance off, or call disable_nasa(pipe)"
        )
    rows = sample.shape[0]
    if cfg is None and caller is not None:
        cfg = caller.uses_cfg
    if cfg is None and rows % 2 == 0 and torch.equal(*sample.chunk(2)):
        raise RuntimeError(
            "nasa_diffusers: both halves of the batch have the same latents, so this may be "
            "classifier-free guidance, and no pipeline in the call stack says; pass cfg=True (the "
            "first half is unconditional) or cfg=False to enable_nasa"
        )
    if cfg and rows % 2 == 1:
        raise RuntimeError(
            f"nasa_diffusers: with classifier-free guidance the batch must be even, it has {rows} "
            "rows; pass cfg=False to enable_nasa if it is not doubled"
        )
    return rows // 2 if cfg else 0


def _has_other_rows(pipe: DiffusionPipeline) -> bool:
    perturbed = getattr(pipe, "do_perturbed_attention_guidance", False)
    return perturbed or "Pix2Pix" in type(pipe).__name__
