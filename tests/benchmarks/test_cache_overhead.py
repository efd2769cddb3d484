import runpy
from pathlib import Path

import pytest

from distill.cache_grid import METHODS
from fast_diffusers.caching import TaylorSeer

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "cache_overhead.py"))


def test_every_method_is_measured_and_none_reuses(capsys):
    small = ["--size=4", "--heads=1", "--blocks", "1", "1", "--steps=2", "--pairs=2"]
    assert SCRIPT["main"](small).keys() == METHODS.keys()
    with pytest.raises(SystemExit):
        SCRIPT["main"](["NoMethod"])
    assert "no method NoMethod" in capsys.readouterr().err


def test_a_cache_that_hits_is_not_measured():
    loop = SCRIPT["Loop"](SCRIPT["small_flux"]((1, 1), 1), 1, 4, 4)
    with pytest.raises(ValueError, match="reuses something"):
        loop.cached(TaylorSeer(interval=2, first_enhance=1))
