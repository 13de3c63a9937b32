"""What one node says, checked: a term of the guidance."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor

METHODS = ("NASA", "NASA projected", "NAG", "VSF")
RULES = ("nasa-cross", "nasa-text", "nasa")
# of a conditioning entry, what says nothing about where or when it holds
_PLAIN = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
_REFUSED = {
    "area": "an area",
    "mask": "a mask",
    "control": "a ControlNet",
    "gligen": "GLIGEN boxes",
    "hooks": "hooks",
    "strength": "a strength of its own",
    "start_percent": "a range of steps",
    "end_percent": "a range of steps",
}


@dataclass(frozen=True, eq=False)
class Term:
    text: Tensor  # [b, n, c], as CLIPTextEncode gives it
    # what the conditioning says beside it: pooled output, masks of tokens, ...
    settings: dict[str, Any]
    method: str
    strength: float
    rule: str
    start_percent: float
    end_percent: float
    # of the attentions to text, counted as they run; None is all
    layers: frozenset[int] | None = None

    def __post_init__(self) -> None:
        for name, value, known in (
            ("method", self.method, METHODS), ("rule", self.rule, RULES),
        ):  # fmt: skip
            if value not in known:
                raise ValueError(
                    f"NASA negative prompt: {name} must be one of {', '.join(known)}, got "
                    f"{value!r}; choose one of them in the node"
                )
        if not math.isfinite(self.strength) or self.strength < 0:
            raise ValueError(
                f"NASA negative prompt: strength must be 0 or more, got {self.strength}"
            )
        if self.start_percent >= self.end_percent:
            raise ValueError(
                "NASA negative prompt: start_percent must be below end_percent, or this node acts "
                f"in no step; got {self.start_percent} and {self.end_percent}"
            )

    def __deepcopy__(self, memo: dict) -> Term:
        """ComfyUI copies the options of a model deeply whenever it is cloned."""
        return self

    def is_off(self) -> bool:
        return self.strength == (1.0 if self.method == "NAG" else 0.0)

    def holds_at(self, sigma: float, sampling: Any) -> bool:
        """By the sampling of the model that runs, which a later node may have changed."""
        end, start = (sampling.percent_to_sigma(x) for x in (self.end_percent, self.start_percent))
        return end <= sigma <= start

    def acts_on(self, layer: int) -> bool:
        return self.layers is None or layer in self.layers


def prompt_of(conditioning: Any) -> tuple[Tensor, dict[str, Any]]:
    """Text and settings of a CONDITIONING that is one prompt for the whole image and all steps."""
    if not conditioning:
        raise ValueError("NASA negative prompt: the negative conditioning is empty; connect a text")
    if len(conditioning) > 1:
        raise ValueError(
            f"NASA negative prompt: the negative conditioning has {len(conditioning)} prompts; "
            "give each a node of its own, one after the other"
        )
    text, settings = conditioning[0]
    if text.shape[1] == 0:
        raise ValueError("NASA negative prompt: the negative text has no tokens; connect a text")
    for key, name in _REFUSED.items():
        if settings.get(key, _PLAIN.get(key)) != _PLAIN.get(key):
            raise ValueError(
                f"NASA negative prompt: the negative conditioning has {name}, which is not obeyed "
                "here; connect the text encoder itself, and use start_percent and end_percent of "
                "this node for steps"
            )
    return text, settings


def layers_of(text: str) -> frozenset[int] | None:
    """ "0-9, 12" as numbers; None, all of them, for an empty text."""
    if not text.strip():
        return None
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None or (match[2] is not None and int(match[2]) < int(match[1])):
            raise ValueError(
                f"NASA negative prompt: layers must be like 0-9, 12 or empty for all, got {text!r}"
            )
        found.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return frozenset(found)


def together(terms: tuple[Term, ...], is_joint: bool) -> None:
    """Raise if these nodes cannot act in one attention."""
    methods = {term.method for term in terms}
    if len(methods) > 1:
        raise ValueError(
            f"NASA negative prompt: the nodes in a row have different methods, "
            f"{', '.join(sorted(methods))}; set one for all"
        )
    if len(terms) == 1:
        return
    if methods == {"NAG"}:
        raise ValueError(
            "NASA negative prompt: NAG takes one negative prompt, and there are "
            f"{len(terms)} nodes in a row; write one text, or choose another method"
        )
    if is_joint and methods == {"VSF"}:
        raise ValueError(
            "NASA negative prompt: VSF takes one negative prompt where text and image share an "
            f"attention, and there are {len(terms)} nodes in a row; write one text"
        )
    if is_joint and methods == {"NASA"} and {term.rule for term in terms} != {"nasa-cross"}:
        raise ValueError(
            "NASA negative prompt: several nodes in a row need the rule nasa-cross where text and "
            "image share an attention; set it in all of them"
        )
