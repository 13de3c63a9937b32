"""From nothing to a teacher and its students in a small world, stage by stage, each resumable.

OUT/clip         the world's CLIP
OUT/autoencoder  its autoencoder, where that is trained
OUT/teacher      the many-step teacher
OUT/pairs        its images, and its path to them from noise
OUT/decoder      the autoencoder with a decoder that was trained longer
OUT/student      the one-step student that NASA-T begins with
OUT/four-step    the student of four steps
OUT/finish       that student and the decoder, each trained on by what the other makes
OUT/joint        another, with joint attention, of which NASA has several rules
OUT/words        another with joint attention, which knows its prompt from text tokens alone
OUT/pixart       another, a PixArt with a T5

The last three learn from a student of four steps: that of the stages before, or the shipped one
(`make_from_shipped`).
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTokenizer

from nasa_distill.scalars import read_numbers
from nasa_distill.train import checkpoint
from nasa_distill.train.networks import Model, load, model_of
from nasa_distill.world import clip as world_clip
from nasa_distill.world import draws, imitate, model, settle, shipped, students, t5, teacher
from nasa_distill.world.code import PatchCode
from nasa_distill.world.evaluation.progress import checksum
from nasa_distill.world.fit import Settings
from nasa_distill.world.kinds import WORLDS, Code, World
from nasa_distill.world.large import autoencoder


@dataclass(frozen=True)
class Round:
    """Of `make_finish`: the decoder learns from draws, then the student from its images."""

    decoder: tuple[Settings, ...]
    grown: bool = False  # the decoder has a block more at each level from here on
    settled: tuple[Settings, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """Of one world; as it stands, of the shipped model and its siblings.

    It was run in parts, on two CPU cores; the last three stages of 32x32 images with other code,
    which taught them the ends of paths.
    """

    size: int = 32  # of images, which says of which world
    autoencoder: tuple[Settings, ...] = ()  # none: its weights are set by hand
    clip: Settings = Settings(steps=600, batch=64, learning_rate=2e-3, ema=0.99)
    teacher: tuple[Settings, ...] = (
        Settings(steps=1800, batch=48, ema=0.996),
        Settings(steps=1600, batch=48, ema=0.996, learning_rate=7e-4, seed=1),
    )
    decoder: tuple[Settings, ...] = ()  # of a trained autoencoder
    unet: tuple[int, ...] = model.CHANNELS_OF_UNET
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
    # of teacher and students of one step and four: see `teacher.train` and `students.train`
    floor: float | None = None
    plain_cycles: int = 0  # the teacher's first ones, without `floor`
    own_cycles: int = 0  # its last ones, half on its own paths
    exact: bool = False  # the students' pairs: see `students.exact_pairs`
    # after the regression: see `settle`
    student_settled: tuple[Settings, ...] = ()
    four_step_settled: tuple[Settings, ...] = ()
    last_anchor: float = settle.ANCHOR  # see `settle.train`
    finish: tuple[Round, ...] = ()
    draws: int = 9600  # of the student in each number of steps, and of the teacher
    chained: bool = True  # the student of four steps begins with that of one, not with the teacher
    # from random weights: of what another student draws in its steps, then in their own
    shown_pairs: int = 51200
    joint: tuple[Settings, ...] = (Settings(steps=5000, batch=16, ema=0.995),)
    joint_size: tuple[int, int, int] = (192, 5, 2)  # width, blocks, patch
    joint_shown: tuple[Settings, ...] = ()
    words: tuple[Settings, ...] = (Settings(steps=6000, batch=16, ema=0.995),)
    words_size: tuple[int, int, int] = (192, 5, 1)
    words_shown: tuple[Settings, ...] = ()
    t5: Settings = Settings(steps=400, batch=64, learning_rate=2e-3, ema=0.99)
    pixart: tuple[Settings, ...] = (Settings(steps=4000, batch=16, ema=0.995),)
    pixart_size: tuple[int, int] = (3, 6)  # heads, blocks
    pixart_shown: tuple[Settings, ...] = ()

    def __post_init__(self) -> None:
        read_numbers(self)


# of 64x64 images. The model's card says which parts were run with other code; `student` was not
# run to its end
LARGE_RECIPE = Recipe(
    size=64,
    clip=Settings(steps=1500, batch=64, learning_rate=2e-3, ema=0.99),
    autoencoder=(Settings(steps=5000, batch=16, learning_rate=2e-3, ema=0.995),),
    decoder=(
        Settings(steps=7000, batch=16, learning_rate=2e-3, ema=0.995),
        Settings(steps=4000, batch=16, learning_rate=7e-4, ema=0.995, seed=1, muon=0.005),
        Settings(steps=9000, batch=16, learning_rate=1e-3, ema=0.997, seed=2, muon=0.005),
        Settings(steps=4000, batch=16, learning_rate=1e-3, ema=0.997, seed=3, muon=0.005),
    ),
    teacher=(
        Settings(steps=4000, batch=48, ema=0.997),
        Settings(steps=2000, batch=48, ema=0.996, learning_rate=7e-4, seed=1),
        Settings(steps=3600, batch=48, ema=0.997, seed=2, muon=0.004),
        Settings(steps=6000, batch=48, ema=0.998, seed=5, muon=0.004),
        Settings(steps=6000, batch=48, ema=0.998, seed=9, muon=0.004),
        Settings(steps=3400, batch=48, ema=0.998, learning_rate=7e-4, seed=10, muon=0.003),
        Settings(steps=6000, batch=48, ema=0.998, seed=14, muon=0.004),
    ),
    unet=(80, 96),
    pairs=40960,
    student=(Settings(steps=1400, batch=64, learning_rate=6e-4, ema=0.99, muon=0.004),),
    student_settled=(
        Settings(steps=1600, batch=64, learning_rate=4e-4, ema=0.995, seed=6, muon=0.0025),
        Settings(steps=450, batch=64, learning_rate=3e-4, ema=0.99, seed=13, muon=0.002),
    ),
    four_step=(Settings(steps=1600, batch=64, learning_rate=6e-4, ema=0.99, seed=2, muon=0.004),),
    four_step_settled=(
        Settings(steps=1600, batch=64, learning_rate=5e-4, ema=0.997, seed=4, muon=0.003),
        Settings(steps=600, batch=64, learning_rate=5e-4, ema=0.99, seed=11, muon=0.003),
        Settings(steps=2500, batch=64, learning_rate=5e-4, ema=0.997, seed=12, muon=0.003),
        Settings(steps=450, batch=64, learning_rate=3e-4, ema=0.99, seed=12, muon=0.002),
    ),
    last_anchor=0.15,
    finish=(
        Round(
            decoder=(
                Settings(steps=2000, batch=24, learning_rate=7e-4, ema=0.995, seed=31, muon=0.004),
            ),
            settled=(
                Settings(steps=600, batch=64, learning_rate=3e-4, ema=0.99, seed=12, muon=0.002),
            ),
        ),
        Round(
            decoder=(
                Settings(steps=8000, batch=24, learning_rate=1e-3, ema=0.997, seed=32, muon=0.005),
            ),
            grown=True,
        ),
        Round(
            decoder=(
                Settings(steps=4800, batch=24, learning_rate=7e-4, ema=0.996, seed=33, muon=0.004),
                Settings(steps=2600, batch=24, learning_rate=5e-4, ema=0.995, seed=34, muon=0.003),
            ),
        ),
    ),
    chained=False,
    joint=(Settings(steps=3000, batch=64, learning_rate=6e-4, ema=0.995, muon=0.004),),
    words=(Settings(steps=3000, batch=64, learning_rate=6e-4, ema=0.995, muon=0.004),),
    words_size=(192, 5, 2),
    words_shown=(
        Settings(steps=200, batch=64, learning_rate=4e-4, ema=0.995, seed=7, muon=0.0025),
    ),
    t5=Settings(steps=800, batch=64, learning_rate=2e-3, ema=0.99),
    pixart=(Settings(steps=3000, batch=64, learning_rate=6e-4, ema=0.995, muon=0.004),),
    pixart_shown=(
        Settings(steps=300, batch=64, learning_rate=4e-4, ema=0.995, seed=8, muon=0.0025),
    ),
    shown_pairs=20480,
    floor=1.0,
    plain_cycles=2,
    own_cycles=3,
    exact=True,
)
RECIPES = {recipe.size: recipe for recipe in (Recipe(), LARGE_RECIPE)}
OTHERS = ("joint", "words", "pixart")
STAGES = (
    "clip",
    "autoencoder",
    "teacher",
    "pairs",
    "decoder",
    "student",
    "four-step",
    "finish",
    *OTHERS,
)


class Lessons(NamedTuple):
    """What a student learns from."""

    world: World
    code: Code
    known: Tensor  # the world's latents
    pairs: students.Pairs
    floor: float | None


def make_joint(recipe: Recipe, shown: Model, lessons: Lessons, encoder: Any, out: Path) -> None:
    torch.manual_seed(0)
    transformer = model.make_joint(*recipe.joint_size)
    pipe = model.make_joint_pipeline(transformer, encoder, lessons.code.vae, lessons.world)
    from_nothing(pipe, shown, lessons, recipe.joint, recipe.joint_shown, out)


def make_words(recipe: Recipe, shown: Model, lessons: Lessons, encoder: Any, out: Path) -> None:
    """The pooled vector of every prompt is zero, so time alone modulates the blocks."""
    encoder = copy.deepcopy(encoder)
    torch.nn.init.zeros_(encoder.text_projection.weight)
    torch.manual_seed(0)
    transformer = model.make_joint(*recipe.words_size)
    pipe = model.make_joint_pipeline(transformer, encoder, lessons.code.vae, lessons.world)
    from_nothing(pipe, shown, lessons, recipe.words, recipe.words_shown, out)


def make_pixart(recipe: Recipe, shown: Model, lessons: Lessons, out: Path) -> None:
    tokenizer = t5.make_tokenizer(lessons.world)
    encoder = t5.train(recipe.t5, out / "t5", tokenizer, lessons.world)
    torch.manual_seed(0)
    transformer = model.make_pixart(*recipe.pixart_size)
    pipe = model.make_pixart_pipeline(transformer, encoder, tokenizer, lessons.code.vae)
    from_nothing(pipe, shown, lessons, recipe.pixart, recipe.pixart_shown, out)


def from_nothing(
    pipe: Any,
    shown: Model,
    lessons: Lessons,
    cycles: Sequence[Settings],
    own: Sequence[Settings],
    out: Path,
) -> None:
    """A student of four steps from random weights, which learns from another student.

    Args:
        cycles: On the other's latents.
        own: Then on its own.
    """
    world, code, known, pairs, floor = lessons
    called, of = model_of(pipe, str(out)), (out, world, code)
    learned: Any = {"known": known, "floor": floor}
    student = called.denoiser
    student = students.train(called, student, pairs, students.QUARTERS, cycles, *of, **learned)
    student = imitate.train(called, student, shown, own, *of, **learned)
    pipe.register_modules(transformer=student)
    pipe.save_pretrained(out / "pipeline")


def make(recipe: Recipe, out: Path, last: str = STAGES[-1], world: World | None = None) -> None:
    """Run what is missing, up to the stage `last`; see `fit` for what it raises.

    Args:
        world: In the place of the one that the recipe is for.

    Raises:
        ValueError: `out` was begun with another tokenizer.
    """
    world, wanted = world or WORLDS[recipe.size], STAGES[: STAGES.index(last) + 1]
    tokenizer = model.make_tokenizer(world)
    _check_tokens(tokenizer, out / "clip" / "model", world)
    clip = world_clip.train_clip(recipe.clip, out / "clip", tokenizer, world)
    encoder = world_clip.text_encoder(clip)
    if not (out / "clip" / "model").exists():
        clip.model.save_pretrained(out / "clip" / "model")
        tokenizer.save_pretrained(out / "clip" / "model")
    write_prompts(out, world)
    if "autoencoder" not in wanted:
        return
    code = make_code(recipe, out / "autoencoder")
    if "teacher" not in wanted:
        return
    known = make_latents(world, code, out / "autoencoder" / "latents.pt")

    def save(unet: UNet2DConditionModel, name: str, few_step: bool) -> Path:
        pipe: Any = model.make_pipeline(unet, encoder, code.vae, few_step, world)
        path = out / name / "pipeline"
        pipe.save_pretrained(path)
        return path

    trained = (out / "teacher", world, known, code, recipe.unet)
    floors = [None if n < recipe.plain_cycles else recipe.floor for n in range(len(recipe.teacher))]
    unet = teacher.train(
        recipe.teacher, floors, encoder, tokenizer, *trained, own=recipe.own_cycles
    )
    drawn = load(save(unet, "teacher", few_step=False))
    if "pairs" not in wanted:
        return
    pairs = make_pairs(recipe, drawn, known, out, world)
    if "decoder" not in wanted:
        return
    if recipe.decoder:
        code = make_decoder(recipe, code, known, out / "decoder")
        save(unet, "teacher", few_step=False)
    begun = drawn.denoiser
    for steps, cycles, settled, name in (
        (1, recipe.student, recipe.student_settled, "student"),
        (4, recipe.four_step, recipe.four_step_settled, "four-step"),
    ):
        if name in wanted:
            of = (out / name, world, code)
            weighed: Any = {"known": known, "floor": recipe.floor}
            student = students.train(drawn, begun, pairs, steps, cycles, *of, **weighed)
            how: Any = weighed | {"last_anchor": recipe.last_anchor}
            student = settle.train(drawn, student, pairs, steps, settled, *of, **how)
            save(student, name, few_step=True)
            begun = student if recipe.chained else begun
    if "finish" in wanted and recipe.finish:
        lessons = Lessons(world, code, known, pairs, recipe.floor)
        student, code = make_finish(recipe, drawn, student, lessons, out / "finish")
        save(student, "finish", few_step=True)
        save(unet, "teacher", few_step=False)
    if not set(OTHERS) & set(wanted):
        return
    path = out / ("finish" if recipe.finish else "four-step") / "pipeline"
    encoder = world_clip.text_encoder(clip, projected=True)
    make_others(recipe, path, encoder, (world, code, known), out, last)


def make_others(
    recipe: Recipe,
    path: Path,
    encoder: Any,
    of: tuple[World, Code, Tensor],
    out: Path,
    last: str,
) -> None:
    """The students of other architectures, up to `last`.

    Args:
        path: The student of four steps that they learn from.
        of: The world, its code and its latents.
    """
    wanted = OTHERS[: OTHERS.index(last) + 1]
    shown = load(path)
    pairs = students.shown_pairs(shown, checksum(path), of[0], recipe.shown_pairs, out / "shown")
    lessons = Lessons(*of, pairs, recipe.floor)
    if "joint" in wanted and recipe.joint:
        make_joint(recipe, shown, lessons, encoder, out / "joint")
    if "words" in wanted:
        make_words(recipe, shown, lessons, encoder, out / "words")
    if "pixart" in wanted:
        make_pixart(recipe, shown, lessons, out / "pixart")


def _check_tokens(tokenizer: Any, folder: Path, world: World) -> None:
    if not folder.exists():
        return
    before = CLIPTokenizer.from_pretrained(folder)
    changed = [x for x in world.words if before.tokenize(x) != tokenizer.tokenize(x)]
    if changed:
        raise ValueError(
            f"make: the CLIP in {folder} was trained with other tokens for {', '.join(changed)}; "
            "choose another folder, or move this one away to train it anew"
        )


def make_code(recipe: Recipe, out: Path) -> Code:
    if not recipe.autoencoder:
        return PatchCode()
    vae: Any = autoencoder.train(recipe.autoencoder, out)
    vae.save_pretrained(out / "model")
    return autoencoder.TrainedCode(vae)


def make_latents(world: World, code: Code, path: Path) -> Tensor:
    """`teacher.latents`, kept beside the autoencoder that they are of."""
    made = checkpoint.load(path, {})
    if made is None:
        made = {"latents": teacher.latents(world, code), "settings": {}}
        checkpoint.save(made, path)
    return made["latents"]


def make_pairs(
    recipe: Recipe, drawn: Model, known: Tensor, out: Path, world: World
) -> students.Pairs:
    if recipe.exact:
        return students.exact_pairs(known, world, recipe.pairs, out, recipe.ddim_steps)
    return students.make_pairs(
        drawn,
        recipe.pairs,
        out,
        recipe.guidance,
        recipe.ddim_steps,
        recipe.guided_from,
        world=world,
    )


def make_decoder(recipe: Recipe, code: Code, known: Tensor, out: Path) -> Code:
    vae: Any = autoencoder.train_decoder(code.vae, known, recipe.decoder, out)
    vae.save_pretrained(out / "model")
    return autoencoder.TrainedCode(vae)


def make_finish(
    recipe: Recipe, drawn: Model, student: Any, lessons: Lessons, out: Path
) -> tuple[Any, Code]:
    """The student of four steps and the decoder, better by what each learns of the other.

    Args:
        drawn: The teacher.
        student, lessons: Where it begins. They are not changed.
    """
    world, code, known, pairs, floor = lessons
    vae = copy.deepcopy(code.vae)
    for number, round_ in enumerate(recipe.finish):
        folder = out / f"round-{number}"
        many = (recipe.draws, world)
        learned = [
            *draws.of_student(
                drawn, student, students.QUARTERS, *many, folder / "drawn-by-student.pt", number
            ),
            *draws.of_teacher(drawn, *many, folder / "drawn-by-teacher.pt", number),
        ]
        vae = autoencoder.grown(vae) if round_.grown else vae
        vae = autoencoder.train_decoder(vae, known, round_.decoder, folder / "decoder", learned)
        code = autoencoder.TrainedCode(vae)
        student = settle.train(
            drawn,
            student,
            pairs,
            students.QUARTERS,
            round_.settled,
            folder,
            world,
            code,
            known,
            floor,
            last_anchor=recipe.last_anchor,
            image_loss=autoencoder.loss_by(vae),
        )
    return student, code


def make_from_shipped(recipe: Recipe, out: Path, last: str = OTHERS[-1]) -> None:
    """The students of other architectures, without a teacher; see `fit` for what it raises.

    They learn from the shipped student. Its text encoder has no trained projection; theirs hands on
    what it is given.
    """
    path, world = shipped.path(recipe.size), WORLDS[recipe.size]
    pipe = load(path).pipe
    code = autoencoder.TrainedCode(pipe.vae) if recipe.autoencoder else PatchCode()
    known = make_latents(world, code, out / "latents.pt")
    encoder = world_clip.with_identity(pipe.text_encoder)
    make_others(recipe, path, encoder, (world, code, known), out, last)
    write_prompts(out, world)


def write_prompts(out: Path, world: World, count: int = 4000, seed: int = 0) -> None:
    """`prompts.txt` and `negatives.txt` for NASA-T: captions, and one or two values each."""
    rng = random.Random(seed)
    rates = world.rates().tolist()
    captions = [world.caption(i, rng, 0.0) for i in rng.choices(range(len(rates)), rates, k=count)]
    pairs = [f"{a}, {b}" for a in world.negatives for b in world.negatives if a != b]
    (out / "prompts.txt").write_text(
        "".join(f"{caption}\n" for caption in captions), encoding="utf-8"
    )
    (out / "negatives.txt").write_text(
        "".join(f"{text}\n" for text in [*world.negatives, *pairs]), encoding="utf-8"
    )
