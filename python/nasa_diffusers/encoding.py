"""A pipeline's own way of encoding text: how it is called, and whether it still can be.

Text encoders come and go: they are offloaded, set to None, replaced by a stand-in, or freed with
the pipeline that had them. So nothing here holds one.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nasa_diffusers.weights import Fingerprint, Record

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
# what makes other text of theirs before it reaches the denoiser
CONNECTORS = ("connectors",)
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3", "tokenizer_4")
# given to every `encode_prompt` that takes them: one row per prompt, no guidance
FIXED: dict[str, Any] = {
    "prompt_2": None,
    "prompt_3": None,
    "num_images_per_prompt": 1,
    "num_videos_per_prompt": 1,
    "do_classifier_free_guidance": False,
    # of an image behind the text
    "grid_h": 1,
    "grid_w": 1,
}


def text_encoders(pipe: Any) -> list[nn.Module]:
    return [encoder for name in ENCODERS if (encoder := getattr(pipe, name, None)) is not None]


# ---- calling it ----------------------------------------------------------------------------------


def encode_prompt(pipe: Any, prompts: list[str], options: Mapping[str, Any]) -> tuple:
    """What the pipeline makes of prompts, first the embeddings; of `options` those it takes."""
    encode, taken = _own_encoding(pipe)
    given = {"device": on_device(pipe), **FIXED, **options}
    given = {name: value for name, value in given.items() if name in taken}
    if "negative_prompt" in taken and taken["negative_prompt"].default is inspect.Parameter.empty:
        given["negative_prompt"] = None
    made = encode(prompt=prompts, **given)
    return made if isinstance(made, tuple) else (made,)


def takes(pipe: Any, option: str, without: Sequence[str] = ()) -> bool:
    """Whether the pipeline's encoding has this option."""
    return option in _own_encoding(pipe, without)[1]


def check_encodes(pipe: Any, without: Sequence[str] = ()) -> None:
    """An error where the pipeline has no encoding of its own that could be called; what it asks
    for of `without` is not needed."""
    _own_encoding(pipe, without)


def call_defaults(pipe: Any, names: Sequence[str]) -> dict[str, Any]:
    """The options `names` of a call of this pipeline that names none of them."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    defaults = {name: parameters[name].default for name in names if name in parameters}
    return {
        name: value
        for name, value in defaults.items()
        if value is not None and value is not inspect.Parameter.empty
    }


def on_device(pipe: Any) -> torch.device:
    return pipe._execution_device


def _own_encoding(
    pipe: Any, without: Sequence[str] = ()
) -> tuple[Callable, Mapping[str, inspect.Parameter]]:
    encode = getattr(pipe, "encode_prompt", None) or getattr(pipe, "_encode_prompt", None)
    if encode is None:
        raise _cannot_encode(pipe, "it has no encode_prompt")
    taken = inspect.signature(encode).parameters
    if "prompt" not in taken:
        raise _cannot_encode(pipe, f"its encode_prompt takes {', '.join(taken)}, and no prompt")
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    known = {"prompt", "device", "negative_prompt", "max_sequence_length", *FIXED, *without}
    others = [
        name
        for name, parameter in taken.items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind not in variadic
        and name not in known
    ]
    if others:
        raise _cannot_encode(pipe, f"its encode_prompt asks for {', '.join(others)} as well")
    return encode, taken


def _cannot_encode(pipe: Any, why: str) -> ValueError:
    return ValueError(
        f"enable_nasa: {type(pipe).__name__} does not encode a prompt by itself: {why}; encode the "
        "negative prompt as this pipeline does its own and pass negative_prompt_embeds, "
        "[1 or one per prompt, n, c]"
    )


# ---- tokens --------------------------------------------------------------------------------------


def token_counts(pipe: Any, tokenizer: str, prompts: Sequence[str], **options: Any) -> list[int]:
    """How many tokens each prompt has before it is cut, with those that open and close it."""
    texts = list(prompts)
    if hasattr(pipe, "_text_preprocessing"):
        clean = {"clean_caption": options.get("clean_caption", False)}
        texts = pipe._text_preprocessing(texts, **clean)
    # Wan and SkyReels have theirs beside the pipeline
    clean_one = getattr(sys.modules.get(type(pipe).__module__), "prompt_clean", None)
    if clean_one is not None:
        texts = [clean_one(text) for text in texts]
    if hasattr(pipe, "maybe_convert_prompt"):
        texts = pipe.maybe_convert_prompt(texts, getattr(pipe, tokenizer))
    return [len(ids) for ids in getattr(pipe, tokenizer)(texts).input_ids]


def dropped_tokens(
    pipe: Any, limits: Mapping[str, int], prompts: Sequence[str], **options: Any
) -> dict[str, int]:
    """For each tokenizer that cut something, how many tokens of the longest prompt it cut off."""
    dropped = {}
    for name, limit in limits.items():
        if getattr(pipe, name, None) is not None:
            over = max(token_counts(pipe, name, prompts, **options)) - limit
            if over > 0:
                dropped[name] = over
    return dropped


def side_by_side(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Texts `[n, c]` of several lengths as `[m, n, c]` with a mask `[m, n]`."""
    lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
    embeds = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    mask = torch.arange(embeds.shape[1], device=embeds.device) < lengths[:, None]
    return embeds, None if mask.all() else mask


