"""The pages: the index is whole, links lead somewhere, what is generated is current."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


def links(page):
    """Local targets of a page's links and pictures, without their anchors."""
    found = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    return [target for target in found if "://" not in target]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in links(page):
        assert (page.parent / target).exists(), target


def test_the_index_names_every_page():
    index = DOCS / "README.md"
    named = {(index.parent / target).resolve() for target in links(index)}
    assert {page for page in DOCS.rglob("*.md") if page != index} <= named


def test_every_picture_is_shown_somewhere():
    shown = {(page.parent / target).resolve() for page in PAGES for target in links(page)}
    pictures = {path for kind in ("png", "svg") for path in DOCS.rglob(f"*.{kind}")}
    assert pictures and pictures <= shown


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 110
    # the picture, and two plots
    assert text.count("![") <= 3
    _, numbers, _ = re.split(r"^## (?:Numbers|More)\n", text, flags=re.MULTILINE)
    assert len(re.findall("^- ", numbers, re.MULTILINE)) <= 6


def test_the_page_of_public_names_is_made_of_the_docstrings():
    spec = importlib.util.spec_from_file_location("make_api", DOCS / "make_api.py")
    make_api = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_api)
    assert make_api.page() == make_api.PAGE.read_text(), "run: python docs/make_api.py"


def test_no_page_names_a_machine():
    for page in PAGES:
        assert not re.search(r"/(?:home|work|root|tmp)/", page.read_text()), page.name


def test_python_on_a_page_is_run_by_a_test():
    """Those of docs/diffusers, docs/distill and the README are; another page's would not be."""
    fenced = {page for page in PAGES if "```python" in page.read_text()}
    assert fenced
    for page in fenced - {ROOT / "README.md"}:
        assert page.parent.name in ("diffusers", "distill"), page.name
