import runpy
from pathlib import Path

import pytest

BENCHMARK = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "jvp.py"))


@pytest.mark.parametrize("name", ["flux digits teacher", "sana sprint"])
def test_exact_and_frugal(name):
    figures = BENCHMARK["measure"](BENCHMARK["FAMILIES"][name], batch=1, repeats=1)
    assert figures["error"] < 1e-7
    assert figures["memory ratio"] < 2.2 and figures["time ratio"] > 0
