import importlib.util
import json
import shutil
from pathlib import Path

import distill  # noqa: F401  # isort: skip  (before paddle)
import numpy as np
import paddle
import pytest
from PIL import Image

from distill.architectures import SanaConfig
from distill.checkpoint import latest_valid
from distill.config import DataConfig, TrainerConfig
from distill.logs import read_metrics
from distill.sana_sprint import student_pipeline, student_transformer
from fast_diffusers.errors import UserError
from fast_diffusers.pipelines.shipped import open_pipeline

SCRIPT = Path(__file__).parents[2] / "examples" / "control.py"
SPEC = importlib.util.spec_from_file_location("control_example", SCRIPT)
control = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(control)

TINY = {
    "model.control_blocks": 1,
    "trainer.steps": 4,
    "trainer.batch_size": 4,
    "trainer.checkpoint_every": 2,
    "trainer.log_every": 1,
    "trainer.sample_every": "null",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A random teacher of labels, and a student of it."""
    paddle.seed(0)
    teacher = SanaConfig(num_layers=2, num_attention_heads=2, attention_head_dim=8).pipeline(
        DataConfig(), TrainerConfig()
    )
    for parameter in teacher.transformer.parameters():  # the zero-initialised output would hide everything behind it
        parameter.set_value(parameter + 0.1 * paddle.randn(parameter.shape))
    folder = tmp_path_factory.mktemp("models")
    teacher.save_pretrained(folder / "teacher")
    student = student_pipeline(teacher, student_transformer(teacher.transformer, guided=True))
    student.save_pretrained(folder / "student")
    return folder


def call(output, student=None, **changes):
    sets = [word for name, value in (TINY | changes).items() for word in ("--set", f"{name}={value}")]
    control.main([*([] if student is None else ["--student", str(student)]), "--output", str(output), *sets])


def test_what_a_run_leaves_and_that_it_is_not_repeated(folders, tmp_path, capsys):
    call(tmp_path, folders / "student")
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "metrics.json").read_text())
    rows = [control.REAL, control.ALONE, control.CONTROLLED, control.OTHER_LABEL, control.CHANCE]
    assert list(result["metrics"]) == rows
    assert result["num_inference_steps"] == 1 and result["seed"] == 0
    assert all(0 <= row["found"] <= 1 for row in result["metrics"].values())
    assert result["metrics"][control.REAL]["correlation"] == pytest.approx(1)
    assert result["metrics"][control.REAL]["found"] == 1 and result["metrics"][control.REAL]["accuracy"] > 0.95
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert "\n".join(lines) in printed and len(lines) == 2 + len(rows)
    assert all(line.count("|") == 2 + len(control.COLUMNS) for line in lines)
    assert Image.open(tmp_path / "control.png").height > 5 * 64
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    checkpoint = latest_valid(tmp_path / "checkpoints").path.stat().st_mtime_ns
    call(tmp_path, folders / "student")
    assert latest_valid(tmp_path / "checkpoints").path.stat().st_mtime_ns == checkpoint
    assert json.loads((tmp_path / "metrics.json").read_text()) == result
    with pytest.raises(UserError, match="holds a ControlNet of other settings: choose another --output, or remove it"):
        call(tmp_path, folders / "student", **{"trainer.batch_size": 5})


def test_what_was_stopped_continues_to_the_same_result(folders, tmp_path):
    call(tmp_path, folders / "student")
    kept = {name: (tmp_path / name).read_bytes() for name in ("metrics.json", "control.png")}
    weights = {file.name: file.read_bytes() for file in (tmp_path / "controlnet").glob("*.safetensors")}
    shutil.rmtree(latest_valid(tmp_path / "checkpoints").path)
    assert latest_valid(tmp_path / "checkpoints").step == 2
    for name in ("controlnet", "metrics.json", "control.png"):
        path = tmp_path / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    call(tmp_path, folders / "student")
    assert weights == {file.name: file.read_bytes() for file in (tmp_path / "controlnet").glob("*.safetensors")}
    assert kept == {name: (tmp_path / name).read_bytes() for name in kept}


def test_a_missing_student_is_trained_first(folders, tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "student.yaml"
    output = tmp_path / "student"
    recipe.write_text(
        f"model: {{path: {folders / 'teacher'}}}\n"
        f"trainer: {{steps: 2, batch_size: 4, sample_every: null, output_dir: {output}}}\n"
    )
    monkeypatch.setattr(control, "STUDENT", str(recipe))
    call(tmp_path / "first")
    assert "training the recipe" in capsys.readouterr().out
    trained = (output / "pipeline" / "model_index.json").stat().st_mtime_ns
    call(tmp_path / "second")
    assert "training the recipe" not in capsys.readouterr().out
    assert (output / "pipeline" / "model_index.json").stat().st_mtime_ns == trained
    first, second = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("first", "second"))
    assert first == second


def test_samples_have_noise_of_their_own(folders):
    pipe, labels = open_pipeline(folders / "student"), np.array([3, 1, 4])
    images = control.draw(pipe, labels, None, 7, num_inference_steps=1)
    assert images.dtype == np.uint8 and images.shape == (3, 1, 8, 8)
    assert np.abs(images[:2].astype(int) - control.draw(pipe, labels[:2], None, 7, num_inference_steps=1)).max() <= 1
    assert (images != control.draw(pipe, labels, None, 8, num_inference_steps=1)).any()


def test_neighbours_have_the_same_label():
    labels = np.array([0, 1, 0, 2, 1, 0])
    np.testing.assert_array_equal(control.neighbours(labels), [2, 4, 5, 3, 1, 0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--student", "nowhere"], "nowhere is neither a pipeline folder"),
        (["--student", "sana_digits"], "takes a SANA-Sprint student, which sana_digits is not"),
        (["--student", "sana_digits", "--seed", "-1"], "--seed must not be negative"),
        (["--student", "sana_digits", "--steps", "0"], "--steps must be positive"),
        (["--student", "sana_digits", "--set", "trainer.step=1"], "unknown key trainer.step"),
    ],
)
def test_mistakes_are_one_message(arguments, message, tmp_path):
    with pytest.raises(UserError, match=message):
        control.main([*arguments, "--output", str(tmp_path)])
