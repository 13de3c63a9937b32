"""The compiled CPU kernels: every instruction set under the parity suite, threads, hard numbers."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from support.cases import ALL, DTYPES, mask_of, with_rule
from support.formula import exact_and_budget, exact_and_budget_of_joint
from support.gradients import check_gradients, gradients
from test_joint import make as make_joint

from nasa_kernels import (
    _cpu,
    nag_attention,
    nag_joint_attention,
    nasa_attention,
    nasa_attention_reference,
    nasa_joint_attention,
    ops,
)
from nasa_kernels.backends import RECORDS
from nasa_kernels.reference import CROSS_RULES
from nasa_kernels.testing import Shape, make_inputs

TESTS = Path(__file__).parent
ROOT = TESTS.parents[1]
ISAS = ("generic", "avx2", "avx512", "avx512bf16")
needs_kernels = pytest.mark.skipif(_cpu.load() is not None, reason=str(_cpu.load()))
NAG = {"nag_scale": 5.0, "nag_tau": 2.5, "nag_alpha": 0.25}
BASIC = Shape("basic", 2, 70, 2, 64, 77, 50)


def python(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | env
    )


def best() -> str:
    """The instruction set that the kernels take on this CPU, whatever this process was told."""
    code = "from nasa_kernels import _cpu; print(_cpu.isa())"
    env = {k: v for k, v in os.environ.items() if k != "NASA_CPU_ISA"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    return done.stdout.strip()


# ---- instruction sets ----------------------------------------------------------------------------


@pytest.mark.skipif(os.environ.get("NASA_CPU_ISA") is not None, reason="this is the inner run")
# avx512 in `make test-all`: but for the products of bf16 it is avx512bf16
@pytest.mark.parametrize("isa", ["none", "generic", "avx2", *["avx512"] * ALL])
def test_the_parity_suite(isa):
    """A part of what `cpu` has to pass, on each instruction set below the best, and without the
    kernels; tests/support/cpu_check.cpp has the rest."""
    if isa != "none" and (_cpu.load() is not None or ISAS.index(isa) >= ISAS.index(best())):
        pytest.skip("it is the one that all other tests run on, or this CPU does not have it")
    files = ("forward", "backward", "joint", "joint_backward")
    shapes = "odd or widest or smallest or pixart-512 or sd15-32 or short-and or tiles or flux"
    chosen = f"cpu and matches_fp64 and ({shapes})"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p"),
            *("no:xdist", "-k", chosen, *(str(TESTS / f"test_{name}.py") for name in files)),
        ],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NASA_CPU_ISA": isa},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 60


def test_an_unknown_instruction_set_is_an_error():
    if _cpu.load() is not None:
        pytest.skip(_cpu.load())
    done = python("import nasa_kernels", NASA_CPU_ISA="sse9")
    assert done.returncode != 0
    assert "NASA_CPU_ISA must be none or an instruction set that this CPU has" in done.stderr


def test_the_command_says_what_runs():
    code = "from nasa_kernels.__main__ import main; main()"
    without = python(code, NASA_CPU_ISA="none").stdout
    assert "runs (PyTorch's attention for each prompt: NASA_CPU_ISA=none leaves" in without
    if _cpu.load() is None:
        assert "runs (kernels for generic)" in python(code, NASA_CPU_ISA="generic").stdout


def test_an_install_without_them_says_so(monkeypatch):
    monkeypatch.setattr(_cpu, "LIBRARY", ROOT / "no" / "_cpu_C.so")
    monkeypatch.delenv("NASA_CPU_ISA", raising=False)
    assert _cpu.load.__wrapped__() == _cpu.NOT_BUILT


@needs_kernels
def test_no_second_runtime_and_the_stable_abi_alone():
    for tool in ("readelf", "nm"):
        if shutil.which(tool) is None:
            pytest.skip(f"there is no {tool}")
    needed = subprocess.run(["readelf", "-d", _cpu.LIBRARY], capture_output=True, text=True).stdout
    assert "libtorch_cpu" in needed
    assert not re.search(r"omp|tbb|libtorch_python|libpython", needed)
    text = subprocess.run(["nm", "-DuC", _cpu.LIBRARY], capture_output=True, text=True).stdout
    assert not [line for line in text.splitlines() if re.search(r"\b(at|c10)::", line)]


def setup(**env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"NASA_KERNELS_CUDA": "0"} | env,
    )  # fmt: skip


def test_setup_without_a_compiler(tmp_path):
    """The install goes on and says why; or, where they were asked for, it ends."""
    for tool in ("cmake", "ninja"):
        (tmp_path / tool).symlink_to("/bin/true")
    # only the tools beside this Python are found as well
    if any((Path(sys.executable).parent / name).exists() for name in ("c++", "g++", "clang++")):
        pytest.skip("there is a compiler beside this Python")
    without = {"PATH": str(tmp_path), "CXX": ""}
    done = setup(NASA_KERNELS_CPU="auto", **without)
    assert done.returncode == 0, done.stderr
    assert "without the CPU kernels: there is no C++ compiler" in done.stdout
    done = setup(NASA_KERNELS_CPU="1", **without)
    assert "there is no C++ compiler" in done.stderr


def test_setup_modes():
    assert "without the CPU kernels: NASA_KERNELS_CPU=0" in setup(NASA_KERNELS_CPU="0").stdout
    done = setup(NASA_KERNELS_CPU="maybe")
    assert "NASA_KERNELS_CPU must be auto, 0 or 1, got 'maybe'" in done.stderr


# ---- threads -------------------------------------------------------------------------------------


def everything(dtype):
    """O and all gradients of both operations."""
    shape = Shape("threads", 2, 700, 2, 40, 77, 140)
    inputs = make_inputs(shape, dtype, "cpu")
    alpha = torch.linspace(0, 1, 700)[:, None]
    grad_o = torch.randn(inputs["q"].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = []
    for rule in CROSS_RULES:
        options = {"rule": rule, "backend": "cpu"}
        found.append(nasa_attention(**inputs, alpha=alpha, **options))
        found += gradients(nasa_attention, inputs, alpha, grad_o, **options).values()
    # under NAG a task has all heads of these rows, or with more threads one of them
    some = inputs | {"q": inputs["q"][:, :400]}
    found.append(nag_attention(**some, **NAG, backend="cpu"))
    inputs, text = make_joint("flux", dtype)
    found.append(nag_joint_attention(**inputs, **NAG, text_queries=text, backend="cpu"))
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    for rule in ("nasa", "projected"):
        o = nasa_joint_attention(**leaves, alpha=0.6, rule=rule, text_queries=text, backend="cpu")
        loss = o.float().square().cumsum(-1).sum()
        found += [o, *torch.autograd.grad(loss, list(leaves.values()))]
    return found


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_number_of_threads(dtype):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = everything(dtype)
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            for a, b in zip(everything(dtype), expected, strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)


@needs_kernels
def test_calls_of_several_threads():
    """Their scratch is their own."""
    inputs = [make_inputs(BASIC, torch.float32, "cpu", seed) for seed in range(4)]
    expected = [nasa_attention(**x, alpha=0.5, backend="cpu") for x in inputs]
    wrong = []

    def work(i):
        for _ in range(20):
            o = nasa_attention(**inputs[i], alpha=0.5, backend="cpu")
            if not torch.equal(o, expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def tasks() -> int:
    """Threads of this process."""
    return len(list(Path("/proc/self/task").iterdir()))


@needs_kernels
def test_inside_a_parallel_region():
    """A call there takes the thread that it is on, and no others."""
    inputs = make_inputs(BASIC, torch.float32, "cpu")
    expected = nasa_attention(**inputs, alpha=0.5, backend="cpu")
    libraries = Path(torch.__file__).parent / "lib"
    parallel_for = ctypes.CDLL(str(libraries / "libtorch_cpu.so")).torch_parallel_for
    body = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
    before = torch.get_num_threads()
    seen, found = [], []

    @body
    def region(begin, end, _):
        found.append(nasa_attention(**inputs, alpha=0.5, backend="cpu"))
        seen.append(tasks())

    if not Path("/proc/self/task").exists():
        pytest.skip("there is no /proc")
    try:
        torch.set_num_threads(2)
        nasa_attention(**inputs, alpha=0.5, backend="cpu")
        threads = tasks()
        parallel_for(
            ctypes.c_int64(0), ctypes.c_int64(2), ctypes.c_int64(1), region, ctypes.c_void_p()
        )
    finally:
        torch.set_num_threads(before)
    assert len(found) == 2
    assert all(torch.equal(o, expected) for o in found)
    assert max(seen) <= threads


# ---- hard numbers --------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinities_and_nan_under_masks(dtype):
    """In masked rows of K and V, in both directions, as in the reference."""
    inputs = make_inputs(BASIC, dtype, "cpu")
    masks = {"mask_pos": mask_of("bool", 2, 77), "mask_neg": mask_of("bias", 2, 50, seed=2)}
    for i, name in enumerate(("k_pos", "v_pos", "k_neg", "v_neg")):
        mask = masks["mask_pos" if "pos" in name else "mask_neg"]
        present = mask if mask.dtype == torch.bool else mask > float("-inf")
        poison = (float("nan"), float("inf"), float("-inf"), float("nan"))[i]
        inputs[name] = torch.where(present[..., None, None], inputs[name], poison)
    exact, budget = exact_and_budget(inputs, 0.6, **masks)
    budget.check(nasa_attention(**inputs, alpha=0.6, backend="cpu", **masks), exact)
    found = gradients(
        nasa_attention, inputs, 0.6, torch.ones_like(inputs["q"]), backend="cpu", **masks
    )
    assert all(torch.isfinite(x).all() for x in found.values())


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_stays_in_its_row(dtype):
    """One in Q in its row of O; one in a key that is attended to in every row of its head."""
    inputs = make_inputs(BASIC, dtype, "cpu")
    inputs["q"][0, 33, 1, 5] = float("nan")
    o = nasa_attention(**inputs, alpha=0.6, backend="cpu")
    bad = o.isnan().any(-1)
    assert bad[0, 33, 1]
    assert bad.sum() == 1
    inputs = make_inputs(BASIC, dtype, "cpu")
    inputs["k_neg"][1, 7, 0, 3] = float("nan")
    o = nasa_attention(**inputs, alpha=0.6, backend="cpu")
    assert o[1, :, 0].isnan().all()
    assert o.isnan().any(-1).sum() == 70


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_and_large_numbers(dtype):
    """Values near the least and the largest of a dtype, and scores that only one key survives.

    Of numbers below the normal ones each of some hundred terms is rounded to a multiple of the
    least; the instruction for pairs of bf16 takes them, and gives them, as 0.
    """
    inputs = make_inputs(BASIC, dtype, "cpu")
    info = torch.finfo(dtype)
    small = inputs | {name: inputs[name] * (info.tiny / 8) for name in ("v_pos", "v_neg")}
    o = nasa_attention(**small, alpha=0.6, backend="cpu")
    exact = nasa_attention_reference(**{k: x.double() for k, x in small.items()}, alpha=0.6)
    step = info.tiny * info.eps
    allowed = {torch.float32: 80 * step, torch.float16: step, torch.bfloat16: info.tiny}[dtype]
    assert (o.double() - exact).abs().max() <= allowed
    large = {k: x * (100 if k[0] in "qk" else 1e4) for k, x in inputs.items()}
    exact, budget = exact_and_budget(large, 0.6)
    budget.check(nasa_attention(**large, alpha=0.6, backend="cpu"), exact)


@needs_kernels
def test_a_wide_head_is_summed_in_two_parts():
    """At d 256 a single sum over d loses 1.6 times what eager PyTorch does."""
    inputs = make_inputs(Shape("wide", 1, 200, 2, 256, 77, 77), torch.float32, "cpu")
    doubles = {k: x.double() for k, x in inputs.items()}
    exact = nasa_attention_reference(**doubles, alpha=0.5)
    eager = nasa_attention_reference(**inputs, alpha=0.5)
    o = nasa_attention(**inputs, alpha=0.5, backend="cpu")
    assert (o - exact).norm() <= 1.2 * (eager - exact).norm()


@needs_kernels
@pytest.mark.parametrize("rule", CROSS_RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_more_keys_than_are_held(dtype, rule):
    """Then scores are made twice; key by key the same gradients."""
    shape = Shape("long", 1, 20, 1, 16, 8200, 33)
    check_gradients("cpu", make_inputs(shape, dtype, "cpu"), 0.6, rule=rule)


@needs_kernels
def test_the_scratch_of_the_backward_pass_has_a_bound():
    """Of its S and dP: 8192 keys for 48 rows, whatever the number of keys."""
    code = """
