"""The first minutes on an NVIDIA GPU: what only a GPU can show, in the order in which it matters.

    python tools/gpu.py [--report FILE] [--minutes 8] [--only NAME,...]

Each step prints what was predicted from the machine code beside what is measured; all of it goes to
one report. Without a GPU it says what it would do, runs the checks of its first steps on a CPU back
end, so that they are known to run, and looks for every test file it names.

Right answers come first: a kernel that is wrong is not timed. Predictions are models
(docs/kernels/statics.md): ratios can be trusted, digits cannot.
"""

import argparse
import contextlib
import functools
import itertools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from bench import statics  # noqa: E402
from nasa_kernels import nasa_attention, nasa_joint_attention  # noqa: E402
from nasa_kernels.backends import why_not  # noqa: E402
from nasa_kernels.testing import (  # noqa: E402
    Shape,
    exact_and_budget,
    exact_and_budget_of_joint,
    make_inputs,
    take_in_one_launch,
)

HEAD_DIMS = (40, 64, 72, 80, 128, 160, 112)
LENGTHS = ((77, 77), (80, 80), (120, 120), (128, 1), (0, 77), (512, 512), (129, 77))
RULES = ("nasa", "projected")
TIMES_THE_SAME = 20
STOPPED = 124
SUITE = (
    "tests/diffusers/test_pipe_gpu.py", "tests/op/test_forward.py", "tests/op/test_backward.py",
    "tests/op/test_properties.py", "tests/op/test_projected.py", "tests/op/test_ops.py",
    "tests/op/test_errors.py", "tests/op/test_nag.py", "tests/op/test_joint.py",
    "tests/op/test_joint_backward.py", "tests/op/test_fuzz.py", "tests/bench/test_bench_gpu.py",
)  # fmt: skip


class Report:
    """Lines for the terminal and for the file."""

    def __init__(self, path: Path, minutes: float):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("w", encoding="utf-8")
        self.end = time.monotonic() + 60 * minutes
        self.failed: list[str] = []

    def __call__(self, line: str = "") -> None:
        print(line, flush=True)
        print(line, file=self.file, flush=True)

    def left(self) -> float:
        return self.end - time.monotonic()

    def fail(self, line: str) -> None:
        self.failed.append(line)
        self(f"FAIL {line}")


class Machine(NamedTuple):
    device: torch.device
    backend: str  # the one that is looked at first
    real: bool  # a GPU is here

    def backends(self) -> list[str]:
        names = ("cuda", "triton") if self.real else (self.backend,)
        return [name for name in names if why_not(name, self.device) is None]


def machine() -> Machine:
    if torch.cuda.is_available():
        return Machine(torch.device("cuda", 0), "cuda", True)
    device = torch.device("cpu")
    return Machine(device, "cpu" if why_not("cpu", device) is None else "reference", False)


# ---- right answers ------------------------------------------------------------------------------


def calls(m: Machine) -> Iterator[tuple[str, Shape, dict[str, Any]]]:
    """Head_dims, lengths, and what a call may bring along."""
    lengths = (200, 4096) if m.real else (33,)
    for l, d, (n_pos, n_neg) in itertools.product(lengths, HEAD_DIMS, LENGTHS):
        if not m.real and (d, n_pos) not in ((64, 77), (160, 129)):
            continue
        shape = Shape("gpu", 1, l, 2, d, n_pos, n_neg)
        for how in ("plain", "mask", "alpha map"):
            extra: dict[str, Any] = {"alpha": 0.75}
            if how == "mask":
                for side, n in (("pos", n_pos), ("neg", n_neg)):
                    extra[f"mask_{side}"] = (torch.arange(n, device=m.device) % 5 != 2)[None]
            elif how == "alpha map":
                extra["alpha"] = torch.linspace(-1, 2, l, device=m.device)[None, :, None]
            yield f"d{d} l{l} {n_pos}+{n_neg} {how}", shape, extra


def forward(m: Machine, report: Report) -> None:
    """Against fp64, and the same bits every time."""
    count = 0
    for name, shape, extra in calls(m):
        inputs = make_inputs(shape, torch.bfloat16, m.device)
        for rule in RULES:
            exact, budget = exact_and_budget(inputs, rule=rule, **extra)
            call = functools.partial(
                nasa_attention, **inputs, rule=rule, backend=m.backend, **extra
            )
            if not check(report, f"{name} {rule}", call, exact, budget, m):
                return
            count += 1
    report(f"{count} calls within the budget, each again with the same bits")


@contextlib.contextmanager
def one_launch_up_to(flops: int) -> Iterator[None]:
    before = take_in_one_launch(flops)
    try:
        yield
    finally:
        take_in_one_launch(before)


