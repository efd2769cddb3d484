import math
import runpy
from pathlib import Path

import pytest

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "load_memory.py"))


@pytest.mark.parametrize("num_bytes", [1e9, 2e9])
def test_the_checkpoint_has_about_the_size_asked_for(num_bytes):
    size = sum(4 * math.prod(weight.shape) for weight in SCRIPT["lazy_model"](num_bytes).parameters())
    assert abs(size - num_bytes) < 0.2e9
