"""Write docs/api.md from the docstrings of the public names: `python docs/make_api.py`."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("api.md")
PACKAGES = ("nasa_kernels", "nasa_diffusers")
SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises")
WIDTH = 96
HEAD = """# Public names

Made by `python docs/make_api.py` from the docstrings; change those. In shapes `b` is batch, `h`
heads, `l` queries, `n` text tokens, `d` head_dim.
"""


def page() -> str:
    parts = [HEAD]
    for package in PACKAGES:
        module = importlib.import_module(package)
        summary = (inspect.getdoc(module) or "").partition("\n\n")[0]
        parts.append(f"## {package}\n\n{summary}\n")
        for name in sorted(module.__all__):
            parts += entry(f"{package}.{name}", getattr(module, name))
    return re.sub("\n{3,}", "\n\n", "\n".join(parts)).rstrip() + "\n"


def entry(name: str, thing: Any) -> Iterator[str]:
    """A heading, how it is called, what its docstring says; of a class also its members."""
    yield f"### `{name}`\n"
    # other classes are made by the functions that return them
    if not inspect.isclass(thing) or dataclasses.is_dataclass(thing):
        yield code(signature(name.rpartition(".")[2], thing)) + "\n"
    yield from text_of(thing)
    if inspect.isclass(thing):
        for member, value in vars(thing).items():
            if member.startswith("_") or not value.__doc__:
                continue
            if inspect.isfunction(value) or isinstance(value, property):
                yield f"#### `{name.rpartition('.')[2]}.{member}`\n"
                if inspect.isfunction(value):
                    yield code(signature(member, value)) + "\n"
                yield from text_of(value)


def signature(name: str, thing: Any) -> str:
    """On one line where it fits, else one argument a line."""
    found = inspect.signature(thing)
    arguments = [
        p.replace(annotation=annotation(p.annotation), default=default(p.default))
        for p in found.parameters.values()
        if p.name != "self"
    ]
    found = found.replace(return_annotation=annotation(found.return_annotation))
    short = f"{name}{found.replace(parameters=arguments)}".replace(" -> None", "")
    if len(short) <= WIDTH:
        return short
    lines, starred = [], False
    for p in arguments:
        if p.kind is p.KEYWORD_ONLY and not starred:
            lines.append("    *,")
        starred = starred or p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)
        lines.append(f"    {p},")
    return "\n".join([f"{name}(", *lines, short[short.rindex(")") :]])


class Plain:
    """Prints as it stands in the source."""

    def __init__(self, text: str):
        self.text = re.sub(r"\b(torch|typing)\.", "", text).replace("'", '"')

    def __repr__(self) -> str:
        return self.text


def annotation(value: Any) -> Any:
    """Strings, as under `from __future__ import annotations`, and objects alike."""
    if value is inspect.Parameter.empty:
        return value
    return Plain(value if isinstance(value, str) else inspect.formatannotation(value))


def default(value: Any) -> Any:
    return value if value is inspect.Parameter.empty else Plain(repr(value))


def code(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def text_of(thing: Any) -> Iterator[str]:
    """A docstring's paragraphs and formulas as they are, its sections as lists."""
    lines = (inspect.getdoc(thing) or "").splitlines()
    section: list[str] = []
    for line in [*lines, ""]:
        if line.rstrip(":") in SECTIONS and line.endswith(":"):
            yield from items(section)
            section = [line]
        elif section and (line.startswith("    ") or not line):
            section.append(line)
        else:
            yield from items(section)
            section = []
            yield line
    yield from items(section)


def items(section: list[str]) -> Iterator[str]:
    """`name: what it is` over one or more lines becomes a point of a list."""
    if not section:
        return
    yield f"**{section[0].rstrip(':')}**\n"
    for line in section[1:]:
        text = line[4:]
        begins = re.match(r"(\*{0,2}[\w, .]+): (.*)", text)
        if begins and "Returns" not in section[0]:
            yield f"- `{begins[1]}`: {begins[2]}"
        elif text.startswith(" ") or not text:
            yield text and f"  {text.strip()}"
        else:
            yield text
    yield ""


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE}")
