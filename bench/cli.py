"""The commands of `python -m bench`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import mkl
from bench import row as rows_of
from bench.machine import RESULTS, describe, slug
from bench.roofline import BY_NAME, measure_rates, rates_of
from bench.select import matching
from bench.session import Session, console, time_table


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    try:
        if getattr(options, "free_mkl", False) and not mkl.is_free():
            mkl.start_again()
        if getattr(options, "threads", None) is not None:
            if options.threads < 1:
                raise ValueError(f"--threads must be at least 1, got {options.threads}")
            torch.set_num_threads(options.threads)
        return options.run(options) or 0
    except ImportError as error:
        print(f"bench {options.command}: {error}: pip install -e '.[bench]'", file=sys.stderr)
        return 2
    except (ValueError, RuntimeError, OSError) as error:
        print(f"bench {options.command}: error: {error}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run, text: str, measures: bool = True) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.set_defaults(run=run)
        if measures:
            made.add_argument("--out", type=Path, help="result file; default: the device's own")
            made.add_argument("--device", help="default: cuda where there is one")
            made.add_argument("--minutes", type=float, help="begin no case after so many")
            made.add_argument("--quick", action="store_true", help="the headline cases alone")
            made.add_argument("--threads", type=int, help="of a CPU; default: as PyTorch has them")
            made.add_argument(
                "--free-mkl", action="store_true",
                help="PyTorch's products at their best on a CPU that is not Intel's",
            )  # fmt: skip
        return made

    flops = command("flops", run_flops, "count FLOPs by method on the real architectures")
    flops.add_argument("--case", action="append", help="pattern of model names")
    command("roofline", run_roofline, "measure the rates that the floors are made of")
    op = command("op", run_op, "time the operation, forward and backward")
    layer = command("layer", run_layer, "time one cross-attention layer, to_q to to_out")
    model = command("model", run_model, "time a whole denoiser with random weights")
    memory = command("memory", run_memory, "peak memory of a whole denoiser call by method")
    host = command("host", run_host, "host time of a call, with a runtime that launches nothing")
    host.add_argument("--library", type=Path, help="default: build/cuda/host.so")
    for made in (op, layer, model, memory):
        made.add_argument("--case", action="append", help="pattern of case names")
        made.add_argument("--dtype", action="append", choices=BY_NAME)
        made.add_argument("--provider", action="append", help="pattern of providers or methods")
    for made in (op, layer):
        made.add_argument("--batch", type=int, nargs="+", help="default: 1 4 16, on a CPU 1")
    op.add_argument("--direction", choices=("forward", "backward"), action="append")
    op.add_argument("--timing", choices=("cold", "warm", "eager"), action="append")
    op.add_argument("--compiled", action="store_true", help="also what takes seconds to compile")
    model.add_argument("--timing", choices=("eager", "graph", "compiled"), action="append")
    command("all", run_all, "all that makes sense on this machine, headline cases first")

    compare = command("compare", run_compare, "what became worse from A to B", measures=False)
    compare.add_argument("before", type=Path, metavar="A.csv")
    compare.add_argument("after", type=Path, metavar="B.csv")
    compare.add_argument("--tolerance", type=float, default=0.03, help="default: %(default)s")
    plot = command("plot", run_plot, "draw result files as PNG and SVG", measures=False)
    plot.add_argument("files", type=Path, nargs="*", help="default: all of bench/results")
    plot.add_argument("--out", type=Path, default=RESULTS / "plots", help="folder")
    readme = command("readme", run_readme, "renew what the docs say of it", measures=False)
    readme.add_argument("--check", action="store_true", help="only say whether it is current")
    counted = command("statics", run_statics, "count in the compiled kernels", measures=False)
    counted.add_argument("--library", type=Path, help="default: the built extension")
    counted.add_argument("--write", action="store_true", help="renew docs/kernels/statics*.md")
    show = command("show", run_show, "print a result file as tables", measures=False)
    show.add_argument("file", type=Path)
    return parser


def run_statics(options: argparse.Namespace) -> int:
    from bench import statics_command, triton_statics

    return statics_command.run(options.library, options.write) or triton_statics.run(options.write)


# ---- what measures -------------------------------------------------------------------------------


def start(
    device: str | None = None, out: Path | None = None, minutes: float | None = None
) -> Session:
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("--device cuda: this torch sees no NVIDIA GPU; leave the option out")
    where = torch.device(name)
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    machine = describe(where)
    session = Session(machine, where, out or machine.file, console(), minutes)
    threads = rows_of.in_threads(machine.threads)
    session.say(f"{machine.device}{threads}, torch {machine.torch}, commit {machine.commit}")
    return session


def start_as(options: argparse.Namespace) -> Session:
    return start(options.device, options.out, options.minutes)


def finish(session: Session, title: str, rows: list) -> int:
    if rows:
        session.console.print(time_table(title, rows))
        session.say(f"{len(rows)} rows in {session.out}")
    session.report_left_out()
    # a command that was to measure and has nothing to show did not succeed
    return 0 if rows else 1


def with_rates(options: argparse.Namespace) -> Session:
    """A session whose floors come from rates measured in it."""
    session = start_as(options)
    measure_roofline(session, options.quick)
    return session


def measure_roofline(session: Session, quick: bool) -> list:
    rows = measure_rates(session.machine, session.device, quick=quick)
    session.write(rows)
    session.rates = rates_of(rows)
    return rows


def run_flops(options: argparse.Namespace) -> int:
    from bench import flops

    session = start("meta", options.out, options.minutes)
    names = matching(list(flops.MODELS), options.case, "model")
    rows = flops.run(session, names if options.case else ())
    session.console.print(flops_table(rows))
    session.say(f"{len(rows)} rows in {session.out}")
    return 0


def flops_table(rows: list):
    from rich.table import Table

    stock = {r.case: r.flops for r in rows if r.provider == "stock"}
    methods = [m for m in dict.fromkeys(r.provider for r in rows) if m not in ("stock", "encode")]
    by = {(r.case, r.provider): r.flops for r in rows}
    table = Table(title="FLOPs of one denoiser call, over stock", title_justify="left")
    table.add_column("model", no_wrap=True)
    for column in ("stock, TFLOP", *methods):
        table.add_column(column, justify="right", no_wrap=True)
    for case, flops in stock.items():
        added = [by.get((case, method)) for method in methods]
        cells = ["" if x is None else f"{x / flops - 1:+.2%}" for x in added]
        table.add_row(case, f"{flops / 1e12:.3f}", *cells)
    for r in rows:
        if r.provider == "encode":
            table.add_row(f"encode a prompt: {r.case}", f"{r.flops / 1e12:.3f}")
    return table


def run_host(options: argparse.Namespace) -> int:
    from bench import host

    session = start("cpu", options.out, options.minutes)
    rows = host.run(session, options.library, options.quick)
    if rows:
        session.console.print(host_table(rows))
        session.say(f"{len(rows)} rows in {session.out}")
    session.report_left_out()
    return 0 if rows else 1


def host_table(rows: list):
    from rich.table import Table

    from bench.host_shares import shares

    title = f"host time over that of one {rows[0].baseline} call, {rows[0].baseline_us:.1f} us"
    table = Table(title=title, title_justify="left")
    for column in ("back end", "call", "median", "p20 to p80", "of it ours"):
        table.add_column(column, justify="right" if column[0] in "mpo" else "left", no_wrap=True)
    for x in shares(rows):
        ours = "-" if x.ours is None else f"{x.ours:.2f}"
        spread = f"{x.low:.2f} to {x.high:.2f}"
        table.add_row(x.row.provider, x.row.case, f"{x.all:.2f}", spread, ours)
    return table


def run_roofline(options: argparse.Namespace) -> int:
    session = start_as(options)
    return finish(session, "rates", measure_roofline(session, options.quick))


def run_op(options: argparse.Namespace) -> int:
    from bench import op
    from bench.providers import PROVIDERS

    # before minutes are spent on rates
    names = matching(op.ALL_NAMES, options.case, "case") if options.case else None
    providers = matching(list(PROVIDERS), options.provider, "provider")
    session = with_rates(options)
    rows = op_rows(
        session,
        options.quick,
        names,
        options.batch,
        options.dtype,
        options.direction,
        providers if options.provider else None,
        options.timing,
        options.compiled,
    )
    return finish(session, "one operation", rows)


def op_rows(
    session: Session,
    quick: bool = False,
    names: Sequence[str] | None = None,
    batches: Sequence[int] | None = None,
    dtypes: Sequence[str] | None = None,
    directions: Sequence[str] | None = None,
    providers: Sequence[str] | None = None,
    timings: Sequence[str] | None = None,
    compiled: bool = False,
) -> list:
    """Rows of `bench op`; None takes what makes sense on the device of the session."""
    from bench import op
    from bench.providers import PROVIDERS

    on_gpu = session.device.type == "cuda"
    if names is None:
        # Wan takes minutes per call on a CPU
        all_names = [n for n in op.NAMES if on_gpu or not n.startswith("wan")]
        names = op.HEADLINE[: 3 if on_gpu else 2] if quick else all_names
    if dtypes is None:
        dtypes = ["bfloat16", "float16", "float32"] if on_gpu else ["float32", "bfloat16"]
        dtypes = dtypes[:1] if quick else dtypes
    if batches is None:
        batches = ((1, 16) if quick else (1, 16, 4)) if on_gpu else (1,)
    if providers is None:
        providers = [name for name, p in PROVIDERS.items() if compiled or not p.compiled]
    wanted = op.cases(
        session.device,
        names,
        batches,
        [BY_NAME[dtype] for dtype in dtypes],
        directions or ("forward", "backward"),
    )
    return op.run(
        session,
        wanted,
        [PROVIDERS[name] for name in providers],
        timings or (("cold", "warm", "eager") if on_gpu else ("cold", "warm")),
    )


def run_layer(options: argparse.Namespace) -> int:
    from bench import layer

    given = matching(layer.NAMES, options.case, "case") if options.case else None
    methods = matching(list(layer.METHODS), options.provider, "method")
    session = with_rates(options)
    names = given or layer.default_names(session.device, options.quick)
    rows = layer.run(session, names, options.batch, options.dtype, methods)
    return finish(session, "one layer", rows)


def run_model(options: argparse.Namespace) -> int:
    from bench import model

    session = start_as(options)
    names, methods = chosen_models(session.device, options)
    rows = model.run(session, names, options.dtype, methods, options.timing)
    return finish(session, "one denoiser call", rows)


def run_memory(options: argparse.Namespace) -> int:
    from bench import model

    session = start_as(options)
    names, methods = chosen_models(session.device, options)
    return finish(session, "peak memory", model.run_memory(session, names, options.dtype, methods))


def chosen_models(
    device: torch.device, options: argparse.Namespace
) -> tuple[Sequence[str], Sequence[str]]:
    """Names of models, and of methods."""
    from bench import model

    given = matching(list(model.MODELS), options.case, "case") if options.case else None
    methods = list(model.QUICK_METHODS if options.quick else model.METHODS)
    return (
        given or model.default_names(device, options.quick),
        matching(methods, options.provider, "method"),
    )


def run_all(options: argparse.Namespace) -> int:
    """FLOPs into their own file, then what is timed. Each part has a share of the minutes.

    Where diffusers is missing, only what needs it is left out.
    """
    from bench import layer

    try:
        from bench import flops, model
    except ImportError as error:
        print(f"bench all: without models and FLOPs: {error}", file=sys.stderr)
        model = None  # type: ignore[assignment]
    quick = options.quick
    if model is not None and not quick:
        counting = start("meta")
        counting.console.print(flops_table(flops.run(counting)))
    minutes = options.minutes or (1.5 if quick else 5.0)
    session = with_rates(options)
    rows = op_rows(session.within(0.5 * minutes), quick)
    names = layer.default_names(session.device, quick)
    rows += layer.run(session.within(0.2 * minutes), names)
    # the rows of a model have its peak memory as well
    if model is not None and not (quick and session.device.type == "cpu"):
        rows += model.run(
            session.within(0.3 * minutes),
            model.default_names(session.device, quick),
            methods=list(model.QUICK_METHODS if quick else model.METHODS),
        )
    return finish(session, "all", rows)


# ---- what reads result files ---------------------------------------------------------------------


def run_compare(options: argparse.Namespace) -> int:
    from bench import compare

    before, after = rows_of.read(options.before), rows_of.read(options.after)
    found = compare.changes(before, after, options.tolerance)
    if found:
        console().print(compare.table(found))
    code, text = compare.verdict(before, after, found)
    print(text)
    return code


def run_plot(options: argparse.Namespace) -> int:
    """One set of pictures per device, with the counted rows in each."""
    from bench import plot

    files = options.files or sorted(RESULTS.glob("*.csv"))
    rows = [row for path in files for row in rows_of.read(path)]
    if not rows:
        raise ValueError("there are no rows to draw; run `python -m bench all` first")
    counted = [r for r in rows if r.device == "meta"]
    devices = dict.fromkeys(r.device for r in rows if r.device != "meta")
    written = plot.run(counted, options.out)
    for device in devices:
        of = [r for r in rows if r.device == device]
        written += plot.run(of, options.out, f"{slug(device)}-")
    for path in written:
        print(path)
    return 0 if written else 1


def run_readme(options: argparse.Namespace) -> int:
    from bench import readme

    return readme.run(options.check)


def run_show(options: argparse.Namespace) -> int:
    rows = list(rows_of.latest(rows_of.read(options.file)).values())
    console().print(time_table(str(options.file), [r for r in rows if r.bench != "flops"]))
    return 0
