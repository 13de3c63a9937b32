"""The CPU kernels outside of Python (support/cpu_check.cpp): under sanitizers, between pages that
must not be touched, and on CPUs that are emulated.

Built below `build/` by CMake, once; without a compiler or an emulator the tests skip.
"""

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.cases import ALL

ROOT = Path(__file__).parents[2]
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
ISAS = ("generic", "avx2", "avx512", "avx512bf16")
CPU_INFO = Path("/proc/cpuinfo")
CPU_FLAGS = CPU_INFO.read_text().split() if CPU_INFO.exists() else []
# avx512bf16 has the code of avx512 but for the products of bf16: `make test-all` checks both
HAS_BF16 = "avx512_bf16" in CPU_FLAGS
SANITIZED = tuple(isa for isa in ISAS if not HAS_BF16 or ALL or isa != "avx512")
# what this CPU does not have takes the compiler minutes, and then the program skips it
COMPILED = tuple(isa for isa in SANITIZED if "avx512f" in CPU_FLAGS or "avx512" not in isa)
# what costs the compiler minutes is left out: overflow of pointers, sizes of objects
SANITIZERS = (
    "address,bounds,alignment,shift,signed-integer-overflow,integer-divide-by-zero,"
    "float-cast-overflow,bool,enum"
)
FLAGS = "-ffp-contract=off;-fno-exceptions;-Wno-psabi"


def run(*command: object, check: bool = True) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": PATH, "ASAN_OPTIONS": "detect_leaks=1"},
    )
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def built(name: str, *options: str, compiler: str = "c++") -> Path:
    """build/NAME/cpu_check, made with these options of CMake."""
    for tool in ("cmake", compiler):
        if shutil.which(tool, path=PATH) is None:
            pytest.skip(f"there is no {tool}")
    folder = ROOT / "build" / name
    torch = importlib.util.find_spec("torch").submodule_search_locations[0]
    ninja = ["-G", "Ninja"] if shutil.which("ninja", path=PATH) else []
    folder.mkdir(parents=True, exist_ok=True)
    # several processes of pytest may want it at once
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run("cmake", "-S", ROOT, "-B", folder, *ninja, f"-DNASA_TORCH_DIR={torch}", *options)
        run("cmake", "--build", folder, "--target", "cpu_check", "-j", os.cpu_count())
    return folder / "cpu_check"


@pytest.fixture(scope="module")
def release() -> Path:
    """Of the objects that the library is made of."""
    return built("cpu")


@pytest.fixture(scope="module")
def sanitized() -> Path:
    """The kernels alone: what judges them would run ten times as long."""
    return built(
        "cpu-sanitized",
        f"-DNASA_CPU_FLAGS=-O0;-g1;-fsanitize={SANITIZERS};-fno-sanitize-recover=all;{FLAGS}",
        f"-DCMAKE_EXE_LINKER_FLAGS=-fsanitize={SANITIZERS}",
        *(f"-DNASA_WITH_{isa.upper()}=OFF" for isa in ISAS if isa not in COMPILED),
    )


def runs(program: Path, isa: str) -> str:
    done = run(program, isa, check=False)
    if done.returncode == 2:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("isa", ISAS)
def test_pages_behind_the_tensors_are_not_touched(release, isa):
    assert f"{isa} Z+ and Z- apart" in runs(release, isa)


@pytest.mark.parametrize("isa", SANITIZED)
def test_sanitizers_find_nothing(sanitized, isa):
    assert f"{isa} Z+ and Z- apart" in runs(sanitized, isa)


@pytest.mark.parametrize(
    ("cpu", "isa"), [("Nehalem", "generic"), ("Haswell", "avx2")], ids=["2008", "2013"]
)
def test_an_older_cpu_takes_what_it_has(release, cpu, isa):
    qemu = shutil.which("qemu-x86_64-static") or shutil.which("qemu-x86_64")
    if qemu is None:
        pytest.skip("there is no qemu-x86_64; on Debian: apt install qemu-user-static")
    done = run(qemu, "-cpu", cpu, release)
    assert f"{isa} Z+ and Z- apart" in done.stdout
    assert run(qemu, "-cpu", cpu, release, "avx512", check=False).returncode == 2


def test_aarch64():
    """NEON, by the same source; emulated."""
    qemu = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if qemu is None:
        pytest.skip("there is no qemu-aarch64; on Debian: apt install qemu-user-static")
    program = built(
        "cpu-aarch64",
        *("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64"),
        *("-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++", "-DCMAKE_EXE_LINKER_FLAGS=-static"),
        # -O3 takes the compiler several times as long
        f"-DNASA_CPU_FLAGS=-O1;{FLAGS}",
        compiler="aarch64-linux-gnu-g++",
    )
    assert "generic Z+ and Z- apart" in run(qemu, program).stdout


def test_no_wide_instruction_leaves_its_kernel(release):
    """A function that several objects define is kept once, for all CPUs: it must not be one that
    was compiled for a newer CPU. So these objects define nothing but their calls."""
    if shutil.which("nm") is None:
        pytest.skip("there is no nm")
    objects = [
        file
        for isa in ISAS[1:]
        for file in (release.parent / "CMakeFiles" / f"cpu_{isa}.dir").rglob("*.o")
    ]
    if not objects:
        pytest.skip("this compiler makes no kernels for newer CPUs")
    lines = run("nm", "-C", "--defined-only", "--extern-only", *objects).stdout.splitlines()
    symbols = [line.split(maxsplit=2)[1:] for line in lines if len(line.split()) > 2]
    assert len(symbols) == len(objects)
    for kind, name in symbols:
        assert kind == "T", f"{name} is {kind}"
        assert any(f"::{call}(" in name for call in ("forward", "backward", "work"))
