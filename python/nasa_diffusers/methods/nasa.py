"""Negative-Away Steer Attention (arXiv:2412.02687)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from nasa_diffusers.methods.base import Method, Strength
from nasa_diffusers.prompts import nothing, subtract
from nasa_diffusers.streams import subtract_from_image

RULES = ("nasa", "nasa-cross", "nasa-text")


@dataclass(frozen=True, eq=False)
class NASA(Method):
    """Negative-Away Steer Attention (arXiv:2412.02687), each prompt under its own softmax.

        O = Z+ - alpha Z-,    Z+ = softmax(Q K+^T) V+,    Z- = softmax(Q K-^T) V-

    Several negative prompts are all subtracted, each with its alpha. In joint attention, which has
    image keys in the softmax, a rule says what is taken from the image queries:

        nasa-cross    alpha times the attention to the negative text under a softmax of its own
        nasa-text     alpha times the text's part of Z- over [image; negative]
        nasa          alpha times all of Z- over [image; negative]

    Args:
        alpha: Strength: a number, one per image, or a map over the image (a 2-D tensor of alphas,
            or a PIL mask, white where the family's default holds). `None` takes the family's
            default; with `(string, alpha)` pairs it is a common factor, 1 unless given.
        rule: One of the family's rules; `None` takes the first.
    """

    alpha: Strength | None = None
    rule: str | None = None
    name: ClassVar[str] = "NASA"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rule == "vsf":
            raise ValueError("NASA: value sign flip is a method, not a rule; write VSF(alpha)")
        if self.rule is not None and self.rule not in RULES:
            names = ", ".join(map(repr, RULES))
            raise ValueError(f"NASA: rule must be one of {names}, got {self.rule!r}")

    def filled_in(self, family, denoiser):
        if self.rule is not None and self.rule not in family.rules:
            raise ValueError(
                f"NASA: rule must be one of {', '.join(map(repr, family.rules))} for "
                f"{family.name}, got {self.rule!r}"
            )
        return replace(self, rule=self.rule or family.rules[0])

    def cross(self, q, pos, negatives, backend, image=None):
        o: Tensor | None = None
        for prompt, alpha in negatives:
            z = subtract(q, pos, prompt, alpha.at(q.shape[1]), backend, image)
            o = z if o is None else o + z
            # Z+ counts once: a prompt without keys contributes 0 to the terms that follow
            pos, image = nothing(pos), None
        assert o is not None, "enable_nasa refuses an empty list of negative prompts"
        return o

    def joint(self, streams):
        assert self.rule is not None
        return subtract_from_image(streams, self.rule)

    def __str__(self) -> str:
        # where there are no others to choose from, the rule has the method's name
        return self.name if self.rule in (None, "nasa") else f"{self.name}, rule {self.rule}"
