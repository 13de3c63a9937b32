"""The row format, the comparison of two files, and what is made from them."""

import dataclasses

import pytest
import torch
from support.bench_rows import row

from bench import cli, compare, plot, readme
from bench import row as rows_of
from bench.roofline import rates_of
from bench.row import COLUMNS, Row


def test_a_row_comes_back_as_it_was(tmp_path):
    path = tmp_path / "rows.csv"
    full = row(
        launches=1, peak_bytes=2**33, max_error=1.25e-3, l2_error=2.5e-4, error_against="fp64",
        baseline="algorithm-1", baseline_us=25.0, floor_us=5.0, floor_of="memory",
        mhz_before=1980.0, threads=2,
    )  # fmt: skip
    rows_of.append(path, [full])
    rows_of.append(path, [row("stock, quoted")])
    assert rows_of.read(path) == [full, row("stock, quoted")]
    assert path.read_text().splitlines()[0] == ",".join(COLUMNS)


def test_derived_columns():
    r = row(us=10.0, floor_us=4.0, baseline_us=25.0)
    assert r.tb_s == pytest.approx(4e6 / 10e-6 / 1e12)
    assert r.tflop_s == pytest.approx(2e9 / 10e-6 / 1e12)
    assert r.floor_percent == pytest.approx(40)
    assert r.speedup == pytest.approx(2.5)
    assert row(flops=None).tflop_s is None


@pytest.mark.parametrize(
    "columns",
    [{"p20_us": 11.0}, {"p50_us": None}, {"p50_us": float("nan")}, {"p20_us": 0.0}, {"case": ""}],
    ids=str,
)
def test_impossible_rows_are_refused(columns):
    with pytest.raises(ValueError, match="Row: "):
        row(**columns)


def test_a_killed_run_does_not_swallow_the_next_row(tmp_path):
    path = tmp_path / "rows.csv"
    rows_of.append(path, [row()])
    path.write_text(path.read_text()[:-20])
    rows_of.append(path, [row("stock")])
    assert len(path.read_text().splitlines()) == 3
    with pytest.raises(ValueError, match=r"rows.csv:2: a row must have \d+ cells"):
        rows_of.read(path)


def test_other_columns_are_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("date,commit,speed\n")
    for use in (rows_of.read, lambda p: rows_of.append(p, [row()])):
        with pytest.raises(ValueError, match="unknown .'speed'.*--out"):
            use(path)
    rows_of.append(tmp_path / "good.csv", [row()])
    text = (tmp_path / "good.csv").read_text()
    path.write_text(text.replace("4000000", "4e6"))
    with pytest.raises(ValueError, match="bytes must be int, got '4e6'"):
        rows_of.read(path)


def test_the_newest_row_of_a_key_counts_and_counted_rows_are_replaced(tmp_path):
    path = tmp_path / "rows.csv"
    rows_of.append(path, [row(us=10.0), row("stock")])
    rows_of.append(path, [row(us=20.0)])
    assert [r.p50_us for r in rows_of.latest(rows_of.read(path)).values()] == [20.0, 10.0]
    rows_of.replace(path, [row(us=30.0)])
    assert [(r.provider, r.p50_us) for r in rows_of.read(path)] == [
        ("stock", 10.0),
        ("nasa-triton", 30.0),
    ]


# ---- compare -------------------------------------------------------------------------------------


def test_rows_with_most_threads_of_their_device():
    rows = [
        row(device="A", threads=2), row(device="A", threads=1), row(device="B", threads=1),
        row(device="C"),
    ]  # fmt: skip
    assert rows_of.with_most_threads(rows) == [rows[0], *rows[2:]]


def test_threads_of_a_run(tmp_path, capsys):
    before = torch.get_num_threads()
    try:
        out = ["--device", "cpu", "--out", str(tmp_path / "rows.csv")]
        assert cli.main(["roofline", "--quick", "--threads", "1", *out]) == 0
        assert {r.threads for r in rows_of.read(tmp_path / "rows.csv")} == {1}
        assert cli.main(["roofline", "--threads", "0", *out]) == 2
        assert "--threads must be at least 1, got 0" in capsys.readouterr().err
    finally:
        torch.set_num_threads(before)


