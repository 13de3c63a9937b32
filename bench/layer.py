"""`bench layer`: one text cross-attention layer, from to_q to to_out, in plain PyTorch modules.

    stock         Q, K, V, attention, output: five launches at best
    algorithm-1   K and V of each prompt by themselves, two attentions, a product, a difference
    nasa-first    both prompts projected side by side, one operation
    nasa          keys and values cached: Q, one operation, output
    projected     the same by the rule "projected"
    nag           as published: both prompts as a batch, Q twice, normalised and blended
    nag-ours      the same guidance by `nag_attention`, keys and values cached
    cfg           the stock layer on a doubled batch

What a pipeline adds around a layer is in `bench model`. The sizes of text and layer are those of
the models; Wan's norms of Q and K are left out, for every method alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench import baselines, gate, kinds
from bench.attention import sdpa
from bench.launches import count_launches, peak_bytes
from bench.machine import clock_mhz
from bench.op import ALPHA
from bench.roofline import BY_NAME, name_of
from bench.row import Row
from bench.session import Session
from bench.timing import GraphTimer, HostTimer, Timer, measure, synchroniser
from nasa_kernels import nag_attention, nasa_attention
from nasa_kernels.testing import MODEL_SHAPES, Shape

BASELINE = "stock"
# width of the text where it reaches the layers, by the first part of a shape's name
TEXT_WIDTH = {"sd15": 768, "sd21": 1024, "sdxl": 2048, "pixart": 1152, "sana": None, "wan": None}
HEADLINE = ("sdxl-32", "sdxl-64", "sd15-64", "pixart-1024")
NAMES = (*HEADLINE, *(s.name for s in MODEL_SHAPES if s.name not in HEADLINE))


class Layer(nn.Module):
    """The projections of a layer, and its methods on `[b, l, c]` images and `[b, n, c]` texts."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        width = shape.h * shape.d
        # Sana and Wan project their text to the width of the layers
        text = TEXT_WIDTH[shape.name.split("-")[0]] or width
        self.text_width = text
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(text, width, bias=False)
        self.to_v = nn.Linear(text, width, bias=False)
        self.to_out = nn.Linear(width, width)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.shape.h, self.shape.d))

    def keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        return self.heads(self.to_k(text)), self.heads(self.to_v(text))

    def attend(self, q: Tensor, text: Tensor) -> Tensor:
        return sdpa(q, *self.keys_values(text)).flatten(2)


Projected = tuple[Tensor, Tensor]  # keys and values of one prompt


@dataclass
class Inputs:
    image: Tensor
    positive: Tensor
    negative: Tensor
    cached: tuple[Tensor, ...] = ()  # k_pos, v_pos, k_neg, v_neg


def stock(layer: Layer, x: Inputs) -> Tensor:
    return layer.to_out(layer.attend(layer.heads(layer.to_q(x.image)), x.positive))


def algorithm_1(layer: Layer, x: Inputs) -> Tensor:
    return in_two_calls(layer, x, layer.keys_values(x.positive), layer.keys_values(x.negative))


def in_two_calls(layer: Layer, x: Inputs, pos: Projected, neg: Projected) -> Tensor:
    q = layer.heads(layer.to_q(x.image))
    z_pos, z_neg = sdpa(q, *pos).flatten(2), sdpa(q, *neg).flatten(2)
    return layer.to_out(baselines.subtract(z_pos, z_neg, ALPHA))


def projected_at_once(layer: Layer, x: Inputs) -> tuple[Projected, Projected]:
    """Keys and values of both prompts, each in one product."""
    n = x.positive.shape[1]
    k, v = layer.keys_values(torch.cat([x.positive, x.negative], 1))
    return (k[:, :n], v[:, :n]), (k[:, n:], v[:, n:])


def nasa_first(layer: Layer, x: Inputs) -> Tensor:
    pos, neg = projected_at_once(layer, x)
    q = layer.heads(layer.to_q(x.image))
    return layer.to_out(nasa_attention(q, *pos, *neg, ALPHA).flatten(2))


