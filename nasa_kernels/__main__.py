"""`python -m nasa_kernels`: versions, the GPU, and which back ends run here."""

import importlib.metadata
import platform

import torch

from nasa_kernels import __version__, _cpu, backends


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main() -> None:
    versions = ", ".join(f"{name} {_version(name)}" for name in ("triton", "diffusers"))
    print(f"nasa-kernels {__version__}")
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {versions}")
    if torch.cuda.is_available():
        devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
        for device in devices:
            major, minor = torch.cuda.get_device_capability(device)
            print(f"{device}: {torch.cuda.get_device_name(device)}, sm_{major}{minor}")
    else:
        devices = []
        print("no NVIDIA GPU that this torch can use")
    for device in (*devices, torch.device("cpu")):
        print(f"back ends for tensors on {device}:")
        for name in backends.NAMES:
            reason = backends.why_not(name, device)
            how = f" ({_cpu.implementation()})" if name == "cpu" else ""
            print(f"  {name:<9} {'runs' + how if reason is None else 'no: ' + reason}")
        print(f"  backend=None takes {backends.choose(device, torch.float16)!r}")


if __name__ == "__main__":
    main()
