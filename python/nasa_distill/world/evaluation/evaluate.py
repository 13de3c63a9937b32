"""What negative prompts do to a model of the small world: the paper's Table 2 and Figure 7 there.

Every cell is one method at one strength over all prompt pairs, drawn by the stock pipeline and
judged exactly: how often the attribute is gone, and what else of the image is kept.
"""

from __future__ import annotations

import contextlib
import functools
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import nasa_diffusers
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from nasa_distill import pictures
from nasa_distill.scalars import plain
from nasa_distill.train.networks import Model, load
from nasa_distill.train.seeds import generator
from nasa_distill.world.code import PatchCode
from nasa_distill.world.evaluation.counts import Cell, Counts, Method, Results
from nasa_distill.world.evaluation.progress import Made, checksum, commit
from nasa_distill.world.evaluation.prompts import pairs_of
from nasa_distill.world.kinds import SMALL, world_of

BATCH = 100
TEACHER_STEPS = 25


NONE = Method("none")
CFG = tuple(Method("cfg", scale) for scale in (1.5, 2.5, 4.0))
NASA = tuple(Method("nasa", alpha) for alpha in (0.1, 0.25, 0.5, 0.75, 1.0, 1.25))
PROJECTED = tuple(Method("projected", alpha) for alpha in (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0))
NAG = tuple(Method("nag", scale) for scale in (2.0, 4.0, 8.0))
VSF = tuple(Method("vsf", alpha) for alpha in (0.5, 1.0, 2.0))
METHODS = (NONE, *CFG, *NASA, *PROJECTED, *NAG, *VSF)
# of joint attention, each over the alphas at which it acts
ALPHAS = {
    "nasa-cross": (0.1, 0.25, 0.35, 0.5),
    "nasa-text": (0.25, 0.5, 0.75, 1.0),
    "nasa": (0.1, 0.25, 0.5),
    "vsf": (0.25, 0.5, 1.0),
}
RULES = tuple(Method(rule, alpha) for rule, alphas in ALPHAS.items() for alpha in alphas)
JOINT = (NONE, *CFG[:2], *PROJECTED, *RULES, *NAG)
# for a search: what NAG's scale alone leaves out, around the shares that its paper takes
NAG_SHARES = {False: (0.5, 1.0), True: (0.125, 0.25)}  # of cross- and of joint attention


def nag_grid(joint: bool) -> tuple[Method, ...]:
    return tuple(
        Method("nag", scale, tau, share)
        for scale in (4.0, 8.0, 16.0)
        for tau in (1.25, 2.5)
        for share in NAG_SHARES[joint]
    )


