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
from nasa_diffusers.methods import Nag
from nasa_diffusers.negative import Negative, NegativePrompt
from nasa_diffusers.report import Report, make_report
from nasa_diffusers.rows import Cfg, read_cfg
from nasa_diffusers.scalars import is_int, scalar
from nasa_diffusers.steering import Settings, Steering
from nasa_diffusers.watch import DENOISERS, denoisers_of, what_runs_instead
from nasa_diffusers.window import Window


def enable_nasa(
    pipe: DiffusionPipeline,
    negative_prompt: NegativePrompt | None = None,
    *,
    alpha: float | Sequence[float] | Tensor | Any | None = None,
    negative_prompt_embeds: Tensor | None = None,
    negative_prompt_attention_mask: Tensor | None = None,
    max_sequence_length: int | None = None,
    start: int | float = 0,
    stop: int | float | None = None,
    layers: str | Sequence[str] | None = None,
    backend: str | None = None,
    cfg: bool | Sequence[bool] | None = None,
    rule: str | None = None,
    method: str = "nasa",
    nag_scale: float | None = None,
    nag_tau: float | None = None,
    nag_alpha: float | Sequence[float] | Tensor | Any | None = None,
    nag_norm: int | None = None,
) -> Handle:
    """Steer every image of a stock pipeline away from a negative prompt, at any guidance scale.

        O = softmax(Q K+^T) V+ - alpha * softmax(Q K-^T) V-        in its text cross-attention

    The pipeline object stays what it is; call it as before. Under classifier-free guidance only
    the conditional rows are steered.

    Args:
        pipe: A loaded pipeline of one of the families in `nasa_diffusers.families`.
        negative_prompt: A string for all images; a list of strings, one per prompt of the call;
            or a list of `(string, alpha)` pairs, all of them subtracted, each under its own
            softmax. A further pair costs one more attention call per layer.
        alpha: Strength: a number, one per image, or a map over the image (a 2-D tensor of alphas,
            or a PIL mask, white where the family's default holds). `None` takes the family's
            default; with pairs alpha is a common factor, 1 unless given. At 0 the stock code runs.
        negative_prompt_embeds: Text embeddings `[1 or one per prompt, n, c]` instead of a prompt.
        negative_prompt_attention_mask: Their mask `[1 or one per prompt, n]`, 1 keeps a token.
        max_sequence_length: Tokens the negative prompt is cut or padded to, where the pipeline
            has such an option. `None` takes the pipeline's default.
        start, stop: Steps guided, from `start` up to and without `stop`: ints are steps, floats
            fractions of the steps. `None` is the end.
        layers: Names of cross-attention layers, shell patterns (`"up_blocks.*"`). `None`: all.
        backend: A back end of `nasa_kernels.nasa_attention`. `None` takes the best that runs.
        cfg: Which rows of a batch carry the prompt: under classifier-free guidance (True) the
            second half, without (False) all of them; or one bool per row. `None` asks the
            pipeline that calls; a loop of your own has to say, `handle.cfg` before each call.
        rule: One of the family's `rules`; `None` takes the first. `"vsf"` is value sign flip: one
            softmax over the keys of all prompts, the values of the negative ones times `-alpha`.
        method: `"nasa"`, or `"nag"` for normalised attention guidance, with these parameters;
            `None` takes the family's default from the NAG paper.
        nag_scale: Extrapolation as the published code counts it, where 1 is off; the paper's
            scale is 1 less.
        nag_tau: The most by which the extrapolation may exceed Z+ in magnitude.
        nag_alpha: Share of the guided result, in all the forms of `alpha`, whose place it takes:
            `handle.alpha` reads and sets it.
        nag_norm: How NAG measures magnitude: 1, the default, by the sum of magnitudes, as its
            paper and most of its published code; 2 by the root of the sum of squares, as its
            published code for FLUX.

    Returns:
        A handle: `handle.alpha`, `handle.set_negative_prompt`, `handle.report`, `handle.disable`.

    Raises:
        ValueError: The pipeline, a prompt or a setting cannot be used. The message says what can.
        RuntimeError: NASA is on already.
    """
    denoisers = find_denoisers(pipe)
    if any(find_steering(denoiser) for denoiser in denoisers):
        raise RuntimeError(
            f"enable_nasa: NASA is on already for the denoiser of this {type(pipe).__name__} "
            "(pipelines made with from_pipe share it); use handle.set_negative_prompt and "
            "handle.alpha, or call disable_nasa(pipe) first"
        )
    family = family_of(denoisers[0])
    guided = [_choose_layers(denoiser, family, layers) for denoiser in denoisers]
    rule = _choose_rule(family, rule)
    negative = _read_negative(
        pipe, family, rule, negative_prompt, negative_prompt_embeds,
        negative_prompt_attention_mask, max_sequence_length,
    )  # fmt: skip
    nag = _read_nag(
        family, denoisers[0], method, rule, alpha, nag_scale, nag_tau, nag_alpha, nag_norm
    )
    alpha = alpha if nag is None else nag_alpha
    settings = Settings(
        negative,
        Alpha.parse(alpha, _default_alpha(family, denoisers[0], negative, nag)),
        alpha_is_default=alpha is None,
        window=Window(start, stop),
        backend=backend,
        cfg=read_cfg(cfg),
        rule=rule,
        nag=nag,
        vsf_takes_maps=family.vsf_takes_maps,
    )
    cache = TextCache()
    steerings = [
        Steering(pipe, denoiser, family, settings, chosen, cache)
        for denoiser, chosen in zip(denoisers, guided, strict=True)
    ]
    for steering in steerings:
        steering.attach()
    return Handle(steerings)


