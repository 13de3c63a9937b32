"""Results as JSON, CSV, pictures and a page of Markdown, all from the same cells."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from nasa_distill import tables
from nasa_distill.intervals import Share
from nasa_distill.world.evaluation import plot, prompts
from nasa_distill.world.evaluation.evaluate import (
    NONE,
    Cell,
    Counts,
    Method,
    Results,
)
from nasa_distill.world.kinds import LARGE, SMALL, WORLDS, World

# methods, and what their strength is
STRENGTHS = {
    "projected": "alpha of projected NASA",
    "nasa-cross": "alpha of nasa-cross",
    "nasa-text": "alpha of nasa-text",
    "nasa": "alpha",
    "cfg": "guidance scale",
    "nag": "scale of NAG",
    "vsf": "alpha of value sign flip",
}
# in pictures
CURVES = {
    "projected": "projected NASA, alpha",
    "nasa": "NASA, alpha",
    "nasa-cross": "NASA, rule nasa-cross, alpha",
    "nasa-text": "NASA, rule nasa-text, alpha",
    "nag": "NAG, scale",
    "vsf": "VSF, alpha",
    "cfg": "guidance, scale",
}
COLUMNS = ("removed", "followed", "valid", "followed if valid", "removed if valid", "all three")


def write(
    results: Results, out: Path, page: Path | None = None, pictures: Sequence[Path] = ()
) -> None:
    """`results.json`, `results.csv` and plots in `out`, and the page if one is named."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(
        json.dumps(as_json(results), indent=1) + "\n", encoding="utf-8"
    )
    write_csv(results, out / "results.csv")
    plots = [plot_sweep(results, steps, out) for steps in student_steps(results)]
    if has_start(results):
        plot_frontier(results, out / "price.png")
        plots.append(out / "price.png")
    if page is not None:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(
            markdown(results, [*(path for path in plots if path), *pictures], page.parent),
            encoding="utf-8",
        )


def as_json(results: Results) -> dict:
    return {
        "about": results.about,
        "pairs": [list(pair) for pair in pairs_of(results)],
        "cells": [
            {
                "model": cell.model,
                "steps": cell.steps,
                "method": cell.method.name,
                "strength": cell.method.strength,
                "tau": cell.method.tau,
                "alpha": cell.method.share,
                "pairs": [counts.plain() for counts in cell.pairs],
                "seeds": {seed: x.plain() for seed, x in cell.seeds.items()},
            }
            for cell in results.cells
        ],
        "quality": {name: counts.plain() for name, counts in results.quality.items()},
    }


def read(path: Path) -> Results:
    """What `write` wrote as JSON."""
    given = json.loads(path.read_text(encoding="utf-8"))
    cells = [
        Cell(
            cell["model"],
            cell["steps"],
            Method(cell["method"], cell["strength"], cell.get("tau"), cell.get("alpha")),
            [Counts(**counts) for counts in cell["pairs"]],
            {int(seed): Counts(**counts) for seed, counts in cell.get("seeds", {}).items()},
        )
        for cell in given["cells"]
    ]
    quality = {name: Counts(**counts) for name, counts in given["quality"].items()}
    return Results(cells, given["about"], quality)


