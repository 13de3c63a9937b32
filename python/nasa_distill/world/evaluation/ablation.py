"""Which networks should see the negative prompts: the paper's Table 5, on the small world.

Each variant is trained from the same student with several seeds, then judged at alpha 0 and at one
other alpha: the first shows what training did, the second what NASA adds at inference.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nasa_distill import tables
from nasa_distill.scalars import plain
from nasa_distill.train.config import Settings
from nasa_distill.train.nasa_t import Run
from nasa_distill.train.networks import load
from nasa_distill.world.evaluation import evaluate

# teacher, LoRA teacher, student
VARIANTS = {
    "none": (False, False, False),
    "teacher": (True, False, False),
    "LoRA teacher": (False, True, False),
    "teacher and LoRA teacher": (True, True, False),
    "student": (False, False, True),
    "teacher and student (NASA-T)": (True, False, True),
    "all": (True, True, True),
}
COLUMNS = ("removed", "followed", "valid", "all three")


def run(
    settings: Settings,
    teacher: Path,
    student: Path,
    prompts: Sequence[str],
    negatives: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    alpha: float = 0.5,
    images: int = 100,
) -> list[dict[str, Any]]:
    """Train and judge every variant with every seed; what is in `out` is not done again.

    Returns:
        A row per variant and seed, as `ablation.json` has them.
    """
    seeds, alpha, images = [plain(seed) for seed in seeds], plain(alpha), plain(images)
    if not seeds:
        raise ValueError("ablation.run: seeds must name at least one, got none")
    rows: list[dict[str, Any]] = []
    methods = (evaluate.NONE, evaluate.Method("nasa", alpha))
    for name, (sees_teacher, sees_lora, sees_student) in VARIANTS.items():
        for seed in seeds:
            folder = out / f"{name.replace(' ', '-')}-{seed}"
            changed = settings.changed(
                teacher_negative=sees_teacher,
                lora_negative=sees_lora,
                student_nasa=sees_student,
                seed=seed,
            )
            if not (folder / "pipeline").exists():
                networks = load(teacher), load(student)
                Run(changed, *networks, prompts, negatives, folder).train()
            results = evaluate.run(folder / "pipeline", [changed.student_steps], images, 0, None,
                                   methods)  # fmt: skip
            for cell in results.cells:
                shares = cell.total.shares
                row = {"variant": name, "seed": seed, "alpha": cell.method.strength}
                # the seed of training, not that of the evaluation, which is always 0
                rows.append(results.about | row | {key: shares[key].value for key in COLUMNS})
    (out / "ablation.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (out / "ablation.md").write_text(page(rows), encoding="utf-8")
    return rows


def page(rows: Sequence[dict[str, Any]]) -> str:
    """Every variant in percent, then what it differs from the first one by, in points.

    The second table has differences seed by seed. Runs of one seed see the same prompts and noise,
    in training and evaluation, so these cancel. With two seeds or more, spreads are standard
    deviations.
    """
    none = {
        (row["alpha"], row["seed"], key): row[key]
        for row in rows
        if row["variant"] == "none"
        for key in COLUMNS
    }
    differences = [
        row | {key: row[key] - none[row["alpha"], row["seed"], key] for key in COLUMNS}
        for row in rows
        if row["variant"] != "none"
    ]
    return (
        table(rows)
        + "\nAgainst training without negative prompts, in points, seed by seed:\n\n"
        + table(differences, "+")
    )


def table(rows: Sequence[dict[str, Any]], sign: str = "") -> str:
    cells = []
    for name in VARIANTS:
        for alpha in sorted({row["alpha"] for row in rows}):
            chosen = [row for row in rows if (row["variant"], row["alpha"]) == (name, alpha)]
            if not chosen:
                continue
            spreads = [spread([row[key] for row in chosen], sign) for key in COLUMNS]
            cells.append((name, f"{alpha:g}", len(chosen), *spreads))
    return tables.markdown(("sees the negatives", "alpha", "seeds", *COLUMNS), cells) + "\n"


def spread(shares: Sequence[float], sign: str) -> str:
    percent = [100 * share for share in shares]
    deviation = f" ± {statistics.stdev(percent):.1f}" if len(percent) > 1 else ""
    return f"{statistics.mean(percent):{sign}.1f}{deviation}"
