"""What is counted: a method on a model, prompt pair by prompt pair and seed by seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import nasa_diffusers
from torch import Tensor

from nasa_distill.intervals import Share
from nasa_distill.world.kinds import World, of_images


class Method(NamedTuple):
    """A way to use the negative prompt, and how strongly."""

    name: str  # "none", "cfg", "nag", "vsf", "projected", or a rule of NASA
    strength: float = 0.0
    tau: float | None = None  # of NAG, as the next; None: the family's
    share: float | None = None

    def made(self) -> nasa_diffusers.Method:
        """The method of `enable_nasa`; strength is the scale of NAG and the alpha of the others."""
        if self.name == "nag":
            return nasa_diffusers.NAG(self.strength, self.tau, self.share)
        if self.name == "projected":
            return nasa_diffusers.ProjectedNASA(self.strength)
        if self.name == "vsf":
            return nasa_diffusers.VSF(self.strength)
        return nasa_diffusers.NASA(self.strength, rule=self.name)

    def __str__(self) -> str:
        if self.name == "none":
            return self.name
        more = {"tau": self.tau, "alpha": self.share}
        said = (f", {name} {value:g}" for name, value in more.items() if value is not None)
        return f"{self.name} {self.strength:g}" + "".join(said)


@dataclass
class Counts:
    """Of one prompt pair, or of several added up."""

    n: int = 0
    removed: int = 0  # the negative attribute is not there
    followed: int = 0  # all attributes of the prompt are
    valid: int = 0  # an image of the world
    followed_valid: int = 0
    removed_valid: int = 0
    good: int = 0  # removed, followed and valid
    residual: float = 0.0  # added up
    # "colour red": how often in valid images, of a model without a negative prompt
    values: dict[str, int] = field(default_factory=dict)

    def add(self, other: Counts) -> None:
        for name in self.__dataclass_fields__:
            if name != "values":
                setattr(self, name, getattr(self, name) + getattr(other, name))
        for value, count in other.values.items():
            self.values[value] = self.values.get(value, 0) + count

    def plain(self) -> dict[str, Any]:
        """As JSON takes it, and `Counts(**...)` gives it back."""
        return {name: x for name, x in vars(self).items() if name != "values" or x}

    def furthest(self, world: World) -> tuple[str, Share, float]:
        """The value whose share of its attribute in valid images is furthest from the world's,
        its share, and the world's.

        What a model leaves out is seen here: every image of it can be valid and as prompted.
        """
        found = []
        for value, share in world.shares.items():
            attribute = value.split()[0]
            total = sum(n for x, n in self.values.items() if x.split()[0] == attribute)
            found.append((value, Share(self.values.get(value, 0), total), share))
        return max(found, key=lambda x: abs(x[1].value - x[2]))

    @staticmethod
    def of(images: Tensor, prompt: str, negative: str) -> Counts:
        verdict = of_images(images).judge(images)
        removed, followed, valid = (
            ~verdict.shows(negative),
            verdict.follows(prompt),
            verdict.valid.cpu(),
        )
        return Counts(
            len(images),
            int(removed.sum()),
            int(followed.sum()),
            int(valid.sum()),
            int((followed & valid).sum()),
            int((removed & valid).sum()),
            int((removed & followed & valid).sum()),
            verdict.residual.sum().item(),
        )

    @property
    def shares(self) -> dict[str, Share]:
        return {
            "removed": Share(self.removed, self.n),
            "followed": Share(self.followed, self.n),
            "valid": Share(self.valid, self.n),
            "followed if valid": Share(self.followed_valid, self.valid),
            "removed if valid": Share(self.removed_valid, self.valid),
            "all three": Share(self.good, self.n),
        }


@dataclass
class Cell:
    """One method on one model: the pairs, each over all seeds, and their sum."""

    model: str  # "student" or "teacher"
    steps: int
    method: Method
    pairs: list[Counts] = field(default_factory=list)
    seeds: dict[int, Counts] = field(default_factory=dict)  # each over all pairs

    def add(self, seed: int, pairs: Sequence[Counts]) -> None:
        self.pairs = self.pairs or [Counts() for _ in pairs]
        self.seeds[seed] = Counts()
        for mine, counts in zip(self.pairs, pairs, strict=True):
            mine.add(counts)
            self.seeds[seed].add(counts)

    @property
    def total(self) -> Counts:
        total = Counts()
        for counts in self.pairs:
            total.add(counts)
        return total


@dataclass
class Results:
    cells: list[Cell]
    about: dict[str, Any]  # commit, versions, seeds, checksum
    quality: dict[str, Counts] = field(default_factory=dict)  # without any negative prompt
