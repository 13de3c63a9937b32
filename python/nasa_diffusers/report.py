"""What was guided, and what it cost: the answer of `handle.report()`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from nasa_diffusers.guidance import Guidance
from nasa_kernels import backends


@dataclass(frozen=True)
class Report:
    """Counts are those of the last denoiser call; None where none has been made."""

    family: str
    method: str  # with its settings
    alpha: str
    negatives: tuple[str, ...]  # prompt, its tokens, how many did not fit, its own alpha
    dropped: tuple[int, ...]  # of each negative prompt, the tokens that did not fit
    steps: str
    layers: int
    layers_guided: int
    keys_pos: int | None
    keys_neg: int
    backend: str
    attention_flops: int | None  # added to every denoiser call
    projection_flops: int | None  # added once per negative prompt, then cached
    cache_bytes: int
    cache_limit: int
    problem: str | None = None  # why nothing is guided, where nothing is

    def __str__(self) -> str:
        rows = {
            "family": self.family,
            "method": self.method,
            "negative": "; ".join(self.negatives),
            "alpha": f"{self.alpha}, {self.steps}",
            "layers": f"{self.layers_guided} of {self.layers} text cross-attention layers guided",
            "keys": f"{'?' if self.keys_pos is None else self.keys_pos} + {self.keys_neg}",
            "back end": self.backend,
            "added": _flops(self.attention_flops, self.projection_flops),
            "K/V cache": f"{self.cache_bytes / 2**20:.1f} of {self.cache_limit / 2**20:.0f} MiB",
        }
        if self.problem is not None:
            rows = {"NOT GUIDED": self.problem} | rows
        return "\n".join(f"{name:<10} {value}" for name, value in rows.items())


def _flops(attention: int | None, projection: int | None) -> str:
    if attention is None or projection is None:
        return "not known before the pipeline has run"
    return (
        f"{attention / 1e9:.3f} GFLOP per denoiser call, {projection / 1e9:.3f} GFLOP once per "
        "negative prompt"
    )


def _dropped(by_tokenizer: Mapping[str, int]) -> str:
    parts = [f"{count} dropped by {name}" for name, count in by_tokenizer.items()]
    return "".join(f", {part}" for part in parts)


def make_report(guidances: list[Guidance], problem: str | None = None) -> Report:
    """One report for all denoisers of a pipeline; with a problem none of their layers is guided."""
    first = guidances[0]
    settings = first.settings
    hooks = [hook for guidance in guidances for hook in guidance.guided_layers.values()]
    calls = [hook.last_call for hook in hooks if hook.last_call is not None]
    terms = settings.negative.terms
    negatives = tuple(
        f"{term.label!r} ({term.embeds.shape[1]} tokens{_dropped(term.dropped)}"
        + (f", alpha {term.weight:g})" if settings.negative.has_own_alphas else ")")
        for term in terms
    )
    return Report(
        family=first.family.name,
        method=str(settings.method),
        alpha=str(settings.alpha),
        negatives=negatives,
        dropped=tuple(max(term.dropped.values(), default=0) for term in terms),
        steps=str(settings.window),
        layers=sum(len(guidance.layers) for guidance in guidances),
        layers_guided=0 if problem else len(hooks),
        keys_pos=calls[0].texts[0][1] if calls else None,
        keys_neg=sum(n for _, n, _ in calls[0].texts[1:])
        if calls
        else sum(term.embeds.shape[1] for term in terms),
        backend=settings.backend or _chosen_backend(first.denoiser),
        attention_flops=sum(call.attention_flops for call in calls) if calls else None,
        projection_flops=sum(call.projection_flops for call in calls) if calls else None,
        cache_bytes=first.cache.nbytes,
        cache_limit=first.cache.limit,
        problem=problem,
    )


def _chosen_backend(denoiser) -> str:
    """What `backend=None` takes for tensors of this denoiser."""
    parameter = next(denoiser.parameters())
    dtype = getattr(denoiser, "dtype", parameter.dtype)
    return backends.choose(torch.device(parameter.device), dtype)
