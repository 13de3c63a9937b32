"""`make demo`: a negative prompt on a stock pipeline in one step, and what it costs.

The pipeline has the real diffusers classes in small, with random weights: its images are patterns,
and what they show is that they change with alpha and not at alpha 0. Parity and cost are measured
on one cross-attention layer of each real model size.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nasa_diffusers import enable_nasa
from nasa_diffusers.cli import grid
from nasa_diffusers.testing import stable_diffusion
from nasa_kernels import __version__, backends, nasa_attention
from nasa_kernels.testing import (
    MODEL_SHAPES,
    Shape,
    algorithm_1,
    exact_and_budget,
    make_inputs,
)

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
LAYERS = ("sd15-64", "sdxl-64", "pixart-1024")
PROMPT, NEGATIVE = "a photo of a cat", "blurry, red"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m nasa_diffusers.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="folder of the PNG")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console = Console(width=120, highlight=False, soft_wrap=True)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    console.print(f"nasa-kernels {__version__}, torch {torch.__version__}, {name}{threads}\n")
    draw(options.out, device, console)
    measure_layers(device, console)


def draw(out: Path, device: torch.device, console: Console) -> None:
    """The same noise and prompt at every alpha, and once more after NASA is off."""
    pipe: Any = stable_diffusion()
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)

    def image() -> Image.Image:
        generator = torch.Generator("cpu").manual_seed(7)
        call = pipe(PROMPT, num_inference_steps=1, guidance_scale=0, generator=generator)
        return call.images[0]

    image()  # warm
    stock, stock_seconds = timed(image)
    handle = enable_nasa(pipe, NEGATIVE)
    images, seconds = [], []
    for alpha in ALPHAS:
        handle.alpha = alpha
        picture, took = timed(image)
        images.append(picture)
        seconds.append(took)
    report = handle.report()
    handle.disable()
    same = [images[0].tobytes() == stock.tobytes(), image().tobytes() == stock.tobytes()]
    changed = sum(picture.tobytes() != stock.tobytes() for picture in images[1:])

    console.print(f"[bold]StableDiffusionPipeline[/], one step: {PROMPT!r} without {NEGATIVE!r}")
    console.print(str(report))
    console.print(f"alpha 0 equals the stock image, byte for byte: {'yes' if same[0] else 'NO'}")
    console.print(f"after disable() likewise: {'yes' if same[1] else 'NO'}")
    moved = (np.asarray(images[-1]) != np.asarray(stock)).mean()
    console.print(
        f"images changed by alpha > 0: {changed} of {len(ALPHAS) - 1}; at alpha {ALPHAS[-1]:g} "
        f"{moved:.1%} of the values differ (random weights hardly look at the text)"
    )
    console.print(
        f"one image: stock {stock_seconds * 1e3:.0f} ms, with the negative prompt "
        f"{statistics.median(seconds[1:]) * 1e3:.0f} ms (a tiny model: host time)"
    )
    out.mkdir(parents=True, exist_ok=True)
    path = out / "alpha.png"
    large = [picture.resize((192, 192), Image.Resampling.NEAREST) for picture in images]
    grid(large, [f"alpha {alpha:g}" for alpha in ALPHAS]).save(path)
    console.print(f"wrote [bold]{path}[/]\n")


def measure_layers(device: torch.device, console: Console) -> None:
    """One layer of each real size: parity against fp64, FLOPs and time of three ways to do it."""
    table = Table(title="One cross-attention layer at its real size, both prompts projected")
    table.add_column("layer", no_wrap=True)
    for column in ("dtype", "back end", "error", "stock", "Algorithm 1", "NASA", "FLOPs"):
        table.add_column(column, justify="right", no_wrap=True)
    for shape in MODEL_SHAPES:
        if shape.name in LAYERS:
            for dtype in (torch.float32, torch.bfloat16):
                table.add_row(*layer_row(shape, dtype, device))
    console.print(table)
    console.print(
        "error: relative L2 of NASA against fp64, over that of eager PyTorch (Algorithm 1 in "
        "matrix products) in the same dtype\n"
        "stock: one scaled_dot_product_attention, no negative prompt; Algorithm 1: two, a product "
        "and a difference; median of 7 warm calls\n"
        "FLOPs: of NASA, as a multiple of stock, counted"
    )


def layer_row(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[str]:
    inputs = make_inputs(shape, dtype, device)
    backend = backends.choose(device, dtype)
    rows: dict[str, Any] = {**inputs, "q": inputs["q"][:, :256]}
    exact, _ = exact_and_budget(rows, 0.5)

    def error(o: Tensor) -> float:
        return (o.double() - exact).norm().item()

    ratio = error(nasa_attention(**rows, alpha=0.5)) / error(algorithm_1(**rows, alpha=0.5))

    def stock() -> Tensor:
        q, k, v = (inputs[name].transpose(1, 2) for name in ("q", "k_pos", "v_pos"))
        return F.scaled_dot_product_attention(q, k, v)

    def two_calls() -> Tensor:
        q, k, v = (inputs[name].transpose(1, 2) for name in ("q", "k_neg", "v_neg"))
        return stock() - 0.5 * F.scaled_dot_product_attention(q, k, v)

    def fused() -> Tensor:
        return nasa_attention(**inputs, alpha=0.5)

    with torch.no_grad():
        times = [median_seconds(function, device) for function in (stock, two_calls, fused)]
    name = f"{shape.name} l{shape.l} h{shape.h} d{shape.d} n{shape.n_pos}+{shape.n_neg}"
    milliseconds = [f"{seconds * 1e3:.2f} ms" for seconds in times]
    kind = str(dtype).removeprefix("torch.")
    return [name, kind, backend, f"{ratio:.2f}", *milliseconds, f"{flop_ratio(shape):.1f}x"]


def flop_ratio(shape: Shape) -> float:
    """FLOPs of the fused operator over those of attention to one prompt, counted."""
    meta = make_inputs(shape._replace(l=64), torch.float32, "meta")

    def count(alpha_keys: int) -> int:
        keys = {name: meta[name][:, :alpha_keys] for name in ("k_neg", "v_neg")}
        with FlopCounterMode(display=False) as counter:
            nasa_attention(**{**meta, **keys}, alpha=0.5)
        return counter.get_total_flops()

    return count(shape.n_neg) / count(0)


def timed(function: Callable):
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def median_seconds(function: Callable, device: torch.device, calls: int = 7) -> float:
    function()
    seconds = []
    for _ in range(calls):
        synchronise(device)
        start = time.perf_counter()
        function()
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
