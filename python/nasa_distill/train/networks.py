"""Loading and calling the networks of a diffusers checkpoint: Stable Diffusion or PixArt.

The three networks of NASA-T (teacher, LoRA teacher, student) are denoisers of one kind of pipeline.
This module encodes text for them and calls them; losses are elsewhere.
"""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline, LCMScheduler
from nasa_diffusers.api import find_denoisers
from nasa_diffusers.families import family_of
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from nasa_distill.train import losses

PIXART = "PixArtTransformer2DModel"
JOINT = "SD3Transformer2DModel"  # joint attention: evaluated, not trained by NASA-T
KINDS = ("UNet2DConditionModel", PIXART, JOINT)


class Text(NamedTuple):
    """Encoded prompts, one row per image."""

    embeds: Tensor  # [b, n, c]
    mask: Tensor | None = None  # [b, n], 1 keeps a token
    pooled: Tensor | None = None  # [b, p], which modulates a joint attention

    def rows(self, index: Tensor) -> Text:
        """Those of `index`, in its order."""
        return Text(*(None if x is None else x[index] for x in self))  # type: ignore[arg-type]

    def where(self, use: Tensor, other: Text) -> Text:
        """These rows where `use` `[b]` is true, else those of `other`."""
        embeds = torch.where(use[:, None, None], self.embeds, other.embeds)
        if self.mask is None or other.mask is None:
            return Text(embeds, self.mask)
        return Text(embeds, torch.where(use[:, None], self.mask, other.mask))

    @staticmethod
    def cat(texts: Sequence[Text]) -> Text:
        masks = [text.mask for text in texts if text.mask is not None]
        return Text(torch.cat([text.embeds for text in texts]), torch.cat(masks) if masks else None)


