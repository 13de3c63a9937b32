"""The shipped model in four steps: judged with NASA at several strengths, and a picture of it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging
from nasa_diffusers import ProjectedNASA, enable_nasa
from rich.console import Console
from rich.table import Table

from nasa_distill import pictures
from nasa_distill.demo import layers
from nasa_distill.world import shipped
from nasa_distill.world.evaluation.evaluate import Counts
from nasa_kernels import __version__

PROMPT, NEGATIVE = "a photo of a shape", "striped"
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
IMAGES, SHOWN, STEPS = 100, 7, 4
# what the picture shows: prompts, and what is not wanted
EXAMPLES = (
    ("a photo of a shape", "striped"),
    ("a photo of a triangle and a shape", "circle"),
    ("a photo of a large shape", "red"),
)
STRENGTH = ProjectedNASA(1.5)  # within the interval of its best in docs/distill/large.md


def show(out: Path) -> None:
    """Draw, judge, and measure the operator on layers of real sizes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console = Console(width=120, highlight=False, soft_wrap=True)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    count = torch.get_num_threads()
    noun = "thread" if count == 1 else "threads"
    threads = f", {count} {noun}" if device.type == "cpu" else ""
    logging.set_verbosity_error()  # of what it says of configs
    console.print(f"nasa-kernels {__version__}, torch {torch.__version__}, {name}{threads}\n")
    pipe = load(device)
    sweep(pipe, console)
    picture(pipe, out / "demo.png")
    console.print(f"Wrote [bold]{out / 'demo.png'}[/]\n")
    layers.measure_layers(device, console)


def load(device: torch.device) -> Any:
    pipe: Any = StableDiffusionPipeline.from_pretrained(shipped.path(), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def draw(pipe: Any, prompt: str, count: int) -> torch.Tensor:
    """`[n, 3, size, size]` in [0, 1], from noise that is always the same."""
    config, random_ = pipe.unet.config, torch.Generator().manual_seed(0)
    noise = torch.randn(
        count, config.in_channels, config.sample_size, config.sample_size, generator=random_
    )
    call = {"num_inference_steps": STEPS, "guidance_scale": 0, "output_type": "pt"}
    return pipe([prompt] * count, latents=noise.to(pipe.device), generator=random_, **call).images


def picture(pipe: Any, path: Path) -> None:
    """Each example without its negative prompt and with it, from the same noise."""
    shown = []
    for prompt, negative in EXAMPLES:
        rows = [("no negative\nprompt", draw(pipe, prompt, SHOWN))]
        handle = enable_nasa(pipe, negative, STRENGTH)
        rows.append((f"negative prompt\n{negative}", draw(pipe, prompt, SHOWN)))
        handle.disable()
        shown.append((prompt, rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures.blocks(shown).save(path)


def sweep(pipe: Any, console: Console) -> None:
    """The same noise at every alpha, judged; and once more after NASA is off."""

    def draw_all() -> torch.Tensor:
        return draw(pipe, PROMPT, IMAGES)

    stock = draw_all()
    console.print(
        f"[bold]StableDiffusionPipeline[/], the shipped model in {STEPS} steps, {IMAGES} images:\n"
        f"{PROMPT!r} without {NEGATIVE!r}"
    )
    table = Table()
    for column in ("alpha", f"not {NEGATIVE}", "valid", f"valid and not {NEGATIVE}", "seconds"):
        table.add_column(column, justify="right")
    handle = enable_nasa(pipe, NEGATIVE)
    report, zero = None, stock.new_empty(0)
    for alpha in ALPHAS:
        handle.alpha = alpha
        start = time.perf_counter()
        images = draw_all()
        seconds = time.perf_counter() - start
        counts = Counts.of(images * 2 - 1, PROMPT, NEGATIVE)
        shares = [counts.shares[key] for key in ("removed", "valid", "all three")]
        table.add_row(f"{alpha:g}", *(f"{share} %" for share in shares), f"{seconds:.2f}")
        zero, report = (images, report) if alpha == 0 else (zero, handle.report())
    handle.disable()
    console.print(table)
    console.print(str(report))
    same = [torch.equal(zero, stock), torch.equal(draw_all(), stock)]
    console.print(f"alpha 0 equals the stock images, bit for bit: {'yes' if same[0] else 'NO'}")
    console.print(f"after disable() likewise: {'yes' if same[1] else 'NO'}")
    console.print("in brackets: 95 % intervals")
