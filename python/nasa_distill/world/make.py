"""From nothing to a teacher and its students in the small world: seven stages, each resumable.

OUT/clip       the world's CLIP
OUT/teacher    the many-step teacher
OUT/pairs      its images, and its path to them from noise
OUT/student    the one-step student that NASA-T begins with
OUT/four-step  the student of four steps
OUT/joint      another, with joint attention, of which NASA has several rules
OUT/pixart     another, a PixArt with a T5
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextModel

from nasa_distill.scalars import read_numbers
from nasa_distill.train.clip import Clip
from nasa_distill.train.networks import load, model_of
from nasa_distill.world import clip as world_clip
from nasa_distill.world import model, students, t5, teacher
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
    joint: tuple[Settings, ...] = (
        Settings(steps=2600, batch=16, ema=0.995),
        Settings(steps=1200, batch=16, ema=0.995, learning_rate=7e-4, seed=1),
    )
    joint_size: tuple[int, int] = (192, 5)  # width, blocks
    t5: Settings = Settings(steps=400, batch=64, learning_rate=2e-3, ema=0.99)
    pixart: tuple[Settings, ...] = (
        Settings(steps=6000, batch=16, ema=0.995),
        Settings(steps=3000, batch=16, ema=0.995, learning_rate=7e-4, seed=1),
    )
    pixart_size: tuple[int, int] = (3, 6)  # heads, blocks

    def __post_init__(self) -> None:
        read_numbers(self)


def make_joint(recipe: Recipe, pairs: students.Pairs, clip: Clip, out: Path) -> None:
    torch.manual_seed(0)
    encoder = world_clip.text_encoder(clip, projected=True)
    transformer = model.make_joint(*recipe.joint_size)
    pipe = model.make_joint_pipeline(transformer, encoder, make_autoencoder())
    from_nothing(pipe, pairs, recipe.joint, out)


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
    make_joint(recipe, pairs, clip, out / "joint")
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
