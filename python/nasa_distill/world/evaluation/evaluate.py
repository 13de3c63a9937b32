"""What negative prompts do to a model of the small world: the paper's Table 2 and Figure 7 there.

Every cell is one method at one strength over all prompt pairs, drawn by the stock pipeline and
judged exactly: how often the attribute is gone, and what else of the image is kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import nasa_diffusers
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from nasa_distill import pictures
from nasa_distill.intervals import Share
from nasa_distill.scalars import plain
from nasa_distill.train.networks import Model, load
from nasa_distill.train.seeds import generator
from nasa_distill.world.captions import draw_caption, matches
from nasa_distill.world.judge import judge
from nasa_distill.world.scene import scenes

# a prompt, and what must not be in its images; no prompt mentions its negative's attribute
PAIRS = (
    ("a photo of a shape", "red"),
    ("a photo of a circle", "red"),
    ("a photo of a shape on a white background", "circle"),
    ("a photo of a red shape", "circle"),
    ("a photo of a blue square", "striped"),
    ("a photo of a shape", "striped"),
    ("a photo of a red circle", "large"),
    ("a photo of a green triangle", "black"),
    ("a photo of a shape", "blurry"),
    ("a photo of a red circle", "watermarked"),
    ("a photo of a yellow shape", "blurry, watermarked"),
)
BATCH = 100
TEACHER_STEPS = 25
SOURCES = Path(__file__).parents[2]


class Method(NamedTuple):
    """A way to use the negative prompt, and how strongly."""

    name: str  # "none", "cfg", "nag", "vsf", or a rule of NASA
    strength: float = 0.0

    def made(self) -> nasa_diffusers.Method:
        """The method of `enable_nasa`; strength is the scale of NAG and the alpha of the others."""
        if self.name == "nag":
            return nasa_diffusers.NAG(scale=self.strength)
        if self.name == "vsf":
            return nasa_diffusers.VSF(self.strength)
        return nasa_diffusers.NASA(self.strength, rule=self.name)

    def __str__(self) -> str:
        return self.name if self.name == "none" else f"{self.name} {self.strength:g}"


NONE = Method("none")
CFG = tuple(Method("cfg", scale) for scale in (1.5, 2.5, 4.0))
NASA = tuple(Method("nasa", alpha) for alpha in (0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5))
NAG = tuple(Method("nag", scale) for scale in (2.0, 4.0, 8.0))
VSF = tuple(Method("vsf", alpha) for alpha in (0.5, 1.0, 2.0))
METHODS = (NONE, *CFG, *NASA, *NAG, *VSF)
# of joint attention, each over the alphas at which it acts
ALPHAS = {
    "nasa-cross": (0.1, 0.25, 0.5, 1.0, 1.5),
    "nasa-text": (0.25, 0.5, 1.0, 2.0, 4.0),
    "nasa": (0.1, 0.25, 0.5, 0.75, 1.0),
    "vsf": (0.25, 0.5, 1.0, 2.0),
}
RULES = tuple(Method(rule, alpha) for rule, alphas in ALPHAS.items() for alpha in alphas)
JOINT = (NONE, *CFG, *RULES, *NAG)


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

    def add(self, other: Counts) -> None:
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @staticmethod
    def of(images: Tensor, prompt: str, negative: str) -> Counts:
        verdict = judge(images)
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
    """One method on one model: the pairs, and their sum."""

    model: str  # "student" or "teacher"
    steps: int
    method: Method
    pairs: list[Counts] = field(default_factory=list)

    @property
    def total(self) -> Counts:
        total = Counts()
        for counts in self.pairs:
            total.add(counts)
        return total


@dataclass
class Results:
    cells: list[Cell]
    about: dict[str, Any]  # commit, versions, seed, checksum
    quality: dict[str, Counts] = field(default_factory=dict)  # without any negative prompt


def draw(
    model: Model,
    prompt: str,
    negative: str,
    method: Method,
    steps: int,
    noise: Tensor,
    seed: int,
) -> Tensor:
    """Images `[n, 3, 32, 32]` in [-1, 1] from the model's own pipeline."""
    images = []
    for number, z in enumerate(noise.split(BATCH)):
        call: dict[str, Any] = {"guidance_scale": 0.0}
        if method.name == "cfg":
            call = {
                "guidance_scale": method.strength,
                "negative_prompt": [negative] * len(z),
            }
        with _guided(model, negative, method):
            images.append(_call(model, [prompt] * len(z), steps, z, seed, number, **call))
    return torch.cat(images)


