"""Every arithmetic instruction of the interpreter against numpy, one thread per value.

Where ptxas is at hand the snippets are assembled too, so the PTX tested here is real PTX.
"""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import ptx
import pytest
from instruction_cases import CASES, F32, U32
from ptx.snippet import entry, module


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_numpy(case):
    actual = ptx.evaluate(case.code, case.d, **case.inputs)
    np.testing.assert_array_equal(actual, case.expected.astype(actual.dtype))


def ptxas() -> str | None:
    found = shutil.which("ptxas")
    if found:
        return found
    triton = pytest.importorskip("triton")
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    return str(bundled) if bundled.exists() else None


def test_snippets_are_ptx(tmp_path):
    """All snippets above in one module, through NVIDIA's assembler."""
    if ptxas() is None:
        pytest.skip("no ptxas")
    entries = [
        entry(c.code, c.d, {n: k for n, (k, _) in c.inputs.items()}, f"snippet_{i}")
        for i, c in enumerate(CASES)
    ]
    source = tmp_path / "snippets.ptx"
    source.write_text(module(*entries), encoding="utf-8")
    command = [ptxas(), "-arch=sm_90a", "-o", str(tmp_path / "out.cubin"), str(source)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_unknown_instruction_is_named():
    with pytest.raises(ptx.Unsupported, match=r"snippet, line \d+: `frobnicate.b32 d, a`"):
        ptx.evaluate("frobnicate.b32 d, a;", "b32", a=("b32", U32))


def test_unknown_modifier_is_named():
    with pytest.raises(ptx.Unsupported, match=r"`mul.sat.f32 d, a, a`.*unknown modifier .sat"):
        ptx.evaluate("mul.sat.f32 d, a, a;", "f32", a=("f32", F32))
