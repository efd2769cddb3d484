import json
import sys
from pathlib import Path

import pytest

from cinn_infer import bench_loop
from cinn_infer.bench_loop import Worker, WorkerError

WORKER = f"""
import os, runpy, sys, time
from pathlib import Path
loop = runpy.run_path({str(Path(bench_loop.__file__))!r})
kind, journal = sys.argv[1:]
runs = []

def open_task():
    print("chatter that is no answer")
    if kind == "absent":
        raise ValueError("no such runtime: install it")
    seconds = {{}}

    def run():
        runs.append(kind)
        if kind == "dies" and len(runs) > 1:
            print("out of luck", file=sys.stderr, flush=True)
            os._exit(3)
        if kind == "fails" and len(runs) > 1:
            raise RuntimeError("trace\\nof a kernel")
        with open(journal, "a") as file:
            file.write(kind + "\\n")
        time.sleep(0.06)
        seconds["model"] = seconds.get("model", 0) + 0.05

    return loop["Task"](run, lambda path: path.write_text(kind), seconds, {{"made": "here"}})

loop["serve"](open_task)
"""


@pytest.fixture
def start(tmp_path):
    """Starts a worker of a kind, whose runs are lines of journal.txt."""
    workers = []
    (tmp_path / "worker.py").write_text(WORKER)

    def make(kind: str) -> Worker:
        command = [sys.executable, tmp_path / "worker.py", kind, tmp_path / "journal.txt"]
        workers.append(Worker(command, {"OMP_NUM_THREADS": "1"}, tmp_path / f"{len(workers)}.log"))
        return workers[-1]

    yield make
    for worker in workers:
        worker.close()


def test_a_worker_runs_when_it_is_asked_to(start, tmp_path):
    first, second = start("first"), start("second")
    for worker in (first, second):
        answer = worker.prepare(tmp_path / "output.npy")
        assert answer["about"] == {"made": "here"} and answer["first_ms"] > 0
    assert (tmp_path / "output.npy").read_text() == "second"
    turns = [worker.turn() for worker in (first, second, first)]
    assert all(turn["ms"] > 50 and turn["stages"] == {"model": pytest.approx(50)} for turn in turns)
    runs = (tmp_path / "journal.txt").read_text().split()
    assert list(dict.fromkeys(runs)) == ["first", "second"]
    order = [run for run, before in zip(runs[2:], [None, *runs[2:-1]], strict=True) if run != before]
    assert order == ["first", "second", "first"]
    assert 1 < first.peak_mib() < 200


def test_why_a_worker_does_not_go_on(start, tmp_path):
    with pytest.raises(WorkerError, match=r"^no such runtime: install it$"):
        start("absent").prepare(tmp_path / "output.npy")
    for kind, message in [("fails", "^RuntimeError: of a kernel$"), ("dies", "ended with code 3: out of luck")]:
        worker = start(kind)
        worker.prepare(tmp_path / "output.npy")
        with pytest.raises(WorkerError, match=message):
            worker.turn()


def test_a_program_that_is_no_worker(tmp_path):
    worker = Worker([sys.executable, "-c", "raise SystemExit('wrong interpreter')"], {}, tmp_path / "log")
    with pytest.raises(WorkerError, match="ended with code 1: wrong interpreter"):
        worker.prepare(tmp_path / "output.npy")
    worker.close()


def test_peak_memory_is_that_of_this_process():
    assert json.dumps(bench_loop.peak_mib()) and bench_loop.peak_mib() > 10
