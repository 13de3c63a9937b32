"""Patterns of the command line to names."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence


def matching(names: Sequence[str], patterns: Sequence[str] | None, what: str) -> list[str]:
    """The names that match one of the patterns; all where there is none."""
    for pattern in patterns or ():
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"no {what} {pattern!r}; there are {', '.join(names)}")
    return [n for n in names if not patterns or any(fnmatch.fnmatchcase(n, p) for p in patterns)]