def disable_nasa(pipe: DiffusionPipeline) -> None:
    """Take NASA off the denoisers of `pipe`; they compute what they computed before, exactly."""
    steerings = [s for d in find_denoisers(pipe) if (s := find_steering(d)) is not None]
    if not steerings:
        raise RuntimeError(f"disable_nasa: NASA is not on for this {type(pipe).__name__}")
    for steering in steerings:
        steering.detach()


@contextlib.contextmanager
def nasa(pipe: DiffusionPipeline, negative_prompt: NegativePrompt | None = None, **options: Any):
    """`with nasa(pipe, "blurry", alpha=0.2) as handle:`, with the options of `enable_nasa`."""
    handle = enable_nasa(pipe, negative_prompt, **options)
    try:
        yield handle
    finally:
        if handle.is_enabled:
            handle.disable()


class Handle:
    """What `enable_nasa` returns. Settings hold from the next denoiser call on."""

    def __init__(self, steerings: list[Steering]):
        self._steerings = steerings

    def __repr__(self) -> str:
        return f"<nasa_diffusers.Handle {'on' if self.is_enabled else 'off'}>\n{self.report()}"

    @property
    def is_enabled(self) -> bool:
        return all(find_steering(s.denoiser) is s for s in self._steerings)

    @property
    def alpha(self) -> float | Sequence[float] | Tensor:
        """Strength of the removal (under NAG `nag_alpha`), as it was set; a mask as its map."""
        return self._settings.alpha.given

    @alpha.setter
    def alpha(self, alpha: float | Sequence[float] | Tensor | Any) -> None:
        self._change(
            alpha=Alpha.parse(alpha, self._default_alpha(self._settings.negative)),
            alpha_is_default=alpha is None,
        )

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
        return self._steerings[0].cache.limit

    @cache_limit.setter
    def cache_limit(self, limit: int) -> None:
        value = scalar(limit)
        if not is_int(value) or value < 0:
            raise ValueError(
                f"cache_limit: it must be a number of bytes, 0 to keep nothing, got {limit!r}"
            )
        self._steerings[0].cache.limit = value

    def clear_cache(self) -> None:
        """Forget all keys and values, as after weights were written through `.data`."""
        self._steerings[0].cache.clear()

    def set_negative_prompt(
        self,
        negative_prompt: NegativePrompt | None = None,
        *,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        max_sequence_length: int | None = None,
    ) -> None:
        """Steer away from something else; the arguments are those of `enable_nasa`.

        An alpha that was set stays; a default is that of the new prompt.
        """
        steering = self._steerings[0]
        negative = _read_negative(
            steering.pipe, steering.family, self._settings.rule, negative_prompt,
            negative_prompt_embeds, negative_prompt_attention_mask, max_sequence_length,
        )  # fmt: skip
        changes: dict[str, Any] = {"negative": negative}
        if self._settings.alpha_is_default:
            changes["alpha"] = Alpha.parse(None, self._default_alpha(negative))
        self._change(**changes)

    def report(self) -> Report:
        """Layers guided, rule, alpha, keys, back end, FLOPs added, bytes of the cache."""
        return make_report(self._steerings, self._why_off())

    def _why_off(self) -> str | None:
        """Why nothing is guided; None where something is."""
        if not self.is_enabled:
            return "NASA is off: its hooks are no longer on the denoiser"
        problems = (s.lost or what_runs_instead(s, s.pipe) for s in self._steerings)
        return next((problem for problem in problems if problem), None)

    def disable(self) -> None:
        """Take NASA off; the pipeline computes what it computed before, exactly."""
        if not self.is_enabled:
            raise RuntimeError("disable: NASA is off already; enable_nasa returns a new handle")
        for steering in self._steerings:
            steering.detach()

    @property
    def _settings(self) -> Settings:
        return self._steerings[0].settings

    def set_nag(
        self,
        *,
        nag_scale: float | None = None,
        nag_tau: float | None = None,
        nag_norm: int | None = None,
    ) -> None:
        """Change the parameters of `method="nag"`; one that is left out stays."""
        nag = self._settings.nag
        if nag is None:
            raise ValueError("set_nag: NAG is not on; call enable_nasa(..., method='nag')")
        given: dict[str, Any] = {"scale": nag_scale, "tau": nag_tau, "norm": nag_norm}
        given = {name: value for name, value in given.items() if value is not None}
        self._change(nag=replace(nag, **given))

    def _default_alpha(self, negative: Negative) -> float:
        steering = self._steerings[0]
        return _default_alpha(steering.family, steering.denoiser, negative, self._settings.nag)

    def _change(self, **changes: Any) -> None:
        # all are made before one is set: a change that is refused changes nothing
        settings = [replace(steering.settings, **changes) for steering in self._steerings]
        for steering, changed in zip(self._steerings, settings, strict=True):
            steering.settings = changed


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