def first_in_two_calls(layer: Layer, x: Inputs) -> Tensor:
    """Algorithm 1 on the very projections of `nasa_first`: a product of two prompts rounds
    otherwise than two of one, by how much depends on the CPU."""
    return in_two_calls(layer, x, *projected_at_once(layer, x))


def nasa(layer: Layer, x: Inputs) -> Tensor:
    q = layer.heads(layer.to_q(x.image))
    k_pos, v_pos, k_neg, v_neg = x.cached
    return layer.to_out(nasa_attention(q, k_pos, v_pos, k_neg, v_neg, ALPHA).flatten(2))


def projected(layer: Layer, x: Inputs) -> Tensor:
    q = layer.heads(layer.to_q(x.image))
    k_pos, v_pos, k_neg, v_neg = x.cached
    o = nasa_attention(q, k_pos, v_pos, k_neg, v_neg, ALPHA, rule="projected")
    return layer.to_out(o.flatten(2))


def projected_in_two(layer: Layer, x: Inputs) -> Tensor:
    """The same as one would write it."""
    q = layer.heads(layer.to_q(x.image))
    z_pos, z_neg = (sdpa(q, *layer.keys_values(text)) for text in (x.positive, x.negative))
    return layer.to_out(kinds.project(z_pos, z_neg, ALPHA).flatten(2))


def nag(layer: Layer, x: Inputs) -> Tensor:
    q = layer.heads(layer.to_q(x.image)).tile(2, 1, 1, 1)
    z_pos, z_neg = layer.attend(q, torch.cat([x.positive, x.negative])).chunk(2)
    return layer.to_out(baselines.nag(z_pos, z_neg))


def nag_in_two_calls(layer: Layer, x: Inputs) -> Tensor:
    """The same on the projections of `nag_ours`, which are of one prompt each."""
    q = layer.heads(layer.to_q(x.image))
    z_pos, z_neg = (sdpa(q, *layer.keys_values(text)) for text in (x.positive, x.negative))
    return layer.to_out(baselines.nag(z_pos.flatten(2), z_neg.flatten(2)))


def nag_ours(layer: Layer, x: Inputs) -> Tensor:
    q = layer.heads(layer.to_q(x.image))
    o = nag_attention(q, *x.cached, nag_scale=5.0, nag_tau=2.5, nag_alpha=0.25)
    return layer.to_out(o.flatten(2))


def cfg(layer: Layer, x: Inputs) -> Tensor:
    q = layer.heads(layer.to_q(torch.cat([x.image, x.image])))
    return layer.to_out(layer.attend(q, torch.cat([x.negative, x.positive])))


METHODS: dict[str, Callable[[Layer, Inputs], Tensor]] = {
    "stock": stock,
    "algorithm-1": algorithm_1,
    "nasa-first": nasa_first,
    "nasa": nasa,
    "projected": projected,
    "nag": nag,
    "nag-ours": nag_ours,
    "cfg": cfg,
}
# ours and Algorithm 1, and the layer of which each must be a rounding
JUDGED_BY = {
    "algorithm-1": algorithm_1, "nasa-first": first_in_two_calls, "nasa": algorithm_1,
    "projected": projected_in_two, "nag-ours": nag_in_two_calls,
}  # fmt: skip


def build(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Layer, Inputs]:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=device, dtype=dtype)

    layer = Layer(shape).to(device, dtype).requires_grad_(False)
    image = normal(shape.b, shape.l, shape.h * shape.d)
    positive = normal(shape.b, shape.n_pos, layer.text_width)
    negative = normal(shape.b, shape.n_neg, layer.text_width)
    cached = (*layer.keys_values(positive), *layer.keys_values(negative))
    return layer, Inputs(image, positive, negative, cached)


