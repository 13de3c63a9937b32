"""The models that come with the package, one of each world."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from nasa_distill.train.networks import load

LIMIT = 10_000_000  # bytes of safetensors
MODELS = Path(__file__).parents[1] / "models"
NAMES = {64: "few-step-64", 32: "few-step"}  # by the size of their images
# the models in an installation: a package of their own, models/pyproject.toml
PACKAGE = "nasa_distill_models"


def path(size: int = 64) -> Path:
    """Folder of the pipeline, of one to four steps, for `StableDiffusionPipeline.from_pretrained`.

    Args:
        size: Of its images: 64, or 32 for the model that most pages of results are of.

    Raises:
        FileNotFoundError: It is not installed.
        ValueError: No model draws images of that size.
    """
    if size not in NAMES:
        raise ValueError(
            f"shipped.path: size must be {' or '.join(map(str, NAMES))} pixels, got {size}"
        )
    package = importlib.util.find_spec(PACKAGE)
    for folder in (MODELS, *map(Path, _folders(package))):
        if (folder / NAMES[size] / "model_index.json").exists():
            return folder / NAMES[size]
    raise FileNotFoundError(
        "shipped.path: the model is not installed; in a clone, pip install "
        "./python/nasa_distill/models, or train one: python -m nasa_distill world"
    )


def _folders(package: ModuleSpec | None) -> Iterable[str]:
    return (package and package.submodule_search_locations) or ()


def pack(source: Path, target: Path) -> int:
    """Write a pipeline with its U-Net and autoencoder in half precision; bytes of the weights.

    diffusers loads these as fp32 again. The text encoder stays fp32, because transformers loads it
    in the precision of the file.

    Raises:
        ValueError: `source` holds no pipeline, or it takes more than `LIMIT`.
    """
    pipe: Any = load(source).pipe
    for module in (pipe.unet, pipe.vae):
        module.to(torch.float16)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipe.save_pretrained(partial)
    # transformers 5 writes tokenizer.json alone, which transformers 4 does not read
    if hasattr(pipe.tokenizer, "backend_tokenizer"):
        pipe.tokenizer.backend_tokenizer.model.save(str(partial / "tokenizer"))
    _prefix(partial / "text_encoder" / "model.safetensors")
    for config in partial.rglob("*.json"):
        _forget_folder(config)
    size = sum(file.stat().st_size for file in partial.rglob("*.safetensors"))
    if size > LIMIT:
        shutil.rmtree(partial)
        raise ValueError(f"shipped.pack: {source} takes {size} bytes, more than {LIMIT}")
    card = target / "README.md"
    if card.exists():
        shutil.copy(card, partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    return size


def _forget_folder(config: Path) -> None:
    """diffusers writes where a model was loaded from, which is a folder of this machine."""
    settings = json.loads(config.read_text(encoding="utf-8"))
    if settings.pop("_name_or_path", None) is not None:
        config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _prefix(path: Path) -> None:
    """Names as in transformers 4 and every published checkpoint, which transformers 5 reads too."""
    weights = safetensors.torch.load_file(path)
    named = {f"text_model.{name.removeprefix('text_model.')}": x for name, x in weights.items()}
    safetensors.torch.save_file(named, path, {"format": "pt"})
