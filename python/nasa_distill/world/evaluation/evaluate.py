"""What negative prompts do to a model of the small world: the paper's Table 2 and Figure 7 there.

Every cell is one method at one strength over all prompt pairs, drawn by the stock pipeline and
judged exactly: how often the attribute is gone, and what else of the image is kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import random
import subprocess
from collections.abc import Callable, Iterator, Sequence
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
from nasa_distill.world.code import PatchCode
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
# written down before anything was drawn for them, and after the rules were chosen on the others
HELD_OUT = (
    ("a photo of a square", "blue"),
    ("a photo of a triangle", "green, yellow"),
    ("a photo of a large shape", "solid"),
    ("a photo of a yellow shape on a black background", "triangle"),
    ("a photo of a blue circle", "small"),
    ("a photo of a striped shape", "white"),
    ("a photo of a green shape", "square"),
    ("a clean photo of a shape", "yellow"),
    ("a photo of a large red shape", "circle, triangle"),
    ("a photo of a red striped square on a white background", "blurry"),
    ("a photo of a small shape", "red, circle"),
)
LISTS = {"first": PAIRS, "held-out": HELD_OUT}
BATCH = 100
TEACHER_STEPS = 25
SOURCES = Path(__file__).parents[2]


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


NONE = Method("none")
CFG = tuple(Method("cfg", scale) for scale in (1.5, 2.5, 4.0))
NASA = tuple(Method("nasa", alpha) for alpha in (0.1, 0.25, 0.5, 0.75, 1.0, 1.25))
PROJECTED = tuple(Method("projected", alpha) for alpha in (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0))
NAG = tuple(Method("nag", scale) for scale in (2.0, 4.0, 8.0))
VSF = tuple(Method("vsf", alpha) for alpha in (0.5, 1.0, 2.0))
METHODS = (NONE, *CFG, *NASA, *PROJECTED, *NAG, *VSF)
# of joint attention, each over the alphas at which it acts
ALPHAS = {
    "nasa-cross": (0.1, 0.25, 0.5, 1.0, 1.5),
    "nasa-text": (0.25, 0.5, 1.0, 2.0, 4.0),
    "nasa": (0.1, 0.25, 0.5, 0.75, 1.0),
    "vsf": (0.25, 0.5, 1.0, 2.0),
}
RULES = tuple(Method(rule, alpha) for rule, alphas in ALPHAS.items() for alpha in alphas)
JOINT = (NONE, *CFG, *PROJECTED, *RULES, *NAG)
# for a search: what NAG's scale alone leaves out
NAG_GRID = tuple(
    Method("nag", scale, tau, share)
    for scale in (4.0, 8.0, 16.0)
    for tau in (1.25, 2.5)
    for share in (0.5, 1.0)
)


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


def draw(
    model: Model,
    prompt: str,
    negative: str,
    method: Method,
    steps: int,
    noise: Tensor,
    seed: int,
) -> Tensor:
    """Images `[n, 3, 32, 32]` in [-1, 1] from the model's own pipeline.

    Its latents are read by the linear code that its autoencoder computes, in a thousandth of the
    time.
    """
    images = []
    for number, z in enumerate(noise.split(BATCH)):
        call: dict[str, Any] = {"guidance_scale": 0.0}
        if method.name == "cfg":
            call = {
                "guidance_scale": method.strength,
                "negative_prompt": [negative] * len(z),
            }
        with _guided(model, negative, method):
            images.append(call_pipeline(model, [prompt] * len(z), steps, z, seed, number, **call))
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
        verdict = judge(
            call_pipeline(model, batch, steps, z, seed, number, guidance_scale=guidance)
        )
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


def call_pipeline(
    model: Model,
    prompts: list[str] | None,
    steps: int,
    z: Tensor,
    seed: int,
    number: int,
    **options: Any,
) -> Tensor:
    random_ = generator(seed, number)
    # SD3's pipeline gives its scheduler no generator
    with torch.random.fork_rng():
        torch.manual_seed(random_.initial_seed())
        codes = model.pipe(
            prompts,
            num_inference_steps=steps,
            latents=z,
            generator=random_,
            output_type="latent",
            **model.call_options,
            **options,
        ).images
    return code().decode(codes).clamp(-1, 1)


@functools.cache
def code() -> PatchCode:
    return PatchCode()


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
    steps: Sequence[int],
    images: int,
    seeds: int | Sequence[int] = 0,
    teacher: Path | None = None,
    methods: Sequence[Method] | None = None,
    more: Sequence[Method] = (),
    pairs: str = "first",
    progress: Path | None = None,
) -> Results:
    """Methods on the student, by default all it has, and negative guidance on the teacher in 25.

    Args:
        images: Of each prompt pair and seed.
        more: Methods beside those.
        pairs: One of `LISTS`.
        progress: A file of the cells that are there; the same call goes on with it.
    """
    images, steps = plain(images), [plain(count) for count in steps]
    seeds = [plain(seed) for seed in ([seeds] if isinstance(plain(seeds), int) else seeds)]
    if images < 1:
        raise ValueError(f"evaluate.run: images must be at least 1, got {images}")
    if pairs not in LISTS:
        raise ValueError(f"evaluate.run: pairs must be one of {', '.join(LISTS)}, got {pairs!r}")
    models = {"student": load(student)} | ({} if teacher is None else {"teacher": load(teacher)})
    distilled = models["student"]
    if methods is None:
        methods = JOINT if distilled.joint else METHODS
    methods = [*methods, *(method for method in more if method not in methods)]
    methods = [Method(m.name, *(plain(x) for x in m[1:])) for m in methods]
    about = {
        "commit": commit(),
        "seeds": ", ".join(map(str, seeds)),
        "images per pair and seed": images,
        "prompt pairs": pairs,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "network": type(distilled.denoiser).__name__,
        "student": checksum(student),
    }
    if teacher is not None:
        about["teacher"] = checksum(teacher)
    made = Made(progress, about)
    count = images * len(LISTS[pairs])
    seen = {}
    for model, number, guidance, name in qualities(steps, teacher is not None):
        seen[name] = Counts()
        for seed in seeds:
            how = (models[model], number, count, seed, guidance)
            seen[name].add(*made.through(f"{name}, seed {seed}", lambda *x: [quality(*x)], *how))
    jobs = [("student", number, method) for number in steps for method in methods]
    if teacher is not None:
        jobs += [("teacher", TEACHER_STEPS, method) for method in (NONE, CFG[1])]
    cells = [Cell(*job) for job in jobs]
    # seed by seed: what was stopped early has all methods
    for seed, cell in tqdm([(seed, cell) for seed in seeds for cell in cells], "cells"):
        key = f"{cell.model}, {cell.steps} steps, {cell.method}, seed {seed}"
        how = (models[cell.model], cell.steps, cell.method, LISTS[pairs], images, seed)
        cell.add(seed, made.through(key, pair_by_pair, *how))
    return Results(cells, about, seen)


def qualities(steps: Sequence[int], with_teacher: bool) -> Iterator[tuple[str, int, float, str]]:
    """Model, steps and guidance of what is judged without a negative prompt, and its name."""
    for number in steps:
        yield "student", number, 0.0, f"student, {number} step{'s' * (number > 1)}"
    if with_teacher:
        for guidance in (0.0, 2.0):
            said = f"guidance {guidance:g}" if guidance else "no guidance"
            yield "teacher", TEACHER_STEPS, guidance, f"teacher, {TEACHER_STEPS} steps, {said}"


def pair_by_pair(
    model: Model,
    steps: int,
    method: Method,
    pairs: Sequence[tuple[str, str]],
    images: int,
    seed: int,
) -> list[Counts]:
    found = []
    for number, (prompt, negative) in enumerate(pairs):
        # the same noise for every method
        noise = torch.randn(images, *model.latent_shape, generator=generator(seed, number))
        drawn = draw(model, prompt, negative, method, steps, noise, seed)
        found.append(Counts.of(drawn, prompt, negative))
    return found


class Made:
    """Counts that were made before, line by line in a file, for as long as nothing else changed."""

    def __init__(self, path: Path | None, about: dict[str, Any]):
        self.path, self.known = path, {}
        # seeds may be added, and sources change between two parts of a run if it says so
        free = ("commit", "seeds")
        same = {name: value for name, value in about.items() if name not in free}
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(json.dumps(about) + "\n")
        first, *lines = map(json.loads, path.read_text().splitlines())
        if {name: value for name, value in first.items() if name not in free} != same:
            raise ValueError(
                f"evaluate.run: {path} holds cells of another run, {first}; this one is {about}. "
                "Delete it, or name another folder"
            )
        if first["commit"] != about["commit"]:
            about["commit"] = f"{first['commit']} to {about['commit']}"
        self.known = {line["cell"]: [Counts(**x) for x in line["counts"]] for line in lines}

    def through(self, key: str, make: Callable[..., list[Counts]], *how: Any) -> list[Counts]:
        if key not in self.known:
            self.known[key] = make(*how)
            if self.path is not None:
                line = {"cell": key, "counts": [dataclasses.asdict(x) for x in self.known[key]]}
                with self.path.open("a") as file:
                    file.write(json.dumps(line) + "\n")
        return self.known[key]


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