def compared(tmp_path, before, after, *options):
    paths = []
    for name, rows in (("a", before), ("b", after)):
        paths.append(tmp_path / f"{name}.csv")
        rows_of.append(paths[-1], rows)
    return cli.main(["compare", *map(str, paths), *options])


@pytest.mark.parametrize(
    ("before", "after", "code"),
    [
        (row(us=10, spread=0.01), row(us=12, spread=0.01), compare.WORSE),
        (row(us=10, spread=0.3), row(us=12, spread=0.3), compare.NOTHING_WORSE),  # within spread
        (row(us=10, spread=0.001), row(us=10.1, spread=0.001), compare.NOTHING_WORSE),  # tolerance
        (row(us=12, spread=0.01), row(us=10, spread=0.01), compare.NOTHING_WORSE),
        (row(peak_bytes=100), row(peak_bytes=101), compare.WORSE),
        (row(launches=3), row(launches=4), compare.WORSE),
        (row(bench="flops", flops=5), row(bench="flops", flops=6), compare.WORSE),
        (row(us=10, device="one"), row(us=10, device="two"), compare.INCOMPARABLE),
        (row("nasa-triton"), row("stock"), compare.INCOMPARABLE),
    ],
    ids=[
        "slower",
        "spread",
        "tolerance",
        "faster",
        "memory",
        "launches",
        "flops",
        "device",
        "none",
    ],
)
def test_compare_exit_code(tmp_path, capsys, before, after, code):
    assert compared(tmp_path, [before], [after]) == code
    assert capsys.readouterr().out


def test_compare_says_what_is_gone_and_takes_a_tolerance(tmp_path, capsys):
    before = [row(us=10, spread=0.001), row("stock")]
    after = [row(us=10.5, spread=0.001)]
    assert compared(tmp_path, before, after) == compare.WORSE
    assert "1 only in A" in capsys.readouterr().out
    (tmp_path / "more").mkdir()
    assert compared(tmp_path / "more", before, after, "--tolerance", "0.2") == 0


