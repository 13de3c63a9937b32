"""A hook of MkDocs: what a page links to outside of `docs/` is in the repository, not on the site.

Such a link becomes its text, such a picture its description.
"""

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)]*)?\)")


def on_page_markdown(markdown: str, page, **_) -> str:
    folder = (DOCS / page.file.src_uri).parent

    def on_site(match: re.Match) -> str:
        target = match[3]
        if "://" in target or (folder / target).resolve().is_relative_to(DOCS):
            return match[0]
        return f"*{match[2]}*" if match[1] else match[2]

    return LINK.sub(on_site, markdown)
