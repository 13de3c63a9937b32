"""The settings of a NASA-T run, and the paper's presets (its Table 6)."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from nasa_distill.scalars import read_numbers

STUDENT_STEPS = (1, 4)
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
# a network as small as the world's has most of its weights elsewhere
EVERYTHING = (
    *(*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "time_emb_proj"),
)


@dataclass(frozen=True)
class Settings:
    """Everything a run depends on besides the data, the checkpoints and the number of processes."""

    steps: int
    batch: int  # images of one step, over all processes
    accumulate: int = 1  # micro-batches of a step, in each process
    student_steps: int = 1  # 1 or 4
    lora_updates: int = 1  # steps of the LoRA teacher for one of the student
    lora_first: int = 0  # of the steps, those at the start in which it learns alone

    # Table 5: who sees the negative prompt
    teacher_negative: bool = True
    lora_negative: bool = False
    student_nasa: bool = True
    # not the paper's: the LoRA teacher has NASA as the student has, and so learns what the student
    # draws for both prompts, not for all negative prompts together
    lora_nasa: bool = False

    kappa: tuple[float, float] = (0.5, 4.0)  # guidance of both scores, uniform, per image
    alpha: tuple[float, float] = (0.0, 1.0)  # of NASA in the student, uniform, one per step
    p_no_negative: float = 0.0  # images whose student sees no negative prompt
    p_null: float = 0.1  # images whose LoRA teacher sees the empty prompt
    noise: tuple[int, int] = (20, 980)  # timesteps of the VSD loss

    student_rate: float = 1e-6
    lora_rate: float = 1e-3
    weight_decay: float = 1e-2
    clip_gradient: float = 1.0
    lora_rank: int = 64
    lora_alpha: int = 128
    lora_targets: tuple[str, ...] = ATTENTION

    clip_weight: float = 0.1  # falls to 0 over the run; needs a CLIP
    clip_threshold: float = 0.37

    ema: float = 0.0  # 0: none
    precision: str = "no"  # or "bf16"
    gradient_checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        read_numbers(self)
        for name in ("kappa", "alpha", "noise"):
            low, high = getattr(self, name)
            if not low <= high:
                self._refuse(name, "a range low <= high")
        for name in ("p_no_negative", "p_null", "ema"):
            if not 0 <= getattr(self, name) <= 1:
                self._refuse(name, "between 0 and 1")
        for name in ("steps", "batch", "accumulate", "lora_updates", "lora_rank"):
            if getattr(self, name) < 1:
                self._refuse(name, "at least 1")
        if not 0 <= self.lora_first < self.steps:
            self._refuse("lora_first", "from 0 to below steps")
        for name in ("student_rate", "lora_rate", "clip_gradient"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                self._refuse(name, "a positive number")
        if self.lora_nasa and self.lora_negative:
            raise ValueError(
                "Settings: lora_nasa and lora_negative are two ways of one network to see the "
                "negative prompt, got both"
            )
        if self.student_steps not in STUDENT_STEPS:
            self._refuse("student_steps", " or ".join(map(str, STUDENT_STEPS)))
        if self.precision not in ("no", "bf16"):
            self._refuse("precision", "'no' or 'bf16'")
        if not 0 <= self.noise[0] <= self.noise[1] < 1000:
            self._refuse("noise", "timesteps from 0 to 999")

    def _refuse(self, name: str, must: str) -> None:
        raise ValueError(f"Settings: {name} must be {must}, got {getattr(self, name)!r}")

    @property
    def needs_negatives(self) -> bool:
        sees = (self.teacher_negative, self.lora_negative, self.student_nasa, self.lora_nasa)
        return any(sees)

    def changed(self, **changes: Any) -> Settings:
        """Those of `changes` that are not None, in place of what is here."""
        known = {field.name for field in fields(self)}
        if unknown := set(changes) - known:
            raise ValueError(f"Settings: there is no {min(unknown)!r}")
        return replace(self, **{name: v for name, v in changes.items() if v is not None})


PAPER: dict[str, Any] = {"precision": "bf16", "gradient_checkpointing": True}
PRESETS = {
    "sd15": Settings(steps=60_000, batch=64, **PAPER),
    "sd21": Settings(steps=40_000, batch=64, **PAPER),
    "pixart": Settings(steps=50_000, batch=32, kappa=(0.5, 3.0), **PAPER),
    # the small world, on two CPU cores in a quarter of an hour
    "world": Settings(
        steps=600,
        batch=32,
        lora_updates=2,
        lora_first=60,
        kappa=(1.0, 1.75),
        student_rate=1e-5,
        lora_rate=5e-4,
        weight_decay=0.0,
        lora_targets=EVERYTHING,
        p_no_negative=0.1,
        p_null=0.3,
        ema=0.99,
    ),
}
