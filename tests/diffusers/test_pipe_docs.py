"""Every Python block of the documentation runs as it stands, page by page."""

import re
from pathlib import Path

import pytest
from nasa_diffusers import flops

PAGES = sorted((Path(__file__).parents[2] / "docs" / "diffusers").glob("*.md"))


def test_there_are_pages():
    assert [page.stem for page in PAGES] == [
        "compared",
        "families",
        "joint",
        "pipelines",
        "quick-start",
        "side",
        "troubleshooting",
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_run(page):
    """Blocks of a page share their names, as a reader who pastes one after the other has it."""
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    names = {}
    for block in blocks:
        exec(compile(block, page.name, "exec"), names)


def test_the_table_is_what_is_counted():
    """One row is counted here; `python -m nasa_diffusers flops` prints them all."""
    text = next(page for page in PAGES if page.stem == "compared").read_text()
    rows = [row for row in text.splitlines() if re.match(r"\| .* \| \d+ \+ \d+ \|", row)]
    assert [row.split(" | ")[0] for row in rows] == [f"| {name}" for name in flops.MODELS]
    assert flops.markdown([flops.count("PixArt-alpha, 512 px")]).splitlines()[-1] in rows


def test_links_between_pages_exist():
    links = [(p, link) for p in PAGES for link in re.findall(r"\]\(([^)#]+)\)", p.read_text())]
    assert links
    for page, target in links:
        assert (page.parent / target).exists(), f"{page.name}: {target}"
