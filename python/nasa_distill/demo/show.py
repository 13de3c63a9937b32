"""The shipped model in one step: drawn and judged with NASA at several strengths."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging
from nasa_diffusers import enable_nasa
from rich.console import Console
from rich.table import Table

from nasa_distill import pictures
from nasa_distill.demo import layers
from nasa_distill.world import shipped
from nasa_distill.world.code import CHANNELS, GRID
from nasa_distill.world.evaluation.evaluate import Counts
from nasa_kernels import __version__

PROMPT, NEGATIVE = "a photo of a shape", "red"
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
IMAGES, SHOWN = 100, 10  # the first ten


def show(out: Path) -> None:
    """Draw, judge, and measure the operator on layers of real sizes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console = Console(width=120, highlight=False, soft_wrap=True)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    count = torch.get_num_threads()
    noun = "thread" if count == 1 else "threads"
    threads = f", {count} {noun}" if device.type == "cpu" else ""
    console.print(f"nasa-kernels {__version__}, torch {torch.__version__}, {name}{threads}\n")
    sweep(out, device, console)
    layers.measure_layers(device, console)


def sweep(out: Path, device: torch.device, console: Console) -> None:
    """The same noise at every alpha, judged; and once more after NASA is off."""
    logging.set_verbosity_error()  # AutoencoderTiny warns of its own config
    pipe: Any = StableDiffusionPipeline.from_pretrained(shipped.path(), local_files_only=True)
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(IMAGES, CHANNELS, GRID, GRID, generator=torch.Generator().manual_seed(0))

    def draw() -> torch.Tensor:
        """`[n, 3, 32, 32]` in [0, 1]."""
        call = {"num_inference_steps": 1, "guidance_scale": 0, "output_type": "pt"}
        return pipe([PROMPT] * IMAGES, latents=noise.to(device), **call).images

    stock = draw()
    console.print(
        f"[bold]StableDiffusionPipeline[/], the shipped model in one step, {IMAGES} images:\n"
        f"{PROMPT!r} without {NEGATIVE!r}"
    )
    table = Table()
    for column in ("alpha", f"not {NEGATIVE}", "valid", f"valid and not {NEGATIVE}", "seconds"):
        table.add_column(column, justify="right")
    handle = enable_nasa(pipe, NEGATIVE)
    rows, report, zero = [], None, stock.new_empty(0)
    for alpha in ALPHAS:
        handle.alpha = alpha
        start = time.perf_counter()
        images = draw()
        seconds = time.perf_counter() - start
        counts = Counts.of(images * 2 - 1, PROMPT, NEGATIVE)
        shares = [counts.shares[key] for key in ("removed", "valid", "all three")]
        table.add_row(f"{alpha:g}", *(f"{share} %" for share in shares), f"{seconds:.2f}")
        label = f"alpha {alpha:g}: {100 * shares[0].value:.0f} % without {NEGATIVE}"
        rows.append((label, images[:SHOWN]))
        zero, report = (images, report) if alpha == 0 else (zero, handle.report())
    handle.disable()
    console.print(table)
    console.print(str(report))
    same = [torch.equal(zero, stock), torch.equal(draw(), stock)]
    console.print(f"alpha 0 equals the stock images, bit for bit: {'yes' if same[0] else 'NO'}")
    console.print(f"after disable() likewise: {'yes' if same[1] else 'NO'}")
    out.mkdir(parents=True, exist_ok=True)
    path = out / "alpha.png"
    pictures.rows(rows).save(path)
    console.print(f"in brackets: 95 % intervals. Wrote [bold]{path}[/]\n")
