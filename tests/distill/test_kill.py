"""kill -9 at random moments of training scripts, each time resumed: the final weights are the uninterrupted run's."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from distill.checkpoint import MANIFEST, latest_valid
from distill.logs import read_metrics

ROOT = Path(__file__).parents[2]
STARTUP = 8.0
"""Seconds within which early kills fall: imports, model, data, reading a checkpoint."""
EVERY = 3
"""Steps between checkpoints."""
MOMENTS = ("saving", "starting", "training", "saving", "training")
"""Kinds of moments, in turn; the last kill of a run falls while it finishes."""


@dataclass(frozen=True)
class Case:
    """A training script on a recipe. The steps must be more than its kills let pass, about 5 each."""

    script: str
    recipe: str
    kills: int
    steps: int
    settings: tuple[str, ...] = ()
    weights: tuple[str, ...] = ("lora",)  # folders of its final weights


SLOW = {
    "flux_lightning_digits": Case(
        "train_flux_lightning.py",
        "flux_lightning_digits",
        kills=25,
        steps=130,
        settings=("trainer.batch_size=8", "objective.fake_score=adapter"),
    ),
    "twinflow_digits": Case(
        "train_twinflow.py",
        "twinflow_digits",
        kills=5,
        steps=40,
        settings=("trainer.batch_size=8",),
        weights=("lora", "lora_last"),  # the averaged adapter and the trained one
    ),
    "sana_sprint_digits": Case(
        "train_sana_sprint.py",
        "sana_sprint_digits",
        kills=5,
        steps=40,
        settings=("trainer.batch_size=8",),
        weights=("pipeline",),
    ),
    "sana_sprint_digits, came": Case(
        "train_sana_sprint.py",
        "sana_sprint_digits",
        kills=5,
        steps=40,
        settings=("trainer.batch_size=8", "student_optimizer.kind=came", "discriminator_optimizer.kind=came"),
        weights=("pipeline",),
    ),
}
"""Other recipes join by a row here."""


def start(case: Case, folder: Path, *options: str) -> subprocess.Popen:
    settings = (
        *case.settings,
        f"trainer.steps={case.steps}",
        f"trainer.checkpoint_every={EVERY}",
        "trainer.log_every=1",
        f"trainer.sample_every={2 * EVERY + 1}",
        f"trainer.output_dir={folder}",
    )
    command = [sys.executable, ROOT / "distill" / case.script, "--recipe", case.recipe, *options]
    for setting in settings:
        command += ["--set", setting]
    with (folder.parent / f"{folder.name}.log").open("ab") as output:
        # One thread: sums over several may depend on how the threads are scheduled.
        return subprocess.Popen(
            command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=output, stderr=output
        )


def wait_until(happened: Callable[[], bool], process: subprocess.Popen, seconds: float = 240) -> None:
    """Poll, at most until the process ends."""
    end = time.monotonic() + seconds
    while not happened() and process.poll() is None:
        assert time.monotonic() < end, f"nothing happened for {seconds} s"
        time.sleep(0.005)


def steps_logged(folder: Path) -> int:
    lines = read_metrics(folder / "metrics.jsonl")
    return lines[-1]["step"] if lines else 0


def kill(process: subprocess.Popen, folder: Path, moment: str, steps: int, rng: random.Random) -> None:
    """Kill a run at a moment of a kind. It is left to itself if it ends before."""
    # The log is the one of the life before, until this one cuts it down to its checkpoint and goes on from there.
    before, delay = steps_logged(folder), rng.uniform(0, 0.1)
    if moment == "starting":
        end = time.monotonic() + rng.uniform(0, STARTUP)
        wait_until(lambda: time.monotonic() > end or steps_logged(folder) > before, process)
    else:
        target = steps if moment == "finishing" else before + rng.randint(1, EVERY + 1)
        wait_until(lambda: steps_logged(folder) >= target, process)
        if moment == "saving":  # or while old checkpoints are deleted
            wait_until(lambda: any((folder / "checkpoints").glob(".tmp-*")), process)
            delay = rng.uniform(0, 0.03)
        time.sleep(delay)
    process.send_signal(signal.SIGKILL)


def train_with_kills(case: Case, folder: Path, seed: int) -> list[str]:
    """Run a case to its end through its kills; returns the moments that were hit."""
    rng, hit = random.Random(seed), []
    moments = [MOMENTS[i % len(MOMENTS)] for i in range(case.kills - 1)] + ["finishing"]
    for i, moment in enumerate(moments):
        process = start(case, folder, *(["--resume"] if i else []))
        try:
            kill(process, folder, moment, case.steps, rng)
        finally:
            process.kill()
        code = process.wait()
        assert code == -signal.SIGKILL, f"kill {i} ({moment}): ended with {code} before it, see {folder}.log"
        hit.append(f"{moment} at {steps_logged(folder)}")
    finish(start(case, folder, "--resume"), folder)
    return hit


def finish(process: subprocess.Popen, folder: Path) -> None:
    try:
        assert process.wait(timeout=600) == 0, f"see {folder}.log"
    finally:
        process.kill()


def content(file: Path) -> tuple:
    """A file's bytes; those of safetensors with the header read, in which the order of keys is left to chance."""
    data = file.read_bytes()
    if file.suffix != ".safetensors":
        return (data,)
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def assert_same_run(case: Case, expected: Path, actual: Path) -> None:
    """Bit-identical final weights and last checkpoint, and the same log."""
    checkpoints = [latest_valid(folder / "checkpoints") for folder in (expected, actual)]
    assert checkpoints[0].step == checkpoints[1].step == case.steps
    assert checkpoints[0].state == checkpoints[1].state
    pairs = [(expected / weights, actual / weights) for weights in case.weights]
    pairs += [tuple(checkpoint.path for checkpoint in checkpoints)]
    for folders in pairs:
        names = [sorted(file.relative_to(folder) for file in folder.rglob("*.*")) for folder in folders]
        assert names[0] == names[1] != []
        for name in names[0]:
            if name.name != MANIFEST:  # which has the paths of the run
                assert content(folders[0] / name) == content(folders[1] / name), f"{name} differs"
    logs = [
        [{name: value for name, value in line.items() if name == "step" or name.endswith("_loss")} for line in lines]
        for lines in (read_metrics(folder / "metrics.jsonl") for folder in (expected, actual))
    ]
    assert logs[0] == logs[1]
    assert [line["step"] for line in logs[0]] == list(range(1, case.steps + 1))


def check(case: Case, folder: Path, seed: int = 0) -> None:
    """The uninterrupted run goes on beside the interrupted one."""
    reference = start(case, folder / "whole")
    try:
        hit = train_with_kills(case, folder / "killed", seed)
        print("\n".join(hit))
        finish(reference, folder / "whole")
    finally:
        reference.kill()
    assert_same_run(case, folder / "whole", folder / "killed")


def test_killed_thrice(tiny_teacher, tmp_path):
    settings = (f"model.path={tiny_teacher}", "lora.rank=2", "trainer.batch_size=4", "objective.fake_score=adapter")
    check(Case("train_flux_lightning.py", "flux_lightning_digits", kills=3, steps=40, settings=settings), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", SLOW)
def test_killed_often(recipe, tmp_path):
    check(SLOW[recipe], tmp_path)
