"""`bench model` and `bench memory`: a whole denoiser from its real configuration, random weights.

    stock         no negative prompt
    algorithm-1   both prompts projected and attended to in every call
    nasa          nasa_diffusers with the keys and values of both prompts cached
    projected     the same by the rule "projected", which nothing published is compared with
    nasa-first    nasa without anything cached, as in the first call with a prompt (eager only)
    nag           as published
    nag-ours      the same guidance on this package's operations, keys and values cached
    cfg           a doubled batch, or two calls where the model's pipeline makes two

`eager` includes the host; `graph` is the same call replayed from a CUDA graph; `compiled` is
torch.compile with its defaults, host included. The gate: Algorithm 1 (for `nag-ours`, NAG as
published) under PyTorch's unfused attention is an equally right result, and the distance between
these two is the noise of the model in its dtype; ours must lie within 4 times that.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from nasa_diffusers import NAG, NASA, Method, ProjectedNASA, enable_nasa
from nasa_diffusers.flops import Model
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from bench import baselines, flops
from bench.gate import WrongResult
from bench.launches import count_launches, peak_bytes
from bench.machine import clock_mhz
from bench.roofline import BY_NAME, name_of
from bench.row import Row
from bench.session import Session
from bench.timing import Call, GraphTimer, HostTimer, Timer, measure, synchroniser

NOISE_ALLOWED = 4.0
# pipelines of these make two calls a step under classifier-free guidance
TWO_CALLS = ("WanTransformer3DModel", "FluxTransformer2DModel")
# one frame group of a streaming video model, and an image that a CPU draws in seconds
MODELS: dict[str, Model] = {
    "SD 1.5, 128 px": replace(flops.MODELS["SD 1.5, 512 px"], latents=(4, 16, 16)),
    "SD 1.5, 256 px": replace(flops.MODELS["SD 1.5, 512 px"], latents=(4, 32, 32)),
    "Wan 2.1 1.3B, 480p, 9 frames": replace(
        flops.MODELS["Wan 2.1 1.3B, 480p, 81 frames"], latents=(16, 3, 60, 104)
    ),
} | flops.MODELS
ON_GPU = (
    "SDXL, 1024 px", "SD 1.5, 512 px", "PixArt-alpha, 1024 px", "FLUX.1 schnell, 1024 px",
    "Wan 2.1 1.3B, 480p, 9 frames",
)  # fmt: skip
ON_CPU = ("SD 1.5, 128 px",)
BASELINE = "stock"


@dataclass
class Denoiser:
    """A built model and the inputs of one call."""

    module: Any
    inputs: dict[str, Any]
    negative: Tensor

    def __call__(self, module: Any = None, **changes: Any) -> Tensor:
        with torch.no_grad():
            return (module or self.module)(**{**self.inputs, **changes}, return_dict=False)[0]


def build(model: Model, dtype: torch.dtype, device: torch.device) -> Denoiser:
    """Random weights and random inputs, in the model's own initialisation."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            module = model.build(**model.config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=device, dtype=dtype)

    inputs = tree_map(
        lambda x: normal(*x.shape) if isinstance(x, Tensor) else x, dict(model.inputs)
    )
    first = baselines.parameters(type(module))[0]
    inputs |= {
        first: normal(1, *model.latents),
        "timestep": torch.ones(1, device=device, dtype=dtype),
        "encoder_hidden_states": normal(1, model.tokens, model.channels),
    }
    return Denoiser(module, inputs, normal(1, model.tokens, model.channels))


# ---- methods: with each, calls of the denoiser do what the method does ---------------------------


@contextlib.contextmanager
def _stock(denoiser: Denoiser) -> Iterator[Callable[..., Tensor]]:
    yield denoiser


@contextlib.contextmanager
def _algorithm_1(denoiser: Denoiser) -> Iterator[Callable[..., Tensor]]:
    with baselines.algorithm_1(denoiser.module, denoiser.negative):
        yield denoiser


@contextlib.contextmanager
def _nag(denoiser: Denoiser) -> Iterator[Callable[..., Tensor]]:
    with baselines.nag_published(denoiser.module, denoiser.negative):
        yield denoiser


@contextlib.contextmanager
def _ours(
    denoiser: Denoiser, method: Method, first: bool = False
) -> Iterator[Callable[..., Tensor]]:
    pipe: Any = SimpleNamespace(transformer=denoiser.module)
    handle = enable_nasa(pipe, method=method, negative_prompt_embeds=denoiser.negative)

    def first_call(module: Any = None) -> Tensor:
        handle.clear_cache()
        return denoiser(module)

    try:
        yield first_call if first else denoiser
    finally:
        handle.disable()