def test_errors_are_one_line(tmp_path, capsys):
    assert cli.main(["show", str(tmp_path / "none.csv")]) == 2
    assert cli.main(["op", "--case", "sd99*", "--device", "cpu"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and "no case 'sd99*'; there are sdxl-64" in errors[1]


# ---- pictures and the README ---------------------------------------------------------------------


def all_kinds():
    rows = [
        row("copy", bench="roofline", bytes=10**9, us=300.0, dtype="float32"),
        row("matrix", bench="roofline", flops=10**12, us=1500.0),
    ]
    for i, case in enumerate(("sdxl-64", "sd15-64")):
        for provider, us in (("nasa-triton", 10.0), ("algorithm-1", 25.0), ("stacked", 18.0)):
            rows.append(
                row(provider, us * (i + 1), case=case, baseline="algorithm-1",
                    baseline_us=25.0 * (i + 1), bytes=4_000_000 * (i + 1))
            )  # fmt: skip
        for provider, flops in (
            ("stock", 1000), ("algorithm-1", 1013), ("nasa-first", 1013), ("nasa-later", 998),
            ("nag", 1020), ("cfg", 2000),
        ):  # fmt: skip
            rows.append(
                row(provider, bench="flops", case=f"model {i}", device="meta", flops=flops * 10**9,
                    timing="counted", dtype="", p20_us=None, p50_us=None, p80_us=None)
            )  # fmt: skip
            if provider in ("stock", "nag"):
                rows.append(row(provider, flops / 10, bench="model", case="m", timing="graph"))
    encode = {"bench": "flops", "case": "CLIP", "flops": 13 * 10**9, "device": "meta"}
    none = {"p20_us": None, "p50_us": None, "p80_us": None, "timing": "counted"}
    return [*rows, row("encode", **encode, **none)]


def test_pictures(tmp_path):
    written = plot.run(all_kinds(), tmp_path)
    assert {p.name for p in written} == {
        f"{name}.{kind}" for name in ("roofline", "speedup", "overhead") for kind in ("png", "svg")
    }
    assert all(p.stat().st_size > 5000 for p in written)
    svg = (tmp_path / "speedup.svg").read_bytes()
    plot.run(all_kinds(), tmp_path)
    assert (tmp_path / "speedup.svg").read_bytes() == svg
    assert plot.run([row(timing="warm")], tmp_path / "nothing") == []


def test_rates_come_from_rows():
    rates = rates_of(all_kinds())
    # the faster samples
    assert rates.copy == pytest.approx(10**9 / 270e-6)
    assert rates.matrix == {"bfloat16": pytest.approx(10**12 / 1350e-6)}
    assert rates.exponential is None


def test_pages_are_made_from_rows(tmp_path):
    results = tmp_path / "results"
    rows_of.append(results / "test.csv", all_kinds())
    path = tmp_path / "README.md"
    path.write_text(f"above\n{readme.BEGIN}\nwhat was there\n{readme.END}\nbelow\n")
    page = tmp_path / "performance.md"

    def made():
        texts = readme.pages(path, page, results)
        assert list(texts) == [path, page]
        return texts.values()

    short, text = made()
    assert short.startswith("above\n") and short.endswith("\nbelow\n")
    assert "what was there" not in short
    lines = [line for line in short.splitlines() if line.startswith("- ")]
    assert lines == [
        "- FLOPs over a denoiser call without, 2 models: Algorithm 1 +1.3%; NASA, first call "
        "+1.3%; NASA, later calls -0.2%; NAG, as published +2.0%; CFG +100.0%",
        "- Time of a call of m, Test device: bfloat16 NAG, as published +2.0%",
        "- The operation forward, 2 cases, Test device: 2.50 to 2.50 times as fast as Algorithm 1",
    ]
    assert "| model 0 | 1.000 | +1.30% | +1.30% | -0.20% | +2.00% | +100.00% |" in text
    assert "none comes within a tenth of it" in text
    assert "10.0 (9.00-11.0)" in text and "Test device" in text and "CLIP 13" in text
    path.write_text(short)
    assert list(made()) == [short, text]
    path.write_text("no markers")
    with pytest.raises(ValueError, match="must have one line"):
        made()


def test_the_hosts_table_is_of_the_machine_that_was_measured_last():
    """Each machine has a unit of its own. And one without other rows takes no other's place."""

    def host(case, us, device, day) -> Row:
        how = {"bench": "host", "timing": "host", "baseline": "sdpa", "baseline_us": 10.0}
        return row("cuda", us, case=case, device=device, date=f"2020-01-0{day}", **how)

    rows = [host("image", 70.0, "New CPU", 2), host("joint", 90.0, "New CPU", 2)]
    rows += [host("joint", 50.0, "Old CPU", 1), host("image", 20.0, "Old CPU", 1)]
    for order in (rows, rows[::-1]):
        page = readme.section(order)
        assert "| joint | 9.00 (8.10-9.90) | 2.00 |" in page
        assert "New CPU" in page and "Old CPU" not in page
    of = {"case": "sd15-64", "baseline": "algorithm-1", "baseline_us": 25.0}
    measured = [row(device=f"Device {number}", **of) for number in range(readme.DEVICES)]
    assert readme.headlines(measured) == readme.headlines([*measured, *rows])
    assert "Device 0" in readme.headlines(measured)


def test_a_number_near_the_papers_is_named():
    near = [
        row(p, bench="flops", case="m", flops=f)
        for p, f in (("stock", 10000), ("algorithm-1", 10190))
    ]
    assert "within a tenth of it: m" in readme.section(near)


def test_the_pages_are_current():
    """What stands in the README and on the page is what the committed result files give."""
    assert cli.main(["readme", "--check"]) == 0


def test_every_column_is_documented():
    text = (readme.ROOT / "bench" / "README.md").read_text()
    missing = [f.name for f in dataclasses.fields(Row) if f"`{f.name}`" not in text]
    assert not missing
