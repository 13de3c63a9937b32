"""The site, whose strict build follows every link and anchor; skipped where MkDocs is not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_site_builds(tmp_path):
    pytest.importorskip("mkdocs", reason="no MkDocs: make site")
    pytest.importorskip("material", reason="no Material for MkDocs: make site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", tmp_path / "site"],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    index = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    # a link out of the pages is text there
    assert "CHANGELOG.md" not in index and "quick-start" in index
