"""The operator on one cross-attention layer of each real model size: error, time and FLOPs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nasa_kernels import backends, nasa_attention
from nasa_kernels.testing import (
    MODEL_SHAPES,
    Shape,
    algorithm_1,
    exact_and_budget,
    make_inputs,
)

LAYERS = ("sd15-64", "sdxl-64", "pixart-1024")


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
