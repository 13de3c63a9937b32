"""`bench readme`: the page on performance and the README's headlines, made from the result files.

`docs/performance.md` is written as a whole; in the README what stands between the two markers is.
Nothing of either is typed, so a number in it is in a result file, with its commit, its versions
and its spread.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.host_shares import shares
from bench.machine import RESULTS, ROOT, slug
from bench.op import HEADLINE, is_whole_layer
from bench.row import Row, in_threads, latest, read, with_most_threads
from bench.session import number
from nasa_kernels import backends

BEGIN = "<!-- made by `python -m bench readme`: begin -->"
END = "<!-- made by `python -m bench readme`: end -->"
README, PAGE = ROOT / "README.md", ROOT / "docs" / "performance.md"
PLOTS_OF_PAGE = "../bench/results/plots"
INTRODUCTION = """# Performance

Made by `python -m bench readme` from the rows in `bench/results/`: each has its commit, versions
and spread. `make bench` measures on your machine; [bench/README.md](../bench/README.md) says how,
and what the columns mean."""
NO_GPU = "No row of a GPU is in `bench/results/` yet, so no time on one is stated."
DEVICES = 2  # of the README: the last ones, with two lines each
METHODS = {
    "algorithm-1": "Algorithm 1",
    "nasa-first": "NASA, first call",
    "nasa-later": "NASA, later calls",
    "nag": "NAG, as published",
    "cfg": "CFG",
}
CALLS = {
    "nasa": "NASA",
    "algorithm-1": "Algorithm 1",
    "nag": "NAG, as published",
    "cfg": "classifier-free guidance",
}
PAPER = 0.0189
# models whose text and image attend together, by the beginning of their names
JOINT = ("FLUX", "SD3")
# what is near the paper's number: within a tenth of it
NEAR = 0.1
# one per back end, without the variants that benchmarks add
OURS = {f"nasa-{name}" for name in backends.NAMES}


def run(check: bool = False) -> int:
    """Write both files, or only say whether they are what the rows give; 1 where they are not."""
    stale = [path for path, text in pages().items() if not _has(path, text)]
    if not check:
        for path, text in pages().items():
            path.write_text(text, encoding="utf-8")
        return 0
    for path in stale:
        print(f"{path.name} is not current: run `python -m bench readme`")
    if not stale:
        print("current")
    return 1 if stale else 0


def _has(path: Path, text: str) -> bool:
    return path.exists() and path.read_text(encoding="utf-8") == text


def pages(readme: Path = README, page: Path = PAGE, results: Path = RESULTS) -> dict[Path, str]:
    """The text of both files; raises where the README has no place for it."""
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"bench readme: {readme} must have one line {BEGIN!r} and one {END!r}")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    rows = [row for path in sorted(results.glob("*.csv")) for row in read(path)]
    short = headlines(rows, results)
    return {
        readme: f"{before}{BEGIN}\n{short}\n{END}{after}",
        page: section(rows, results),
    }


def section(rows: Iterable[Row], results: Path = RESULTS) -> str:
    """The page on performance."""
    newest = list(latest(rows).values())
    parts = [INTRODUCTION, _flops(newest)]
    if (results / "plots" / "overhead.png").exists():
        parts.append(
            f"![What a negative prompt adds to a denoiser call]({PLOTS_OF_PAGE}/overhead.png)"
        )
    parts += [_device([r for r in newest if _of(r) == d], results) for d in _devices(newest)]
    parts.append(_host(newest))
    if not _has_gpu(newest):
        parts.append(f"{NO_GPU} `make gpu` measures on yours.")
    return "\n\n".join(part for part in parts if part) + "\n"


def headlines(rows: Iterable[Row], results: Path = RESULTS) -> str:
    """At most six lines, and two plots."""
    newest = with_most_threads(latest(rows).values())
    lines = [_flops_added(newest)]
    for device in _devices([r for r in newest if r.bench != "host"])[-DEVICES:]:
        of = [r for r in newest if _of(r) == device]
        lines += [_call_headline(of), _operation_headline(of)]
    text = ["\n".join(f"- {line}" for line in lines if line)]
    if not _has_gpu(newest):
        text.append(NO_GPU)
    plots = results / "plots"
    speedups = [f"{slug(r.device)}-speedup.png" for r in newest if r.bench == "op"]
    for name, what in (
        ("overhead.png", "FLOPs that a negative prompt adds to a denoiser call"),
        (next(iter(reversed(speedups)), ""), "times as fast as Algorithm 1"),
    ):
        if name and (plots / name).exists():
            text.append(f"![{what}](bench/results/plots/{name})")
    return "\n\n".join(text)


def _of(row: Row) -> tuple[str, Any]:
    return row.device, row.threads


def _devices(rows: list[Row]) -> list[tuple[str, Any]]:
    return list(dict.fromkeys(_of(r) for r in rows if r.device != "meta"))


def _has_gpu(rows: list[Row]) -> bool:
    return any(r.cuda and r.driver for r in rows)


def _flops_added(rows: list[Row]) -> str:
    """How far the models lie apart, per method."""
    rows = [r for r in rows if r.bench == "flops" and r.flops]
    stock = {r.case: r.flops for r in rows if r.provider == "stock"}
    added: dict[str, list[float]] = {}
    for r in rows:
        if r.provider in METHODS and r.case in stock:
            added.setdefault(r.provider, []).append(r.flops / stock[r.case] - 1)  # type: ignore
    said = [f"{METHODS[m]} {_span(added[m])}" for m in METHODS if m in added]
    if not said:
        return ""
    return f"FLOPs over a denoiser call without, {len(stock)} models: {'; '.join(said)}"


def _call_headline(rows: list[Row]) -> str:
    """What a negative prompt adds to the time of a whole call, of the first model timed, in every
    dtype."""
    timed = [r for r in rows if r.bench == "model" and r.p50_us]
    first = next((r for r in timed if r.provider == "stock"), None)
    if first is None:
        return ""
    said = []
    for dtype in dict.fromkeys(r.dtype for r in timed):
        of = [r for r in timed if (r.case, r.timing, r.dtype) == (first.case, first.timing, dtype)]
        by = {r.provider: r.p50_us or 0.0 for r in of}
        added = [
            f"{name} {by[m] / by['stock'] - 1:+.1%}"
            for m, name in CALLS.items()
            if m in by and "stock" in by
        ]
        if added:
            said.append(f"{dtype} {', '.join(added)}")
    return f"Time of a call of {first.case}, {_device_name(first)}: {'; '.join(said)}"


def _operation_headline(rows: list[Row]) -> str:
    """Our operation against Algorithm 1, and against one prompt alone, over all forward cases timed
    with cold caches."""
    timed = [r for r in rows if r.bench == "op" and r.timing == "cold" and r.direction == "forward"]
    timed = [r for r in timed if is_whole_layer(r.case)]
    ours = [r for r in timed if r.provider in OURS and r.baseline == "algorithm-1" and r.speedup]
    if not ours:
        return ""
    speedups = [r.speedup or 0.0 for r in ours]
    said = (
        f"The operation forward, {len(ours)} cases, {_device_name(rows[0])}: {min(speedups):.2f} "
        f"to {max(speedups):.2f} times as fast as Algorithm 1"
    )
    stock = {(r.case, r.dtype): r.p50_us or 0.0 for r in timed if r.provider == "stock"}
    shares = [
        (r.p50_us or 0.0) / stock[r.case, r.dtype] for r in ours if (r.case, r.dtype) in stock
    ]
    if shares:
        said += (
            f", in {min(shares):.2f} to {max(shares):.2f} of the time that PyTorch's attention "
            "takes for one prompt"
        )
    return said


def _span(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:+.1%}" if f"{low:.1%}" == f"{high:.1%}" else f"{low:+.1%} to {high:+.1%}"


def _device_name(row: Row) -> str:
    return row.device + in_threads(row.threads)


def _flops(rows: list[Row]) -> str:
    rows = [r for r in rows if r.bench == "flops" and r.flops]
    stock = {r.case: r.flops for r in rows if r.provider == "stock"}
    if not stock:
        return ""
    by = {(r.case, r.provider): r.flops for r in rows}

    def added(case: str, method: str) -> str:
        flops = by.get((case, method))
        return "-" if flops is None else f"{flops / stock[case] - 1:+.2%}"  # type: ignore[operator]

    heads = ["model, one denoiser call", "stock, TFLOP", *METHODS.values()]
    body = [
        [case, f"{flops / 1e12:.3f}", *(added(case, method) for method in METHODS)]  # type: ignore
        for case, flops in stock.items()
    ]
    encoders = [
        f"{r.case} {r.flops / 1e9:.0f}"  # type: ignore[operator]
        for r in rows
        if r.provider == "encode"
    ]
    first = rows[0]
    return "\n\n".join(
        (
            f"**FLOPs added by a negative prompt**, counted on the real architectures "
            f"(torch {first.torch}, diffusers {first.diffusers}, commit {first.commit}):",
            _table(heads, body),
            "Later calls keep the keys and values of both prompts, which a stock pipeline projects "
            "again each time. Encoding the negative prompt comes on top, once per prompt, in "
            f"GFLOP: {', '.join(encoders)}. {_paper(by, stock)}",
        )
    )


def _paper(by: dict, stock: dict) -> str:
    """What of the paper's claim is found, in words that follow from the rows."""
    found = {
        (case, method): by[case, method] / flops - 1
        for case, flops in stock.items()
        for method in ("algorithm-1", "nasa-first", "nasa-later")
        if (case, method) in by
    }
    added = {case: x for (case, method), x in found.items() if method == "algorithm-1"}
    cross = [x for case, x in added.items() if not case.startswith(JOINT)]
    joint = [f"{case} {x:+.2%}" for case, x in added.items() if case.startswith(JOINT)]
    span = f"adds {min(cross):+.2%} to {max(cross):+.2%} to them" if cross else "was not counted"
    near = sorted({case for (case, _), x in found.items() if abs(x / PAPER - 1) < NEAR})
    said = f"within a tenth of it: {', '.join(near)}" if near else "none comes within a tenth of it"
    return (
        f"The paper states {PAPER:+.2%} without naming a model, a resolution or what is counted; "
        f"of these models {said}. For models with text cross-attention its point is reproduced: "
        f"Algorithm 1 {span}, classifier-free guidance +100 %. It gives no algorithm for joint "
        "attention; its equation read literally, two joint attentions, adds to "
        f"{', '.join(joint) or 'none counted'}. FLOPs are not time."
    )


