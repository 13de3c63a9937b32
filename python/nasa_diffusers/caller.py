"""Who is calling the denoiser: its step, its prompts, and the texts it holds.

A denoiser is told neither which rows of its batch carry the prompt nor which step it computes,
and pipelines made with `from_pipe` share it. The pipeline in the call stack knows all of this, so
it is read there. The names read are those of every diffusers pipeline: `prompt_embeds` and
`negative_prompt_embeds` with their few relatives, `do_classifier_free_guidance` (a property, in
PixArt a local variable), `i` and `timesteps` of the loop, `batch_size` (the prompts), `clip_skip`
and `lora_scale`. A modular pipeline keeps the same names in the state of its blocks.
"""

from __future__ import annotations

import sys
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple

from diffusers import DiffusionPipeline
from torch import Tensor

from nasa_diffusers.encoding import call_defaults

try:
    from diffusers import ModularPipeline
except ImportError:  # pragma: no cover

    class ModularPipeline:  # type: ignore[no-redef]
        pass


# their guidance is an input of the model
WITHOUT_CFG = ("SanaSprintPipeline", "SanaSprintImg2ImgPipeline")
# they write prompts times images into `batch_size`
COUNTING_IMAGES = ("StableUnCLIPPipeline", "StableUnCLIPImg2ImgPipeline")
# where pipelines hold the text of the prompt, often beside that of other branches in one tensor
PROMPTS = (
    "connector_prompt_embeds",
    "prompt_embeds",
    "prompt_embeds_t5",
    "text_embeddings",
    "text_embedding",
    "text_bth",
    "llm_features",
    "cond_embeddings",
)
# words in the names of texts that are not the prompt's
OTHERS = {
    *("negative", "uncond", "unconditional", "null", "empty", "safety"),
    *("edit", "editing", "source", "target"),
}
IMAGES_PER_PROMPT = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")


class Texts(NamedTuple):
    """The texts that a running pipeline holds."""

    prompt: Tensor | None  # [R, n, c], other branches may be rows of it
    others: list[Tensor]  # [r, n, c] each: negative prompts, edits, safety concepts


