"""A test of support/cpu_check.cpp: each fault, planted in a copy of the CPU kernels, must be found.

Compiled for the instruction set that is quickest to compile, from a handful of objects, and for
fp32 alone: every fault is in what all dtypes share.
"""

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc" / "cpu"
FLAGS = ("-std=c++17", "-O1", "-ffp-contract=off", "-fno-exceptions", "-w", "-DNASA_ISA=generic")
UNITS = ("forward", "backward", "peak", "dispatch")


class Fault(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    units: tuple[str, ...]  # what has to be compiled again


FORWARD, BACKWARD = ("forward",), ("backward",)
FAULTS = (
    Fault("sign", "work.h", "= -p.alpha_map[b", "= p.alpha_map[b", FORWARD),
    Fault(
        "rescale", "forward_long.h", "rescale[r] = exponential(before[r], rows.largest[r]);",
        "rescale[r] = broadcast(1.f);", FORWARD,
    ),
    Fault(
        "read-behind-the-end", "tile.h", "return x + smaller(i, count - 1) * stride;",
        "return x + i * stride;", FORWARD,
    ),
    Fault(
        "columns-behind-the-end", "keys.h", "const int64_t at = smaller(i, count - kLanes);",
        "const int64_t at = i;", FORWARD,
    ),
    Fault(
        "masked-key", "keys.h", "if (bias == -__builtin_inff()) continue;",
        "if (bias == -1e30f) continue;", FORWARD,
    ),
    Fault("second-sum", "tile.h", "c[t][r] += rest[t][r];", ";", FORWARD),
    Fault(
        "rule", "rules.h", "a.of[0] + minus_alpha * b.of[0], a.of[1]",
        "a.of[0], a.of[1]", FORWARD,
    ),
    Fault(
        "text-rows", "work.h", "const int64_t first = x.first + begin * kLanes;",
        "const int64_t first = begin * kLanes;", FORWARD,
    ),
    Fault(
        "pair-rows", "work.h", "{{z_neg.rule, to.z_neg, z_neg.rows, image}}",
        "{{z_neg.rule, to.z_neg, z_neg.rows, first_neg}}", FORWARD,
    ),
    Fault("u", "backward.cpp", "u[r] = fma(u[r], rescale[r], new_u[r]);", ";", BACKWARD),
    Fault("dlse", "rules.h", "const Vec pos = a.of[0] * a.of[1] * by_a", "const Vec pos = by_a",
          BACKWARD),
    Fault(
        "rows-behind-the-end", "backward.cpp", "exists[i] = i < count ? 1.f : 0.f",
        "exists[i] = 1.f", BACKWARD,
    ),
    Fault("weight-of-dv", "backward.cpp", "store(e + at, p * f.c[r]);", "store(e + at, p);",
          BACKWARD),
    Fault(
        "scale-of-dk", "backward.cpp",
        "reduce<T>(p, x, b, h, dk, parts_of_group, stride, width, p.scale,",
        "reduce<T>(p, x, b, h, dk, parts_of_group, stride, width, 1.f,", BACKWARD,
    ),
    Fault("head-of-a-group", "keys.h", "h / group_;", "h % heads_;", FORWARD),
    Fault(
        "sum-over-a-group", "backward.cpp", "dv, parts_of_group, stride,", "dv, parts, stride,",
        BACKWARD,
    ),
    Fault("dalpha", "rules.h", "{{zero, zero, zero}, -u_n}", "{{zero, zero, zero}, u_n}", BACKWARD),
    Fault(
        "projection", "projected.h", "where(x.is_active[r], fma(-x.t[r], p(c, r), n(c, r)))",
        "where(x.is_active[r], n(c, r))", FORWARD,
    ),
    Fault("length", "projected.h", "return one / sqrt(fma(minus_alpha * minus_alpha, s, one));",
          "return one + 0.f * s;", FORWARD),
    Fault("alpha-0", "projected.h", "exists[r] & (minus_alpha[r] != 0)", "exists[r]", FORWARD),
    Fault("zero-rows", "projected.h", "exists[r] = pp[r] != 0;", "exists[r] = pp[r] == pp[r];",
          FORWARD),
    Fault("nag-norm", "nag.h", "for (int64_t i = 0; i < p.h; ++i) {",
          "for (int64_t i = h; i <= h; ++i) {", FORWARD),
    Fault("nag-share-0", "nag.h", "where(is_guided[r], load(g + at) * factor_g[r])",
          "load(g + at) * factor_g[r]", FORWARD),
    Fault("nag-place", "forward.cpp", "attend_head(i / p.h, i % p.h, worker, i / p.h);",
          "attend_head(i / p.h, i % p.h, worker, 0);", FORWARD),
    Fault("projected-dlse", "backward.cpp", "c[r].of[kNeg] * of_neg[r];", "of_neg[r];", BACKWARD),
    Fault(
        "projected-shared", "backward.cpp", "c[r].of[kShared] * load(own.dz_neg + at);",
        "c[r].of[kNeg] * load(own.dz_neg + at);", BACKWARD,
    ),
    Fault("projected-ds", "projected.h", "neg[r].d = active(twice_ds * x.inverse_pp[r]);",
          "neg[r].d = Vec{};", BACKWARD),
)  # fmt: skip


def copy_of_fp32(folder: Path) -> Path:
    shutil.copytree(SOURCES, folder)
    for unit in ("forward", "backward", "peak"):
        source = folder / f"{unit}.cpp"
        text, cut = re.subn(r" case Type::k(Half|Bfloat16): return .*;", "", source.read_text())
        assert cut == 2, f"{unit}.cpp chooses a dtype elsewhere"
        source.write_text(text)
    return folder


def compile_unit(source: Path, out: Path) -> Path:
    done = subprocess.run(
        ["c++", *FLAGS, f"-I{source.parent}", "-c", source, "-o", out],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def check(objects: dict[str, Path], folder: Path) -> subprocess.CompletedProcess:
    program = folder / "cpu_check"
    subprocess.run(["c++", *objects.values(), "-o", program], check=True)
    return subprocess.run([program, "generic", "fp32"], capture_output=True, text=True)


@pytest.fixture(scope="module")
def objects(tmp_path_factory) -> dict[str, Path]:
    """Of the sources as they are."""
    if shutil.which("c++") is None:
        pytest.skip("there is no C++ compiler")
    folder = tmp_path_factory.mktemp("objects")
    sources = copy_of_fp32(folder / "cpu")
    shutil.copy(ROOT / "tests" / "support" / "cpu_check.cpp", sources)
    made = {
        name: compile_unit(sources / f"{name}.cpp", folder / f"{name}.o")
        for name in (*UNITS, "cpu_check")
    }
    assert check(made, folder).returncode == 0
    return made


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_found(fault, objects, tmp_path):
    source = copy_of_fp32(tmp_path / "cpu") / fault.file
    text = source.read_text()
    assert fault.old in text, f"the fault {fault.name} has lost its place"
    source.write_text(text.replace(fault.old, fault.new))
    made = dict(objects)
    for name in fault.units:
        made[name] = compile_unit(tmp_path / "cpu" / f"{name}.cpp", tmp_path / f"{name}.o")
    # 1 is a wrong result; a signal is a page that must not be touched
    assert check(made, tmp_path).returncode in (1, -11, -7)
