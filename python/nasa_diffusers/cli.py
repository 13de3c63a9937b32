"""Command line: draw with a negative prompt from any diffusers checkpoint, or count its cost.

    python -m nasa_diffusers generate --model DIR_OR_ID --prompt "a cat" --negative blurry \\
        --steps 1 --seed 0 --sweep 0,0.25,0.5,1 --out images
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
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import single_file_utils as single_file
from PIL import Image, ImageDraw
from tqdm import tqdm

from nasa_diffusers.api import enable_nasa
from nasa_diffusers.methods import NAG, NASA, VSF, Method, ProjectedNASA

LABEL_HEIGHT = 16
METHODS: dict[str, Any] = {"nasa": NASA, "projected": ProjectedNASA, "nag": NAG, "vsf": VSF}
# flags of one method: what each sets in which class
FLAGS: dict[str, tuple[type[Method], str]] = {
    "rule": (NASA, "rule"),
    "nag_scale": (NAG, "scale"),
    "nag_tau": (NAG, "tau"),
    "nag_norm": (NAG, "norm"),
}
SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; what the user can correct is one line on stderr and a status of 1."""
    options = build_parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, RuntimeError, OSError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m nasa_diffusers", description="Negative prompts for few-step diffusion."
    )
    commands = parser.add_subparsers(required=True)

    generate = commands.add_parser("generate", help="draw images, or a sweep over alpha")
    generate.set_defaults(run=run_generate)
    add = generate.add_argument
    add("--model", required=True, help="folder or hub id of a diffusers pipeline, or one file")
    add("--config", help="of a model that is one file: folder or hub id of its configuration")
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
    add("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 elsewhere")
    add("--device", help="default: cuda where there is one")

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
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    default = "float32" if torch.device(device).type == "cpu" else "bfloat16"
    dtype = DTYPES[options.dtype or default]
    pipe = load(options.model, options.config, dtype).to(device)

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


def load(model: str, config: str | None, dtype: torch.dtype) -> Any:
    """A pipeline from a folder, a hub id or one file of weights."""
    if not Path(model).is_file():
        if Path(model).suffix in SINGLE_FILES:
            raise ValueError(f"--model: there is no file {model!r}")
        if config is not None:
            raise ValueError(f"--config goes with a --model that is one file; {model!r} is none")
        return DiffusionPipeline.from_pretrained(model, torch_dtype=dtype)
    # which pipeline it is stands in the configuration; the weights say which of diffusers' own
    config = config or single_file.fetch_diffusers_config(
        single_file.load_single_file_checkpoint(model)
    ).get("pretrained_model_name_or_path")
    name = DiffusionPipeline.load_config(config)["_class_name"]
    if not hasattr(getattr(diffusers, name, None), "from_single_file"):
        raise ValueError(
            f"--model: a {name} cannot be read from one file; give the folder or the hub id of "
            "the whole pipeline"
        )
    return getattr(diffusers, name).from_single_file(model, config=config, torch_dtype=dtype)


def draw(pipe: Any, options: argparse.Namespace) -> list[Image.Image]:
    """One image, or the frames of one video."""
    call: dict[str, Any] = {}
    if options.height is not None or options.width is not None:
        # given one of them, some pipelines take neither
        if options.height is None or options.width is None:
            raise ValueError("--height and --width go together: give both, or none")
        call = {"height": options.height, "width": options.width}
    output = pipe(
        options.prompt,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance,
        generator=torch.Generator().manual_seed(options.seed),
        output_type="pil",
        **call,
    )
    frames = getattr(output, "frames", None)
    return output.images if frames is None else frames[0]


def save(images: list[Image.Image], path: Path) -> Path:
    """A PNG, or a GIF for the frames of a video."""
    if len(images) == 1:
        path = path.parent / f"{path.name}.png"
        images[0].save(path)
    else:
        path = path.parent / f"{path.name}.gif"
        images[0].save(path, save_all=True, append_images=images[1:])
    return path


def grid(images: list[Image.Image], labels: list[str]) -> Image.Image:
    """Images side by side, each over its label."""
    width, height = images[0].size
    canvas = Image.new("RGB", (width * len(images), height + LABEL_HEIGHT), "white")
    pen = ImageDraw.Draw(canvas)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        canvas.paste(image, (i * width, 0))
        pen.text((i * width + 2, height + 2), label, fill="black")
    return canvas


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
