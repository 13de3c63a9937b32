"""From nothing to a teacher and its students in the small world: eight stages, each resumable.

OUT/clip       the world's CLIP
OUT/teacher    the many-step teacher
OUT/pairs      its images, and its path to them from noise
OUT/student    the one-step student that NASA-T begins with
OUT/four-step  the student of four steps
OUT/joint      another, with joint attention, of which NASA has several rules
OUT/words      another with joint attention, which knows its prompt from text tokens alone
OUT/pixart     another, a PixArt with a T5

The last three can also learn from the shipped student of four steps: `make_from_shipped`.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextModel

from nasa_distill.scalars import read_numbers
from nasa_distill.train.networks import load, model_of
from nasa_distill.world import clip as world_clip
from nasa_distill.world import model, shipped, students, t5, teacher
from nasa_distill.world.captions import draw_caption
from nasa_distill.world.code import make_autoencoder
from nasa_distill.world.fit import Settings
from nasa_distill.world.scene import RATES, scenes


@dataclass(frozen=True)
class Recipe:
    """Of the shipped model and its siblings. It was run in parts, on two CPU cores."""

    clip: Settings = Settings(steps=600, batch=64, learning_rate=2e-3, ema=0.99)
    teacher: tuple[Settings, ...] = (
        Settings(steps=1800, batch=48, ema=0.996),
        Settings(steps=1600, batch=48, ema=0.996, learning_rate=7e-4, seed=1),
    )
    pairs: int = 51200
    guidance: float = 1.5
    guided_from: int = 800
    ddim_steps: int = 8
    student: tuple[Settings, ...] = (
        Settings(steps=2000, batch=64, learning_rate=6e-4, ema=0.99),
        Settings(steps=600, batch=64, learning_rate=4e-4, ema=0.99, seed=1),
    )
    four_step: tuple[Settings, ...] = (
        Settings(steps=800, batch=64, learning_rate=3e-4, ema=0.99, seed=2),
        Settings(steps=1500, batch=64, learning_rate=5e-4, ema=0.99, seed=3),
    )
    # from random weights: many small steps
    joint: tuple[Settings, ...] = (Settings(steps=5000, batch=16, ema=0.995),)
    joint_size: tuple[int, int, int] = (192, 5, 2)  # width, blocks, patch
    words: tuple[Settings, ...] = (Settings(steps=6000, batch=16, ema=0.995),)
    words_size: tuple[int, int, int] = (192, 5, 1)  # 64 tokens of the image, 16 of the text
    t5: Settings = Settings(steps=400, batch=64, learning_rate=2e-3, ema=0.99)
    pixart: tuple[Settings, ...] = (Settings(steps=4000, batch=16, ema=0.995),)
    pixart_size: tuple[int, int] = (3, 6)  # heads, blocks

    def __post_init__(self) -> None:
        read_numbers(self)


def make_joint(recipe: Recipe, pairs: students.Pairs, encoder: Any, out: Path) -> None:
    _make_joint(recipe.joint, recipe.joint_size, pairs, encoder, out)


def make_words(recipe: Recipe, pairs: students.Pairs, encoder: Any, out: Path) -> None:
    """The pooled vector of every prompt is zero, so time alone modulates the blocks."""
    encoder = copy.deepcopy(encoder)
    torch.nn.init.zeros_(encoder.text_projection.weight)
    _make_joint(recipe.words, recipe.words_size, pairs, encoder, out)


def _make_joint(
    cycles: Sequence[Settings],
    size: tuple[int, int, int],
    pairs: students.Pairs,
    encoder: Any,
    out: Path,
) -> None:
    torch.manual_seed(0)
    pipe = model.make_joint_pipeline(model.make_joint(*size), encoder, make_autoencoder())
    from_nothing(pipe, pairs, cycles, out)


def make_pixart(recipe: Recipe, pairs: students.Pairs, out: Path) -> None:
    tokenizer = t5.make_tokenizer()
    encoder = t5.train(recipe.t5, out / "t5", tokenizer)
    torch.manual_seed(0)
    transformer = model.make_pixart(*recipe.pixart_size)
    pipe = model.make_pixart_pipeline(transformer, encoder, tokenizer, make_autoencoder())
    from_nothing(pipe, pairs, recipe.pixart, out)


def from_nothing(pipe: Any, pairs: students.Pairs, cycles: Sequence[Settings], out: Path) -> None:
    """A student of four steps from random weights: no teacher is of its architecture."""
    called = model_of(pipe, str(out))
    student = students.train(called, called.denoiser, pairs, 4, cycles, out, half=True)
    pipe.register_modules(transformer=student)
    pipe.save_pretrained(out / "pipeline")


def make(recipe: Recipe, out: Path) -> None:
    """Run what is missing; see `fit` for what it raises."""
    tokenizer = model.make_tokenizer()
    clip = world_clip.train_clip(recipe.clip, out / "clip", tokenizer)
    encoder = world_clip.text_encoder(clip)
    if not (out / "clip" / "model").exists():
        clip.model.save_pretrained(out / "clip" / "model")
        tokenizer.save_pretrained(out / "clip" / "model")

    unet = teacher.train(recipe.teacher, encoder, tokenizer, out / "teacher")
    save(unet, encoder, out / "teacher" / "pipeline", few_step=False)

    drawn = load(out / "teacher" / "pipeline")
    pairs = students.make_pairs(
        drawn, recipe.pairs, out, recipe.guidance, recipe.ddim_steps, recipe.guided_from
    )
    student = drawn.denoiser
    for steps, cycles, name in (
        (1, recipe.student, "student"),
        (4, recipe.four_step, "four-step"),
    ):
        student = students.train(drawn, student, pairs, steps, cycles, out / name)
        save(student, encoder, out / name / "pipeline", few_step=True)
    encoder = world_clip.text_encoder(clip, projected=True)
    make_joint(recipe, pairs, encoder, out / "joint")
    make_words(recipe, pairs, encoder, out / "words")
    make_pixart(recipe, pairs, out / "pixart")
    write_prompts(out)


def make_from_shipped(recipe: Recipe, out: Path) -> None:
    """The three students from random weights, without a teacher; see `fit` for what it raises.

    The paths are those of the shipped student: one step from the beginning of each quarter to that
    of the next. Its text encoder has no trained projection; theirs hands on what it is given.
    """
    drawn = load(shipped.path())
    pairs = students.make_pairs(drawn, recipe.pairs, out, guidance=1.0, steps=students.QUARTERS)
    encoder = world_clip.with_identity(drawn.pipe.text_encoder)
    make_words(recipe, pairs, encoder, out / "words")
    make_joint(recipe, pairs, encoder, out / "joint")
    make_pixart(recipe, pairs, out / "pixart")
    write_prompts(out)


def save(unet: UNet2DConditionModel, encoder: CLIPTextModel, path: Path, few_step: bool) -> None:
    pipe: Any = model.make_pipeline(unet, encoder, make_autoencoder(), few_step)
    pipe.save_pretrained(path)


def write_prompts(out: Path, count: int = 4000, seed: int = 0) -> None:
    """`prompts.txt` and `negatives.txt` for NASA-T: captions, and one or two values each."""
    rng = random.Random(seed)
    drawn = rng.choices(scenes(), [scene.rate for scene in scenes()], k=count)
    captions = [draw_caption(scene, rng) for scene in drawn]
    values = [value for name in RATES for value in RATES[name]]
    pairs = [f"{a}, {b}" for a in values for b in values if a != b]
    (out / "prompts.txt").write_text(
        "".join(f"{caption}\n" for caption in captions), encoding="utf-8"
    )
    (out / "negatives.txt").write_text(
        "".join(f"{text}\n" for text in [*values, *pairs]), encoding="utf-8"
    )
