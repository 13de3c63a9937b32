"""Command line: draw with a negative prompt from any diffusers checkpoint, or count its cost.

    python -m nasa_diffusers generate --model DIR_OR_ID --prompt "a cat" --negative blurry \\
        --steps 1 --seed 0 --sweep 0,0.25,0.5,1 --out images
    python -m nasa_diffusers app --model DIR_OR_ID
    python -m nasa_diffusers gallery --model DIR_OR_ID --prompt "a cat" --negative blurry --out DIR
    python -m nasa_diffusers flops
    python -m nasa_diffusers pipelines
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from nasa_diffusers import app, gallery
from nasa_diffusers.api import enable_nasa
from nasa_diffusers.command import add_model_options, load_on_device, status_of
from nasa_diffusers.drawing import METHODS, draw, grid, save
from nasa_diffusers.methods import NAG, NASA, Method

# flags of one method: what each sets in which class
FLAGS: dict[str, tuple[type[Method], str]] = {
    "rule": (NASA, "rule"),
    "nag_scale": (NAG, "scale"),
    "nag_tau": (NAG, "tau"),
    "nag_norm": (NAG, "norm"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; what the user can correct is one line on stderr and a status of 1."""
    options = build_parser().parse_args(arguments)
    return status_of(options.run, options)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m nasa_diffusers", description="Negative prompts for few-step diffusion."
    )
    commands = parser.add_subparsers(required=True)

    generate = commands.add_parser("generate", help="draw images, or a sweep over alpha")
    generate.set_defaults(run=run_generate)
    add = generate.add_argument
    add_model_options(generate)
    add("--prompt", required=True)
    add(
        "--negative",
        required=True,
        action="append",
        nargs="+",
        metavar=("PROMPT", "ALPHA"),
        help="what to guide away from; repeat with an alpha each for several at once",
    )
    strength = generate.add_mutually_exclusive_group()
    strength.add_argument(
        "--alpha", type=float, help="strength of the method; default: the family's"
    )
    strength.add_argument(
        "--sweep", type=_numbers, metavar="A,B,...", help="alphas to draw side by side"
    )
    add("--steps", type=int, default=4, help="denoising steps (default: %(default)s)")
    add("--guidance", type=float, default=0.0, help="guidance scale (default: %(default)s, off)")
    add("--seed", type=int, default=0, help="seed of the noise (default: %(default)s)")
    add("--out", type=Path, required=True, help="folder for the images; made if missing")
    add("--start", type=_step, default=0, help="first step guided: 2, or 0.5 of all steps")
    add("--stop", type=_step, help="first step not guided any more")
    add("--layers", action="append", help="pattern of layer names; repeat for more")
    add("--height", type=int, help="of the image in pixels")
    add("--width", type=int, help="of the image in pixels")
    add("--method", choices=METHODS, default="nasa", help="default: %(default)s")
    add("--rule", help="of --method nasa in joint attention; default: the family's")
    add("--nag-scale", type=float, help="of --method nag, where 1 is off; default: the family's")
    add("--nag-tau", type=float, help="of --method nag; default: the family's")
    add("--nag-norm", type=int, choices=(1, 2), help="of --method nag; 2 as in its FLUX code")
    add("--backend", help="back end of nasa_kernels; default: the best that runs")

    page = commands.add_parser("app", help="a page in the browser: without and with, side by side")
    page.set_defaults(run=app.run)
    app.add_options(page)

    pictures = commands.add_parser("gallery", help="a Markdown page of prompts, without and with")
    pictures.set_defaults(run=gallery.run)
    gallery.add_options(pictures)

    flops = commands.add_parser("flops", help="count what NASA adds to real architectures")
    flops.set_defaults(run=run_flops)
    flops.add_argument("--model", action="append", help="one of the models; default: all")
    flops.add_argument("--method", choices=METHODS, default="nasa", help="default: %(default)s")

    walk = commands.add_parser("pipelines", help="which pipelines of diffusers can be guided")
    walk.set_defaults(run=run_pipelines)
    walk.add_argument("--json", action="store_true", help="for programs; default: Markdown")
    return parser


def run_generate(options: argparse.Namespace) -> None:
    method = read_method(options)
    pipe = load_on_device(options)

    handle = enable_nasa(
        pipe,
        _negatives(options.negative),
        method,
        start=options.start,
        stop=options.stop,
        layers=options.layers,
        backend=options.backend,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    alphas = [handle.alpha] if options.sweep is None else options.sweep
    # the pipeline counts its steps inside, this bar counts images
    bar = tqdm(alphas, desc="images", unit="image", disable=len(alphas) == 1)
    images, report = [], None
    for alpha in bar:
        handle.alpha = alpha
        begin = time.perf_counter()
        image = draw(pipe, options)
        seconds = time.perf_counter() - begin
        path = save(image, options.out / f"seed{options.seed}-alpha{alpha:g}")
        tqdm.write(f"{path}  ({seconds:.2f} s)")
        images.append(image[0])
        report = handle.report() if alpha else report
    if len(images) > 1:
        path = options.out / f"seed{options.seed}-sweep.png"
        grid(images, [f"alpha {alpha:g}" for alpha in alphas]).save(path)
        print(path)
    if report is not None:
        print(report)


def read_method(options: argparse.Namespace) -> Method:
    """The method that the flags describe."""
    cls, settings = METHODS[options.method], {}
    for flag, (owner, name) in FLAGS.items():
        value = getattr(options, flag)
        if value is None:
            continue
        if cls is not owner:
            raise ValueError(
                f"--{flag.replace('_', '-')} goes with --method {owner.name.lower()}, and the "
                f"method is {options.method}; leave one out"
            )
        settings[name] = value
    return cls(alpha=options.alpha, **settings)


def run_flops(options: argparse.Namespace) -> None:
    from nasa_diffusers.flops import MODELS, count, markdown

    names = options.model or list(MODELS)
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        raise ValueError(f"no model {unknown[0]!r}; there are {', '.join(MODELS)}")
    with contextlib.closing(tqdm(names, unit="model", disable=not sys.stderr.isatty())) as bar:
        print(markdown([count(name, METHODS[options.method]()) for name in bar]))


def run_pipelines(options: argparse.Namespace) -> None:
    from nasa_diffusers.pipelines import as_json, as_markdown, rows

    found = rows()
    print(json.dumps(as_json(found), indent=1) if options.json else as_markdown(found), end="")


def _negatives(given: list[list[str]]) -> str | list[tuple[str, float]]:
    """`--negative PROMPT` once, or `--negative PROMPT ALPHA` once or more."""
    if len(given) == 1 and len(given[0]) == 1:
        return given[0][0]
    if any(len(values) != 2 for values in given):
        raise ValueError(
            "--negative takes one quoted prompt, or, when repeated, a prompt and its alpha: "
            "--negative blurry 0.3 --negative red 0.8"
        )
    return [(prompt, float(alpha)) for prompt, alpha in given]


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


def _step(text: str) -> int | float:
    """`2` is a step, `0.5` a fraction of all steps."""
    return float(text) if "." in text else int(text)
