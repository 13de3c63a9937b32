"""Package metadata. `pip install --no-build-isolation .` after torch; no compiler is needed."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "nasa_kernels/__init__.py").read_text())[1]

# Interpreter: Triton 3.6 fails with NumPy 2.4 in its interpreter, which the tests run kernels in.
DIFFUSERS = ["diffusers>=0.35,<0.43", "transformers>=4.53", "accelerate>=1.0", "peft>=0.17"]
DEMO = ["matplotlib>=3.8", "rich>=13", "pillow>=10"]
TEST = [
    *("pytest>=8", "pytest-timeout", "pytest-xdist", "hypothesis>=6.100"),
    *("triton>=3.6,<3.10", "numpy<2.4", "ruff", "mypy", "ninja"),
]

setup(
    name="nasa-kernels",
    version=VERSION,
    description="Negative prompts for one-step and few-step diffusion models: fused NASA attention",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=["nasa_kernels", "nasa_kernels._triton", "nasa_diffusers"],
    package_dir={
        "nasa_kernels": "nasa_kernels",
        "nasa_diffusers": "python/nasa_diffusers",
    },
    install_requires=["torch>=2.10,<2.16"],
    extras_require={
        "triton": ["triton>=3.6,<3.10"],
        "diffusers": DIFFUSERS,
        "demo": [*DIFFUSERS, *DEMO],
        "test": [*DIFFUSERS, *DEMO, *TEST],
    },
)
