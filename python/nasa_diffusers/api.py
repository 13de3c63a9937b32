"""`enable_nasa`, `disable_nasa` and `nasa`: negative prompts on a stock diffusers pipeline."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from nasa_diffusers.alpha import Alpha
from nasa_diffusers.cache import TextCache
from nasa_diffusers.families import Family, family_of
from nasa_diffusers.guidance import Guidance, Settings
from nasa_diffusers.methods import Method, read_method, with_alpha
from nasa_diffusers.negative import Negative, NegativePrompt
from nasa_diffusers.report import Report, make_report
from nasa_diffusers.rows import Cfg, read_cfg
from nasa_diffusers.scalars import is_int, scalar
from nasa_diffusers.watch import DENOISERS, denoisers_of, what_runs_instead
from nasa_diffusers.window import Window


def enable_nasa(
    pipe: DiffusionPipeline,
    negative_prompt: NegativePrompt | None = None,
    method: Method | None = None,
    *,
    alpha: float | Sequence[float] | Tensor | Any | None = None,
    start: int | float = 0,
    stop: int | float | None = None,
    layers: str | Sequence[str] | None = None,
    backend: str | None = None,
    cfg: bool | Sequence[bool] | None = None,
    negative_prompt_embeds: Tensor | None = None,
    negative_prompt_attention_mask: Tensor | None = None,
    max_sequence_length: int | None = None,
) -> Handle:
    """Guide every image of a stock pipeline away from a negative prompt, at any guidance scale.

        O = softmax(Q K+^T) V+ - alpha * softmax(Q K-^T) V-        in its text cross-attention

    The pipeline object stays what it is; call it as before. Under classifier-free guidance only
    the conditional rows are guided.

    Args:
        pipe: A loaded pipeline of one of the families in `nasa_diffusers.families`.
        negative_prompt: A string for all images; a list of strings, one per prompt of the call;
            or a list of `(string, alpha)` pairs, all of them at once, each with its own strength.
            Under NASA a further pair costs one more attention call per layer.
        method: `NASA(...)`, `ProjectedNASA(...)`, `NAG(...)` or `VSF(...)`. `None` is NASA with the
            family's defaults.
        alpha: Short for `NASA(alpha)`: its strength, a number, one per image, or a map over the
            image.
        start, stop: Steps guided, from `start` up to and without `stop`: ints are steps, floats
            fractions of the steps. `None` is the end.
        layers: Names of cross-attention layers, shell patterns (`"up_blocks.*"`). `None`: all.
        backend: A back end of `nasa_kernels.nasa_attention`. `None` takes the best that runs.
        cfg: Which rows of a batch carry the prompt: under classifier-free guidance (True) the
            second half, without (False) all of them; or one bool per row. `None` asks the
            pipeline that calls; a loop of your own has to say, `handle.cfg` before each call.
        negative_prompt_embeds: Text embeddings `[1 or one per prompt, n, c]` instead of a prompt.
        negative_prompt_attention_mask: Their mask `[1 or one per prompt, n]`, 1 keeps a token.
        max_sequence_length: Tokens the negative prompt is cut or padded to, where the pipeline
            has such an option. `None` takes the pipeline's default.

    Returns:
        A handle: `handle.method`, `handle.alpha`, `handle.set_negative_prompt`, `handle.report`,
        `handle.disable`.

    Raises:
        ValueError: The pipeline, a prompt or a setting cannot be used. The message says what can.
        RuntimeError: NASA is on already.
    """
    denoisers = find_denoisers(pipe)
    if any(find_guidance(denoiser) for denoiser in denoisers):
        raise RuntimeError(
            f"enable_nasa: NASA is on already for the denoiser of this {type(pipe).__name__} "
            "(pipelines made with from_pipe share it); use handle.set_negative_prompt and "
            "handle.method, or call disable_nasa(pipe) first"
        )
    family, method = family_of(denoisers[0]), read_method(method, alpha)
    guided = [choose_layers(denoiser, family, layers) for denoiser in denoisers]
    # a setting that the family does not have is refused before anything is encoded
    method.filled_in(family, denoisers[0])
    negative = _read_negative(
        pipe, family, method, negative_prompt, negative_prompt_embeds,
        negative_prompt_attention_mask, max_sequence_length,
    )  # fmt: skip
    settings = Settings(
        negative,
        **in_force(method, family, denoisers[0], negative),
        window=Window(start, stop),
        backend=backend,
        cfg=read_cfg(cfg),
    )
    return put_on(pipe, denoisers, family, settings, guided)


def put_on(
    pipe: DiffusionPipeline,
    denoisers: Sequence[nn.Module],
    family: Family,
    settings: Settings,
    guided: Sequence[dict[str, bool]],  # for each denoiser, its layers
) -> Handle:
    """Attach the hooks: what `enable_nasa` does once all settings are read."""
    cache = TextCache(max(family.cache_limit(denoiser) for denoiser in denoisers))
    guidances = [
        Guidance(pipe, denoiser, family, settings, chosen, cache)
        for denoiser, chosen in zip(denoisers, guided, strict=True)
    ]
    for guidance in guidances:
        guidance.attach()
    return Handle(guidances)


def disable_nasa(pipe: DiffusionPipeline) -> None:
    """Take NASA off the denoisers of `pipe`; they compute what they computed before, exactly."""
    guidances = [g for d in find_denoisers(pipe) if (g := find_guidance(d)) is not None]
    if not guidances:
        raise RuntimeError(f"disable_nasa: NASA is not on for this {type(pipe).__name__}")
    for guidance in guidances:
        guidance.detach()


@contextlib.contextmanager
def nasa(
    pipe: DiffusionPipeline,
    negative_prompt: NegativePrompt | None = None,
    method: Method | None = None,
    **options: Any,
):
    """`with nasa(pipe, "blurry", alpha=0.2) as handle:`, with the options of `enable_nasa`."""
    handle = enable_nasa(pipe, negative_prompt, method, **options)
    try:
        yield handle
    finally:
        if handle.is_enabled:
            handle.disable()


class Handle:
    """What `enable_nasa` returns. Settings hold from the next denoiser call on."""

    def __init__(self, guidances: list[Guidance]):
        self._guidances = guidances

    def __repr__(self) -> str:
        return f"<nasa_diffusers.Handle {'on' if self.is_enabled else 'off'}>\n{self.report()}"

    @property
    def is_enabled(self) -> bool:
        return all(find_guidance(g.denoiser) is g for g in self._guidances)

    @property
    def method(self) -> Method:
        """The method in force, its defaults filled in; another one may be set between calls."""
        return self._settings.method

    @method.setter
    def method(self, method: Method) -> None:
        if method is None:
            raise ValueError("handle.method: None is no method; write NASA() for the default")
        self._change_method(read_method(method))

    @property
    def alpha(self) -> float | Sequence[float] | Tensor:
        """The method's alpha, as it was set; a mask as its map. `None` sets the default."""
        return self._settings.alpha.given

    @alpha.setter
    def alpha(self, alpha: float | Sequence[float] | Tensor | Any | None) -> None:
        self._change_method(with_alpha(self._settings.method, alpha))

    @property
    def cfg(self) -> Cfg:
        """Which rows of a batch carry the prompt, as in `enable_nasa`."""
        return self._settings.cfg

    @cfg.setter
    def cfg(self, cfg: bool | Sequence[bool] | None) -> None:
        self._change(cfg=read_cfg(cfg))

    @property
    def cache_limit(self) -> int:
        """Bytes that the keys and values of text may take; 0 keeps none."""
        return self._guidances[0].cache.limit

    @cache_limit.setter
    def cache_limit(self, limit: int) -> None:
        value = scalar(limit)
        if not is_int(value) or value < 0:
            raise ValueError(
                f"cache_limit: it must be a number of bytes, 0 to keep nothing, got {limit!r}"
            )
        self._guidances[0].cache.limit = value

    def clear_cache(self) -> None:
        """Forget all keys and values, as after weights were written through `.data`."""
        self._guidances[0].cache.clear()

    def set_negative_prompt(
        self,
        negative_prompt: NegativePrompt | None = None,
        *,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        max_sequence_length: int | None = None,
    ) -> None:
        """Guide away from something else; the arguments are those of `enable_nasa`.

        An alpha that was set stays; a default is that of the new prompt.
        """
        guidance, settings = self._guidances[0], self._settings
        negative = _read_negative(
            guidance.pipe, guidance.family, settings.method, negative_prompt,
            negative_prompt_embeds, negative_prompt_attention_mask, max_sequence_length,
        )  # fmt: skip
        alpha = None if settings.alpha_is_default else settings.alpha
        method = settings.method if alpha else with_alpha(settings.method, None)
        read = in_force(method, guidance.family, guidance.denoiser, negative, alpha)
        self._change(negative=negative, **read)

    def report(self) -> Report:
        """Layers guided, method, alpha, keys, back end, FLOPs added, bytes of the cache."""
        return make_report(self._guidances, self._why_off())

    def _why_off(self) -> str | None:
        """Why nothing is guided; None where something is."""
        if not self.is_enabled:
            return "NASA is off: its hooks are no longer on the denoiser"
        problems = (g.lost or what_runs_instead(g, g.pipe) for g in self._guidances)
        return next((problem for problem in problems if problem), None)

    def disable(self) -> None:
        """Take NASA off; the pipeline computes what it computed before, exactly."""
        if not self.is_enabled:
            raise RuntimeError("disable: NASA is off already; enable_nasa returns a new handle")
        for guidance in self._guidances:
            guidance.detach()

    @property
    def _settings(self) -> Settings:
        return self._guidances[0].settings

    def _change_method(self, method: Method) -> None:
        guidance = self._guidances[0]
        negative = self._settings.negative.for_method(guidance.pipe, guidance.family, method)
        read = in_force(method, guidance.family, guidance.denoiser, negative)
        self._change(negative=negative, **read)

    def _change(self, **changes: Any) -> None:
        # all are made before one is set: a change that is refused changes nothing
        settings = [replace(guidance.settings, **changes) for guidance in self._guidances]
        for guidance, changed in zip(self._guidances, settings, strict=True):
            guidance.settings = changed


