"""One training loop for everything that has one loss: resumable, averaged, logged."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nasa_distill.scalars import read_numbers
from nasa_distill.train import checkpoint, muon
from nasa_distill.train.average import average_of, resume
from nasa_distill.train.seeds import generator

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Settings:
    """The optimisers, their schedule and the average. These and the data decide the result."""

    steps: int
    batch: int = 64
    learning_rate: float = 1e-3
    warmup: int = 100
    weight_decay: float = 1e-4
    ema: float = 0.998
    seed: int = 0
    muon: float | None = None  # learning rate of `Muon`, for matrices; None: AdamW for everything

    def __post_init__(self) -> None:
        read_numbers(self)


def schedule(settings: Settings, step: int) -> float:
    """Of learning rates: linear warm-up, then half a cosine down to nothing."""
    warm = min(1.0, (step + 1) / settings.warmup)
    return warm * 0.5 * (1 + math.cos(math.pi * step / settings.steps))


def fit(
    module: Module,
    loss: Callable[[Module, int, torch.Generator], Tensor],
    settings: Settings,
    out: Path,
    what: str,
    check: Callable[[Module], Any] | None = None,
    save_every: int = 200,
    check_every: int = 1000,
    channels_last: bool = True,
) -> Module:
    """Train, or go on training, and return the average of the weights.

    Args:
        module: Trained in place.
        loss: Of the module, at a step, with the generator of that step.
        out: Folder of the log and the checkpoint.
        what: Named by the progress bar, the checkpoint and the errors.
        check: Called on the average every `check_every` steps; its result is logged.
        channels_last: The layout of weights: in fp32 a sixth faster on a CPU, in bf16 slower.

    Raises:
        FloatingPointError: The loss is not finite. The last checkpoint is kept.
        ValueError, OSError: As `checkpoint.load` and `checkpoint.save`.
    """
    path = out / f"{what}.pt"
    identity = {"what": what, **asdict(settings)}
    state = checkpoint.load(path, identity)
    if channels_last:
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average: Any = average_of(module, lambda count: min(settings.ema, count / (count + 9)))
    optimisers = make_optimisers(module, settings)
    start = 0
    if state is not None:
        module.load_state_dict(state["module"])
        average.module.load_state_dict(state["average"])
        for optimiser, saved in zip(optimisers, _listed(state["optimiser"]), strict=True):
            optimiser.load_state_dict(saved)
        start = state["step"]
        resume(average, start)
    log = checkpoint.Log(out / f"{what}.jsonl", start)
    module.train()
    for step in tqdm(range(start, settings.steps), what, settings.steps, initial=start):
        value = loss(module, step, generator(settings.seed, step))
        if not math.isfinite(value.item()):
            kept = f"{path} holds the last good step" if path.exists() else "nothing was saved"
            raise FloatingPointError(
                f"fit: the loss of the {what} is {value.item()} at step {step}; {kept}. Lower the "
                f"learning rate, now {settings.learning_rate:g}"
            )
        module.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = optimiser.defaults["lr"] * schedule(settings, step)
            optimiser.step()
        average.update_parameters(module)

        done = step + 1
        log.write(done, loss=value.item())
        if check is not None and (done % check_every == 0 or done == settings.steps):
            log.write(done, check=check(average.module))
        if done % save_every == 0 or done == settings.steps:
            weights = {"module": module.state_dict(), "average": average.module.state_dict()}
            states = [optimiser.state_dict() for optimiser in optimisers]
            checkpoint.save(
                {"settings": identity, "step": done, "optimiser": states} | weights, path
            )
    return average.module.to(memory_format=torch.contiguous_format)


def in_bf16(device: str = "cpu") -> torch.autocast:
    """Matrix products in bf16, where the processor has them.

    An x86 CPU without AVX-512 takes several times as long for them as for those of fp32.
    """
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.autocast(
        device, torch.bfloat16, enabled=device != "cpu" or known.get("avx512_bf16", True)
    )


def make_optimisers(module: nn.Module, settings: Settings) -> list[torch.optim.Optimizer]:
    """AdamW, and before it Muon where that is wanted."""
    first: list[torch.optim.Optimizer] = []
    others: list[Tensor] = list(module.parameters())
    if settings.muon is not None:
        inner, others = muon.split(module)
        first.append(muon.Muon(inner, settings.muon))
    decay = settings.weight_decay
    return [*first, torch.optim.AdamW(others, settings.learning_rate, weight_decay=decay)]


def _listed(states: Any) -> list[Any]:
    """Checkpoints held the state of AdamW alone before there was another."""
    return states if isinstance(states, list) else [states]