# ---- whether it can be called --------------------------------------------------------------------


class Encoders:
    """The text encoders and tokenizers of a pipeline at one time, none of them held."""

    def __init__(self, pipe: Any):
        parts = _parts(pipe)
        self.parts = {name: reference(part) for name, part in parts.items()}
        self.kinds = {name: type(part) for name, part in parts.items()}
        self.record = Record(Fingerprint(_modules(parts)))
        self.have_loras = have_loras(pipe)

    def are_those_of(self, pipe: Any) -> bool:
        """True if the pipeline would encode a text now as it did then."""
        parts = _parts(pipe)
        if parts.keys() != self.parts.keys():
            return False
        if any(self.parts[name]() is not part for name, part in parts.items()):
            return False
        return self.record.matches(Fingerprint(_modules(parts)), compare_values=True)

    def why_not(self, pipe: Any) -> str | None:
        """Why the pipeline cannot encode a text now, in words; None if it can."""
        now = _parts(pipe)
        for name, kind in self.kinds.items():
            part = now.get(name)
            if part is None:
                return f"{name} of {type(pipe).__name__} is gone"
            if name in TOKENIZERS or not issubclass(kind, nn.Module):
                if not callable(part):
                    return f"{name} of {type(pipe).__name__} is a {type(part).__name__}"
                continue
            if not _is_encoder(part, kind):
                return f"{name} of {type(pipe).__name__} is a {type(part).__name__}"
            if _rests_on_meta(part):
                return f"{name} of {type(pipe).__name__} has no weights (it is on meta)"
            if _is_elsewhere(part, on_device(pipe)):
                return f"{name} is on another device than {type(pipe).__name__}"
        return None


def have_loras(pipe: Any) -> bool:
    """Whether a text encoder has LoRA layers; without any, `lora_scale` has no effect."""
    return any(
        "merged_adapters" in vars(module)
        for encoder in _modules(_parts(pipe))
        for module in encoder.modules()
    )


def _parts(pipe: Any) -> dict[str, Any]:
    """By name, without the wrapper of torch.compile."""
    found = {name: getattr(pipe, name, None) for name in (*ENCODERS, *CONNECTORS, *TOKENIZERS)}
    return {
        name: vars(part).get("_modules", {}).get("_orig_mod", part)
        if isinstance(part, nn.Module)
        else part
        for name, part in found.items()
        if part is not None
    }


def _modules(parts: Mapping[str, Any]) -> list[nn.Module]:
    return [part for part in parts.values() if isinstance(part, nn.Module)]


def reference(part: Any) -> Callable[[], Any]:
    """A weak reference; a strong one to what cannot have one: a list, or an object with slots."""
    try:
        return weakref.ref(part)
    except TypeError:
        return lambda: part


def _is_encoder(part: Any, kind: type) -> bool:
    """False for what only stands in the place of an encoder."""
    if not isinstance(part, nn.Module):
        return False
    return any(isinstance(module, (kind, PreTrainedModel)) for module in part.modules())


def _rests_on_meta(part: nn.Module) -> bool:
    """Weights on meta that no hook brings."""
    is_offloaded = any(hasattr(module, "_hf_hook") for module in part.modules())
    return not is_offloaded and any(weight.is_meta for weight in part.parameters())


def _is_elsewhere(part: nn.Module, device: torch.device) -> bool:
    """On another kind of device than inputs will be, with no hook to bring weights or inputs."""
    for module in part.modules():
        if hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook"):
            return False
    return any(weight.device.type != device.type for weight in part.parameters())