import resource, torch
from nasa_kernels import ops
torch.set_num_threads(1)
n, d = {n}, 8
q, go = (torch.randn(1, 64, 1, d) for _ in range(2))
k, v = (torch.randn(1, n, 1, d) for _ in range(2))
none = torch.empty(0, 0, 0, 0), torch.empty(0, 0, 0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
torch.ops.nasa_kernels.backward_cpu(
    go, *none, *none, q, k, v, k[:, :0], v[:, :0], None, None, None, 0.0, 0.3, 0,
    [True] * 5 + [False])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    # K, V, their gradients and sums: 7 matrices [n, 16] of 4 bytes
    n = 200_000
    used = int(python(code.replace("{n}", str(n))).stdout) * 1024
    assert used < 7 * n * 16 * 4 + 32e6
    assert used < 2 * 48 * n * 4


# ---- joint attention -----------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("rule", RECORDS["cpu"].joint_rules)
def test_joint_attention_is_one_operator(rule):
    """Nothing of PyTorch's runs beside it."""
    inputs, text = make_joint("flux")
    with torch.profiler.profile() as profile:
        o = nasa_joint_attention(**inputs, alpha=0.6, rule=rule, text_queries=text, backend="cpu")
    names = {event.key for event in profile.key_averages() if event.key.startswith("aten::")}
    # the result, which the tests fill with NaN, and views
    assert names <= {
        *("aten::new_empty", "aten::empty", "aten::fill_"),
        *("aten::expand", "aten::as_strided"),
    }
    exact, budget = exact_and_budget_of_joint(inputs, 0.6, rule, text)
    budget.check(o, exact)


@needs_kernels
@pytest.mark.parametrize("function", ["cross", "joint", "cross-projected", "joint-projected"])
def test_other_rules_are_one_operator(function):
    """NAG, whose norms are those of all heads, and the projected rule."""
    inputs, text = make_joint("flux")
    if function.startswith("cross"):
        inputs, text = make_inputs(BASIC, torch.float32, "cpu"), None
    options = {"backend": "cpu"} | ({} if text is None else {"text_queries": text})
    with torch.profiler.profile() as profile:
        if function.endswith("projected"):
            attend = nasa_attention if text is None else nasa_joint_attention
            attend(**inputs, alpha=2.0, rule="projected", **options)
        else:
            attend = nag_attention if text is None else nag_joint_attention
            attend(**inputs, **NAG, **options)
    ours = [e.key for e in profile.key_averages() if e.key.startswith("nasa_kernels::")]
    assert len(ours) == 1
    names = {event.key for event in profile.key_averages() if event.key.startswith("aten::")}
    assert names <= {
        *("aten::new_empty", "aten::empty", "aten::fill_", "aten::slice"),
        *("aten::expand", "aten::as_strided"),
    }


@needs_kernels
@pytest.mark.parametrize("rows", [40, 700], ids=["few", "many"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nag_rounds_once(dtype, rows):
    """So it loses less than what follows Z+ and Z- that were rounded before."""
    inputs = make_inputs(Shape("nag", 2, rows, 3, 24, 77, 50), dtype, "cpu")
    doubles = {name: x.double() for name, x in inputs.items()}
    exact = nag_attention(**doubles, **NAG, backend="reference")
    eager = nag_attention(**inputs, **NAG, backend="reference")
    o = nag_attention(**inputs, **NAG, backend="cpu")
    assert (o - exact).norm() <= 1.02 * (eager - exact).norm()


@needs_kernels
def test_nothing_is_kept_for_the_backward_pass():
    inputs = make_inputs(BASIC, torch.float32, "cpu")
    attention = ops.ATTENTION["cpu"]
    arguments = with_rule(attention, (*inputs.values(), None, None, None, 0.6, 0.125))
    _, *kept = attention(*arguments)
    assert sum(x.numel() for x in kept) == 0
