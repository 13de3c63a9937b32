"""`bench op`: the operation alone, forward and backward, on the layers of real models."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench import gate
from bench.kinds import KINDS
from bench.launches import count_launches, peak_bytes
from bench.machine import cache_bytes, clock_mhz
from bench.providers import BASELINE, Case, Compiled, Inputs, Provider, for_kind
from bench.roofline import name_of
from bench.row import Row
from bench.session import Session
from bench.timing import (
    Call,
    GraphTimer,
    HostTimer,
    Timer,
    measure,
    rotations,
    synchroniser,
)
from nasa_kernels.testing import MODEL_SHAPES, Shape

ALPHA = 0.5
# headline cases, measured first: a run that is cut short has their rows
HEADLINE = ("sdxl-64", "sd15-64", "pixart-1024", "sd21-64")
NAMES = (*HEADLINE, *(s.name for s in MODEL_SHAPES if s.name not in HEADLINE))
# what is measured where it is asked for: a part of a clip, a small FLUX, models whose keys have
# fewer heads, and calls of other kinds
PARTS = (
    Shape("wan-2k", 1, 2000, 12, 128, 512, 512),
    Shape("flux-like", 1, 2048, 4, 128, 256, 256),
    Shape("krea2", 1, 4096, 48, 128, 512, 64),
    Shape("lumina2", 1, 4096, 24, 96, 256, 64),
    Shape("ace-step", 1, 750, 16, 128, 256, 256),
)
KINDS_OF = {
    "masked": ("pixart-1024",),
    "projected": ("sdxl-64", "sd15-64", "sd15-16", "pixart-1024"),
    "nag": ("sdxl-64", "sd15-64", "sd15-16", "pixart-1024"),
    "grouped": ("ace-step",),
    "joint": ("flux-like",),
    "joint-grouped": ("krea2", "lumina2"),
    "joint-projected": ("flux-like",),
    "joint-nag": ("flux-like",),
}
_MORE = {"wan-2k": ("", "wan-2k")} | {
    f"{kind}-{name}": (kind, name) for kind, names in KINDS_OF.items() for name in names
}
ALL_NAMES = (*NAMES, *_MORE)


def is_whole_layer(case: str) -> bool:
    """Whether a row's case is `nasa_attention` on a layer of a model."""
    return case.split("-b")[0] not in _MORE


def cases(
    device: torch.device,
    names: Sequence[str],
    batches: Iterable[int],
    dtypes: Iterable[torch.dtype],
    directions: Iterable[str],
) -> list[Case]:
    """Every combination, in the order of the arguments' values. Other kinds of calls are measured
    forward alone."""
    shapes = {shape.name: shape for shape in (*MODEL_SHAPES, *PARTS)}
    found = []
    for dtype in dtypes:
        for direction in directions:
            for b in batches:
                for name in names:
                    kind, shape = _MORE.get(name, ("", name))
                    if not kind or direction == "forward":
                        sized = shapes[shape]._replace(b=b)
                        found.append(Case(sized, dtype, device, direction, kind))
    return found


def run(
    session: Session,
    wanted: Sequence[Case],
    providers: Sequence[Provider],
    timings: Sequence[str] = ("cold", "warm", "eager"),
) -> list[Row]:
    """Measure case by case; the rows of a finished case are written before the next begins."""
    rows: list[Row] = []
    for case in wanted:
        if session.is_over:
            session.leave_out(f"{case} {case.direction}", "no time was left")
            continue
        found = run_case(session, case, providers, timings)
        session.write(found)
        rows += found
        session.say(f"{case} {name_of(case.dtype)} {case.direction}: {len(found)} rows")
    return rows


def run_case(
    session: Session, case: Case, providers: Sequence[Provider], timings: Sequence[str]
) -> list[Row]:
    """All providers of one case. What does not run, or is wrong, gets no row but a reason."""
    torch.compiler.reset()
    providers = [p for p in (for_kind(p, case.kind) for p in providers) if p is not None]
    inputs = case.inputs()
    grad_o = torch.randn_like(inputs["q"])
    result = inputs["q"].numel() * case.dtype.itemsize
    sets = [inputs]
    if "cold" in timings:
        needed = rotations(inputs.values(), result, cache_bytes(case.device))
        sets += [{name: x.clone() for name, x in inputs.items()} for _ in range(needed - 1)]

    timers: dict[tuple[str, str], Timer] = {}
    facts: dict[str, dict[str, Any]] = {}
    try:
        for provider in providers:
            label = f"{provider.name} on {case} {name_of(case.dtype)} {case.direction}"
            reason = provider.refuse(case)
            if reason is not None:
                session.leave_out(label, reason)
                continue
            if isinstance(provider.attend, Compiled):
                provider.attend.reset()
            try:
                with provider.around():
                    facts[provider.name] = _facts(provider, case, inputs, grad_o)
                for timing in timings:
                    calls = _calls(provider, case, sets if timing == "cold" else sets[:1], grad_o)
                    timers[provider.name, timing] = _timer(calls, timing, provider, case.device)
            except (gate.WrongResult, RuntimeError, ValueError, ImportError) as error:
                # a named back end of PyTorch says here that it does not take the case
                wrong = "its result is wrong: " if isinstance(error, gate.WrongResult) else ""
                session.leave_out(label, f"{wrong}{error}")
                facts.pop(provider.name, None)
        before = clock_mhz(case.device)
        running = {key: t for key, t in timers.items() if key[0] in facts}
        measure(running.values(), seconds=session.seconds)
        clocks = {"mhz_before": before, "mhz_after": clock_mhz(case.device)}
        return _rows(session, case, providers, running, facts, clocks)
    finally:
        for timer in timers.values():
            timer.close()
        del timers, sets
        gc.collect()
        if case.device.type == "cuda":
            torch.cuda.empty_cache()


