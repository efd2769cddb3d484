import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fast_diffusers.pipelines.shipped import SHIPPED

SCRIPT = Path(__file__).parents[2] / "examples" / "inference.py"


@pytest.fixture
def inference(monkeypatch, tmp_path):
    """Runs the script as `python examples/inference.py` does, in an empty folder, and gives its exit code."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as stop:
            return stop.code or 0
        return 0

    return call


def pixels(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))])


def test_writes_images_that_depend_on_the_seed_alone(inference, tmp_path):
    options = ["--model_name", "digits", "--prompt", "7", "--prompt", "3", "--num_images", "2", "--steps", "2"]
    assert inference(*options, "--output_dir", "a") == 0
    assert inference(*options, "--output_dir", "b") == 0
    assert inference(*options, "--output_dir", "c", "--seed", "1", "--order", "2") == 0
    first = pixels(tmp_path / "a")
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == [f"image-{i:03d}.png" for i in range(4)]
    assert first.shape == (4, 8, 8) and np.array_equal(first, pixels(tmp_path / "b"))
    assert not np.array_equal(first, pixels(tmp_path / "c"))


def test_opens_a_folder(inference, tmp_path):
    folder = str(SHIPPED["digits"])
    for i, options in enumerate((["--model_name", folder], ["--model_name", "qwen-image", "--model_path", folder])):
        assert inference(*options, "--prompt", "1", "--output_dir", str(i)) == 0
    assert np.array_equal(pixels(tmp_path / "0"), pixels(tmp_path / "1"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "cat"], "labels 0 to 9"),
        (["--prompt", "3", "--order", "3"], "order must be 1 or 2, got 3"),
        (["--prompt", "3", "--steps", "0"], "at least 1, got 0"),
        (["--prompt", "3", "--style", "any"], "told its target time"),
        (["--prompt", "3", "--style", "many"], "few, any, mul"),
        (["--prompt", "3", "--seed", "-1"], "--seed must not be negative"),
        (["--prompt", "3", "--num_images", "0"], "--num_images must be positive"),
        (["--prompt", "3", "--lora", "nowhere"], "nowhere"),
        (["--prompt", "3", "--model_name", "nothing"], "neither a pipeline folder nor one of"),
        (["--prompt", "3", "--model_name", "qwen-image"], "download Qwen/Qwen-Image .* pass --model_path"),
    ],
)
def test_mistakes_end_in_one_line(inference, options, message, capsys):
    assert inference(*options) == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert re.search(message, line)
