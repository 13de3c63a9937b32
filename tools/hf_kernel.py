"""Make a kernel of Hugging Face's `kernels` out of nasa_kernels, without compiled code.

    python tools/hf_kernel.py OUT     makes OUT/build/torch-cpu and torch-cuda, build.toml, CARD.md

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


def build(out: Path) -> None:
    sources = {
        path.relative_to(PACKAGE): path.read_text(encoding="utf-8")
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name not in LEFT_OUT
    }
    digest = hashlib.sha256(
        "".join(f"{path}\0{text}\0" for path, text in sources.items()).encode()
    ).hexdigest()
    shutil.rmtree(out / "build", ignore_errors=True)
    for variant in VARIANTS:
        namespace = f"nasa_kernels_{variant}_{digest[:8]}"
        folder = out / "build" / f"torch-{variant}"
        for path, text in sources.items():
            write(folder / path, relative(text, len(path.parts) - 1))
        write(folder / "_ops.py", _OPS.format(namespace=namespace))
        write(folder / "layers.py", (LAYOUT / "layers.py").read_text(encoding="utf-8"))
        init = (folder / "__init__.py").read_text(encoding="utf-8")
        init = init.replace("__all__ = [\n", 'from . import layers\n\n__all__ = [\n    "layers",\n')
        write(folder / "__init__.py", init)
        metadata = {
            "id": f"_{namespace}", "name": "nasa-kernels", "version": 0, "license": "Apache-2.0",
            "python-depends": [], "backend": {"type": variant},
        }  # fmt: skip
        write(folder / "metadata.json", json.dumps(metadata, indent=2) + "\n")
    for name in ("build.toml", "CARD.md"):
        shutil.copy(LAYOUT / name, out / name)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    build(Path(sys.argv[1]))
    print(f"wrote {sys.argv[1]}/build: torch-{', torch-'.join(VARIANTS)}")
