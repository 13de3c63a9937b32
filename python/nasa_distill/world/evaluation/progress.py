"""What a run was, and what it has already counted."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nasa_distill.world.evaluation.counts import Counts

SOURCES = Path(__file__).parents[3]


class Made:
    """Counts that were made before, line by line in a file, for as long as nothing else changed."""

    def __init__(self, path: Path | None, about: dict[str, Any]):
        self.path, self.known = path, {}
        # seeds may be added, and sources change between two parts of a run if it says so
        free = ("commit", "seeds")
        same = {name: value for name, value in about.items() if name not in free}
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(json.dumps(about) + "\n", encoding="utf-8")
        first, *lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        if {name: value for name, value in first.items() if name not in free} != same:
            raise ValueError(
                f"evaluate.run: {path} holds cells of another run, {first}; this one is {about}. "
                "Delete it, or name another folder"
            )
        if first["commit"] != about["commit"]:
            about["commit"] = f"{first['commit']} to {about['commit']}"
        self.known = {line["cell"]: [Counts(**x) for x in line["counts"]] for line in lines}

    def through(self, key: str, make: Callable[..., list[Counts]], *how: Any) -> list[Counts]:
        if key not in self.known:
            self.known[key] = make(*how)
            if self.path is not None:
                line = {"cell": key, "counts": [x.plain() for x in self.known[key]]}
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
        return self.known[key]


def commit() -> str:
    """Of the sources that ran, with a `+` where they were changed since."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(SOURCES), *arguments],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", ".")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def checksum(path: Path) -> str:
    """The first half of a SHA-256 over the weights of a pipeline."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:32]
