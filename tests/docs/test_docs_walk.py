"""docs/kernels/walk.md: its code is that of the kernels, its counts those of the machine code."""

import re
from pathlib import Path

from bench import statics

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "kernels" / "walk.md").read_text()
SOURCES = "\n".join(
    path.read_text() for path in sorted((ROOT / "csrc").glob("*")) if path.suffix in (".cu", ".cuh")
)


def test_every_line_of_code_is_one_of_the_kernels():
    excerpts = re.findall(r"```cpp\n(.*?)```", PAGE, re.S)
    assert len(excerpts) >= 6
    for excerpt in excerpts:
        assert excerpt in SOURCES, f"no longer in csrc:\n{excerpt}"


def test_the_table_adds_up_to_the_counted_path():
    (row,) = (r for r in statics.recorded() if r.gpu == "H100" and r.shape.startswith("sdxl-64-"))
    table = re.search(r"\| phase \|.*?\n\n", PAGE, re.S)[0]
    slots = [int(n) for n in re.findall(r"^\| [^*|]+ \| (\d+) \|", table, re.M)]
    total = int(re.search(r"\*\*all\*\* \| \*\*(\d+)\*\*", table)[1])
    assert sum(slots) == total == row.cycles["issue"]
    headings = re.findall(r"^## .*?: ([\d +]+) slots", PAGE, re.M)
    assert [int(n) for heading in headings for n in heading.split("+")] == slots
    for pipe in ("memory", "tensor", "exponential"):
        assert f"{row.cycles[pipe]:.0f} cycles" in PAGE
    assert f"{row.projected_issue:.0f} slots instead of {total}" in PAGE
