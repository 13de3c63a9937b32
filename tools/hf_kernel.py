"""Make a kernel of Hugging Face's `kernels` out of nasa_kernels.

    python tools/hf_kernel.py OUT     makes OUT/build/torch-cpu and torch-cuda, build.toml, CARD.md
    python tools/hf_kernel.py --aot OUT     makes what their kernel-builder compiles

The first has no compiled code and is ready to load. The second has the CUDA C++ kernels in the
layout of a source repository; the builder itself, which needs Nix, was not run on it.

The sources stay as they are; what the layout asks for is written while they are copied: imports are
relative, and operators are in a namespace of the build's own, so that several versions can stand in
one process.
"""

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "nasa_kernels"
LAYOUT = ROOT / "integrations" / "hf-kernels"
# the command line, and what tests and benchmarks share
LEFT_OUT = ("__main__.py", "testing.py")
VARIANTS = ("cpu", "cuda")

_OPS = '''"""Operators of this build, in a namespace of their own."""

import torch

ops = torch.ops.{namespace}


def add_op_namespace_prefix(name: str) -> str:
    return f"{namespace}::{{name}}"
'''


def relative(source: str, depth: int) -> str:
    """A module of nasa_kernels, `depth` folders below it, with relative imports."""
    dots = "." * (depth + 1)
    source = re.sub(r"(?m)^(\s*)from nasa_kernels import ", rf"\1from {dots} import ", source)
    source = re.sub(
        r"(?m)^(\s*)from nasa_kernels\.([\w.]+) import ", rf"\1from {dots}\2 import ", source
    )
    # modules that are imported by name when they are needed
    root = "__package__" if depth == 0 else f'__package__.rsplit(".", {depth})[0]'
    source = re.sub(r'"nasa_kernels(\.[\w.]+)"', rf'{root} + "\1"', source)
    needs = []
    if "torch.ops.nasa_kernels" in source:
        source = source.replace("torch.ops.nasa_kernels", "_ops.ops")
        needs.append("_ops")
    if '"nasa_kernels::' in source:
        source = re.sub(r'f"nasa_kernels::\{(\w+)\}"', r"_ops.add_op_namespace_prefix(\1)", source)
        needs.append("_ops")
    if needs:
        source = re.sub(
            r"(?m)^import torch$", f"import torch\n\nfrom {dots} import _ops", source, count=1
        )
    left = re.search(
        r"(import|from) nasa_kernels|torch\.ops\.nasa_kernels|\"nasa_kernels::", source
    )
    if left is not None:
        raise ValueError(f"hf_kernel: {left[0]!r} is left; teach tools/hf_kernel.py this form")
    return source


def read_sources() -> dict[Path, str]:
    """The modules of the package, by their place in it."""
    return {
        path.relative_to(PACKAGE): path.read_text(encoding="utf-8")
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name not in LEFT_OUT
    }


def write_package(folder: Path, sources: dict[Path, str]) -> None:
    """The package with relative imports, and its layer."""
    for path, text in sources.items():
        write(folder / path, relative(text, len(path.parts) - 1))
    write(folder / "layers.py", (LAYOUT / "layers.py").read_text(encoding="utf-8"))
    init = (folder / "__init__.py").read_text(encoding="utf-8")
    init = init.replace("__all__ = [\n", 'from . import layers\n\n__all__ = [\n    "layers",\n')
    write(folder / "__init__.py", init)


def build(out: Path) -> None:
    sources = read_sources()
    digest = hashlib.sha256(
        "".join(f"{path}\0{text}\0" for path, text in sources.items()).encode()
    ).hexdigest()
    shutil.rmtree(out / "build", ignore_errors=True)
    for variant in VARIANTS:
        namespace = f"nasa_kernels_{variant}_{digest[:8]}"
        folder = out / "build" / f"torch-{variant}"
        write_package(folder, sources)
        write(folder / "_ops.py", _OPS.format(namespace=namespace))
        metadata = {
            "id": f"_{namespace}", "name": "nasa-kernels", "version": 0, "license": "Apache-2.0",
            "python-depends": [], "backend": {"type": variant},
        }  # fmt: skip
        write(folder / "metadata.json", json.dumps(metadata, indent=2) + "\n")
    for name in ("build.toml", "CARD.md"):
        shutil.copy(LAYOUT / name, out / name)


def build_aot(out: Path) -> None:
    """The sources for the kernel-builder, which writes `_ops.py` and registration.h itself."""
    sources = read_sources()
    extension = Path("_cuda/extension.py")
    here = 'LIBRARY = Path(__file__).parents[1] / "_C.so"'
    if here not in sources[extension]:
        raise ValueError(f"hf_kernel: {extension} has no line {here!r} any more")
    # the builder names it after the build: _nasa_kernels_cuda_1a2b3c4.abi3.so
    there = 'LIBRARY = next(Path(__file__).parents[1].glob("_nasa_kernels_*.so"))'
    sources[extension] = sources[extension].replace(here, there)
    shutil.rmtree(out / "torch-ext", ignore_errors=True)
    shutil.rmtree(out / "csrc", ignore_errors=True)
    write_package(out / "torch-ext" / "nasa_kernels", sources)
    binding = (LAYOUT / "aot" / "torch_binding.cpp").read_text(encoding="utf-8")
    write(out / "torch-ext" / "torch_binding.cpp", binding)

    listed = (ROOT / "cmake" / "cuda.cmake").read_text(encoding="utf-8")
    headers = [
        f"csrc/{path.name}"
        for path in sorted((ROOT / "csrc").iterdir())
        if path.suffix in (".h", ".cuh")
    ]
    lists = {
        name: re.search(rf"set\({name}\s([^)]*)\)", listed)[1].split()
        for name in ("NASA_KERNELS", "NASA_KERNELS_SM90")
    }
    lists["BINDING"] = ["torch-ext/torch_binding.cpp", "csrc/bindings.h", "csrc/choose.h"]
    text = (LAYOUT / "aot" / "build.toml").read_text(encoding="utf-8")
    for name, files in lists.items():
        text = text.replace(f'["@{name}@"]', json.dumps([*files, *headers]))
    # torch_binding.cpp includes what elsewhere is compiled by itself
    included = {f"csrc/{name}.h": f"csrc/{name}.cpp" for name in ("bindings", "choose")}
    for file in (*lists["NASA_KERNELS"], *lists["NASA_KERNELS_SM90"], *headers, *included):
        write(out / file, (ROOT / included.get(file, file)).read_text(encoding="utf-8"))
    write(out / "build.toml", text)
    shutil.copy(LAYOUT / "CARD.md", out / "CARD.md")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    arguments = [x for x in sys.argv[1:] if x != "--aot"]
    if len(arguments) != 1 or len(sys.argv) > 3:
        sys.exit(__doc__)
    out = Path(arguments[0])
    if "--aot" in sys.argv:
        build_aot(out)
        print(f"wrote {out}: build.toml, torch-ext, csrc")
    else:
        build(out)
        print(f"wrote {out}/build: torch-{', torch-'.join(VARIANTS)}")
