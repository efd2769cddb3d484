"""Writes docs/support.md from the tests that exist: `python docs/make_support.py`, or `make support`.

A test whose function is marked `support(group, argument)` and that has a parameter `family` fills a cell of the table:
the row is the id of its parameter `argument` (without one, the group itself), the column that of `family`. A test that
is skipped or expected to fail leaves its reason in the place of the tick. The tests are collected, not run; that they
pass is for the test suite to show.
"""

import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "support.md"
FAMILIES = {
    "flux": "FLUX",
    "sd3": "SD3, SD3.5",
    "ppdiffusers_sd3": "SD3 of ppdiffusers",
    "sana": "SANA",
    "sana_sprint": "SANA-Sprint",
    "qwen_image": "Qwen-Image",
    "z_image": "Z-Image",
}
"""Columns, by the ids of the tests' parameter."""

INTRODUCTION = """# What works with what

Written by `make support` from the tests that exist; do not edit. Every tick is a test in `tests/` on a tiny random
model of the family: a student's LoRA gets a finite, reproducible loss and a gradient from the objective, and an update
changes it; samples are finite and depend on nothing but the generator. A cache is tested inside the loop of each of the
samplers. An empty cell has no test.
"""

Cells = dict[tuple[str, str, str], set[str]]
"""(group, row, family) to the reasons why tests of this cell do not run; none where all do."""


class Collector:
    """A pytest plugin that reads the marked tests."""

    def __init__(self) -> None:
        self.cells: Cells = defaultdict(set)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Called with all tests."""
        for item in session.items:
            mark = item.get_closest_marker("support")
            if mark is None:
                continue
            group, *argument = mark.args
            ids = dict(zip(item.callspec.params, item.callspec.id.split("-"), strict=True))
            cell = self.cells[group, ids[argument[0]] if argument else group, ids["family"]]
            for name in ("skip", "xfail"):
                cell |= {each.kwargs.get("reason", name) for each in item.iter_markers(name)}


def collect() -> Cells:
    """The cells of all marked tests."""
    files = [
        str(path) for path in sorted(ROOT.glob("tests/**/test_*.py")) if "pytest.mark.support(" in path.read_text()
    ]
    collector = Collector()
    options = ["-o", "addopts=", "--import-mode=importlib", "--rootdir", str(ROOT)]
    options += ["--collect-only", "-p", "no:terminal", "-p", "no:cacheprovider"]
    code = pytest.main([*options, *files], plugins=[collector])
    if code != pytest.ExitCode.OK:
        raise RuntimeError(f"the tests cannot be collected: {code!r}; run pytest --collect-only on {' '.join(files)}")
    return dict(collector.cells)


def page(cells: Cells) -> str:
    """The page for these cells. ValueError for a family without a name."""
    if unknown := {family for *_, family in cells} - FAMILIES.keys():
        raise ValueError(f"FAMILIES has no name for {', '.join(sorted(unknown))}")
    notes: list[str] = []

    def mark(text: str) -> str:
        if text not in notes:
            notes.append(text)
        return f"[{notes.index(text) + 1}]"

    def cell(group: str, row: str, family: str) -> str:
        if (group, row, family) not in cells:
            return ""
        reasons = sorted(cells[group, row, family])
        return " ".join(["–" if reasons else "✓", *map(mark, reasons)])

    lines = ["| | " + " | ".join(FAMILIES.values()) + " |", "|---|" + ":---:|" * len(FAMILIES)]
    for group in dict.fromkeys(group for group, *_ in cells):
        rows = list(dict.fromkeys(row for each, row, _ in cells if each == group))
        if rows != [group]:
            lines.append(f"| **{group}** |" + " |" * len(FAMILIES))
        for row in rows:
            title = f"**{group}**" if row == group else f"`{row}`"
            lines.append(f"| {title} | " + " | ".join(cell(group, row, family) for family in FAMILIES) + " |")
    footnotes = [f"{number}. {text}" for number, text in enumerate(notes, 1)]
    return "\n".join([INTRODUCTION, *lines, *([""] if notes else []), *footnotes]) + "\n"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    PAGE.write_text(page(collect()), encoding="utf-8")
    print(f"wrote {PAGE}")
