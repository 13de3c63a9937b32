"""`NASAGuidance`: a guider for the modular pipelines of diffusers, in the place of its CFG guider.

    pipe.update_components(guider=NASAGuidance(alpha=0.5))
    pipe(prompt="a cat", negative_prompt="blurry", ...)

The blocks encode the negative prompt because the guider says that it takes two conditions; it runs
one batch a step, the conditional one, and its attention is guided as by `enable_nasa`. diffusers
calls its guiders experimental.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from nasa_diffusers.alpha import Alpha
from nasa_diffusers.api import Handle, enable_nasa
from nasa_diffusers.caller import find_caller
from nasa_diffusers.guidance import Settings
from nasa_diffusers.methods import METHODS, Method

try:
    from diffusers.guiders import BaseGuidance
    from diffusers.guiders.guider_utils import GuiderOutput
except ImportError as error:
    raise ImportError(
        "nasa_diffusers.guider: this diffusers has other guiders; pip install -U diffusers"
    ) from error

# what blocks call the text that they hand to a guider, and its mask
TEXTS = ("prompt_embeds", "encoder_hidden_states", "cap_feats")
MASKS = ("encoder_hidden_states_mask", "encoder_attention_mask", "prompt_embeds_mask")
# of models with two texts, the second and its mask
SECOND = ("encoder_hidden_states_2", "encoder_attention_mask_2")


class NASAGuidance(BaseGuidance):
    """One batch a step, guided away from the negative prompt of the call inside the attention.

    For modular pipelines, and those of HunyuanVideo 1.5 and HunyuanImage, which have a guider.

    Args:
        alpha: Strength; `None` takes the default of the model's family.
        method: The name of a method: `"NASA"`, `"ProjectedNASA"`, `"NAG"` or `"VSF"`.
        options: Its other arguments, as `{"rule": "nasa"}` or `{"scale": 3}`.
        layers: As in `enable_nasa`: names or shell patterns of layers; `None` is all.
        start, stop: The share of the steps that are guided.
        enabled: `guider.disable()` and `guider.enable()` change it; disabled it is stock.
    """

    _input_predictions: Any = ["pred_cond"]

    @register_to_config
    def __init__(
        self,
        alpha: float | None = None,
        method: str = "NASA",
        options: dict[str, Any] | None = None,
        layers: str | list[str] | None = None,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ):
        super().__init__(start, stop, enabled)
        self.method = _read(method, alpha, options)
        self.layers = layers
        # or of each two, and the first text, by which it is known again
        self._negative: tuple[Any, Any] = (None, None)
        self._text: Tensor | None = None
        self._handle: Handle | None = None
        self._settings: Settings | None = None

    # ---- what the blocks ask -----------------------------------------------------------------

    @property
    def num_conditions(self) -> int:
        """2, so that the negative prompt is encoded; one batch runs. Also where it is disabled:
        the blocks of SDXL then look for what they would not have made."""
        return 2

    @property
    def is_conditional(self) -> bool:
        return True

    def prepare_inputs(self, data: Any) -> list[Any]:
        """The conditional batch alone; the negative text of `data` is kept aside."""
        self._keep({name: x[1] for name, x in data.items() if isinstance(x, tuple)})
        return [self._prepare_batch(data, 0, "pred_cond")]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: Any) -> list[Any]:
        if "audio_encoder_hidden_states" in input_fields:
            raise ValueError(
                "NASAGuidance: this pipeline has a guider for the picture and one for the sound, "
                "which share their calls; leave both as they are and call enable_nasa(pipe, "
                "negative_prompt_embeds=(video, sound))"
            )
        fields = {name: x[1] for name, x in input_fields.items() if isinstance(x, tuple)}
        self._keep({name: getattr(data, x, None) for name, x in fields.items() if x is not None})
        return [self._prepare_batch_from_block_state(input_fields, data, 0, "pred_cond")]

    def prepare_models(self, denoiser: nn.Module) -> None:
        self._count_prepared += 1
        if not self._enabled or not self._is_guided_step():
            return
        embeds, mask = self._negative
        if embeds is None:
            raise ValueError(
                "NASAGuidance: the call brings no negative text; give negative_prompt or "
                "negative_prompt_embeds, or call guider.disable()"
            )
        handle = self._handle
        if handle is not None and handle._guidances[0].denoiser is not _own(denoiser):
            self._detach()
        if self._handle is None:
            self._attach(denoiser, embeds, mask)
        else:
            self._set(on=True)

    def cleanup_models(self, denoiser: nn.Module) -> None:
        """The hooks stay between steps, because the keys and values of the text do; outside of the
        denoiser's call they do nothing, and after the last one they are gone."""
        if self._handle is None:
            return
        self._set(on=False)
        if self._step is not None and self._step + 1 == self._num_inference_steps:
            self._detach()

    def __call__(self, data: list[Any]) -> Any:
        (batch,) = data
        return self.forward(batch.noise_pred)

    def forward(self, pred_cond: Tensor) -> Any:
        return GuiderOutput(pred=pred_cond, pred_cond=pred_cond, pred_uncond=None)

    def disable(self) -> None:
        if find_caller() is None:
            super().disable()
            self._detach()

    def enable(self) -> None:
        """Within a run neither does anything: a block of diffusers enables every guider, and turns
        those off whose scale a distilled UNet takes as an input; this one has no such scale."""
        if find_caller() is None:
            super().enable()

    def _is_guided_step(self) -> bool:
        """As every guider of diffusers counts its share of the steps."""
        steps = self._num_inference_steps
        if steps is None or self._step is None:
            return True
        return int(self._start * steps) <= self._step < int(self._stop * steps)

    # ---- the hooks ---------------------------------------------------------------------------

    def report(self) -> Any:
        """What was guided, as `handle.report()` of `enable_nasa` says it; None between runs."""
        return None if self._handle is None else self._handle.report()

    def _keep(self, negatives: dict[str, Any]) -> None:
        text = next((negatives[name] for name in TEXTS if negatives.get(name) is not None), None)
        mask = next((negatives[name] for name in MASKS if negatives.get(name) is not None), None)
        if self._handle is not None and text is not self._text:
            self._detach()
        self._text, self._negative = text, (text, mask)
        second, second_mask = (negatives.get(name) for name in SECOND)
        if second is not None:
            self._negative = (text, second), (mask, second_mask)

    def _attach(self, denoiser: nn.Module, embeds: Any, mask: Any) -> None:
        caller = find_caller()
        if caller is not None and caller.is_modular:
            _check_takes_negatives(caller.pipe)
        owner: Any = _Owner(_own(denoiser))
        self._handle = enable_nasa(
            owner,
            method=self.method,
            layers=self.layers,
            cfg=False,
            negative_prompt_embeds=embeds,
            negative_prompt_attention_mask=mask,
        )
        self._settings = self._handle._settings

    def _set(self, on: bool) -> None:
        assert self._handle is not None and self._settings is not None
        off = replace(self._settings, alpha=Alpha.parse(0.0, 0.0, self.method.name))
        for guidance in self._handle._guidances:
            guidance.settings = self._settings if on else off

    def _detach(self) -> None:
        if self._handle is not None and self._handle.is_enabled:
            self._handle.disable()
        self._handle = self._settings = None


