"""VBench in an environment of its own, here a stand-in: a Python whose `vbench` is written below.

It has the class, the arguments and the files of vbench 0.1.5, and invents the scores.
"""

import json
import sys

import pytest
from nasa_distill.cli import main

# what the environment holds besides; `torch` and it are imported by the real script
PACKAGES = {
    "torch.py": """
def device(name): return name
class cuda:
    is_available = staticmethod(lambda: False)
""",
    "vbench/VBench_full_info.json": "[]",
    "vbench/__init__.py": """
import json, os, sys
from pathlib import Path

class VBench:
    def __init__(self, device, full_info_dir, output_path):
        assert device == "cpu" and json.loads(Path(full_info_dir).read_text()) == []
        self.output_path = output_path

    def evaluate(self, videos_path, name, prompt_list=[], dimension_list=None, local=False,
                 read_frame=False, mode="vbench_standard", **kwargs):
        assert mode == "custom_input" and prompt_list == [] and not local
        fault = json.loads(Path(__file__).with_name("fault.json").read_text())
        # as vbench does: by suffix in either case, in the folder's own order
        names = [n for n in os.listdir(videos_path) if Path(n).suffix.lower() in
                 (".mp4", ".gif", ".jpg", ".png")]
        if fault == "crash":
            print("loading", flush=True)
            raise RuntimeError("weights of MUSIQ cannot be had")
        results = {}
        for dimension in dimension_list:
            top = {"aesthetic_quality": 1, "imaging_quality": 100}[dimension]
            rows = [{"video_path": os.path.join(videos_path, n),
                     "video_results": top * len(n) / 16} for n in names]
            if dimension == "imaging_quality":
                if fault == "lost":
                    rows = rows[1:]
                elif fault == "twice":
                    rows.append(rows[0])
                elif isinstance(fault, (int, float)) and not isinstance(fault, bool):
                    rows[0]["video_results"] = fault
            mean = sum(row["video_results"] for row in rows) / len(rows)
            results[dimension] = [mean if fault == "scale" else mean / top, rows]
        if fault == "foreign":
            results = {"aesthetic_quality": 0.5}
        text = "{" if fault == "cut" else json.dumps(results, indent=4)
        if fault != "silent":
            Path(self.output_path, name + "_eval_results.json").write_text(text)
""",
    "vbench-0.1.5.dist-info/METADATA": "Metadata-Version: 2.1\nName: vbench\nVersion: 0.1.5\n",
}


@pytest.fixture
def environment(tmp_path):
    """The Python of an environment, and what sets its fault."""
    packages = tmp_path / "environment"
    for name, text in PACKAGES.items():
        path = packages / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    python = packages / "python"
    # as that Python would do by itself: find its own packages, also where it is isolated
    start = f"import sys; sys.path.insert(0, {str(packages)!r}); exec(sys.argv.pop(1))"
    python.write_text(
        f'#!/bin/sh\ntest "$1" = -I && test "$2" = -c || exit 9\nshift 2\n'
        f'exec {sys.executable} -I -S -c "{start}" "$@"\n'
    )
    python.chmod(0o755)

    def fault(kind):
        (packages / "vbench" / "fault.json").write_text(json.dumps(kind))
        return python

    return fault


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "my videos"
    folder.mkdir()
    for name in ("a.mp4", "bc.gif", "d e.mp4"):
        (folder / name).touch()
    (folder / "prompts.txt").touch()
    return folder


def score(videos, python, out):
    return main(["score", "--videos", str(videos), "--vbench-python", str(python), "--out", out])


def test_scores_of_videos(environment, videos, tmp_path, capsys):
    assert score(videos, environment(None), str(tmp_path / "new" / "scores.json")) == 0
    result = json.loads((tmp_path / "new" / "scores.json").read_text())
    assert result["versions"]["vbench"] == "0.1.5" and result["versions"]["device"] == "cpu"
    rows = {row.pop("video"): row for row in result["rows"]}
    assert rows == {
        name: dict.fromkeys(("aesthetic_quality", "imaging_quality"), len(name) / 16)
        for name in ("a.mp4", "bc.gif", "d e.mp4")
    }
    for name in ("aesthetic_quality", "imaging_quality"):
        assert result[name] == pytest.approx((5 + 6 + 7) / 3 / 16)
    assert result["videos"] == 3
    assert "imaging_quality 0.375" in capsys.readouterr().out


@pytest.mark.parametrize(
    "fault, message",
    [
        ("crash", "ended with status 1 after\nloading\n"),
        ("silent", "nasa_eval_results.json is not a result of VBench 0.1.5 .*No such file"),
        ("cut", "is not a result of VBench 0.1.5"),
        ("foreign", "is not a result of VBench 0.1.5"),
        ("lost", "gave .* no imaging_quality"),
        ("twice", "there are 3 videos, VBench has 4 values of imaging_quality"),
        ("scale", "the mean imaging_quality is 0.375, VBench says 37.5"),
        (float("nan"), "imaging_quality of .* must be from 0 to 1, got nan"),
        (101.0, "imaging_quality of .* must be from 0 to 1, got 1.01"),
        (-1.0, "imaging_quality of .* must be from 0 to 1, got -0.01"),
    ],
)
def test_what_vbench_does_not_deliver(environment, videos, tmp_path, capsys, fault, message):
    assert score(videos, environment(fault), str(tmp_path / "scores.json")) == 1
    error = capsys.readouterr().err
    import re

    assert re.search("error: vbench[.](score|read): .*" + message, error), error
    assert fault != "crash" or "weights of MUSIQ cannot be had" in error.partition("error: vb")[2]
    assert not (tmp_path / "scores.json").exists()


def test_what_vbench_is_not_asked(environment, videos, tmp_path, capsys):
    def error(folder, python):
        assert score(folder, python, str(tmp_path / "scores.json")) == 1
        return capsys.readouterr().err

    python = environment("crash")
    assert "cannot start" in error(videos, tmp_path / "nowhere" / "python")
    assert "cannot read" in error(tmp_path / "nowhere", python)
    (tmp_path / "none").mkdir()
    assert "holds no video" in error(tmp_path / "none", python)
    # listed by VBench, which then fails; and passed over without a word
    for name in ("e.MP4", "f.jpg", "g.webm"):
        (videos / name).touch()
        assert f"and there is {videos / name}" in error(videos, python)
        (videos / name).unlink()
    assert main(["score", "--videos", str(videos), "--out", "scores.json"]) == 1
    assert "--videos takes --vbench-python" in capsys.readouterr().err
    assert main(["score", "--pairs", "pairs.csv", "--out", "scores.json"]) == 1
    assert "--pairs takes --clip" in capsys.readouterr().err