def find_denoisers(pipe: DiffusionPipeline) -> list[nn.Module]:
    """The networks that a pipeline calls once per step, without the wrapper of torch.compile."""
    denoisers = denoisers_of(pipe)
    for denoiser in denoisers:
        if not isinstance(denoiser, nn.Module):
            raise ValueError(
                f"enable_nasa: the denoiser of this {type(pipe).__name__} is a "
                f"{type(denoiser).__name__} and no torch.nn.Module: an exported engine has no "
                "layers in which a prompt could act; load the PyTorch model"
            )
    if not denoisers:
        raise ValueError(
            f"enable_nasa: {type(pipe).__name__} has no {', '.join(DENOISERS)}; NASA needs a "
            "pipeline with a text-conditioned denoiser"
        )
    return denoisers


def find_guidance(denoiser: nn.Module) -> Guidance | None:
    hooks = denoiser._forward_pre_hooks.values()
    return next((hook for hook in hooks if isinstance(hook, Guidance)), None)


def in_force(
    method: Method,
    family: Family,
    denoiser: nn.Module,
    negative: Negative,
    alpha: Alpha | None = None,  # None: that of the method
) -> dict[str, Any]:
    """What `Settings` hold of a method: its defaults filled in, and checked."""
    is_default = alpha is None and method.alpha is None
    if alpha is None:
        default = method.default_alpha(family, denoiser, negative.has_own_alphas)
        alpha = Alpha.parse(default if is_default else method.alpha, default, method.name)
    method = with_alpha(method.filled_in(family, denoiser), alpha.given)
    method.check(family, alpha, negative.has_own_alphas)
    return {"method": method, "alpha": alpha, "alpha_is_default": is_default}


