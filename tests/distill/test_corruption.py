"""Every file of a real training checkpoint damaged in turn: an exact resume from an earlier one, or one message."""

import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from distill.checkpoint import MANIFEST, latest_valid
from distill.flux_lightning import Recipe
from distill.logs import read_metrics
from distill.recipe import build
from distill.train_flux_lightning import train
from fast_diffusers.errors import UserError

STEPS, EVERY = 4, 2
PLAYERS = ("student", "discriminator", "fake")
GROUPS = [*PLAYERS, *(f"{player}_optimizer" for player in PLAYERS), "student_average"]
FILES = [*(f"{group}.safetensors" for group in GROUPS), MANIFEST]


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[random.Random(file.name).randrange(len(content))] ^= 0x10
    file.write_bytes(content)


DAMAGE = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "flipped": flip,
    "emptied": lambda file: file.write_bytes(b""),
    "removed": lambda file: file.unlink(),
}


def recipe_for(teacher: Path, output: Path) -> Recipe:
    settings = {
        "model": {"path": str(teacher)},
        "lora": {"rank": 2, "alpha": 2},
        "objective": {"num_cells": 8, "num_phases": 2, "fake_score": "adapter"},
        "trainer": {
            "steps": STEPS,
            "batch_size": 2,
            "ema_decay": 0.5,
            "checkpoint_every": EVERY,
            "log_every": 1,
            "sample_every": None,
            "output_dir": str(output),
            "sample_prompts": ["0"],
        },
    }
    return build(Recipe, settings)


@pytest.fixture(scope="module")
def finished(tiny_teacher, tmp_path_factory) -> Path:
    """Output folder of an undamaged run with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("finished")
    train(recipe_for(tiny_teacher, folder))
    newest = latest_valid(folder / "checkpoints")
    assert sorted(newest.groups) == sorted(GROUPS) and newest.step == STEPS
    return folder


@pytest.fixture
def run(finished, tmp_path, monkeypatch) -> Path:
    """A copy of it to damage."""
    monkeypatch.setattr("distill.commands.plot_losses", lambda metrics, png: png)  # slow, and not of interest
    return shutil.copytree(finished, tmp_path / "run")


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def assert_same_weights(finished: Path, run: Path) -> None:
    expected, actual = (latest_valid(folder / "checkpoints", on_invalid=lambda _: None) for folder in (finished, run))
    assert (actual.step, actual.state) == (expected.step, expected.state)
    for group in GROUPS:
        tensors = actual.tensors(group)
        assert tensors.keys() == expected.tensors(group).keys()
        for name, tensor in expected.tensors(group).items():
            np.testing.assert_array_equal(tensors[name].numpy(), tensor.numpy(), f"{group}: {name}")


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_resume_is_exact_from_the_checkpoint_before(name, damage, tiny_teacher, finished, run, caplog):
    damaged = checkpoint(run, STEPS)
    DAMAGE[damage](damaged / name)
    train(recipe_for(tiny_teacher, run), resume=True)
    assert str(damaged / name) in caplog.text  # the warning
    assert latest_valid(run / "checkpoints").path != damaged
    assert_same_weights(finished, run)
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_without_a_good_checkpoint_there_is_one_message(name, damage, tiny_teacher, run):
    for step in (EVERY, STEPS):
        DAMAGE[damage](checkpoint(run, step) / name)
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*")}
    with pytest.raises(UserError, match="no usable checkpoint") as error:
        train(recipe_for(tiny_teacher, run), resume=True)
    message = str(error.value)
    assert "\n" not in message and all(str(checkpoint(run, step) / name) in message for step in (EVERY, STEPS))
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*")} == before  # what is left is left


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_log_does_not_matter_to_the_weights(damage, tiny_teacher, finished, run):
    shutil.rmtree(checkpoint(run, STEPS))
    DAMAGE[damage](run / "metrics.jsonl")
    train(recipe_for(tiny_teacher, run), resume=True)
    assert_same_weights(finished, run)