def check(method: str, output: Tensor, layer: Layer, x: Inputs) -> dict[str, Any]:
    """Against the same layer in fp64: eager PyTorch may lose as much, and half as much again."""
    if method not in JUDGED_BY:
        if not torch.isfinite(output).all():
            raise gate.WrongResult("its output is not finite")
        return {}
    exact_layer = Layer(layer.shape).to(output.device, torch.float64)
    exact_layer.load_state_dict(layer.state_dict())
    exact_inputs = Inputs(x.image.double(), x.positive.double(), x.negative.double())
    with torch.no_grad():
        exact = JUDGED_BY[method](exact_layer, exact_inputs)
        eager = (JUDGED_BY[method](layer, x).double() - exact).norm()
    error = output.double() - exact
    if not error.norm() <= 1.5 * eager:
        raise gate.WrongResult(f"L2 error {error.norm():.2e}, that of eager {eager:.2e}")
    return {
        "max_error": error.abs().max().item(),
        "l2_error": (error.norm() / exact.norm()).item(),
        "error_against": "fp64",
    }


def default_names(device: torch.device, quick: bool = False) -> Sequence[str]:
    """The headline cases on a CPU, all of them on a GPU, and two where it must be quick."""
    if quick:
        return HEADLINE[:2]
    return NAMES if device.type == "cuda" else HEADLINE


def run(
    session: Session,
    names: Sequence[str] | None = None,
    batches: Sequence[int] | None = None,
    dtypes: Sequence[str] | None = None,
    methods: Sequence[str] = tuple(METHODS),
) -> list[Row]:
    """Measure layer by layer; None takes what makes sense on the device of the session."""
    on_gpu = session.device.type == "cuda"
    shapes = {shape.name: shape for shape in MODEL_SHAPES}
    rows: list[Row] = []
    for dtype in dtypes or (["bfloat16"] if on_gpu else ["float32"]):
        for b in batches or ((1, 16) if on_gpu else (1,)):
            for name in names or default_names(session.device):
                shape = shapes[name]._replace(b=b)
                if session.is_over:
                    session.leave_out(f"layer {shape}", "no time was left")
                    continue
                found = time_layer(session, shape, BY_NAME[dtype], methods)
                session.write(found)
                rows += found
                session.say(f"layer {shape} {dtype}: {len(found)} rows")
    return rows


@torch.no_grad()
def time_layer(
    session: Session, shape: Shape, dtype: torch.dtype, wanted: Sequence[str]
) -> list[Row]:
    device = session.device
    layer, inputs = build(shape, dtype, device)
    before = clock_mhz(device)
    timers: dict[str, list[Timer]] = {}
    facts: dict[str, dict[str, Any]] = {}
    for method in wanted:

        def call(function=METHODS[method]) -> Tensor:
            with torch.no_grad():
                return function(layer, inputs)

        try:
            facts[method] = check(method, call(), layer, inputs) | {
                "launches": count_launches(call, device),
                "peak_bytes": peak_bytes(call, device),
            }
            timers[method] = _timers(call, device)
        except (gate.WrongResult, RuntimeError, ValueError) as error:
            session.leave_out(f"{method} on layer {shape}", str(error))
            facts.pop(method, None)
    measure([timer for of in timers.values() for timer in of], seconds=session.seconds)
    clocks = {"mhz_before": before, "mhz_after": clock_mhz(device)}
    found = {
        (method, kind): samples
        for method, of in timers.items()
        for timer in of
        for kind, samples in timer.results.items()
    }
    for of in timers.values():
        for timer in of:
            timer.close()
    return [
        session.row(
            bench="layer", case=str(shape), dtype=name_of(dtype), direction="forward",
            provider=method, timing=kind, **samples.columns(), **facts[method], **clocks,
            baseline=BASELINE if (BASELINE, kind) in found else "",
            baseline_us=found[BASELINE, kind].quantile(0.5) if (BASELINE, kind) in found else None,
        )
        for (method, kind), samples in found.items()
    ]  # fmt: skip


def _timers(call: Callable[[], Tensor], device: torch.device) -> list[Timer]:
    if device.type != "cuda":
        return [HostTimer([call], "warm")]
    return [
        GraphTimer([call], "warm", stream=torch.cuda.Stream(device)),
        HostTimer([call], "eager", synchronise=synchroniser(device)),
    ]
