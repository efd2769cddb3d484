import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "examples" / "flux_lightning_cinn.py"


@pytest.fixture
def script(monkeypatch, tmp_path, tiny_teacher):
    """Runs the script as `python examples/flux_lightning_cinn.py` does, in an empty folder, and gives its exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FAST_DIFFUSERS_CACHE", str(tmp_path / "cache"))

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--model", str(tiny_teacher), *arguments])
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as stop:
            return stop.code or 0
        return 0

    return call


def test_compiles_exports_and_says_where_the_time_goes(script, tmp_path, capsys):
    options = ["--prompt", "3", "--prompt", "7", "--steps", "2", "--num_phases", "2", "--warmup", "1"]
    assert script(*options, "--output_dir", "a", "--export", "e", "--runtime", "paddle") == 0
    text = capsys.readouterr().out
    said = r"backend_used (pir|cinn); 1 graphs, compiled in .*, 0 recompilations, 0 graphs read from .*cache/programs"
    assert re.search(said, text)
    stages = re.findall(r"^(.*): transformer [\d.]+ ms, rest [\d.]+ ms, all [\d.]+ ms; first call \d+ ms$", text, re.M)
    assert stages == ["compiled", "exported, paddle fp32"]
    difference = float(re.search(r"largest difference of the images, of values from 0 to 1: (\S+)", text)[1])
    assert difference < 1e-4
    for folder in ("a", "a/exported"):
        images = [np.asarray(Image.open(file)) for file in sorted((tmp_path / folder).glob("*.png"))]
        assert [image.shape for image in images] == [(8, 8)] * 2 and not np.array_equal(*images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backend", "cinn"], "backend='cinn' cannot run: .*pip install paddlepaddle-gpu"),
        (["--warmup", "-1"], "--warmup must not be negative"),
        (["--lora", "nowhere"], "nowhere"),
        (["--granularity", "loop", "--steps", "0"], "num_inference_steps must be a positive integer"),
    ],
)
def test_mistakes_end_in_one_line(script, options, message, capsys):
    assert script("--prompt", "3", *options) == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert re.search(message, line)