def choose_layers(
    denoiser: nn.Module, family: Family, patterns: str | Sequence[str] | None
) -> dict[str, bool]:
    """For each text cross-attention layer, by name, whether it is guided."""
    family.check(denoiser)
    layers = dict(family.layers(denoiser))
    if not layers:
        raise ValueError(
            f"enable_nasa: this {type(denoiser).__name__} has no text cross-attention layers"
        )
    if isinstance(patterns, str):
        patterns = [patterns]
    for pattern in patterns or ():
        if not fnmatch.filter(layers, pattern):
            raise ValueError(
                f"enable_nasa: layers={pattern!r} matches none of the {len(layers)} layers, from "
                f"{min(layers)!r} to {max(layers)!r}; patterns match whole names, as 'up_blocks.*'"
            )
    guided = {
        name: patterns is None or any(fnmatch.fnmatchcase(name, p) for p in patterns)
        for name in layers
    }
    for name, attn in layers.items():
        if guided[name]:
            family.check_layer(name, attn)
    return guided


def _read_negative(
    pipe: DiffusionPipeline | None,
    family: Family,
    method: Method,
    negative_prompt: NegativePrompt | None,
    embeds: Tensor | None,
    mask: Tensor | None,
    max_sequence_length: int | None,
) -> Negative:
    if (negative_prompt is None) == (embeds is None):
        given = "none" if embeds is None else "both"
        raise ValueError(
            f"enable_nasa: give either negative_prompt or negative_prompt_embeds, got {given}"
        )
    if negative_prompt is not None:
        if mask is not None:
            raise ValueError(
                "enable_nasa: negative_prompt_attention_mask goes with negative_prompt_embeds; a "
                "negative_prompt brings its own mask"
            )
        return Negative.from_prompts(
            pipe, family, negative_prompt, max_sequence_length, method.drops_padding
        )
    if max_sequence_length is not None:
        raise ValueError(
            "enable_nasa: max_sequence_length is for a negative_prompt; embeddings have a length"
        )
    assert embeds is not None
    return Negative.from_embeds(embeds, mask, family, method.drops_padding)