@dataclass
class Model:
    """A pipeline, its denoiser and the schedule they were trained with."""

    pipe: Any
    denoiser: Any
    alphas_cumprod: Tensor  # [T] fp32
    prediction: str

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        size = self.denoiser.config.sample_size
        return self.denoiser.config.in_channels, size, size

    @property
    def joint(self) -> bool:
        return type(self.denoiser).__name__ == JOINT

    @property
    def text_options(self) -> dict[str, int]:
        """The T5's number of tokens, for the pipeline's call and for `enable_nasa`."""
        if self.joint:
            return {"max_sequence_length": 0}  # there is no T5
        if type(self.denoiser).__name__ == PIXART:
            call = inspect.signature(self.pipe.__call__).parameters
            most = call["max_sequence_length"].default
            return {"max_sequence_length": min(most, self.pipe.tokenizer.model_max_length)}
        return {}

    @property
    def call_options(self) -> dict[str, Any]:
        """For the pipeline's call. PixArt would round a small size to one of its large models'."""
        plain = {"use_resolution_binning": False, "clean_caption": False}
        return self.text_options | (plain if type(self.denoiser).__name__ == PIXART else {})

    @property
    def last_timestep(self) -> int:
        return len(self.alphas_cumprod) - 1

    def alpha_sigma(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """`[b, 1, 1, 1]` each, fp32: dividing by the last alpha, 0.07, enlarges rounding errors."""
        kept = self.alphas_cumprod.to(timesteps.device)[timesteps].view(-1, 1, 1, 1)
        return kept.sqrt(), (1 - kept).sqrt()

    def stages(self, steps: int) -> tuple[int, ...]:
        """The timesteps at which diffusers' LCMScheduler calls a student of so many steps."""
        scheduler = LCMScheduler.from_config(self.pipe.scheduler.config)
        scheduler.set_timesteps(steps)
        return tuple(scheduler.timesteps.tolist())

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Text:
        if self.joint:
            embeds, _, pooled, _ = self.pipe.encode_prompt(
                list(prompts), None, None, do_classifier_free_guidance=False, **self.text_options
            )
            return Text(embeds, None, pooled)
        family = family_of(self.denoiser)
        return Text(*family.encode(self.pipe, list(prompts), **self.text_options))

    def output(self, denoiser: nn.Module, x_t: Tensor, timesteps: Tensor, text: Text) -> Tensor:
        """What `denoiser` predicts, without the variance that PixArt predicts beside it."""
        options: dict[str, Any] = {}
        if text.mask is not None:
            options["encoder_attention_mask"] = text.mask
            options["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
        if text.pooled is not None:
            options["pooled_projections"] = text.pooled
        output = denoiser(
            x_t,
            timestep=timesteps,
            encoder_hidden_states=text.embeds,
            return_dict=False,
            **options,
        )[0]
        return output[:, : self.latent_shape[0]]

    def x0(self, denoiser: nn.Module, x_t: Tensor, timesteps: Tensor, text: Text) -> Tensor:
        """The clean latents that `denoiser` sees in `x_t`, in fp32."""
        alpha, sigma = self.alpha_sigma(timesteps)
        output = self.output(denoiser, x_t, timesteps, text)
        return losses.to_x0(output, x_t, alpha, sigma, self.prediction)

    def epsilon(self, denoiser: nn.Module, x_t: Tensor, timesteps: Tensor, text: Text) -> Tensor:
        """The noise that `denoiser` sees in `x_t`, in fp32."""
        alpha, sigma = self.alpha_sigma(timesteps)
        output = self.output(denoiser, x_t, timesteps, text)
        return losses.to_epsilon(output, x_t, alpha, sigma, self.prediction)

    def guided_epsilon(
        self,
        denoiser: nn.Module,
        x_t: Tensor,
        timesteps: Tensor,
        text: Text,
        text_neg: Text,
        kappa: Tensor,
    ) -> Tensor:
        """Equation 5, both prompts in one call."""
        twice = torch.cat([x_t, x_t])
        both = self.epsilon(
            denoiser, twice, torch.cat([timesteps, timesteps]), Text.cat([text_neg, text])
        )
        eps_neg, eps_pos = both.chunk(2)
        return losses.guide(eps_pos, eps_neg, kappa)

    def decode(self, latents: Tensor) -> Tensor:
        """Images in [-1, 1]; gradients flow through the decoder."""
        vae = self.pipe.vae
        scaled = latents / vae.config.scaling_factor
        if shift := getattr(vae.config, "shift_factor", None):
            scaled = scaled + shift
        return vae.decode(scaled.to(vae.dtype), return_dict=False)[0].float()


def load(path: str | Path, dtype: torch.dtype = torch.float32) -> Model:
    """A diffusers checkpoint, frozen and in evaluation mode.

    Raises:
        ValueError: There is none at `path`, or it is of a family that is not trained here.
    """
    try:
        pipe: Any = DiffusionPipeline.from_pretrained(
            str(path), torch_dtype=dtype, **absent(Path(path))
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"networks.load: {path} holds no diffusers pipeline ({error}); give a folder with a "
            "model_index.json, or a hub id"
        ) from error
    return model_of(pipe, str(path))


def absent(path: Path) -> dict[str, None]:
    """Parts that were saved as absent, as SD3's T5: loading needs a None for each of them."""
    index = path / "model_index.json"
    parts = json.loads(index.read_text(encoding="utf-8")) if index.exists() else {}
    return {name: None for name, kind in parts.items() if kind == [None, None]}


def model_of(pipe: Any, path: str) -> Model:
    """The parts of a pipeline that training needs."""
    denoiser = find_denoisers(pipe)[0]
    kind = type(denoiser).__name__
    if kind not in KINDS:
        raise ValueError(
            f"networks.load: the denoiser in {path} is a {kind}; it must be one of "
            + ", ".join(KINDS)
        )
    config = pipe.scheduler.config
    prediction = config.get("prediction_type")
    if prediction not in losses.PREDICTIONS:
        raise ValueError(
            f"networks.load: the scheduler in {path} predicts {prediction!r}; NASA-T knows "
            + ", ".join(losses.PREDICTIONS)
        )
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            module.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    kept = pipe.scheduler.alphas_cumprod.float().clone()
    if config.get("rescale_betas_zero_snr"):
        # diffusers leaves 2^-24 there, because some solvers divide by alpha
        kept[-1] = 0.0
    return Model(pipe, denoiser, kept, prediction)


def check_fit(teacher: Model, student: nn.Module) -> None:
    """Raise unless the student reads and writes what the teacher does."""
    if teacher.joint:
        raise ValueError(
            f"networks.check_fit: NASA-T trains networks with cross-attention, got a {JOINT}"
        )
    for name in ("in_channels", "sample_size", "cross_attention_dim", "caption_channels"):
        theirs = getattr(teacher.denoiser.config, name, None)
        own = getattr(student.config, name, None)
        if theirs != own:
            raise ValueError(
                f"networks.check_fit: teacher and student must have the same {name}, got {theirs} "
                f"and {own}; begin with a student of the teacher's family, or with the teacher"
            )


def add_lora(denoiser: Any, config: LoraConfig) -> None:
    """Give a denoiser adapters, in place; PixArt's class has no method of its own for it."""
    inject_adapter_in_model(config, denoiser)


@contextlib.contextmanager
def without_lora(denoiser: nn.Module) -> Iterator[None]:
    """Switch the adapters off, for the frozen teacher, and on again in any case."""
    layers = [module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
