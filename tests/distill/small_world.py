"""A world of two steps of everything: its images are noise, its files are what they are."""

from dataclasses import replace

import torch
from nasa_distill.world.fit import Settings
from nasa_distill.world.kinds import SMALL
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
    pixart_size=(1, 2),
    pairs=1,
    guidance=1.5,
    ddim_steps=4,
)


def make_small(out):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    make(RECIPE, out, world=UNSEEN)
    torch.set_num_threads(threads)
    return out
