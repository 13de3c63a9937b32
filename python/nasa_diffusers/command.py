"""What the commands share: the options of a model, loading it, errors as one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import single_file_utils as single_file

SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def status_of(run: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> int:
    """Run a command; what the user can correct is one line on stderr and a status of 1."""
    try:
        run(options)
    except (ValueError, RuntimeError, OSError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def add_model_options(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """`--model` and how it is loaded; `default`: in words, what a command takes without one."""
    what = "folder or hub id of a diffusers pipeline, or one file"
    add = parser.add_argument
    add(
        "--model",
        required=default is None,
        help=f"{what}; default: {default}" if default else what,
    )
    add("--config", help="of a model that is one file: folder or hub id of its configuration")
    add("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 elsewhere")
    add("--device", help="default: cuda where there is one")


def load_on_device(options: argparse.Namespace) -> Any:
    """The pipeline that the options of `add_model_options` name."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    default = "float32" if torch.device(device).type == "cpu" else "bfloat16"
    return load(options.model, options.config, DTYPES[options.dtype or default]).to(device)


def load(model: str, config: str | None, dtype: torch.dtype) -> Any:
    """A pipeline from a folder, a hub id or one file of weights."""
    if not Path(model).is_file():
        if Path(model).suffix in SINGLE_FILES:
            raise ValueError(f"--model: there is no file {model!r}")
        if config is not None:
            raise ValueError(f"--config goes with a --model that is one file; {model!r} is none")
        return DiffusionPipeline.from_pretrained(model, torch_dtype=dtype)
    # which pipeline it is stands in the configuration; the weights say which of diffusers' own
    config = config or single_file.fetch_diffusers_config(
        single_file.load_single_file_checkpoint(model)
    ).get("pretrained_model_name_or_path")
    name = DiffusionPipeline.load_config(config)["_class_name"]
    if not hasattr(getattr(diffusers, name, None), "from_single_file"):
        raise ValueError(
            f"--model: a {name} cannot be read from one file; give the folder or the hub id of "
            "the whole pipeline"
        )
    return getattr(diffusers, name).from_single_file(model, config=config, torch_dtype=dtype)
