"""What a row says about where it was measured."""

from __future__ import annotations

import functools
import importlib.metadata
import re
import subprocess
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from bench import mkl

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"


@dataclass(frozen=True)
class Machine:
    """The columns that all rows of a run share; see `Row`."""

    date: str
    commit: str
    device: str
    driver: str
    cuda: str
    threads: int | None
    torch: str
    triton: str
    diffusers: str

    @property
    def file(self) -> Path:
        """The device's own result file."""
        return RESULTS / f"{slug(self.device)}.csv"


def slug(device: str) -> str:
    """A device's name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def describe(device: torch.device) -> Machine:
    return Machine(
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        commit=commit(),
        device=device_name(device),
        driver=driver_version() if device.type == "cuda" else "",
        cuda=torch.version.cuda or "",
        threads=torch.get_num_threads() if device.type == "cpu" else None,
        torch=torch.__version__,
        triton=version("triton"),
        diffusers=version("diffusers"),
    )


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return cpu_name() + (", MKL free" if mkl.is_free() else "")
    return device.type


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(
            r"^model name\s*: (.+)$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE
        )
        if found:
            return f"CPU {found[1].strip()}"
    return "CPU"


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


@functools.cache
def commit() -> str:
    """The commit of the sources; changed results are no change of theirs."""
    try:
        head = _output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
        changed = _output(
            "git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no",
            "--", ".", ":!bench/results", ":!README.md", ":!docs",
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+changes" if changed else "")


@functools.cache
def driver_version() -> str:
    try:
        return _output(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        ).splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return ""


def clock_mhz(device: torch.device) -> float | None:
    """The clock of the SMs now, where NVML can be asked (`pip install nvidia-ml-py`)."""
    if device.type != "cuda":
        return None
    try:
        return float(torch.cuda.clock_rate(device))
    except (ImportError, RuntimeError, AttributeError):
        return None


@functools.cache
def cache_bytes(device: torch.device) -> int:
    """Size of the last cache before memory, which a cold measurement has to leave."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [
        int(size[:-1]) * {"K": 2**10, "M": 2**20}[size[-1]]
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if (size := path.read_text(encoding="utf-8").strip())[-1:] in ("K", "M")
    ]
    return max(sizes, default=32 * 2**20)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
