"""Which networks should see the negative prompts: the paper's Table 5, on the small world.

Each variant is trained from the same student with several seeds, then judged without a negative
prompt and with several methods: the first shows what training did, the others what they add at
inference. CLIP+ and CLIP- are the paper's, 100 times the cosine of image and text, of the world's
own CLIP.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nasa_distill import tables
from nasa_distill.scalars import plain
from nasa_distill.train.clip import Clip
from nasa_distill.train.config import Settings
from nasa_distill.train.nasa_t import Run
from nasa_distill.train.networks import load
from nasa_distill.train.seeds import generator
from nasa_distill.world.evaluation import equation6, evaluate
from nasa_distill.world.evaluation.counts import Method
from nasa_distill.world.evaluation.progress import checksum
from nasa_distill.world.evaluation.prompts import pairs_of
from nasa_distill.world.kinds import world_of

# teacher, LoRA teacher, student; the last row is not the paper's, its LoRA teacher has NASA too
VARIANTS = {
    "none": (False, False, False),
    "teacher": (True, False, False),
    "LoRA teacher": (False, True, False),
    "teacher and LoRA teacher": (True, True, False),
    "student": (False, False, True),
    "teacher and student (NASA-T)": (True, False, True),
    "all": (True, True, True),
    "NASA-T with a LoRA teacher that has NASA": (True, False, True),
}
BEYOND = tuple(VARIANTS)[-1]
BEFORE = "(the student before)"
ORDER = (BEFORE, *VARIANTS)
COLUMNS = ("removed", "followed", "valid", "all three")
SCORES = ("CLIP+", "CLIP-")  # where there is a CLIP
LOGGED = {"vsd_gradient": "equation 6", "lora_loss": "LoRA teacher's loss"}
WHEN = ("first", "last")


def run(
    settings: Settings,
    teacher: Path,
    student: Path,
    prompts: Sequence[str],
    negatives: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    methods: Sequence[Method],
    images: int = 100,
    clip: Clip | None = None,
    variants: Sequence[str] = tuple(VARIANTS),
) -> list[dict[str, Any]]:
    """Train and judge every variant with every seed; what is in `out` is not done again.

    Rows of other variants and seeds that are in `out` stay in the tables.

    Args:
        methods: Beside no negative prompt.
        clip: Also what it scores.

    Returns:
        A row per variant, seed and method, as `ablation.json` has them.

    Raises:
        ValueError: No seed, an unknown variant, or a folder in `out` of a run with other settings.
    """
    seeds, images = [plain(seed) for seed in seeds], plain(images)
    if not seeds:
        raise ValueError("ablation.run: seeds must name at least one, got none")
    if unknown := [name for name in variants if name not in VARIANTS]:
        raise ValueError(
            f"ablation.run: variants must be of {', '.join(VARIANTS)}; got {unknown[0]!r}"
        )
    asked = [evaluate.NONE, *(method for method in methods if method != evaluate.NONE)]
    begins_with = {"teacher": checksum(teacher), "student": checksum(student)}

    def judge(drawn: Path, steps: int, progress: Path) -> Iterator[dict[str, Any]]:
        """A row for each method."""
        results = evaluate.run(drawn, [steps], images, methods=asked, progress=progress)
        for cell in results.cells:
            shares, method = cell.total.shares, cell.method
            row = results.about | {"alpha": method.strength, "method": str(method)}
            row |= {key: shares[key].value for key in COLUMNS}
            yield row if clip is None else row | scores(drawn, method, steps, images, clip)

    steps = settings.student_steps
    before = judge(student, steps, out / "before" / "cells.jsonl")
    rows = [row | {"variant": BEFORE, "seed": None} for row in before]
    for name in variants:
        sees_teacher, sees_lora, sees_student = VARIANTS[name]
        for seed in seeds:
            folder = out / f"{name.replace(' ', '-')}-{seed}"
            changed = settings.changed(
                teacher_negative=sees_teacher,
                lora_negative=sees_lora,
                student_nasa=sees_student,
                lora_nasa=name == BEYOND,
                seed=seed,
            )

            def resume(changed: Settings = changed, folder: Path = folder) -> Run:
                """Refuses a folder that was trained with other settings."""
                networks = load(teacher), load(student)
                return Run(changed, *networks, prompts, negatives, folder, identity=begins_with)

            if not (folder / "pipeline").exists():
                resume().train()
            seen = course(folder / "log.jsonl")
            seen |= equation6.parts(resume(), images=min(64, 4 * images))
            for row in judge(folder / "pipeline", steps, folder / "cells.jsonl"):
                # the seed of training, not that of the evaluation, which is always 0
                rows.append(row | {"variant": name, "seed": seed} | seen)
    rows = joined(out / "ablation.json", rows)
    (out / "ablation.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (out / "ablation.md").write_text(page(rows), encoding="utf-8")
    return rows


def joined(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of earlier commands that are not made again, and `rows`, in the order of the table."""
    made: list[dict[str, Any]] = (
        json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    )
    known = {(row["variant"], row["seed"]) for row in rows}
    kept = [row for row in made if (row["variant"], row["seed"]) not in known]
    return sorted(kept + rows, key=lambda row: (ORDER.index(row["variant"]), row["seed"]))


