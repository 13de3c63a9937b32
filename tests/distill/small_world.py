"""Worlds of two steps of everything: their images are noise, their files are what they are."""

from dataclasses import replace

import torch
from nasa_distill.world.fit import Settings
from nasa_distill.world.kinds import LARGE, SMALL
from nasa_distill.world.make import Recipe, make

TINY = Settings(steps=2, batch=4, learning_rate=1e-3, ema=0.5)
CYCLES = (TINY, replace(TINY, seed=1))
# looking at images on the way takes longer than the rest
UNSEEN = replace(SMALL, checks=())
RECIPE = Recipe(
    clip=TINY,
    teacher=CYCLES,
    student=CYCLES,
    four_step=(TINY,),
    joint=(TINY,),
    joint_size=(32, 2, 2),
    words=(TINY,),
    words_size=(32, 2, 1),
    t5=TINY,
    pixart=(TINY,),
    pixart_shown=(TINY,),
    pixart_size=(1, 2),
    pairs=1,
    shown_pairs=1,
    guidance=1.5,
    ddim_steps=4,
)
FEW = 40  # scenes: encoding all of them takes longer than the rest
TINY_LARGE = replace(
    RECIPE,
    size=64,
    autoencoder=CYCLES,
    unet=(16, 32),
    floor=1.0,
    plain_cycles=1,
    own_cycles=1,
    exact=True,
    student_settled=(TINY,),
    four_step_settled=(TINY,),
    chained=False,
)
FEW_SCENES = replace(
    LARGE,
    rates=lambda: LARGE.rates()[:FEW],
    matches=lambda captions: LARGE.matches(captions)[:, :FEW],
    checks=(),
)


def make_small(out):
    _make(RECIPE, out, "pixart", UNSEEN)
    return out


def make_large(out):
    _make(TINY_LARGE, out, "four-step", FEW_SCENES)
    return out


def _make(recipe, out, last, world):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    make(recipe, out, last, world)
    torch.set_num_threads(threads)
