import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import paddle
import pytest

from distill.checkpoint import latest_valid
from distill.commands import run, sample_statistics, train_parser
from distill.stopping import Interrupted
from distill.train_flux_lightning import main as train_flux_lightning
from fast_diffusers.errors import UserError

SCRIPT = Path(__file__).parents[2] / "distill" / "train_flux_lightning.py"


@pytest.mark.parametrize(
    "error, code, message",
    [
        (UserError("data.height is 9"), 1, "error: data.height is 9\n"),
        (FileNotFoundError("no LoRA file"), 1, "error: no LoRA file\n"),
        (Interrupted("stopped by SIGTERM"), 75, "stopped by SIGTERM\n"),
    ],
)
def test_mistakes_and_interrupts_end_in_one_line(error, code, message, capsys):
    def main(argv):
        raise error

    with pytest.raises(SystemExit) as stopped:
        run(main)
    assert stopped.value.code == code
    assert capsys.readouterr().err == message


def test_programming_errors_keep_their_traceback():
    def main(argv):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(main)


def test_settings_are_collected():
    arguments = train_parser("text", "digits").parse_args(["--set", "a=1", "--set", "b=2", "--resume"])
    assert arguments.set == ["a=1", "b=2"] and arguments.resume and arguments.recipe == "digits"


def arguments(teacher, output, steps):
    settings = {
        "model.path": teacher,
        "lora": "{rank: 2, alpha: 2}",
        "objective": "{num_cells: 8, num_phases: 2}",
        "student_optimizer": "{lr: 0.01}",
        "trainer.ema_decay": 0.9,
        "trainer.steps": steps,
        "trainer.batch_size": 4,
        "trainer.log_every": 1,
        "trainer.checkpoint_every": 10_000,
        "trainer.sample_every": 10_000,
        "trainer.output_dir": output,
    }
    pairs = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    return ["--recipe", "flux_lightning_digits", *pairs]


def signalled(command, output, number, steps=3):
    """Start a training command, signal it once it has logged some steps; returns (exit code, stderr)."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        metrics = output / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= steps):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
        return process.returncode, stderr
    finally:
        process.kill()


def final_weights(output, steps):
    checkpoint = latest_valid(output / "checkpoints")
    assert checkpoint.step == steps
    return {(g, name): tensor.numpy() for g in checkpoint.groups for name, tensor in checkpoint.tensors(g).items()}


def test_terminated_training_continues_bit_by_bit(tiny_teacher, tmp_path):
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    code, stderr = signalled([sys.executable, SCRIPT, *arguments(tiny_teacher, parts, 10_000)], parts, signal.SIGTERM)
    done = latest_valid(parts / "checkpoints").step
    assert stderr.splitlines()[-1] == f"stopped by SIGTERM after step {done}, which is saved; continue with --resume"
    assert code == 75 and "Traceback" not in stderr
    assert not list((parts / "checkpoints").glob(".tmp-*"))
    train_flux_lightning([*arguments(tiny_teacher, parts, done + 3), "--resume"])
    train_flux_lightning(arguments(tiny_teacher, whole, done + 3))
    expected, actual = final_weights(whole, done + 3), final_weights(parts, done + 3)
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value, err_msg=str(name))
    steps = [json.loads(line)["step"] for line in (parts / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, done + 4))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_terminated_launcher_stops_all_ranks_with_a_checkpoint(number, tiny_teacher, tmp_path):
    output = tmp_path / "run"
    launcher = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", "2"]
    launcher += ["--log_dir", str(tmp_path / "log")]
    code, _ = signalled([*launcher, SCRIPT, *arguments(tiny_teacher, output, 10_000)], output, number)
    assert code == number  # what the launcher itself exits with
    done = latest_valid(output / "checkpoints").step
    for rank in range(2):
        text = (tmp_path / "log" / f"workerlog.{rank}").read_text()
        assert f"after step {done}, which is saved" in text and "Traceback" not in text


@pytest.fixture
def signals_restored():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)}
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_signal_outside_training_stops_at_once(capsys, signals_restored):
    def main(argv):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)

    with pytest.raises(SystemExit) as stopped:
        run(main)
    assert stopped.value.code == 75
    assert capsys.readouterr().err == "stopped by SIGTERM\n"


def test_signal_during_caching_keeps_whole_shards(tiny_teacher, tmp_path, capsys, signals_restored, monkeypatch):
    output, cache = tmp_path / "run", tmp_path / "cache"
    given = [*arguments(tiny_teacher, output, 2), "--set", f"data.cache={cache}"]
    import distill.batches

    encode, calls = distill.batches.Encoder.images, []

    def images(self, batch):
        calls.append(len(batch))
        if sum(calls) > 1100:
            os.kill(os.getpid(), signal.SIGTERM)
        return encode(self, batch)

    monkeypatch.setattr(distill.batches.Encoder, "images", images)
    with pytest.raises(SystemExit) as stopped:
        run(lambda argv: train_flux_lightning(given))
    assert stopped.value.code == 75 and capsys.readouterr().err.splitlines()[-1] == "stopped by SIGTERM"
    kept = sorted(cache.glob("*/shard-*"))
    assert kept and not list(cache.glob("*/*.tmp"))
    monkeypatch.setattr(distill.batches.Encoder, "images", encode)
    train_flux_lightning(given)
    assert set(kept) < set(cache.glob("*/shard-*"))


def test_sample_statistics():
    latents = paddle.to_tensor(np.array([1.0, 3.0, 10.0, 10.0], np.float32).reshape(4, 1, 1, 1))
    assert sample_statistics(latents, ["0", "0", "1", "1"]) == pytest.approx(
        {"sample_mean": 6.0, "sample_std": np.sqrt(16.5), "sample_diversity": np.sqrt(0.5)}
    )
    assert sample_statistics(latents, list("0123"))["sample_diversity"] == pytest.approx(np.sqrt(16.5))
    assert sample_statistics(latents, list("0012"))["sample_diversity"] == pytest.approx(1.0)