_NASA = NASA(0.5, rule="nasa")
# the defaults of `baselines.nag`
_NAG = NAG(scale=5.0, tau=2.5, alpha=0.25)


@contextlib.contextmanager
def _cfg(denoiser: Denoiser) -> Iterator[Callable[..., Tensor]]:
    """Unconditional and conditional output, combined at a guidance scale of 5."""
    text = denoiser.inputs["encoder_hidden_states"]
    both = torch.cat([denoiser.negative, text])
    # positions have no batch
    doubled = {
        name: tree_map(_twice, x) if not name.endswith("_ids") else x
        for name, x in denoiser.inputs.items()
    } | {"encoder_hidden_states": both}

    def combine(negative: Tensor, positive: Tensor) -> Tensor:
        return negative + 5.0 * (positive - negative)

    def two_calls(module: Any = None) -> Tensor:
        negative = denoiser(module, encoder_hidden_states=denoiser.negative)
        return combine(negative, denoiser(module))

    def one_call(module: Any = None) -> Tensor:
        return combine(*denoiser(module, **doubled).chunk(2))

    yield two_calls if type(denoiser.module).__name__ in TWO_CALLS else one_call


def _twice(x: Any) -> Any:
    return torch.cat([x, x]) if isinstance(x, Tensor) else x


METHODS: dict[str, Callable[[Denoiser], contextlib.AbstractContextManager]] = {
    "stock": _stock,
    "algorithm-1": _algorithm_1,
    "nasa": partial(_ours, method=_NASA),
    "projected": partial(_ours, method=ProjectedNASA(2.0)),
    "nasa-first": partial(_ours, method=_NASA, first=True),
    "nag": _nag,
    "nag-ours": partial(_ours, method=_NAG),
    "cfg": _cfg,
}
# ours, and what each must equal
JUDGED_BY = {"nasa": "algorithm-1", "nasa-first": "algorithm-1", "nag-ours": "nag"}


# ---- the gate ------------------------------------------------------------------------------------


class Gate:
    """Judges the output of one method on one model."""

    def __init__(self, denoiser: Denoiser):
        self.denoiser = denoiser
        self.known: dict[str, tuple[Tensor, float]] = {}  # outputs, and their noise

    def prepare(self, method: str) -> None:
        """Run what judges `method`, while no method is on the model."""
        judge = JUDGED_BY.get(method)
        if judge is None or judge in self.known:
            return
        with METHODS[judge](self.denoiser) as call:
            expected = call().float()
            with sdpa_kernel(SDPBackend.MATH):
                self.known[judge] = expected, distance(call().float(), expected)

    def check(self, method: str, output: Tensor) -> dict[str, Any]:
        """Columns for the row; raises `WrongResult`. What judges must be known by then."""
        if not torch.isfinite(output).all():
            raise WrongResult("its output is not finite")
        if method not in JUDGED_BY:
            return {}
        judge = JUDGED_BY[method]
        expected, noise = self.known[judge]
        error = distance(output.float(), expected)
        rounding = torch.finfo(output.dtype).eps
        if error > NOISE_ALLOWED * max(noise, rounding):
            raise WrongResult(f"it is {error:.2e} from {judge}, whose own noise is {noise:.2e}")
        largest = (output.float() - expected).abs().max().item()
        return {"max_error": largest, "l2_error": error, "error_against": judge}


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


# ---- rows ----------------------------------------------------------------------------------------


def default_names(device: torch.device, quick: bool = False) -> Sequence[str]:
    names: Sequence[str] = ON_GPU if device.type == "cuda" else ON_CPU
    return names[:2] if quick else names


# those of a quick run: without what is measured to be compared with once
QUICK_METHODS = tuple(
    name for name in METHODS if name not in ("nasa-first", "projected", "nag", "nag-ours")
)


def _cases(
    session: Session, names: Sequence[str] | None, dtypes: Sequence[str] | None
) -> Iterator[tuple[str, torch.dtype]]:
    """What there is time for; None takes what makes sense on the device of the session."""
    default = "bfloat16" if session.device.type == "cuda" else "float32"
    for dtype in dtypes or [default]:
        for name in names or default_names(session.device):
            if session.is_over:
                session.leave_out(name, "no time was left")
            else:
                yield name, BY_NAME[dtype]