def write_csv(results: Results, path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        ends = [f"{name} {end}" for name in COLUMNS for end in ("", "low", "high")]
        header = ["model", "steps", "method", "strength", "tau", "alpha", "images"]
        header += map(str.strip, ends)
        writer.writerow([*header, "mean residual", *results.about])
        for cell in results.cells:
            total = cell.total
            row = [cell.model, cell.steps, *cell.method, total.n]
            for name in COLUMNS:
                share = total.shares[name]
                row += [round(x, 4) for x in (share.value, *share.interval)]
            writer.writerow([*row, round(total.residual / total.n, 5), *results.about.values()])


def world_of(results: Results) -> World:
    """The larger one says so; results of the small one do not."""
    name = results.about.get("world", SMALL.name)
    return next(world for world in WORLDS.values() if world.name == name)


def pairs_of(results: Results) -> tuple[tuple[str, str], ...]:
    return prompts.pairs_of(world_of(results), results.about.get("prompt pairs", "first"))


def student_steps(results: Results) -> list[int]:
    return sorted({cell.steps for cell in results.cells if cell.model == "student"})


def is_joint(results: Results) -> bool:
    """Whether the student is one of joint attention, which has rules to choose from."""
    return any(cell.method.name == "nasa-cross" for cell in results.cells)


def default(results: Results) -> str:
    """The rule that `enable_nasa` takes for the student."""
    return "nasa-cross" if is_joint(results) else "nasa"


def student_cells(results: Results, steps: int) -> list[Cell]:
    return [cell for cell in results.cells if cell.model == "student" and cell.steps == steps]


def sweep(results: Results, steps: int, name: str) -> list[Cell]:
    """The student without a negative prompt, then a method by rising strength, with no other
    settings of NAG than the family's."""
    cells = [c for c in student_cells(results, steps) if c.method.tau is None]
    chosen = [c for c in cells if c.method.name in ("none", name)]
    return sorted(chosen, key=lambda cell: cell.method.strength)


def plot_sweep(results: Results, steps: int, out: Path) -> Path | None:
    rule = default(results)
    cells = sweep(results, steps, rule)
    if len(cells) < 2:
        return None
    path = out / f"sweep-{steps}.png"
    names = ("removed", "followed", "valid", "all three")
    alphas = [cell.method.strength for cell in cells]
    lines = [plot.Line(name, alphas, [cell.total.shares[name] for cell in cells]) for name in names]
    title = f"{'NASA' if rule == 'nasa' else rule} on the student, {said(steps)}"
    plot.draw(f"{title}: share of images over alpha, 95 % intervals", "alpha", alphas, lines, path)
    return path


def has_start(results: Results) -> bool:
    """Whether the student was also measured without a negative prompt, where curves begin."""
    steps = [cell.steps for cell in results.cells if cell.method == NONE]
    return set(student_steps(results)) <= set(steps)


def frontier(results: Results) -> Figure:
    """For each number of steps what each method removes, and what it leaves valid.

    Raises:
        ValueError: The student was not measured without a negative prompt.
    """
    if not has_start(results):
        raise ValueError(
            "report.frontier: there is no cell of the student without a negative prompt, where the "
            "curves begin; evaluate the method none as well"
        )
    panels = []
    for steps in student_steps(results):
        cells = student_cells(results, steps)
        none = next(cell.total.shares for cell in cells if cell.method.name == "none")
        curves = []
        for name, label in CURVES.items():
            chosen = [cell for cell in sweep(results, steps, name) if cell.method != NONE]
            if not chosen:
                continue
            # of all panels: a label has one colour
            every = [sweep(results, count, name) for count in student_steps(results)]
            of_all = [cell.method.strength for some in every for cell in some]
            ends = (min(x for x in of_all if x), max(of_all))
            label += " " + " to ".join(f"{end:g}" for end in dict.fromkeys(ends))
            curves.append(
                plot.Curve(
                    label,
                    [cell.total.shares["removed"] for cell in chosen],
                    [cell.total.shares["valid"] for cell in chosen],
                    strong=name == "projected",
                )
            )
        if named := [cell for cell in cells if cell.method.tau is not None]:
            named.sort(key=lambda cell: cell.total.shares["removed"].value)
            curves.append(
                plot.Curve(
                    "NAG, scale, tau and alpha from a search",
                    [cell.total.shares["removed"] for cell in named],
                    [cell.total.shares["valid"] for cell in named],
                )
            )
        panels.append(
            plot.Panel(said(steps).capitalize(), curves, (none["removed"], none["valid"]))
        )
    count = max(cell.total.n for cell in results.cells)
    return plot.frontier(
        f"Each method by rising strength: {count} images a point, judged exactly",
        ("without what the negative prompt names", "whole images of the small world"),
        panels,
    )


def plot_frontier(results: Results, path: Path) -> None:
    """As a PNG."""
    figure = frontier(results)
    path.parent.mkdir(parents=True, exist_ok=True)
    # no name of a version: the same numbers give the same file
    figure.savefig(path, dpi=130, metadata={"Software": None})


def said(steps: int) -> str:
    return "one step" if steps == 1 else f"{steps} steps"


def table(cells: Sequence[Cell]) -> str:
    return tables.markdown(
        ("model", "steps", "method", *COLUMNS),
        [
            (cell.model, cell.steps, cell.method, *(cell.total.shares[name] for name in COLUMNS))
            for cell in cells
        ],
    )


def quality_table(results: Results) -> str:
    """Of results from before a model's values were counted, without their column."""
    named = ("valid", "followed if valid")
    world = world_of(results)
    counted = all(counts.values for counts in results.quality.values())
    rows = []
    for name, counts in results.quality.items():
        row = [name, counts.n, *(counts.shares[x] for x in named)]
        row.append(f"{counts.residual / counts.n:.4f}")
        if counted:
            value, here, there = counts.furthest(world)
            row.append(f"{value}: {here} for {100 * there:.1f}")
        rows.append(row)
    last = ("furthest from the world's share",) if counted else ()
    return tables.markdown(("model", "images", *named, "mean residual", *last), rows)


def pair_table(results: Results, steps: int) -> str:
    """For each pair, what is removed by each method at its best strength over all of them."""
    cells = best_cells(results, steps)
    head = ("prompt", "negative", *(str(cell.method) for cell in cells))
    rows = []
    for number, (prompt, negative) in enumerate(pairs_of(results)):
        values = []
        for cell in cells:
            shares = cell.pairs[number].shares
            values.append(
                f"{100 * shares['removed'].value:.0f} / {100 * shares['all three'].value:.0f}"
            )
        rows.append((prompt, negative, *values))
    return tables.markdown(head, rows)


def best(cells: Sequence[Cell], name: str) -> Cell | None:
    """Of a method, the strength with most images that are all three."""
    chosen = [cell for cell in cells if cell.method.name == name]
    return max(chosen, key=all_three, default=None)


def findings(results: Results, steps: int) -> list[str]:
    """Sentences whose words follow from the numbers."""
    cells, rule = student_cells(results, steps), default(results)
    none, nasa = best(cells, "none"), best(cells, rule)
    if none is None or nasa is None:
        return []

    def says(cell: Cell) -> str:
        shares = cell.total.shares
        return (
            f"{cell.method}: {shares['removed']} % removed, {shares['valid']} % valid, "
            f"{shares['all three']} % all three"
        )

    own = "NASA" if rule == "nasa" else rule
    found = [
        f"Without a negative prompt: {says(none)}.",
        f"The best {STRENGTHS[rule]} is {says(nasa)}.",
    ]
    for name, what in STRENGTHS.items():
        if name != rule and (other := best(cells, name)) is not None:
            a, b = (cell.total.shares["all three"] for cell in (nasa, other))
            word = "overlap" if overlap(a, b) else "do not overlap"
            found.append(
                f"The best {what} is {says(other)}; the intervals of all three, its and that of "
                f"{own}'s best, {word}."
            )
    ranked = [cell for cell in best_cells(results, steps) if cell.method.name != "none"]
    first, second = ranked[0], ranked[1] if len(ranked) > 1 else none
    apart = not overlap(first.total.shares["all three"], second.total.shares["all three"])
    found.append(
        f"Most images that are all three: {first.method}, then {second.method}; their intervals "
        + ("do not overlap." if apart else "overlap.")
    )
    gain = overlap(none.total.shares["all three"], nasa.total.shares["all three"])
    found.append(
        f"{own}'s best and no negative prompt "
        + ("cannot be told apart" if gain else "differ beyond their intervals")
        + " in images that are all three."
    )
    return found


def overlap(a: Share, b: Share) -> bool:
    return a.interval[0] <= b.interval[1] and b.interval[0] <= a.interval[1]


def tuned_methods(tuned: Results) -> list[Method]:
    """NAG as it did best in a search, for each number of steps."""
    found = (best(student_cells(tuned, steps), "nag") for steps in student_steps(tuned))
    return list(dict.fromkeys(cell.method for cell in found if cell is not None))


def best_cells(results: Results, steps: int) -> list[Cell]:
    """Each method at its best strength, the best first."""
    found = [best(student_cells(results, steps), name) for name in ("none", *STRENGTHS)]
    return sorted(filter(None, found), key=all_three, reverse=True)


def best_methods(results: Results) -> dict[int, list[Method]]:
    """Those of `best_cells`, by the number of steps: on other prompts nothing is left to choose."""
    steps = student_steps(results)
    return {number: [cell.method for cell in best_cells(results, number)] for number in steps}


def best_table(results: Results, steps: int) -> str:
    """`best_cells`, and what each seed says."""
    rows = []
    for cell in best_cells(results, steps):
        shares = cell.total.shares
        each = [counts.shares["all three"].value for counts in cell.seeds.values()]
        rows.append(
            (
                cell.method,
                *(shares[name] for name in ("removed", "valid", "followed", "all three")),
                ", ".join(f"{100 * value:.1f}" for value in each),
            )
        )
    return tables.markdown(
        ("method", "removed", "valid", "followed", "all three", "all three, by seed"), rows
    )


def searched(tuned: Results) -> str:
    """How NAG's settings were found."""
    count = len({cell.method for cell in tuned.cells if cell.method.name == "nag"})
    named = ", ".join(f"`{method}`" for method in tuned_methods(tuned))
    about = tuned.about
    return (
        f"also {named}, best of {count} settings on other noise (`--search`), seed "
        f"{about['seeds']}, {about['images per pair and seed']} images of each prompt pair"
    )


def all_three(cell: Cell) -> float:
    return cell.total.shares["all three"].value


def markdown(results: Results, plots: Sequence[Path], folder: Path) -> str:
    about = "\n".join(f"- {name}: {value}" for name, value in results.about.items())
    sections = []
    for steps in student_steps(results):
        sections.append(
            f"## {said(steps).capitalize()}\n\n"
            + "\n".join(f"- {x}" for x in findings(results, steps))
        )
        sections.append("Each method at its best strength:\n\n" + best_table(results, steps))
        sections.append(table([c for c in results.cells if c.steps == steps]))
        sections.append(
            "Pair by pair, removed / all three in percent, the best first:\n\n"
            + pair_table(results, steps)
        )
    if teacher := [cell for cell in results.cells if cell.model == "teacher"]:
        sections.insert(0, "## The teacher, 25 steps\n\n" + table(teacher))
    pictures = "\n\n".join(f"![{p.stem}]({os.path.relpath(p, folder)})" for p in plots)
    texts = TEXTS_JOINT if is_joint(results) else TEXTS
    if "network" in results.about:
        named = ", ".join(results.about[x] for x in ("network", "prompt") if x in results.about)
        texts = texts | {"title": f"{texts['title']}: {named}"}
    return TEMPLATE.format(
        **texts,
        **JUDGED[world_of(results).name],
        about=about,
        quality=quality_table(results),
        sections="\n\n".join(sections),
        pictures=pictures,
        pairs=len(pairs_of(results)),
    )


TEXTS = {
    "title": "Negative prompts in few steps, measured on the small world",
    "models": "models are those",
    "methods": """\
`cfg` is classifier-free guidance with the negative prompt, by its scale; `nasa`, `projected`, `nag`
and `vsf` (value sign flip) are `NASA`, `ProjectedNASA`, `NAG` and `VSF` of `enable_nasa`, by alpha,
alpha, scale and alpha. NAG's tau and alpha are the family's where none are named.""",
}
TEXTS_JOINT = {
    "title": "The rules of joint attention, measured on the small world",
    "models": "model is the `SD3Transformer2DModel`",
    "methods": """\
`cfg` is classifier-free guidance with the negative prompt, by its scale; `nasa-cross`, `nasa-text`
and `nasa` are the rules of `NASA` ([what each subtracts](../diffusers/joint.md)), by alpha;
`projected` is `ProjectedNASA`, by alpha, `vsf` is `VSF`, by alpha, and `nag` is `NAG`, by scale,
with the family's tau and alpha where none are named.""",
}
JUDGED = {
    SMALL.name: {
        "judge": """Its judge is exact: it finds the nearest of the 288 images
that there are.""",
        "valid": "within a mean squared distance of 0.02",
        "bar": """80 % valid and
90 % followed for the student, 90 % and 95 % for the teacher.""",
    },
    LARGE.name: {
        "judge": """Its judge is exact: it finds the nearest of the 9984
images of 64x64 pixels that there are.""",
        "valid": """within a mean squared distance of 0.01
  in the 16x16 pixels where it is largest""",
        "bar": """90 % valid and
92 % followed for the student in one step, 97 % and 97 % in four, 90 % and 95 % for the teacher.""",
    },
}
TEMPLATE = """# {title}

Made by `python -m nasa_distill eval --page`, which measured every number. The {models} of
the small world (`nasa_distill.world`). {judge}

- **removed**: the attribute that the negative prompt names is not in the image
- **followed**: every attribute that the prompt names is
- **valid**: the image is one of the world, {valid}
- **all three** at once

{methods}

In percent, with Wilson's 95 % interval over the {pairs} prompt pairs together. No prompt mentions
its negative's attribute, so some images lack it by themselves: the row `none` says how many.

{about}

## The models themselves

Captions as the world draws them, no negative prompt. The bar, set before measuring: {bar}

{quality}

{sections}

## Pictures

{pictures}
"""
