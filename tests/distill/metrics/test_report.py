import json

import numpy as np
import pytest

from distill.metrics.report import COLUMNS, Report, Row, comparison_grid
from fast_diffusers.errors import UserError

REPORT = Report(
    (
        Row("teacher", 50, {"frechet_real": 0.25, "accuracy": 0.985}, "reference"),
        Row("student", 1, {"frechet_teacher": 12.34567, "frechet_real": 13.0, "accuracy": 0.5}),
    ),
    {"seed": 3, "steps": [1]},
)


def test_table_is_aligned():
    lines = REPORT.table().splitlines()
    assert lines[0].split() == ["FD", "teacher", "FD", "real", "accuracy"]
    assert lines[1].split() == ["teacher,", "50", "steps", "(reference)", "-", "0.250", "98.5%"]
    assert lines[2].split() == ["student,", "1", "step", "12.346", "13.000", "50.0%"]
    assert len({len(line) for line in lines}) == 1


def test_json_round_trip(tmp_path):
    REPORT.save(tmp_path / "metrics.json")
    assert Report.load(tmp_path / "metrics.json") == REPORT
    assert json.loads((tmp_path / "metrics.json").read_text())["rows"][1]["metrics"]["frechet_teacher"] == 12.34567


def test_row_lookup():
    assert REPORT.row("student", 1).metrics["accuracy"] == 0.5
    assert REPORT.row("teacher", 50, "reference") is REPORT.rows[0]
    with pytest.raises(KeyError, match=r"no row 'teacher, 50 steps'; there are \['teacher, 50 steps \(reference\)'"):
        REPORT.row("teacher", 50)


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": [{"role": "x"}], "settings": {}}', '{"rows": []}'])
def test_a_file_that_is_no_report(tmp_path, text):
    (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(UserError, match=r"metrics\.json is not a report"):
        Report.load(tmp_path / "metrics.json")


def test_not_a_number_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        Report((Row("teacher", 1, {"accuracy": float("nan")}),)).save(tmp_path / "metrics.json")


@pytest.mark.parametrize(("channels", "edge"), [(1, 8), (3, 100)])
def test_grid(channels, edge):
    images = np.zeros((5, channels, edge, edge), np.uint8)
    picture = np.asarray(comparison_grid({"black": images, "white, a long label": images + 255}))
    assert picture.shape[0] >= 2 * max(64, edge)
    assert picture.shape[1] >= 5 * max(64, edge) + 100
    half = picture.shape[0] // 2
    right = picture[:, -max(64, edge) // 2]
    assert right[half // 2].max() == 0
    assert right[half + half // 2].min() == 255
    assert (picture[:half, :60] < 128).any()  # its label


def test_every_metric_has_a_format():
    assert all(layout.format(0.5) for _, layout in COLUMNS.values())