def draw(
    model: Model,
    prompt: str,
    negative: str,
    method: Method,
    steps: int,
    noise: Tensor,
    seed: int,
) -> Tensor:
    """Images `[n, 3, size, size]` in [-1, 1] from the model's own pipeline."""
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
    world, rng = world_of(model), random.Random(f"quality {seed}")
    rates = world.rates().tolist()
    captions = [world.caption(i, rng, 0.0) for i in rng.choices(range(len(rates)), rates, k=images)]
    noise = torch.randn(images, *model.latent_shape, generator=generator(seed, 1_000))
    total = Counts()
    for number, start in enumerate(range(0, images, BATCH)):
        batch, z = captions[start : start + BATCH], noise[start : start + BATCH]
        verdict = world.judge(
            call_pipeline(model, batch, steps, z, seed, number, guidance_scale=guidance)
        )
        allowed = world.matches(batch).bool()
        followed = allowed[torch.arange(len(batch)), verdict.scene]
        valid = verdict.valid
        values = Counter(
            f"{attribute} {value}"
            for scene in verdict.scene[valid].tolist()
            for attribute, of_objects in world.describe(scene).items()
            for value in of_objects.split()
        )
        total.add(
            Counts(
                n=len(batch),
                followed=int(followed.sum()),
                valid=int(valid.sum()),
                followed_valid=int((followed & valid).sum()),
                residual=verdict.residual.sum().item(),
                values=values,
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
    return decode(model, codes).clamp(-1, 1)


@torch.no_grad()
def decode(model: Model, codes: Tensor) -> Tensor:
    """Images of latents; those of the small world by the linear code that its autoencoder computes.

    That takes a thousandth of the time.
    """
    return code().decode(codes) if world_of(model) is SMALL else model.decode(codes)


def read_method(text: str) -> Method:
    """`nag:8:2.5:0.25` as the method that it names.

    Raises:
        ValueError: There is no such method, or what follows is no number.
    """
    name, *numbers = text.split(":")
    known = {"none", "cfg", "nag", "vsf", "projected", *ALPHAS}
    try:
        if name not in known or len(numbers) not in (
            (1, 3) if name == "nag" else (name != "none",)
        ):
            raise ValueError(f"one of {', '.join(sorted(known))}, and its numbers")
        return Method(name, *map(float, numbers))
    except ValueError as error:
        raise ValueError(f"evaluate.read_method: cannot read {text!r}: {error}") from error


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
    model = load(student)
    prompt, negative = pairs_of(world_of(model), "first")[0]
    noise = torch.randn(images, *model.latent_shape, generator=generator(seed, 0))
    nasa = tuple(Method("nasa", alpha) for alpha in (0.25, 0.5, 1.0))
    projected = (Method("projected", 1.0), Method("projected", 2.0))
    chosen = (NONE, CFG[1], *nasa, *projected, NAG[1], VSF[1])
    if model.joint:
        rules = (Method(rule, 0.25) for rule in ALPHAS)
        chosen = (NONE, CFG[1], *rules, *projected, NAG[1])
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
    methods: Sequence[Method] | Mapping[int, Sequence[Method]] | None = None,
    more: Sequence[Method] = (),
    pairs: str = "first",
    progress: Path | None = None,
) -> Results:
    """Methods on the student, by default all it has, and negative guidance on the teacher in 25.

    Args:
        images: Of each prompt pair and seed.
        methods: Where they differ, by the number of steps.
        more: Methods beside those.
        pairs: One of `prompts.NAMES`.
        progress: A file of the cells that are there; the same call goes on with it.
    """
    images, steps = plain(images), [plain(count) for count in steps]
    seeds = [plain(seed) for seed in (seeds if isinstance(seeds, Sequence) else [seeds])]
    if images < 1:
        raise ValueError(f"evaluate.run: images must be at least 1, got {images}")
    models = {"student": load(student)} | ({} if teacher is None else {"teacher": load(teacher)})
    distilled = models["student"]
    world = world_of(distilled)
    asked_for = pairs_of(world, pairs)
    if methods is None:
        methods = JOINT if distilled.joint else METHODS
    jobs = [
        ("student", number, Method(m.name, *(plain(x) for x in m[1:])))
        for number in steps
        for m in dict.fromkeys(
            [*(methods[number] if isinstance(methods, Mapping) else methods), *more]
        )
    ]
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
    if world is not SMALL:
        about["world"] = world.name
    if distilled.joint:
        pooled = distilled.encode(["red"]).pooled
        has_vector = pooled is not None and bool(pooled.any())
        about["prompt"] = "tokens and a pooled vector" if has_vector else "tokens alone"
    if teacher is not None:
        about["teacher"] = checksum(teacher)
    made = Made(progress, about)
    count = images * len(asked_for)
    seen = {}
    for model, number, guidance, name in qualities(steps, teacher is not None):
        seen[name] = Counts()
        for seed in seeds:
            drawn = (models[model], number, count, seed, guidance)
            seen[name].add(*made.through(f"{name}, seed {seed}", lambda *x: [quality(*x)], *drawn))
    if teacher is not None:
        jobs += [("teacher", TEACHER_STEPS, method) for method in (NONE, CFG[1])]
    cells = [Cell(*job) for job in jobs]
    # seed by seed: what was stopped early has all methods
    for seed, cell in tqdm([(seed, cell) for seed in seeds for cell in cells], "cells"):
        key = f"{cell.model}, {cell.steps} steps, {cell.method}, seed {seed}"
        asked = (models[cell.model], cell.steps, cell.method, asked_for, images, seed)
        cell.add(seed, made.through(key, pair_by_pair, *asked))
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