def run(
    session: Session,
    names: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    methods: Sequence[str] = tuple(METHODS),
    timings: Sequence[str] | None = None,
) -> list[Row]:
    on_gpu = session.device.type == "cuda"
    rows: list[Row] = []
    for name, dtype in _cases(session, names, dtypes):
        session.say(f"{name}, {name_of(dtype)}")
        wanted = timings or (("eager", "graph") if on_gpu else ("eager",))
        found = time_model(session, name, MODELS[name], dtype, methods, wanted)
        session.write(found)
        rows += found
    return rows


def time_model(
    session: Session,
    name: str,
    model: Model,
    dtype: torch.dtype,
    wanted: Sequence[str],
    timings: Sequence[str],
) -> list[Row]:
    """Eager calls of all methods in turn; graphs and compiled models one after the other."""
    device = session.device
    denoiser = build(model, dtype, device)
    gate = Gate(denoiser)
    facts: dict[str, dict[str, Any]] = {}
    timers: dict[str, list[Timer]] = {}
    for method in wanted:
        try:
            gate.prepare(method)
            with METHODS[method](denoiser) as call:
                facts[method] = gate.check(method, call()) | {
                    "launches": count_launches(call, device),
                    "peak_bytes": peak_bytes(call, device),
                    "mhz_before": clock_mhz(device),
                }
                timers[method] = []
                for timing in timings:
                    if timing == "eager" or method == "nasa-first":
                        continue
                    timer = _timer(denoiser, call, timing, device)
                    measure([timer], seconds=3 * session.seconds)
                    timer.close()
                    timers[method].append(timer)
        except (WrongResult, RuntimeError, ValueError) as error:
            session.leave_out(f"{method} on {name}", str(error))
            facts.pop(method, None)
    if "eager" in timings:
        eager = {method: _eager(denoiser, method, device) for method in facts}
        measure(eager.values(), seconds=3 * session.seconds)
        for method, timer in eager.items():
            timers[method].append(timer)
    rows = [
        _row(session, name, dtype, method, kind, **samples.columns(), **facts[method],
             mhz_after=clock_mhz(device))
        for method in facts
        for timer in timers[method]
        for kind, samples in timer.results.items()
    ]  # fmt: skip
    del denoiser, gate
    gc.collect()
    if session.device.type == "cuda":
        torch.cuda.empty_cache()
    stock = {r.timing: r.p50_us for r in rows if r.provider == BASELINE}
    return [
        replace(r, baseline=BASELINE, baseline_us=stock[r.timing]) if r.timing in stock else r
        for r in rows
    ]


def _eager(denoiser: Denoiser, method: str, device: torch.device) -> Timer:
    """A timer that puts the method on the model for each of its turns."""
    current: list[Callable[..., Tensor]] = []

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        with METHODS[method](denoiser) as call:
            call()  # what is kept from one call to the next
            current[:] = [call]
            yield

    run: Call = lambda: current[0]()  # noqa: E731
    return HostTimer([run], "eager", synchronise=synchroniser(device), around=around)


def _timer(denoiser: Denoiser, call: Any, timing: str, device: torch.device) -> Timer:
    if timing == "graph":
        return GraphTimer([call], timing, stream=torch.cuda.Stream(device), least=1)
    torch.compiler.reset()
    compiled = torch.compile(denoiser.module)
    return HostTimer([lambda: call(compiled)], timing, synchronise=synchroniser(device))


def _row(
    session: Session, name: str, dtype: torch.dtype, method: str, timing: str, **columns: Any
) -> Row:
    return session.row(
        bench="model", case=name, dtype=name_of(dtype), direction="forward", provider=method,
        timing=timing, **columns,
    )  # fmt: skip


def run_memory(
    session: Session,
    names: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    methods: Sequence[str] = tuple(METHODS),
) -> list[Row]:
    """Peak memory of a call above weights and inputs; the cache of NASA is in its first call."""
    rows: list[Row] = []
    for name, dtype in _cases(session, names, dtypes):
        denoiser = build(MODELS[name], dtype, session.device)
        found = []
        for method in methods:
            try:
                with METHODS[method](denoiser) as call:
                    peak = peak_bytes(call, session.device)
            except (RuntimeError, ValueError) as error:
                session.leave_out(f"{method} on {name}", str(error))
                continue
            found.append(
                session.row(
                    bench="memory", case=name, dtype=name_of(dtype), direction="forward",
                    provider=method, timing="peak", peak_bytes=peak,
                )
            )  # fmt: skip
        del denoiser
        gc.collect()
        session.write(found)
        rows += found
    return rows
