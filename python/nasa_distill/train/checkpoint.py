"""Checkpoints: one file, replaced as a whole or not at all, and the log beside it."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import torch


def save(state: dict[str, Any], path: Path) -> None:
    """Write `state` so that a reader, or a killed process, finds the old file or the new one.

    Raises:
        OSError: The file cannot be written. The one that was there is untouched.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        kept = "the last checkpoint is kept" if path.exists() else "there is no earlier one"
        raise OSError(
            f"checkpoint.save: cannot write {path}: {error}; {kept}. Make room, then run the same "
            "command again"
        ) from error


def load(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The state of an interrupted run, or None where none was begun.

    Raises:
        ValueError: The file is not one of ours, or the run had other settings.
        OSError: The file cannot be read.
    """
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        before = state["settings"]
    except (MemoryError, OSError):
        raise  # the file itself may be good
    # bytes that are no checkpoint raise errors of any class
    except Exception as error:
        raise ValueError(
            f"checkpoint.load: {path} cannot be read as a checkpoint of this command "
            f"({type(error).__name__}: {error}); if it is none, move it away to begin anew"
        ) from error
    if changed := [key for key in {*settings, *before} if settings.get(key) != before.get(key)]:
        key = min(changed)
        raise ValueError(
            f"checkpoint.load: {path} is of a run with {key}={before.get(key)!r}, this one has "
            f"{settings.get(key)!r}; resume with the settings it had, or choose another folder"
        )
    return state


class Log:
    """One JSON object a line; a resumed run goes on where its checkpoint was made.

    Raises:
        ValueError: The file is not one of ours.
    """

    def __init__(self, path: Path, step: int = 0):
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # cut off by a kill
                    if _step(json.loads(line), path) <= step:
                        kept.append(line)
        # beside it first: a full disk leaves what there was
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        partial.replace(path)
        self.path = path

    def write(self, step: int, **values: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def _step(row: Any, path: Path) -> int:
    step = row.get("step") if isinstance(row, dict) else None
    if not isinstance(step, int):
        raise ValueError(
            f"checkpoint.Log: {path} is not the log of this command: a line has no step; move it "
            "away, or choose another folder"
        )
    return step
