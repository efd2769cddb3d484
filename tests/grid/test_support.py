"""docs/support.md says what the tests of this checkout say."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "docs" / "make_support.py"


@pytest.fixture(scope="module")
def support():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("make_support", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_is_up_to_date(support):
    assert support.PAGE.read_text(encoding="utf-8") == support.page(support.collect()), "run `make support`"


def test_cells_of_a_page(support):
    cells = {
        ("Sampler", "euler", "flux"): set(),
        ("Sampler", "euler", "sana"): {"no such time"},
        ("Sampler", "phased", "flux"): {"no such time", "too slow"},
        ("Compile", "Compile", "sana"): set(),
    }
    text = support.page(cells)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    columns = ["", *support.FAMILIES.values()]
    found = {
        (row[0], column): cell for row in rows[2:] for column, cell in zip(columns[1:], row[1:], strict=True) if cell
    }
    assert found == {
        ("`euler`", "FLUX"): "✓",
        ("`euler`", "SANA"): "– [1]",
        ("`phased`", "FLUX"): "– [1] [2]",
        ("**Compile**", "SANA"): "✓",
    }
    assert text.endswith("1. no such time\n2. too slow\n")
    assert [row[0] for row in rows[2:]] == ["**Sampler**", "`euler`", "`phased`", "**Compile**"]


def test_families_have_names(support):
    with pytest.raises(ValueError, match="no name for pixart"):
        support.page({("Sampler", "euler", "pixart"): set()})
