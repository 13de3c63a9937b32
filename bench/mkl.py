"""`--free-mkl`: PyTorch's matrix products at their best on CPUs of other makers than Intel.

MKL, which multiplies matrices for PyTorch and for its attention, asks who made the CPU, and on all
but one maker's takes an older code. A library loaded before it answers that question with yes. So
baselines can be measured both as people have them and as fast as they could be; such rows are of a
device of their own, "..., MKL free".
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

_SOURCE = "int mkl_serv_intel_cpu_true(void) { return 1; }\n"
_NAME = "nasa_free_mkl.so"


def is_free() -> bool:
    return _NAME in os.environ.get("LD_PRELOAD", "")


def start_again() -> None:
    """This command in a process in which MKL is free; does not return."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise RuntimeError("--free-mkl needs a C compiler; on Debian: apt install gcc")
    folder = Path(tempfile.mkdtemp())
    source, library = folder / "free_mkl.c", folder / _NAME
    source.write_text(_SOURCE, encoding="utf-8")
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", library], check=True)
    preloaded = f"{library} {os.environ.get('LD_PRELOAD', '')}".strip()
    arguments = [sys.executable, "-m", "bench", *sys.argv[1:]]
    os.execve(sys.executable, arguments, os.environ | {"LD_PRELOAD": preloaded})
