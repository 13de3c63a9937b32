"""The source package and the wheel, made and installed as pip does it, each in a new environment.

Nothing is downloaded: the build environment has setuptools alone, as pip's isolated one has, and
the environments of installs see the packages of this one behind what was installed into them.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parents[2]
PACKAGES = Path(setuptools.__file__).parents[1]
# what the tree has beside the repository
IGNORED = shutil.ignore_patterns(
    ".git", ".venv*", "build", "dist", "*.so", "*.egg-info", "__pycache__"
)


def run(python: Path, code: str, folder: Path, **variables: str) -> subprocess.CompletedProcess:
    # a locale that cannot decode UTF-8, as Windows has in many countries
    environment = {
        "PATH": os.environ["PATH"], "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
        "OMP_NUM_THREADS": "1", **variables,
    }  # fmt: skip
    return subprocess.run(
        [python, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )


def environment(folder: Path) -> Path:
    """The Python of a new environment without any package."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    return folder / "bin" / "python"


def packages_of(python: Path) -> Path:
    return next((python.parents[1] / "lib").glob("python*")) / "site-packages"


@pytest.fixture(scope="module")
def builder(tmp_path_factory):
    """A Python with setuptools alone."""
    python = environment(tmp_path_factory.mktemp("builder") / "env")
    for name in ("setuptools", "_distutils_hack", "pkg_resources", "wheel", "packaging"):
        for path in (*PACKAGES.glob(name), *PACKAGES.glob(f"{name}-*.dist-info")):
            (packages_of(python) / path.name).symlink_to(path)
    return python


@pytest.fixture(scope="module")
def toolkit(tmp_path_factory):
    """A CUDA toolkit as far as setup.py looks for one."""
    nvcc = tmp_path_factory.mktemp("toolkit") / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    return nvcc.parents[1]


def build(python: Path, kind: str, source: Path, out: Path, **variables: str):
    code = f"from setuptools import build_meta as b; b.build_{kind}({str(out)!r})"
    return run(python, code, source, **variables)


@pytest.fixture(scope="module")
def sdist(builder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=IGNORED)
    made = build(builder, "sdist", source, folder)
    assert made.returncode == 0, made.stderr
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def unpacked(sdist):
    with tarfile.open(sdist) as archive:
        archive.extractall(sdist.parent, filter="data")
    return next(
        path
        for path in sdist.parent.iterdir()
        if path.name.startswith("nasa_kernels-") and path.is_dir()
    )


