"""`bench readme`: the README's section on performance, made from the result files.

What stands between the two markers is replaced as a whole. Nothing of it is typed, so a number in
it is in a result file, with its commit, its versions and its spread.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from bench.machine import RESULTS, ROOT, slug
from bench.op import HEADLINE
from bench.row import Row, latest, read
from bench.session import number

BEGIN = "<!-- made by `python -m bench readme`: begin -->"
END = "<!-- made by `python -m bench readme`: end -->"
METHODS = {
    "algorithm-1": "Algorithm 1",
    "nasa-first": "NASA, first call",
    "nasa-later": "NASA, later calls",
    "nag": "NAG, as published",
    "cfg": "CFG",
}
PAPER = 0.0189
# models whose text and image attend together, by the beginning of their names
JOINT = ("FLUX", "SD3")
# what is near the paper's number: within a tenth of it
NEAR = 0.1


def update(readme: Path = ROOT / "README.md", results: Path = RESULTS) -> str:
    """The README with its section renewed; raises where there is no place for it."""
    text = readme.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"bench readme: {readme} must have one line {BEGIN!r} and one {END!r}")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    rows = [row for path in sorted(results.glob("*.csv")) for row in read(path)]
    return f"{before}{BEGIN}\n{section(rows, results)}\n{END}{after}"


def section(rows: Iterable[Row], results: Path = RESULTS) -> str:
    newest = list(latest(rows).values())
    parts = [_flops(newest)]
    devices = dict.fromkeys((r.device, r.threads) for r in newest if r.device != "meta")
    parts += [_device([r for r in newest if (r.device, r.threads) == d], results) for d in devices]
    if not any(r.cuda and r.driver for r in newest):
        parts.append(
            "No row of a GPU is in `bench/results/` yet, so no time on one is stated. "
            "`make gpu` measures on yours."
        )
    if (results / "plots" / "overhead.png").exists():
        parts.append(
            "![What a negative prompt adds to a denoiser call](bench/results/plots/overhead.png)"
        )
    return "\n\n".join(part for part in parts if part)


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
    threads = f", {first.threads} threads" if first.threads else ""
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
        text.append(f"![Times as fast as Algorithm 1](bench/results/plots/{picture})")
    return "\n\n".join(text)


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