def course(log: Path) -> dict[str, float]:
    """What a run logged, as means over the first and the last tenth of the student's steps."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "vsd_gradient" in line]
    tenth = max(1, len(steps) // 10)
    return {
        f"{name}, {when}": statistics.mean(line[name] for line in part)
        for name in LOGGED
        for when, part in zip(WHEN, (steps[:tenth], steps[-tenth:]), strict=True)
    }


@torch.no_grad()
def scores(student: Path, method: Method, steps: int, images: int, clip: Clip) -> dict[str, float]:
    """Mean cosine of what is judged to its prompt and to its negative prompt."""
    model = load(student)
    found: dict[str, list[Tensor]] = {key: [] for key in SCORES}
    for number, (prompt, negative) in enumerate(pairs_of(world_of(model), "first")):
        noise = torch.randn(images, *model.latent_shape, generator=generator(0, number))
        drawn = evaluate.draw(model, prompt, negative, method, steps, noise, 0)
        seen, said = clip.images(drawn), clip.texts([prompt, negative])
        for key, text in zip(SCORES, said, strict=True):
            found[key].append(F.cosine_similarity(seen, text[None], dim=-1))
    return {key: torch.cat(cosines).mean().item() for key, cosines in found.items()}


def page(rows: Sequence[dict[str, Any]]) -> str:
    """Every variant in percent, then what it differs from the first one by, in points.

    The second table has differences seed by seed. Runs of one seed see the same prompts and noise,
    in training and evaluation, so these cancel. With two seeds or more, spreads are standard
    deviations.
    """
    shown = columns(rows)
    none = {
        (how(row), row["seed"]): [row[key] for key in shown]
        for row in rows
        if row["variant"] == "none"
    }
    differences = [
        row | {key: row[key] - other for key, other in zip(shown, none[pair], strict=True)}
        for row in rows
        for pair in [(how(row), row["seed"])]
        if row["variant"] not in (BEFORE, "none") and pair in none
    ]
    parts = [table(rows)]
    if differences:
        parts.append("Against training without negative prompts, in points, seed by seed:\n")
        parts.append(table(differences, "+"))
    keys = [f"{name}, {when}" for name in LOGGED for when in WHEN]
    if logged := means(
        rows, keys, [f"{said}, {when}" for said in LOGGED.values() for when in WHEN]
    ):
        parts.append("What the runs logged, over the first and the last tenth of the steps:\n")
        parts.append(logged)
    if seen := means(rows, equation6.PARTS, equation6.PARTS):
        parts.append("What equation 6 is made of at their ends, at alpha 0.5:\n")
        parts.append(seen)
    return "\n".join(parts)


def means(rows: Sequence[dict[str, Any]], keys: Sequence[str], said: Sequence[str]) -> str:
    """A table of what the rows have under `keys`, as means over the seeds; empty where none has."""
    cells = []
    for name in VARIANTS:
        runs = {row["seed"]: row for row in rows if row["variant"] == name and keys[0] in row}
        if runs:
            of_keys = [statistics.mean(row[key] for row in runs.values()) for key in keys]
            cells.append((name, len(runs), *(f"{mean:.4f}" for mean in of_keys)))
    return tables.markdown(("sees the negatives", "seeds", *said), cells) + "\n" if cells else ""


def how(row: dict[str, Any]) -> str:
    """The method of a row; where none is said, it is NASA at that alpha, and 0 is no method."""
    return row.get("method") or (f"nasa {row['alpha']:g}" if row["alpha"] else "none")


def columns(rows: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """Those that every row has."""
    return (*COLUMNS, *(key for key in SCORES if all(key in row for row in rows)))


def table(rows: Sequence[dict[str, Any]], sign: str = "") -> str:
    cells = []
    methods = list(dict.fromkeys(how(row) for row in rows))
    strengths = {how(row): f"{row['alpha']:g}" for row in rows}
    only_nasa = all(method == "none" or method.startswith("nasa ") for method in methods)
    for name in ORDER:
        for method in methods:
            chosen = [row for row in rows if (row["variant"], how(row)) == (name, method)]
            if not chosen:
                continue
            spreads = [spread([row[key] for row in chosen], sign) for key in columns(rows)]
            said = strengths[method] if only_nasa else method
            seeds = "-" if name == BEFORE else len(chosen)
            cells.append((name, said, seeds, *spreads))
    second = "alpha" if only_nasa else "method"
    return tables.markdown(("sees the negatives", second, "seeds", *columns(rows)), cells) + "\n"


def spread(shares: Sequence[float], sign: str) -> str:
    percent = [100 * share for share in shares]
    deviation = f" ± {statistics.stdev(percent):.1f}" if len(percent) > 1 else ""
    return f"{statistics.mean(percent):{sign}.1f}{deviation}"
