"""VBench's scores of single frames, aesthetic and imaging quality, for videos that were saved.

Its last release (0.1.5) requires `transformers==4.33.2` and `numpy<2`, which no supported diffusers
runs with. So it is installed in an environment of its own, whose Python is started here and calls
the class that VBench documents. Its command is not used: it starts the first `python` on the PATH,
needs NCCL, and ends with status 0 also when it failed.
"""

from __future__ import annotations

import collections
import json
import math
import mimetypes
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# each score, and the value of a perfect video: VBench divides one by 100 in the mean only
DIMENSIONS = {"aesthetic_quality": 1.0, "imaging_quality": 100.0}
SUFFIXES = (".mp4", ".gif", ".png")  # what VBench reads; it lists .jpg too, and then fails
NAME, VERSIONS = "nasa", "versions.json"
TAIL = 20  # lines

# runs in the other environment: nothing of this one may be imported
SCRIPT = f"""
import json, sys
from importlib import metadata
from pathlib import Path
import torch, vbench

videos, out, *dimensions = sys.argv[1:]
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
about = {{"device": str(device), "python": sys.version.split()[0]}}
for name in ("vbench", "torch", "transformers", "pyiqa", "openai-clip", "decord"):
    try:
        about[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
prompts = Path(vbench.__file__).with_name("VBench_full_info.json")
vbench.VBench(device, str(prompts), out).evaluate(
    videos_path=videos, name="{NAME}", dimension_list=dimensions, mode="custom_input",
    imaging_quality_preprocessing_mode="longer",
)
Path(out, "{VERSIONS}").write_text(json.dumps(about))
"""


def find_videos(folder: Path) -> list[Path]:
    """The files in `folder` that VBench reads.

    Raises:
        ValueError: There are none, or it would leave out or stumble over others.
    """
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file())
    except OSError as error:
        raise ValueError(f"vbench.find_videos: cannot read {folder}: {error}") from error
    for path in files:
        kind = (mimetypes.guess_type(path.name)[0] or "").partition("/")[0]
        if kind in ("video", "image") and path.suffix not in SUFFIXES:
            raise ValueError(
                f"vbench.find_videos: VBench reads {', '.join(SUFFIXES)}, and there is {path}; "
                "convert or rename it, or move it away"
            )
    videos = [path for path in files if path.suffix in SUFFIXES]
    if not videos:
        raise ValueError(
            f"vbench.find_videos: {folder} holds no video; VBench reads {', '.join(SUFFIXES)} "
            "that lie in it directly"
        )
    return videos


def score(folder: Path, python: Path) -> dict[str, Any]:
    """Both scores of each video and their means, from 0 to 1.

    Args:
        folder: Of videos; their names do not matter.
        python: Of an environment that has `vbench`.

    Raises:
        ValueError: No videos, no such environment, or a result that is not of these videos.
        RuntimeError: VBench failed; the end of what it wrote is told.
    """
    videos = find_videos(folder)
    with tempfile.TemporaryDirectory() as out:
        # isolated: neither PYTHONPATH nor the working directory leads back to this environment
        command = [str(python), "-I", "-c", SCRIPT, str(folder.resolve()), out, *DIMENSIONS]
        try:
            process = subprocess.Popen(
                command, text=True, errors="replace", stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
        except OSError as error:
            raise ValueError(
                f"vbench.score: cannot start {python}: {error}; give the Python of an environment "
                "with vbench: python3.10 -m venv ENV; ENV/bin/pip install vbench==0.1.5"
            ) from error
        tail: collections.deque[str] = collections.deque(maxlen=TAIL)
        with process:
            for line in process.stdout or ():
                sys.stderr.write(line)
                tail.append(line)
        if process.returncode != 0:
            raise RuntimeError(
                f"vbench.score: {python} ended with status {process.returncode} after\n"
                + "".join(tail).rstrip()
            )
        rows, means = read(Path(out, f"{NAME}_eval_results.json"), videos)
        versions = json.loads(Path(out, VERSIONS).read_text(encoding="utf-8"))
    return {"videos": len(rows), **means, "versions": versions, "rows": rows}


def read(path: Path, videos: list[Path]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """A row per video, and the means, of the file that VBench writes.

    Raises:
        ValueError: It is missing or another file, or not every video has both scores.
    """
    rows: list[dict[str, Any]] = [{"video": video.name} for video in videos]
    means: dict[str, float] = {}
    for dimension, top in DIMENSIONS.items():
        try:
            mean, scored = json.loads(path.read_text(encoding="utf-8"))[dimension]
            pairs = [(Path(x["video_path"]).name, float(x["video_results"]) / top) for x in scored]
            mean = float(mean)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"vbench.read: {path.name} is not a result of VBench 0.1.5 with {dimension} "
                f"({type(error).__name__}: {error}); install that release"
            ) from error
        values = dict(pairs)
        for row in rows:
            if row["video"] not in values:
                raise ValueError(
                    f"vbench.read: VBench gave {row['video']} no {dimension}; see what it wrote "
                    "above, and whether the file plays"
                )
            row[dimension] = value = values[row["video"]]
            if not (math.isfinite(value) and 0 <= value <= 1):
                raise ValueError(
                    f"vbench.read: {dimension} of {row['video']} must be from 0 to 1, got {value}; "
                    "another release may scale it otherwise, install vbench==0.1.5"
                )
        if len(pairs) != len(rows):
            raise ValueError(
                f"vbench.read: there are {len(rows)} videos, VBench has {len(pairs)} values of "
                f"{dimension}; let nothing else write to the folder meanwhile"
            )
        means[dimension] = statistics.fmean(row[dimension] for row in rows)
        if not math.isclose(means[dimension], mean, rel_tol=1e-6):
            raise ValueError(
                f"vbench.read: the mean {dimension} is {means[dimension]}, VBench says {mean}; "
                "another release may scale it otherwise, install vbench==0.1.5"
            )
    return rows, means
