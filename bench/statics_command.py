"""`python -m bench statics` for the CUDA C++ kernels: all rows, and the page made of them."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

from bench import image_statics, nag_statics, statics
from nasa_kernels.testing import CUDA_LIBRARY


def library_of(path: Path | None) -> Path:
    found = path or Path(os.environ.get("NASA_CUDA_LIBRARY", CUDA_LIBRARY))
    if not found.is_file():
        raise OSError(f"statics: {found} does not exist: build the CUDA C++ kernels first")
    return found


def run(library: Path | None = None, write: bool = False) -> int:
    found = library_of(library)
    rows = statics.rows_of(found) + statics.backward_rows(found) + nag_statics.rows_of(found)
    rows += image_statics.rows_of(found)
    if write:
        statics.ROWS.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
        statics.ROWS.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        statics.PAGE.write_text(statics.page(rows), encoding="utf-8")
        print(f"{len(rows)} rows in {statics.PAGE} and {statics.ROWS}")
    else:
        print(statics.page(rows))
    return 0
