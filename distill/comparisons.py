"""Several training runs to compare: one after the other or at a time, each noted once it is measured, and tabulated."""

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from distill.stopping import EXIT_CODE
from fast_diffusers.errors import UserError


def read_results(log: Path) -> list[dict[str, Any]]:
    """What `add_result` has written to a file, nothing if there is none."""
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.is_file() else []


def add_result(log: Path, result: Mapping[str, Any]) -> None:
    """Append the result of a finished run; several processes may do so."""
    with log.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(result) + "\n")


def mean_and_deviation(values: Sequence[float], form: str = ".3f") -> str:
    """A cell of a table: mean ± standard deviation."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{form}} ± {spread:{form}}"


def in_processes(commands: Mapping[str, Sequence[str]], jobs: int) -> None:
    """Run Python with each of these command lines, `jobs` at a time, without their output.

    Whatever stops this process stops them too; a training run then saves a checkpoint.

    Raises:
        UserError: one of them failed or was stopped; it is called by its name here. The others have run.
    """
    children: list[subprocess.Popen] = []

    def start(command: Sequence[str]) -> int:
        children.append(subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL))
        return children[-1].wait()

    with ThreadPoolExecutor(jobs) as pool:
        try:
            codes = list(pool.map(start, commands.values()))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in children:
                child.terminate()
            raise
    for name, code in zip(commands, codes, strict=True):
        if code:
            raise UserError(f"{name} {'was stopped' if code == EXIT_CODE else 'failed'}; run this again")