def _device(rows: list[Row], results: Path) -> str:
    timed = [r for r in rows if r.p50_us and r.bench in ("op", "layer", "model")]
    if not timed:
        return ""
    first = timed[0]
    versions = f"torch {first.torch}" + (f", Triton {first.triton}" if first.cuda else "")
    driver = f", driver {first.driver}" if first.driver else ""
    threads = in_threads(first.threads)
    commits = ", ".join(dict.fromkeys(r.commit for r in timed))
    text = [f"**{first.device}**{threads}{driver}, {versions}, commit {commits}:"]
    for bench, timings in (("op", ("cold",)), ("layer", ("warm",)), ("model", ("graph", "eager"))):
        of = [r for r in timed if r.bench == bench and r.timing in timings]
        if bench == "op":
            of = [r for r in of if r.case.split("-b")[0] in HEADLINE]
        if of:
            text.append(_times(bench, of))
    text.append(f"The other layers: `python -m bench show bench/results/{slug(first.device)}.csv`.")
    picture = f"{slug(first.device)}-speedup.png"
    if (results / "plots" / picture).exists():
        text.append(f"![Times as fast as Algorithm 1]({PLOTS_OF_PAGE}/{picture})")
    return "\n\n".join(text)


HOST = (
    "**Host time of a call**, over that of one `scaled_dot_product_attention` call on the same "
    "CPU: Python, PyTorch's dispatcher and the launchers, with a runtime that launches nothing "
    "({versions}; `python -m bench host`). Median (p20-p80). On CPU tensors PyTorch's own "
    "attention over the image, the first launch of joint attention, does compute: the call "
    "`image` is that alone, `shared` has what joint attention puts around it, and **ours** is "
    "what a call takes beside `image`, where the rows have it. The calls with `small` in their "
    "names attend to the image in their own launch, as all joint attention to small images does."
)