class _Owner:
    """As much of a pipeline as `enable_nasa` looks at where the text is given: its denoiser."""

    def __init__(self, denoiser: nn.Module):
        self.transformer = denoiser

    @property
    def components(self) -> dict[str, nn.Module]:
        return {"transformer": self.transformer}


def _check_takes_negatives(pipe: Any) -> None:
    if "negative_prompt" not in pipe.blocks.input_names:
        raise ValueError(
            f"NASAGuidance: {type(pipe).__name__} takes no negative_prompt, its blocks encode an "
            "empty one; leave its guider as it is and call enable_nasa(pipe, "
            "negative_prompt_embeds=...)"
        )


def _own(denoiser: Any) -> nn.Module:
    return getattr(denoiser, "_orig_mod", denoiser)


def _read(name: str, alpha: float | None, options: dict[str, Any] | None) -> Method:
    methods = {cls.__name__: cls for cls in METHODS}
    if name not in methods:
        raise ValueError(f"NASAGuidance: method must be one of {', '.join(methods)}, got {name!r}")
    kind: Any = methods[name]
    known = [x for x in inspect.signature(kind).parameters if x != "alpha"]
    unknown = sorted(set(options or {}) - set(known))
    if unknown:
        raise ValueError(
            f"NASAGuidance: options of {name} must be of {', '.join(known)}, got "
            f"{', '.join(unknown)}"
        )
    return kind(**(options or {}), alpha=alpha)
