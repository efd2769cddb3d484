import runpy
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "mnist_step.py"


def test_both_methods_are_timed():
    figures = runpy.run_path(str(SCRIPT))["measure"](batch_size=8, width=4, repeats=1, torch=None)
    assert set(figures) == {"rcgm", "twinflow"}
    assert all(row["paddle_ms"] > 0 for row in figures.values())
