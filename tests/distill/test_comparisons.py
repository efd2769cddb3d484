import time

import pytest

from distill.comparisons import add_result, in_processes, mean_and_deviation, read_results
from distill.stopping import EXIT_CODE
from fast_diffusers.errors import UserError


def test_results_are_kept(tmp_path):
    log = tmp_path / "results.jsonl"
    assert read_results(log) == []
    for seed in range(2):
        add_result(log, {"seed": seed})
    assert read_results(log) == [{"seed": 0}, {"seed": 1}]


def test_mean_and_deviation():
    assert mean_and_deviation([1.0, 2.0, 3.0]) == "2.000 ± 1.000"
    assert mean_and_deviation([0.25], ".1f") == "0.2 ± 0.0"


def write(path, code: int = 0) -> list[str]:
    """A command that makes a file."""
    return ["-c", f"import pathlib, sys; pathlib.Path({str(path)!r}).touch(); sys.exit({code})"]


@pytest.mark.parametrize(("code", "how"), [(1, "failed"), (EXIT_CODE, "was stopped")])
def test_every_command_runs_and_the_one_that_fails_is_named(tmp_path, code, how):
    in_processes({"a": write(tmp_path / "a"), "b": write(tmp_path / "b")}, 2)
    assert len(list(tmp_path.iterdir())) == 2
    commands = {"first": write(tmp_path / "c", code), "second": write(tmp_path / "d")}
    with pytest.raises(UserError, match=f"first {how}; run this again"):
        in_processes(commands, 1)
    assert (tmp_path / "d").is_file()


def test_what_stops_this_process_stops_the_others(tmp_path, monkeypatch):
    """They are asked to stop, and the rest does not start."""

    def interrupted(self):
        while not (tmp_path / "started").is_file():
            time.sleep(0.01)
        raise KeyboardInterrupt

    script = f"import pathlib, time; pathlib.Path({str(tmp_path / 'started')!r}).touch(); time.sleep(60)"
    monkeypatch.setattr("subprocess.Popen.wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        in_processes({"long": ["-c", script], "never": write(tmp_path / "never")}, 1)
    assert not (tmp_path / "never").exists()
