"""A benchmark's processes, one a backend, run in turns: what they are asked and answer.

Processes of their own keep one backend's threads, settings and memory away from the others'. Standard library only:
benchmarks/infer_torch.py runs this file where neither Paddle nor this package is installed.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TURN_SECONDS = 0.1
"""A turn has as many runs as fit into this time, at least one; its figure is their median. What ran before it has
emptied the caches, which would count most where a run is short."""


@dataclass
class Task:
    """What a worker runs.

    Attributes:
        run: one call, finished when it returns.
        save: writes the output of the last run to a file.
        seconds: of every stage so far, which `run` adds to.
        about: versions and whatever else a report should say.
    """

    run: Callable[[], Any]
    save: Callable[[Path], None]
    seconds: dict[str, float] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)


class WorkerError(Exception):
    """A backend that cannot run here, or a worker that ended; the message says why."""


class Worker:
    """A process that `serve`s. Between its turns it is stopped, so that threads that spin there disturb nobody.

    Args:
        command: of the process.
        environment: replaces the variables of these names.
        log: where its messages go.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path):
        self.log = log
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [*map(str, command)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env={**os.environ, **environment},
                text=True,
            )

    def prepare(self, output: Path) -> dict[str, Any]:
        """Open the backend, run it once and write what it gave: {"open_ms", "first_ms", "about"}."""
        return self._ask("prepare", output=str(output))

    def turn(self) -> dict[str, Any]:
        """One turn: {"ms", "cpu_ms", "stages": {name: ms}}."""
        return self._ask("turn")

    def peak_mib(self) -> float:
        """The largest resident memory of the process so far."""
        return self._ask("memory")["mib"]

    def _ask(self, what: str, **details: Any) -> dict[str, Any]:
        try:
            self._signal("SIGCONT")
            print(json.dumps({"do": what, **details}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
            self._signal("SIGSTOP")
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            lines = self.log.read_text(errors="replace").split("\n")
            said = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
            raise WorkerError(f"its process ended with code {code}: {said}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def _signal(self, name: str) -> None:
        if hasattr(signal, name) and self._process.poll() is None:
            self._process.send_signal(getattr(signal, name))

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def serve(open_task: Callable[[], Task]) -> None:
    """Answer a `Worker`'s requests on standard input until it closes that; prints go to standard error."""
    _end_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    task = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "prepare":
                task, answer = _prepare(open_task, Path(request["output"]))
            else:
                answer = _turn(task) if request["do"] == "turn" else {"mib": peak_mib()}
        except Exception as error:  # of any library: the others go on
            traceback.print_exc()
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
            answer = {"error": lines[0] if isinstance(error, ValueError) else f"{type(error).__name__}: {lines[-1]}"}
        print(json.dumps(answer), file=answers, flush=True)


def _prepare(open_task: Callable[[], Task], output: Path) -> tuple[Task, dict[str, Any]]:
    started = time.perf_counter()
    task = open_task()
    opened = time.perf_counter()
    task.run()
    ran = time.perf_counter()
    task.save(output)
    return task, {"open_ms": 1000 * (opened - started), "first_ms": 1000 * (ran - opened), "about": task.about}


def _turn(task: Task) -> dict[str, Any]:
    """The median run of a turn, with the processor time of all its threads, and its stages."""
    runs, began = [], time.perf_counter()
    while not runs or time.perf_counter() - began < TURN_SECONDS:
        before, cpu, started = dict(task.seconds), time.process_time(), time.perf_counter()
        task.run()
        ms, cpu_ms = 1000 * (time.perf_counter() - started), 1000 * (time.process_time() - cpu)
        stages = {name: 1000 * (total - before.get(name, 0)) for name, total in task.seconds.items()}
        runs.append({"ms": ms, "cpu_ms": cpu_ms, "stages": stages})
    return sorted(runs, key=lambda run: run["ms"])[len(runs) // 2]


def peak_mib() -> float:
    """Peak resident memory of this process; `ru_maxrss` would count that of the parent before the start, too."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _end_with_parent() -> None:
    """A stopped process would outlive a parent that is killed: have Linux kill it then."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