@pytest.fixture(scope="module")
def wheel(unpacked, builder, toolkit):
    """pip's default: built from the source package where torch is not, though there is an nvcc."""
    made = build(builder, "wheel", unpacked, unpacked.parent, CUDA_HOME=str(toolkit))
    assert made.returncode == 0, made.stderr
    for kernels in ("CPU kernels", "CUDA C++ kernels"):
        assert re.search(
            rf"without the {re.escape(kernels)}: torch.*--no-build-isolation", made.stdout
        )
    return next(unpacked.parent.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    python = environment(tmp_path_factory.mktemp("installed") / "env")
    pip_install(python, wheel)
    return python


def pip_install(python: Path, wheel: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q"]
    # a PYTHONPATH with a clone on it would count as installed
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    subprocess.run([*pip, "--no-deps", "--no-index", wheel], check=True, env=clean)
    # behind what was installed: a line of a .pth file, whose own .pth files are not read
    (packages_of(python) / "behind.pth").write_text(f"{PACKAGES}\n")


def test_the_source_package_has_what_a_build_needs_and_no_part_of_the_tests(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in ("csrc/bindings.cpp", "csrc/cpu/vec.h", "cmake/cpu.cmake", "CHANGELOG.md"):
        assert name in names
    assert not [name for name in names if name.startswith(("tests", "bench", "integrations"))]
    assert not [name for name in names if "/models/" in name]
    assert sdist.stat().st_size < 1_000_000


def test_what_is_missing_is_an_error_where_it_was_asked_for(builder, unpacked, toolkit, tmp_path):
    for variable in ("NASA_KERNELS_CUDA", "NASA_KERNELS_CPU"):
        wanted = {variable: "1", "CUDA_HOME": str(toolkit)}
        made = build(builder, "wheel", unpacked, tmp_path, **wanted)
        last = made.stderr.strip().splitlines()[-1]
        assert made.returncode and last.startswith(f"RuntimeError: {variable}=1 but the")
        assert last.endswith("install torch first and pip install --no-build-isolation")
    made = build(builder, "wheel", unpacked, tmp_path, NASA_KERNELS_CPU="yes")
    assert "NASA_KERNELS_CPU must be auto, 0 or 1, got 'yes'" in made.stderr


def test_the_wheel(wheel):
    assert wheel.name.endswith("-py3-none-any.whl") and wheel.stat().st_size < 1_000_000
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = next(name for name in names if name.endswith("METADATA"))
        text = archive.read(metadata).decode()
    tops = {name.partition("/")[0] for name in names if "dist-info" not in name}
    assert tops == {"nasa_kernels", "nasa_diffusers", "nasa_distill"}
    assert {f"{top}/py.typed" for top in tops} <= set(names)
    assert not [name for name in names if name.endswith((".so", ".safetensors"))]

    fields = message_from_string(text)
    required = fields.get_all("Requires-Dist")
    # pip would replace a torch that a cap shuts out
    assert [x for x in required if x.startswith("torch") and "extra" not in x] == ["torch>=2.7"]
    triton = {
        x.partition(";")[0]: x
        for x in required
        if x.startswith("triton") and 'extra == "triton"' in x
    }
    assert any('sys_platform == "linux"' in x for x in triton.values())
    assert any(name.startswith("triton-windows") and "win32" in x for name, x in triton.items())
    assert {"app", "demo", "diffusers", "distill"} <= set(fields.get_all("Provides-Extra"))
    for field in ("Author", "Keywords", "License-Expression", "Summary", "Requires-Python"):
        assert fields[field]
    assert len(fields.get_all("Classifier")) > 5
    # a relative link or picture leads nowhere on an index
    description = fields.get_payload()
    targets = re.findall(r"\]\(([^)]*)\)", description)
    assert not [x for x in targets if not x.startswith("http")]
    assert "<!--" not in description and "NASA attention" in description and "ᵀ" in text


CALL = """
import json, torch, nasa_kernels
from nasa_kernels import backends, nasa_attention
torch.manual_seed(0)
q, k, v, kn, vn = (torch.randn(1, n, 2, 8) for n in (5, 4, 4, 3, 3))
attend = torch.nn.functional.scaled_dot_product_attention
z, zn = (
    attend(*(x.transpose(1, 2) for x in (q, *prompt))).transpose(1, 2)
    for prompt in ((k, v), (kn, vn))
)
error = (nasa_attention(q, k, v, kn, vn, 0.5) - (z - 0.5 * zn)).abs().max().item()
print(json.dumps([nasa_kernels.__file__, error, backends.why_not("cuda", torch.device("cpu"))]))
"""


def test_a_call_in_a_fresh_environment(installed, tmp_path):
    done = run(installed, CALL, tmp_path)
    assert done.returncode == 0, done.stderr
    file, error, why_not_cuda = json.loads(done.stdout)
    assert Path(file).is_relative_to(packages_of(installed))
    assert error < 1e-6 and "built without the CUDA C++ kernels" in why_not_cuda


def test_broken_libraries_leave_an_install_that_works(installed, tmp_path):
    libraries = [packages_of(installed) / "nasa_kernels" / name for name in ("_C.so", "_cpu_C.so")]
    for library in libraries:
        library.write_bytes(b"\x7fELF, cut off")
    try:
        done = run(installed, f"{CALL}\nimport nasa_kernels.__main__ as m; m.main()", tmp_path)
    finally:
        for library in libraries:
            library.unlink()
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[0])[1] < 1e-6
    for library in libraries:
        assert f"{library.name} does not load under torch" in done.stdout


def test_without_diffusers_it_says_what_to_install(installed, tmp_path):
    code = "import sys; sys.modules['diffusers'] = None\nimport nasa_diffusers"
    done = run(installed, code, tmp_path)
    assert done.stderr.strip().splitlines()[-1] == (
        'ModuleNotFoundError: nasa_diffusers needs diffusers; pip install "nasa-kernels[diffusers]"'
    )


def test_the_models_are_a_package_of_their_own(installed, builder, tmp_path):
    """The same folder, found where it was installed; without it one sentence says what to do."""
    models = tmp_path / "models"
    shutil.copytree(ROOT / "python" / "nasa_distill" / "models", models, ignore=IGNORED)
    made = build(builder, "wheel", models, tmp_path)
    assert made.returncode == 0, made.stderr
    pip_install(installed, next(tmp_path.glob("*.whl")))
    code = """
from nasa_distill.world import shipped
print(shipped.path())
shipped.PACKAGE = "not_installed"
shipped.path()
"""
    done = run(installed, code, tmp_path)
    said = done.stderr.strip().splitlines()[-1]
    assert said.startswith(
        "FileNotFoundError: shipped.path: the model is not installed; in a clone"
    )
    folder = Path(done.stdout.strip())
    assert folder.is_relative_to(packages_of(installed)), done.stderr
    files = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    ours = ROOT / "python" / "nasa_distill" / "models" / folder.name
    assert files == {path.relative_to(ours) for path in ours.rglob("*") if path.is_file()}


def test_two_installs_side_by_side(installed, tmp_path):
    """Halves of different versions, and two copies in one process: a sentence each."""
    copy = tmp_path / "nasa_kernels"
    shutil.copytree(packages_of(installed) / "nasa_kernels", copy, ignore=IGNORED)
    twice = """
import sys, nasa_kernels
for name in [name for name in sys.modules if name.startswith("nasa_kernels")]:
    del sys.modules[name]
sys.path.insert(0, "")
import nasa_kernels
"""
    said = run(installed, twice, tmp_path).stderr.strip().splitlines()[-1]
    assert said.startswith(
        "ImportError: nasa_kernels: its operators are in this process already, from another copy"
    )
    assert said.endswith(f"keep one (this is {copy})")

    # an older one, which has not what this nasa_diffusers needs
    (copy / "nag.py").write_text("def nag_attention(): ...\n")
    (copy / "__init__.py").write_text("")
    done = run(installed, "import nasa_diffusers", tmp_path)
    said = done.stderr.strip().splitlines()[-1]
    assert said.startswith(f"ImportError: nasa_diffusers in {packages_of(installed)}")
    assert "belongs with a nasa_kernels of the same version, and found: cannot import" in said
    assert str(copy) in said