def _facts(provider: Provider, case: Case, inputs: Inputs, grad_o: Tensor) -> dict[str, Any]:
    """Errors, launches and memory of one provider; raises `WrongResult`."""
    alpha = provider.alpha(ALPHA)
    slack = 1.0 if provider.ours else gate.SLACK_OF_OTHERS
    if case.direction == "forward":
        with torch.no_grad():
            o = provider.attend(provider.arrange(inputs), ALPHA)
        if not case.kind:
            errors = gate.check_forward(o, inputs, alpha, slack)
        elif KINDS[case.kind].is_by_row:
            errors = gate.check_forward(o, inputs, alpha, slack, KINDS[case.kind].exact)
        else:
            errors = gate.check_whole(o, *KINDS[case.kind].exact(inputs, alpha), slack)
        del o
    else:

        def attend(alpha: float, **leaves: Tensor) -> Tensor:
            return provider.attend(provider.arrange(leaves), alpha)

        found = gate.gradients_of(attend, inputs, ALPHA, grad_o, _differentiated(provider))
        errors = gate.check_backward(found, inputs, grad_o, alpha, slack)
        del found
    (call,) = _calls(provider, case, [inputs], grad_o)
    return errors.columns() | {
        "launches": count_launches(call, case.device),
        "peak_bytes": peak_bytes(call, case.device),
    }


def _differentiated(provider: Provider) -> tuple[str, ...]:
    negative = ("k_neg", "v_neg") if provider.guided else ()
    return ("q", "k_pos", "v_pos", *negative)


def _calls(provider: Provider, case: Case, sets: Sequence[Inputs], grad_o: Tensor) -> list[Call]:
    """One call per set of buffers. A backward call differentiates a forward pass made before."""
    make: Callable[[Inputs], Call]
    if case.direction == "forward":

        def make(inputs: Inputs) -> Call:
            arranged = provider.arrange(inputs)

            def call() -> Tensor:
                with torch.no_grad():
                    return provider.attend(arranged, ALPHA)

            return call

    else:

        def make(inputs: Inputs) -> Call:
            leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
            wanted = [leaves[name] for name in _differentiated(provider)]
            upstream = grad_o.clone() if len(sets) > 1 else grad_o
            made: list[Tensor] = []

            def call() -> tuple[Tensor, ...]:
                if not made:
                    # on the stream of the first call, as autograd runs backward where forward ran
                    with torch.enable_grad():
                        made.append(provider.attend(provider.arrange(leaves), ALPHA))
                return torch.autograd.grad(made[0], wanted, upstream, retain_graph=True)

            return call

    return [make(inputs) for inputs in sets]


def _timer(calls: list[Call], timing: str, provider: Provider, device: torch.device) -> Timer:
    if timing == "eager" or device.type != "cuda":
        return HostTimer(calls, timing, synchronise=synchroniser(device), around=provider.around)
    return GraphTimer(calls, timing, stream=torch.cuda.Stream(device), around=provider.around)


def _rows(
    session: Session,
    case: Case,
    providers: Sequence[Provider],
    timers: dict[tuple[str, str], Timer],
    facts: dict[str, dict[str, Any]],
    clocks: dict[str, float | None],
) -> list[Row]:
    baselines = {
        timing: samples.quantile(0.5)
        for (name, _), timer in timers.items()
        if name == BASELINE
        for timing, samples in timer.results.items()
    }
    guided = {provider.name: provider.guided for provider in providers}
    rows = []
    for (name, _), timer in timers.items():
        work = case.work(guided[name])
        for timing, samples in timer.results.items():
            rows.append(
                session.row(
                    bench="op", case=str(case), dtype=name_of(case.dtype),
                    direction=case.direction, provider=name, timing=timing, **samples.columns(),
                    **clocks, **vars(work), **session.rates.columns(work, case.dtype),
                    **facts[name], baseline=BASELINE if timing in baselines else "",
                    baseline_us=baselines.get(timing),
                )
            )  # fmt: skip
    return rows
