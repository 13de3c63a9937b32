"""A Markdown page of one's own model: prompts drawn without and with their negative prompts.

    python -m nasa_diffusers gallery --model DIR_OR_ID --prompt "a cat" --negative blurry \\
        --methods nasa:0.2,projected --seeds 0,1,2,3 --steps 4 --out gallery
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from nasa_diffusers.command import add_model_options, load_on_device
from nasa_diffusers.drawing import Compared, Wish, compare, enlarged, grid, method_of, stack
from nasa_diffusers.methods import Method


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    add = parser.add_argument
    add("--prompt", action="append", required=True, help="repeat for more, each with a --negative")
    add("--negative", action="append", default=[], help="of the prompt at the same place")
    add(
        "--methods",
        type=_methods,
        default="nasa,projected",
        metavar="NAME[:STRENGTH],...",
        help="strength is alpha, of nag its scale; default: %(default)s, as the family has them",
    )
    add("--seeds", type=_numbers, default="0,1,2,3", help="a column each; default: %(default)s")
    add("--steps", type=int, default=4, help="default: %(default)s")
    add("--guidance", type=float, default=0.0, help="guidance scale (default: %(default)s, off)")
    add("--height", type=int, help="of each image in pixels")
    add("--width", type=int, help="of each image in pixels")
    add("--size", type=int, default=256, help="width on the page in pixels (default: %(default)s)")
    add("--title", default="Gallery", help="of the page (default: %(default)s)")
    add("--out", type=Path, required=True, help="folder of index.md and its pictures")


def run(options: argparse.Namespace) -> None:
    if len(options.prompt) != len(options.negative):
        raise ValueError(
            f"gallery: each --prompt has its --negative; got {len(options.prompt)} and "
            f"{len(options.negative)}"
        )
    if options.size < 1:
        raise ValueError(f"gallery: --size must be a number of pixels, got {options.size}")
    wishes = [
        Wish(
            prompt, negative, options.steps, options.seeds[0], options.guidance, options.height,
            options.width,
        )
        for prompt, negative in zip(options.prompt, options.negative, strict=True)
    ]  # fmt: skip
    pipe = load_on_device(options)
    options.out.mkdir(parents=True, exist_ok=True)
    page = [f"# {options.title}", ""]
    for number, wish in enumerate(tqdm(wishes, desc="prompts", disable=len(wishes) == 1)):
        compared = [compare(pipe, replace(wish, seed=s), options.methods) for s in options.seeds]
        name = f"{number}.png"
        picture(compared, options.size).save(options.out / name)
        page += section(wish, compared, options.seeds, name)
    path = options.out / "index.md"
    path.write_text("\n".join(page), encoding="utf-8")
    print(path)


def picture(compared: Sequence[Compared], size: int) -> Image.Image:
    """A row without, and one for each method; a column for each seed."""
    rows = [("without", [x.without for x in compared])]
    for i, report in enumerate(compared[0].reports):
        label = f"{report.method}, alpha {report.alpha}"
        rows.append((label, [x.guided[i] for x in compared]))
    pictures = []
    for label, videos in rows:
        images = [shown(frames, size) for frames in videos]
        pictures.append(grid(images, [label, *[""] * (len(images) - 1)]))
    return stack(pictures)


def shown(frames: list[Image.Image], size: int) -> Image.Image:
    """An image, of a video the one in the middle, `size` pixels wide; a small one larger."""
    image = enlarged(frames[len(frames) // 2], size)
    height = max(1, round(image.height * size / image.width))
    return image.resize((size, height), Image.Resampling.LANCZOS)


def section(wish: Wish, compared: Sequence[Compared], seeds: Sequence[int], name: str) -> list[str]:
    """One prompt of the page."""
    reports = [str(report) for report in compared[0].reports]
    fenced = "\n\n".join(reports).replace("\n", "\n    ").replace("    \n", "\n")
    return [
        f"## {_plain(wish.prompt)}, without {_plain(wish.negative)}",
        "",
        f"![Without, and with the negative prompt]({name})",
        "",
        f"Steps {wish.steps}, guidance {wish.guidance:g}, seeds {', '.join(map(str, seeds))}.",
        "",
        f"    {fenced}",
        "",
    ]


def _plain(text: str) -> str:
    """A prompt on one line, no character of which is Markdown's."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>#|" else c for c in " ".join(text.split()))


def _methods(text: str) -> list[Method]:
    found = []
    for item in text.split(","):
        name, _, strength = item.partition(":")
        try:
            found.append(method_of(name, float(strength) if strength else None))
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{item}: {error}") from error
    return found


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