@dataclass(frozen=True)
class Caller:
    """A pipeline that is running, and the variables of the functions that run it."""

    pipe: Any
    variables: Mapping[str, Any]
    # the function that denoises is the `__call__` of a pipeline that diffusers comes with
    is_stock: bool = False
    # a modular pipeline calls the denoiser once for each branch
    is_modular: bool = False

    @property
    def name(self) -> str:
        return type(self.pipe).__name__

    def is_a(self, names: Sequence[str]) -> bool:
        return any(cls.__name__ in names for cls in type(self.pipe).__mro__)

    @property
    def uses_cfg(self) -> bool | None:
        """None where the pipeline does not say."""
        if self.is_a(WITHOUT_CFG):
            return False
        return self._says("do_classifier_free_guidance")

    @property
    def perturbs_attention(self) -> bool:
        """Whether the prompt has a second row, for perturbed attention guidance."""
        return bool(self._says("do_perturbed_attention_guidance"))

    def _says(self, name: str) -> bool | None:
        return self.variables.get(name, getattr(self.pipe, name, None))

    @property
    def step(self) -> tuple[int, int]:
        """The step in progress, from 0, and how many there are."""
        index, timesteps = self.variables.get("i"), self.variables.get("timesteps")
        # under diffusion forcing a row of it holds the timesteps of all frames
        timesteps = self.variables.get("step_matrix", timesteps)
        if timesteps is None and self.is_stock:
            # some loop over those of the scheduler
            timesteps = getattr(self.pipe.scheduler, "timesteps", None)
        if not isinstance(index, int) or timesteps is None:
            raise RuntimeError(
                f"nasa_diffusers: start and stop need to know the step, and {self.name} has no "
                "loop `for i, t in enumerate(timesteps)`; leave them out, and set handle.alpha in "
                "a callback_on_step_end instead"
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
        """How many prompts the call has; each one gives `images_per_prompt` rows."""
        count = self.variables.get("batch_size")
        if not isinstance(count, int):
            prompt = self.variables.get("prompt")
            if isinstance(prompt, str):
                return 1
            return len(prompt) if isinstance(prompt, list) else None
        return count // self.images_per_prompt if self.is_a(COUNTING_IMAGES) else count

    @property
    def images_per_prompt(self) -> int:
        given = (self.variables.get(name) for name in IMAGES_PER_PROMPT)
        return next((count for count in given if isinstance(count, int)), 1)

    def text_options(self, names: Sequence[str]) -> dict[str, Any]:
        """The options `names` of `encode_prompt` with which this call encodes its prompt."""
        # what this function does not name has the value that a call has by default
        given = call_defaults(self.pipe, names)
        given |= {name: self.variables[name] for name in names if name in self.variables}
        if "lora_scale" in names and given.get("lora_scale") is None:
            # its name in image-to-image, inpainting and ControlNet pipelines
            given["lora_scale"] = self.variables.get("text_encoder_lora_scale")
        return {name: value for name, value in given.items() if value is not None}

    @property
    def texts(self) -> Texts:
        """The texts held now, by the names of the variables that hold them."""
        prompt = next((x for name in PROMPTS if _is_text(x := self.variables.get(name))), None)
        others = []
        for name, value in self.variables.items():
            if not any(part in name for part in ("embed", "concept", "text_bth")):
                continue
            if OTHERS & set(name.split("_")):
                others += _texts(value)
            elif name.endswith("_embeds_tuple"):
                # what `encode_prompt` returned: the prompt, then the negative
                others += _texts(value)[1:]
        return Texts(prompt, [x for x in others if x is not prompt])


def find_caller() -> Caller | None:
    """The innermost pipeline in the call stack; None in a loop of the user's own."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        names = frame.f_code.co_varnames
        if names[:1] == ("self",):
            variables = frame.f_locals
            if isinstance(variables.get("self"), DiffusionPipeline):
                return _classic(frame)
            if "block_state" in names and isinstance(variables.get("components"), ModularPipeline):
                state = vars(variables["block_state"])
                # the state first: a block's own variables are those of one branch
                return Caller(variables["components"], ChainMap(state, variables), is_modular=True)
        frame = frame.f_back
    return None


def modular_caller() -> str | None:
    """The modular pipeline in the call stack whose blocks `find_caller` does not know: its name."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        for name in ("components", "self"):
            if name in frame.f_code.co_varnames:
                pipe = frame.f_locals.get(name)
                if isinstance(pipe, ModularPipeline):
                    return type(pipe).__name__
        frame = frame.f_back
    return None


def _classic(frame: FrameType) -> Caller:
    """The caller whose innermost function is `frame`; functions it was called by come after."""
    pipe = frame.f_locals["self"]
    chain = list(_functions_of(pipe, frame))
    # a subclass may wrap the `__call__` that has the loop
    run = next((f for f in chain if f.f_code.co_name == "__call__"), None)
    is_stock = run is not None and run.f_globals.get("__name__", "").startswith("diffusers.")
    return Caller(pipe, ChainMap(*(f.f_locals for f in chain)), is_stock)


def _functions_of(pipe: Any, frame: FrameType | None) -> Iterator[FrameType]:
    """The frames of the pipeline's methods, the innermost first."""
    while frame is not None:
        if frame.f_code.co_varnames[:1] == ("self",) and frame.f_locals.get("self") is pipe:
            yield frame
        frame = frame.f_back


def _is_text(value: Any) -> bool:
    # Allegro has `[r, 1, n, c]`; Krea 2 holds its text layer by layer
    return isinstance(value, Tensor) and value.dim() in (3, 4)


def _texts(value: Any) -> list[Tensor]:
    return [x for x in (value if isinstance(value, (list, tuple)) else [value]) if _is_text(x)]
