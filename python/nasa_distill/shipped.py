"""The model that comes with the package."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "models" / "one-step"


def path() -> Path:
    """Folder of the one-step pipeline, for `StableDiffusionPipeline.from_pretrained`.

    Raises:
        FileNotFoundError: It was left out of the installation.
    """
    if not (FOLDER / "model_index.json").exists():
        raise FileNotFoundError(
            f"shipped.path: {FOLDER} holds no model; install from the repository, or train one: "
            "python -m nasa_distill world"
        )
    return FOLDER
