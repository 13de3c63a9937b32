"""What a run leaves: a pipeline for a few steps, with the trained network in it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from diffusers import LCMScheduler
from safetensors import SafetensorError
from torch import nn


def write_pipeline(pipe: Any, before: nn.Module, trained: nn.Module, path: Path, kept: str) -> None:
    """Write `pipe` with `trained` in the place of `before`; a failure leaves no half of it.

    Args:
        kept: What a message says of where the run is kept.

    Raises:
        OSError: It cannot be written.
    """
    name = next(name for name, part in pipe.components.items() if part is before)
    scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    pipe.register_modules(**{name: trained.eval(), "scheduler": scheduler})
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        pipe.save_pretrained(partial)
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
    except (OSError, SafetensorError) as error:  # of a full disk, either
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"nasa_t: cannot write {path}: {error}; {kept}. Make room, then run the same command "
            "again"
        ) from error