def joint(m: Machine, report: Report) -> None:
    """Beside shared keys, with rows of all kinds, in one launch and in two; the first launch at
    lengths of one, too.
    """
    sizes = ((4608, 4096), (1, 77), (77, 1), (1, 1), (300, 200)) if m.real else ((40, 30),)
    count = 0
    for (l, n), d, rule in itertools.product(sizes, (64, 128), ("nasa", "nasa-cross", "projected")):
        shape = Shape("joint", 1, l, 2, d, 120, 77)
        prompts = make_inputs(shape, torch.bfloat16, m.device)
        image = make_inputs(shape._replace(n_pos=n), torch.bfloat16, m.device)
        inputs = {"q": prompts.pop("q"), "k": image["k_pos"], "v": image["v_pos"]} | prompts
        text = (min(9, l // 3), min(7, l // 3))
        exact, budget = exact_and_budget_of_joint(inputs, 0.75, rule, text)
        how = {"alpha": 0.75, "rule": rule, "text_queries": text, "backend": m.backend}
        call = functools.partial(nasa_joint_attention, **inputs, **how)
        for launches, flops in ((1, 2**60), (2, 0)):
            name = f"joint d{d} l{l} n{n} {rule} in {launches}"
            with one_launch_up_to(flops):
                if not check(report, name, call, exact, budget, m):
                    return
            count += 1
    report(f"{count} joint calls within the budget")


def check(report: Report, name: str, call: Callable[[], Tensor], exact, budget, m: Machine) -> bool:
    """Whether the run may go on: a hang or a fault of the device ends it."""
    try:
        o = call()
        same = all(torch.equal(call(), o) for _ in range(TIMES_THE_SAME if m.real else 1))
    except Exception as error:
        report.fail(f"{name}: {error}")
        return "CUDA error" not in str(error)
    if not same:
        report.fail(f"{name}: other bits in another run")
    try:
        budget.check(o, exact, name)
    except AssertionError as error:
        report.fail(str(error))
    return True


def layouts(m: Machine, report: Report) -> None:
    """NaN beyond the prompts, a fused projection's strides, one prompt for a batch, graphs."""
    shape = Shape("layouts", 4, 200 if m.real else 20, 2, 64, 77, 77)
    inputs = make_inputs(shape, torch.bfloat16, m.device)
    how: dict[str, Any] = {"alpha": 0.5, "backend": m.backend}
    expected = nasa_attention(**inputs, **how)

    def beyond(x: Tensor) -> Tensor:
        b, n, h, d = x.shape
        room = torch.full((b, n + 60, 3 * h, d), float("nan"), dtype=x.dtype, device=x.device)
        room[:, :n, h : 2 * h] = x
        return room[:, :n, h : 2 * h]

    views = {name: beyond(x) for name, x in inputs.items()}
    if not torch.equal(nasa_attention(**views, **how), expected):
        report.fail("rows of a larger tensor with NaN around them")
    one = {name: x if name == "q" else x[:1] for name, x in inputs.items()}
    copies = {name: x.expand(4, -1, -1, -1).contiguous() for name, x in one.items()}
    if not torch.equal(nasa_attention(**one, **how), nasa_attention(**copies, **how)):
        report.fail("one prompt for the whole batch")
    if m.real:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o = nasa_attention(**inputs, **how)
        for seed in (1, 2):
            new = make_inputs(shape, torch.bfloat16, m.device, seed=seed)
            for name, x in inputs.items():
                x.copy_(new[name])
            graph.replay()
            if not torch.equal(o, nasa_attention(**inputs, **how)):
                report.fail("a graph that is replayed with other inputs")
    if torch.cuda.device_count() > 1:
        second = {name: x.to("cuda:1") for name, x in inputs.items()}
        if not torch.equal(
            nasa_attention(**second, **how).cpu(), nasa_attention(**inputs, **how).cpu()
        ):
            report.fail("the second GPU")
    report("strides, one prompt for a batch" + (", a captured graph" if m.real else ""))


def sanitizer(m: Machine, report: Report) -> None:
    """Races and addresses, by the toolkit's checker, in a process of its own."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).is_file():
        report("no compute-sanitizer: races in shared memory were looked for in the PTX alone")
        return
    for kind in ("memcheck", "racecheck"):
        command = [tool, "--tool", kind, "--error-exitcode", "9", sys.executable, __file__]
        done = run(report, [*command, "--only", "layouts", "--report", os.devnull], 60)
        if done == 9:
            report.fail(f"compute-sanitizer {kind}")


def small_shared_memory(m: Machine, report: Report) -> None:
    """(128, 77, 77) asked for more than the 99 KiB of a block on RTX 30, 40, 50, A10, L4, L40."""
    inputs = make_inputs(Shape("small", 1, 256, 2, 128, 77, 77), torch.bfloat16, m.device)
    for name in m.backends():
        try:
            nasa_attention(**inputs, alpha=0.5, backend=name)
            report(f"{name} takes head_dim 128 with 77+77 keys")
        except Exception as error:
            report.fail(f"{name}, head_dim 128 with 77+77 keys: {error}")


# ---- times ---------------------------------------------------------------------------------------


def nearest(m: Machine) -> statics.Gpu | None:
    if not m.real:
        return next(gpu for gpu in statics.GPUS if gpu.name == "H100")
    major, minor = torch.cuda.get_device_capability(m.device)
    mine = [gpu for gpu in statics.GPUS if gpu.major == major]
    small = (major, minor) in ((8, 6), (8, 9))
    return next((gpu for gpu in mine if (gpu.name.startswith("RTX")) == (small or major == 12)),
                None)  # fmt: skip


def measured_us(call: Callable[[], Any], m: Machine) -> float:
    from bench.timing import GraphTimer

    timer = GraphTimer([call] * 50, "warm", stream=torch.cuda.Stream(m.device))
    timer.sample(12)
    us = timer.results["warm"].quantile(0.5)
    timer.close()
    return us


def predicted_us(gpu: statics.Gpu | None, shape: Shape) -> float | None:
    """Of the CUDA C++ kernel; None without a model of it."""
    if gpu is None:
        return None
    for row in statics.recorded():
        if row.gpu == gpu.name and row.shape.startswith(f"{shape.name}-b"):
            return statics.predicted_us(gpu, row, shape)
    return None


def time_layers(m: Machine, report: Report, shapes: list[Shape]) -> None:
    gpu = nearest(m)
    report(f"predicted for {gpu.name}" if gpu else "no model of this GPU")
    report(f"{'layer':<38} {'predicted us':>12} " + " ".join(f"{n:>10}" for n in m.backends()))
    for shape in shapes:
        predicted = predicted_us(gpu, shape)
        cells = []
        for name in m.backends():
            if not m.real:
                cells.append("-")
                continue
            inputs = make_inputs(shape, torch.bfloat16, m.device)
            call = functools.partial(nasa_attention, **inputs, alpha=0.5, backend=name)
            try:
                cells.append(f"{measured_us(call, m):.1f}")
            except Exception as error:
                report.fail(f"{shape} {name}: {error}")
                cells.append("error")
        text = "-" if predicted is None else f"{predicted:.1f}"
        report(f"{shape!s:<38} {text:>12} " + " ".join(f"{cell:>10}" for cell in cells))


def layer(name: str, b: int, **how: int) -> Shape:
    return next(s for s in statics.SHAPES if s.name == name)._replace(b=b, **how)


def heads(m: Machine, report: Report) -> None:
    """A grid that does not fit the GPU would make 11 heads faster than 10."""
    time_layers(m, report, [layer("sdxl-64", 4), layer("sdxl-64", 4, h=11)])


def batches(m: Machine, report: Report) -> None:
    """If `cuda` and `triton` are not within 0.6 to 1.6 of each other, the counts mislead."""
    names = ("sdxl-64", "sdxl-32", "sd15-64", "sd15-16", "pixart-1024", "flux-text", "sd3-text")
    time_layers(m, report, [layer(name, b) for b in (1, 4) for name in names])


def streamed(m: Machine, report: Report) -> None:
    """Prompts that pass by, where the products bound: Wan."""
    time_layers(m, report, [layer("wan-1.3b", 1)])


def images(m: Machine, report: Report) -> None:
    """Joint attention in one launch and in two: the limit of `_joint/shared.py` is a model's."""
    sizes = ((256, 24, 128), (576, 24, 128), (1024, 24, 128), (256, 24, 64), (1024, 24, 64))
    for (n, h, d), backend in itertools.product(sizes if m.real else (), m.backends()):
        prompts = make_inputs(Shape("image", 1, n, h, d, 256, 256), torch.bfloat16, m.device)
        prompts |= {"k": prompts["q"], "v": prompts["q"], "alpha": 0.5, "backend": backend}
        call = functools.partial(nasa_joint_attention, **prompts)
        us = []
        for flops in (2**60, 0):
            with one_launch_up_to(flops):
                us.append(measured_us(call, m))
        report(f"{backend} n{n} h{h} d{d}: {us[0]:.1f} us in one launch, {us[1]:.1f} in two")


def overlap(m: Machine, report: Report) -> None:
    """Programmatic dependent launch at batch 1: on only if it wins here."""
    from nasa_kernels._cuda import extension

    if not m.real:
        report("would time sdxl-64 at batch 1 with and without it")
        return
    try:
        for on in (False, True):
            extension.overlap_launches(on)
            report(f"overlap {'on' if on else 'off'}:")
            time_layers(m, report, [layer("sdxl-64", 1)])
    finally:
        extension.overlap_launches(False)


# ---- commands ------------------------------------------------------------------------------------


def run(report: Report, command: list[str], seconds: float) -> int:
    """Exit status; the last lines of what it printed go to the report."""
    path = f"{ROOT}{os.pathsep}{ROOT / 'python'}"
    offline = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    report("$ " + " ".join(command).replace(sys.executable, "python"))
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | offline, text=True, capture_output=True,
            timeout=max(1.0, min(seconds, report.left())),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        report(f"stopped: its {seconds:.0f} s, or the time of this run, were over")
        return STOPPED
    for line in (done.stdout + done.stderr).splitlines()[-12:]:
        report(f"    {line}")
    return done.returncode


def versions(m: Machine, report: Report) -> None:
    if run(report, [sys.executable, "-m", "nasa_kernels"], 120) not in (0, STOPPED):
        report.fail("python -m nasa_kernels")


def suite(m: Machine, report: Report) -> None:
    missing = [name for name in SUITE if not (ROOT / name).is_file()]
    for name in missing:
        report.fail(f"{name} is not there")
    if not m.real:
        report("would run " + " ".join(SUITE))
        return
    # the pipelines first: nothing else here runs them on a GPU
    for names, seconds in (SUITE[:1], 60.0), (SUITE[1:], 180.0):
        if run(report, [sys.executable, "-m", "pytest", "-q", "-x", *names], seconds) not in (
            0,
            STOPPED,
        ):
            report.fail(f"pytest {' '.join(names)}")


def rows(m: Machine, report: Report) -> None:
    """Rows with versions, spread and baselines, for bench/results; `make bench` takes longer."""
    minutes = (report.left() - 30) / 60
    if not m.real or minutes < 1:
        report("would run" if not m.real else "no time was left for: python -m bench all")
        return
    command = [sys.executable, "-m", "bench", "all", "--minutes", f"{min(minutes, 2):.1f}"]
    if run(report, command, report.left()) not in (0, STOPPED):
        report.fail("python -m bench all")


class Step(NamedTuple):
    name: str
    expects: str
    run: Callable[[Machine, Report], None]


STEPS = (
    Step("versions", "the driver serves the runtime in the extension", versions),
    Step("forward", "every call within the budget: wgmma on 40, 72, 80 and 160 columns", forward),
    Step("layouts", "bit for bit the contiguous call", layouts),
    Step("sanitizer", "no race, no address out of bounds", sanitizer),
    Step("joint", "the first launch takes lengths of one, or another takes its place", joint),
    Step("small", "no back end asks for more shared memory than a block has", small_shared_memory),
    Step("heads", "11 heads take 1.0 to 1.15 times what 10 do", heads),
    Step("batches", "times in the ratios of the predictions", batches),
    Step("streamed", "Wan at its tensor pipe, with gaps", streamed),
    Step("images", "in one launch no more than 4 us slower up to 2^32 FLOPs, a model", images),
    Step("overlap", "a microsecond less, or nothing", overlap),
    Step("suite", "green", suite),
    Step("rows", "the same times, beside what one would use instead", rows),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", type=Path, default=ROOT / "build" / "gpu.txt")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--only", default=",".join(step.name for step in STEPS))
    options = parser.parse_args()
    wanted = options.only.split(",")
    if unknown := set(wanted) - {step.name for step in STEPS}:
        parser.error(f"--only: no step is named {', '.join(sorted(unknown))}")
    m, report = machine(), Report(options.report, options.minutes)
    if m.real:
        report(f"{torch.cuda.get_device_name(m.device)}, torch {torch.__version__}")
        if "cuda" not in m.backends():
            report.fail(f"backend cuda does not run here: {why_not('cuda', m.device)}")
            m = m._replace(backend="triton")
    else:
        report(f"DRY RUN, there is no GPU: the checks run on backend {m.backend}, nothing is timed")
    for step in STEPS:
        if step.name not in wanted:
            continue
        if report.left() < 5:
            report.fail(f"{step.name} and what follows: no time was left")
            break
        report(f"\n## {step.name}: {step.expects}")
        started = time.monotonic()
        step.run(m, report)
        report(f"({time.monotonic() - started:.0f} s)")
    report(f"\n{len(report.failed)} failures; the report is {options.report}")
    return bool(report.failed)


if __name__ == "__main__":
    sys.exit(main())
