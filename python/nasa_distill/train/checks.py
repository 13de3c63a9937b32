"""Checks of data, networks and launcher, made before anything is trained."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from accelerate.utils import DistributedType

from nasa_distill.train.config import Settings
from nasa_distill.train.networks import Model

LAST_TIMESTEP = 999  # the settings' timesteps are at most this


def check_launch(kind: DistributedType, is_split: bool) -> None:
    """Raise unless the processes were started in a way that a run supports."""
    known = {DistributedType.MULTI_CPU, DistributedType.MULTI_GPU}
    known.add(DistributedType.FSDP if is_split else DistributedType.NO)
    if kind in known:
        return
    if is_split:
        raise ValueError(
            "Run: fsdp splits the networks over several processes, and there is one; launch with "
            "torchrun --nproc_per_node 4 -m nasa_distill train ... --fsdp"
        )
    raise ValueError(
        f"Run: {kind} is not supported; launch with one process, with plain data parallelism "
        "(torchrun, accelerate launch --multi_gpu), or with that and --fsdp"
    )


def check_model(model: Model, role: str) -> None:
    """Raise unless this network takes one text and has 1000 timesteps."""
    if added := getattr(model.denoiser.config, "addition_embed_type", None):
        raise ValueError(
            f"Run: the {role} takes more than a text ({added}, as SDXL does), which NASA-T does "
            "not give it; choose a checkpoint of Stable Diffusion 1 or 2, or of PixArt"
        )
    if model.last_timestep != LAST_TIMESTEP:
        raise ValueError(
            f"Run: the {role} must have {LAST_TIMESTEP + 1} timesteps, got "
            f"{model.last_timestep + 1}; choose a scheduler with num_train_timesteps 1000"
        )


def digest(lines: Sequence[str]) -> str:
    """A checksum of texts: with the same texts a resumed run draws the same prompts."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def check_data(prompts: Sequence[str], negatives: Sequence[str], settings: Settings) -> None:
    """Raise unless there are prompts, and negative prompts if needed, none of them empty."""
    pools = {"prompts": prompts}
    if settings.needs_negatives:
        pools["negative prompts"] = negatives
    for name, pool in pools.items():
        if not pool:
            raise ValueError(
                f"nasa_t: there are no {name}; give a file with one per line, or switch off "
                "teacher_negative and student_nasa to train without negatives"
            )
        for number, line in enumerate(pool, start=1):
            if not line.strip():
                raise ValueError(f"nasa_t: line {number} of the {name} is empty; remove it")