def find_steering(denoiser: nn.Module) -> Steering | None:
    hooks = denoiser._forward_pre_hooks.values()
    return next((hook for hook in hooks if isinstance(hook, Steering)), None)


def _default_alpha(
    family: Family, denoiser: nn.Module, negative: Negative, nag: Nag | None
) -> float:
    """Prompts with alphas of their own need no other."""
    if nag is not None:
        return family.default_nag(denoiser)[2]
    return 1.0 if negative.has_own_alphas else family.default_alpha(denoiser)


def _choose_rule(family: Family, rule: str | None) -> str:
    if rule is not None and rule not in family.rules:
        raise ValueError(
            f"enable_nasa: rule must be one of {', '.join(map(repr, family.rules))} for "
            f"{family.name}, got {rule!r}"
        )
    return family.rules[0] if rule is None else rule


def _read_nag(
    family: Family,
    denoiser: nn.Module,
    method: str,
    rule: str,
    alpha: Any,
    scale: float | None,
    tau: float | None,
    nag_alpha: Any,
    norm: int | None,
) -> Nag | None:
    if method not in ("nasa", "nag"):
        raise ValueError(f"enable_nasa: method must be 'nasa' or 'nag', got {method!r}")
    if method == "nasa":
        given = {
            "nag_scale": scale, "nag_tau": tau, "nag_alpha": nag_alpha, "nag_norm": norm,
        }  # fmt: skip
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"enable_nasa: {name} goes with method='nag'; leave one out")
        return None
    if alpha is not None:
        raise ValueError(
            "enable_nasa: alpha is the strength of NASA; method='nag' takes nag_alpha, the share "
            "of the guided result"
        )
    if rule != family.rules[0]:
        raise ValueError(f"enable_nasa: rule={rule!r} goes with method='nasa'; NAG has one rule")
    default_scale, default_tau, _ = family.default_nag(denoiser)
    return Nag(
        default_scale if scale is None else scale,
        default_tau if tau is None else tau,
        1 if norm is None else norm,
    )


def _choose_layers(
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
    rule: str,
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
    # in its one softmax over all prompts padding would take weight
    drops_padding = rule == "vsf"
    if negative_prompt is not None:
        if mask is not None:
            raise ValueError(
                "enable_nasa: negative_prompt_attention_mask goes with negative_prompt_embeds; a "
                "negative_prompt brings its own mask"
            )
        return Negative.from_prompts(
            pipe, family, negative_prompt, max_sequence_length, keeps_padding=not drops_padding
        )
    if max_sequence_length is not None:
        raise ValueError(
            "enable_nasa: max_sequence_length is for a negative_prompt; embeddings have a length"
        )
    assert embeds is not None
    return Negative.from_embeds(embeds, mask, family if drops_padding else None)
