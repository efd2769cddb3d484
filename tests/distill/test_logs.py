import json
import math
import sys

import numpy as np
import paddle
import pytest
from PIL import Image

from distill.logs import MetricsLog, image_grid, plot_losses, progress, read_metrics, save_grid


def test_one_line_a_step_readable_at_once(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write(1, {"loss": 0.5})
        assert read_metrics(path) == [{"step": 1, "loss": 0.5}]
        log.write(2, {"loss": 0.25, "lr": 1e-4})
    assert path.read_text() == '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25, "lr": 0.0001}\n'


@pytest.mark.parametrize("tail", [b"", b'{"step": 31, "lo', b'{"loss": 1}\n', b"\xff\x00", b"[]\n", b'{"step": "x"}\n'])
def test_resuming_removes_later_and_torn_lines(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        for step in (10, 20, 30):
            log.write(step, {"loss": step / 3})
    path.write_bytes(path.read_bytes() + tail)
    assert [line["step"] for line in read_metrics(path)] == [10, 20, 30]
    with MetricsLog(path, start=20) as log:
        log.write(30, {"loss": 9.0})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": 10, "loss": 10 / 3}, {"step": 20, "loss": 20 / 3}, {"step": 30, "loss": 9.0}]


def test_a_new_run_starts_a_new_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    MetricsLog(path).close()
    assert path.read_text() == ""


def test_non_finite_values_stay_valid_json(tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.write(1, {"loss": math.nan, "norm": math.inf})
    assert read_metrics(log.path) == [{"step": 1, "loss": None, "norm": None}]


def test_other_ranks_write_nothing(tmp_path):
    with MetricsLog(tmp_path / "run" / "metrics.jsonl", visualdl=True, enabled=False) as log:
        log.write(1, {"loss": 1.0})
    assert not list(tmp_path.iterdir())
    assert progress(10, enabled=False).disable


def test_visualdl_gets_the_same_values(tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl", visualdl=True) as log:
        log.write(3, {"student_loss": 0.5})
    (record,) = (tmp_path / "visualdl").iterdir()
    assert b"student_loss" in record.read_bytes()


def test_progress_starts_where_the_run_does(monkeypatch, capsys):
    with progress(10, 4) as bar:
        bar.update()
    assert capsys.readouterr().err == ""  # no terminal, no bar
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress(10, 4) as bar:
        bar.update()
        bar.set_postfix({"loss": "0.5"})
    assert "5/10" in capsys.readouterr().err


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_places_and_scales(tmp_path, channels):
    values = np.linspace(-1, 1, 5, dtype=np.float32)
    images = np.broadcast_to(values[:, None, None, None], [5, channels, 3, 2]).copy()
    images[0, :, 0, 0] = np.nan
    path = save_grid(paddle.to_tensor(images), tmp_path / "new" / "grid.png", columns=3, upscale=4)
    sheet = np.asarray(Image.open(path))
    assert sheet.shape == (2 * (12 + 2) + 2, 3 * (8 + 2) + 2) + ((3,) if channels == 3 else ())
    for i, expected in enumerate([0, 64, 128, 191, 255]):
        top, left = 2 + i // 3 * 14, 2 + i % 3 * 10
        assert (sheet[top : top + 12, left : left + 8] == expected).all()
        assert (sheet[top - 2 : top, left : left + 8] == 255).all()
    assert (sheet[16:28, 22:] == 255).all()  # the empty sixth place


def test_grid_clips_and_small_images_are_enlarged(tmp_path):
    images = np.stack([np.full([1, 8, 8], -7.0), np.full([1, 8, 8], 7.0)])
    assert Image.open(save_grid(images, tmp_path / "g.png")).size == (2 * 66 + 2, 66 + 2)
    assert set(np.unique(np.asarray(image_grid(images, margin=0)))) == {0, 255}


@pytest.mark.parametrize("shape", [[0, 1, 8, 8], [2, 2, 8, 8], [8, 8]])
def test_grid_needs_images(shape):
    with pytest.raises(ValueError, match=r"takes images \[B, 1 or 3, H, W\], not"):
        image_grid(np.zeros(shape))


def test_plot_shows_the_losses(tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        for step in range(1, 101):
            log.write(step, {"student_loss": 1 / step if step != 50 else math.nan, "student_lr": 1.0})
            if step % 2:
                log.write(step, {"discriminator_loss": 2.0})
    size = Image.open(plot_losses(log.path, tmp_path / "all.png")).size
    one = Image.open(plot_losses(log.path, tmp_path / "one.png", ["student_lr"]))
    assert size[0] == 2 * one.size[0]
    assert len(np.unique(np.asarray(one))) > 10


def test_nothing_to_plot_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="has no losses to plot"):
        plot_losses(tmp_path / "metrics.jsonl", tmp_path / "losses.png")