def _host(rows: list[Row]) -> str:
    """Of the machine that was measured last: one table has the units of one."""
    of_host = [r for r in rows if r.bench == "host"]
    if not of_host:
        return ""
    machine = _of(max(of_host, key=lambda r: r.date))
    found = shares([r for r in of_host if _of(r) == machine])
    by = {(x.row.provider, x.row.case): x for x in found}
    providers = list(dict.fromkeys(x.row.provider for x in found))
    body = []
    for case in dict.fromkeys(x.row.case for x in found):
        cells = [by.get((provider, case)) for provider in providers]
        body.append([
            case,
            *("-" if x is None else f"{x.all:.2f} ({x.low:.2f}-{x.high:.2f})" for x in cells),
            *("-" if x is None or x.ours is None else f"{x.ours:.2f}" for x in cells),
        ])  # fmt: skip
    first = found[0].row
    of = dict.fromkeys(f"{x.row.device}, commit {x.row.commit}" for x in found)
    versions = f"{'; '.join(of)}; torch {first.torch}, Triton {first.triton}"
    heads = ["call", *providers, *(f"{provider}, ours" for provider in providers)]
    return "\n\n".join((HOST.format(versions=versions), _table(heads, body)))


TITLES = {
    "op": "the operation, cold caches",
    "layer": "one cross-attention layer, projections included",
    "model": "one denoiser call",
}


def _times(bench: str, rows: list[Row]) -> str:
    """Medians with their p20 to p80, one row per case, one column per provider."""
    providers = list(dict.fromkeys(r.provider for r in rows))
    keys = list(dict.fromkeys((r.case, r.dtype, r.direction, r.timing) for r in rows))
    by = {(r.case, r.dtype, r.direction, r.timing, r.provider): r for r in rows}
    heads = [f"{TITLES[bench]}, us", *providers]
    body = []
    for key in keys:
        cells = [by.get((*key, provider)) for provider in providers]
        body.append([" ".join(x for x in key if x), *(_time(r) for r in cells)])
    return _table(heads, body)


def _time(r: Row | None) -> str:
    if r is None:
        return "-"
    return f"{number(r.p50_us)} ({number(r.p20_us)}-{number(r.p80_us)})"


def _table(heads: list[str], body: list[list[str]]) -> str:
    lines = [heads, ["---"] + ["--:"] * (len(heads) - 1), *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