def quality(model: Model, steps: int, images: int, seed: int, guidance: float = 0.0) -> Counts:
    """Images of captions as the world draws them, with no negative prompt."""
    rng = random.Random(f"quality {seed}")
    drawn = rng.choices(scenes(), [scene.rate for scene in scenes()], k=images)
    captions = [draw_caption(scene, rng) for scene in drawn]
    noise = torch.randn(images, *model.latent_shape, generator=generator(seed, 1_000))
    total = Counts()
    for number, start in enumerate(range(0, images, BATCH)):
        batch, z = captions[start : start + BATCH], noise[start : start + BATCH]
        verdict = judge(_call(model, batch, steps, z, seed, number, guidance_scale=guidance))
        allowed = matches(batch).bool()
        followed = allowed[torch.arange(len(batch)), verdict.scene]
        valid = verdict.valid
        total.add(
            Counts(
                n=len(batch),
                followed=int(followed.sum()),
                valid=int(valid.sum()),
                followed_valid=int((followed & valid).sum()),
                residual=verdict.residual.sum().item(),
            )
        )
    return total


def _call(
    model: Model, prompts: list[str], steps: int, z: Tensor, seed: int, number: int, **options: Any
) -> Tensor:
    random_ = generator(seed, number)
    # SD3's pipeline gives its scheduler no generator
    with torch.random.fork_rng():
        torch.manual_seed(random_.initial_seed())
        images = model.pipe(
            prompts,
            num_inference_steps=steps,
            latents=z,
            generator=random_,
            output_type="pt",
            **model.call_options,
            **options,
        ).images
    return images * 2 - 1


@contextlib.contextmanager
def _guided(model: Model, negative: str, method: Method) -> Iterator[None]:
    if method.name in ("none", "cfg"):
        yield
        return
    with nasa_diffusers.nasa(model.pipe, negative, method.made(), **model.text_options):
        yield


def samples(student: Path, steps: int, seed: int = 0, images: int = 10) -> Image.Image:
    """The first pair of prompts from the same noise, by several methods."""
    model, (prompt, negative) = load(student), PAIRS[0]
    noise = torch.randn(images, *model.latent_shape, generator=generator(seed, 0))
    nasa = tuple(Method("nasa", alpha) for alpha in (0.25, 0.5, 1.0))
    chosen = (NONE, CFG[1], *nasa, NAG[1], VSF[1])
    if model.joint:
        chosen = (NONE, CFG[1], *(Method(rule, 1.0) for rule in ALPHAS), NAG[1])
    rows = []
    for method in chosen:
        drawn = draw(model, prompt, negative, method, steps, noise, seed)
        rows.append((f"{method}: {prompt}, without {negative}", drawn / 2 + 0.5))
    return pictures.rows(rows)


def run(
    student: Path,
    steps: list[int],
    images: int,
    seed: int = 0,
    teacher: Path | None = None,
    methods: tuple[Method, ...] | None = None,
) -> Results:
    """Methods on the student, by default all it has, and negative guidance on the teacher in 25."""
    images, seed, steps = plain(images), plain(seed), [plain(count) for count in steps]
    if images < 1:
        raise ValueError(f"evaluate.run: images must be at least 1, got {images}")
    distilled = load(student)
    if methods is None:
        methods = JOINT if distilled.joint else METHODS
    methods = tuple(Method(method.name, plain(method.strength)) for method in methods)
    jobs = [("student", distilled, count, method) for count in steps for method in methods]
    seen = {
        f"student, {count} step{'s' * (count > 1)}": quality(
            distilled, count, images * len(PAIRS), seed
        )
        for count in steps
    }
    if teacher is not None:
        taught = load(teacher)
        jobs += [("teacher", taught, TEACHER_STEPS, method) for method in (NONE, CFG[1])]
        for guidance in (0.0, 2.0):
            name = f"teacher, {TEACHER_STEPS} steps, " + (
                f"guidance {guidance:g}" if guidance else "no guidance"
            )
            seen[name] = quality(taught, TEACHER_STEPS, images * len(PAIRS), seed, guidance)
    cells = []
    for name, model, count, method in tqdm(jobs, "cells"):
        cell = Cell(name, count, method)
        for number, (prompt, negative) in enumerate(PAIRS):
            # the same noise for every method
            noise = torch.randn(images, *model.latent_shape, generator=generator(seed, number))
            drawn = draw(model, prompt, negative, method, count, noise, seed)
            cell.pairs.append(Counts.of(drawn, prompt, negative))
        cells.append(cell)
    about = {
        "commit": commit(),
        "seed": seed,
        "images per pair": images,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "network": type(distilled.denoiser).__name__,
        "student": checksum(student),
    }
    if teacher is not None:
        about["teacher"] = checksum(teacher)
    return Results(cells, about, seen)


def commit() -> str:
    """Of the sources that ran, with a `+` where they were changed since."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(SOURCES), *arguments],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", ".")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def checksum(path: Path) -> str:
    """The first half of a SHA-256 over the weights of a pipeline."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:32]
