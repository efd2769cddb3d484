import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import paddle
import pytest

from distill import checkpoint as module
from distill.checkpoint import MANIFEST, CheckpointWriter, latest_valid, prune, save_checkpoint, verify
from fast_diffusers.errors import UserError


def tensors(step: int) -> dict[str, dict[str, paddle.Tensor]]:
    values = paddle.arange(24, dtype="float32").reshape([4, 6]) + step
    return {
        "student": {"lora.weight": values, "half": values.astype("bfloat16"), "transposed": values.transpose([1, 0])},
        "student_optimizer": {"scalar": paddle.full([], float(step)), "count": paddle.to_tensor([step])},
        "none": {},
    }


def state(step: int) -> dict:
    return {"epoch": step / 10, "alternation": step % 2}


def save(folder: Path, step: int, **options) -> Path:
    return save_checkpoint(folder, step, tensors(step), state(step), recipe={"lr": 1e-4}, **options)


def assert_is_step(checkpoint, step: int) -> None:
    assert checkpoint.step == step
    assert checkpoint.state == state(step)
    assert checkpoint.recipe == {"lr": 1e-4}
    for group, expected in tensors(step).items():
        found = checkpoint.tensors(group)
        assert found.keys() == expected.keys()
        for name in expected:
            assert found[name].dtype == expected[name].dtype
            np.testing.assert_array_equal(found[name].numpy(), expected[name].numpy())


def test_round_trip(tmp_path):
    path = save(tmp_path, 500)
    assert path.name == "step-00000500"
    checkpoint = latest_valid(tmp_path)
    assert_is_step(checkpoint, 500)
    assert checkpoint.versions["paddle"] == paddle.__version__
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
    with pytest.raises(UserError, match="has no tensors of teacher; it has student, student_optimizer, none"):
        checkpoint.tensors("teacher")


def test_no_checkpoints_is_none(tmp_path):
    assert latest_valid(tmp_path / "missing") is None
    (tmp_path / "samples").mkdir()
    (tmp_path / ".tmp-step-00000001-1").mkdir()
    assert latest_valid(tmp_path) is None


def test_latest_is_decided_by_content_not_by_name(tmp_path):
    save(tmp_path, 7).rename(tmp_path / "renamed-by-hand")
    save(tmp_path, 5).rename(tmp_path / "step-00000900")
    assert_is_step(latest_valid(tmp_path), 7)


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 0x10
    file.write_bytes(content)


def replace_by_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGE = {
    "emptied": lambda file: file.write_bytes(b""),
    "removed": lambda file: file.unlink(),
    "replaced by a folder": replace_by_folder,
    "truncated by one": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "truncated to half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "appended to": lambda file: file.write_bytes(file.read_bytes() + b" "),
    "zeroed": lambda file: file.write_bytes(bytes(file.stat().st_size)),
}
DAMAGE |= {f"flipped at {part}": lambda file, part=part: flip(file, int(part * (file.stat().st_size - 1)))
           for part in (0.0, 0.01, 0.2, 0.5, 0.9, 1.0)}  # fmt: skip
FILES = ("student.safetensors", "student_optimizer.safetensors", "none.safetensors", MANIFEST)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_damage_is_named_and_the_previous_checkpoint_used(tmp_path, name, damage):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    DAMAGE[damage](newest / name)
    messages = []
    checkpoint = latest_valid(tmp_path, on_invalid=messages.append)
    if name == MANIFEST and damage == "appended to":  # a space after the JSON changes nothing of what it says
        assert_is_step(checkpoint, 2)
        return
    assert_is_step(checkpoint, 1)
    assert len(messages) == 1 and str(newest / name) in messages[0]

    shutil.rmtree(tmp_path / "step-00000001")
    with pytest.raises(UserError, match=f"no usable checkpoint in .*{name}"):
        latest_valid(tmp_path)


def test_random_damage_never_resumes_wrong(tmp_path):
    """Random bytes of random files overwritten: always the old one, or the new one with all it was saved with."""
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    pristine = {name: (newest / name).read_bytes() for name in FILES}
    draw = random.Random(0)
    for _ in range(150):
        name = draw.choice(FILES)
        content = bytearray(pristine[name])
        for _ in range(draw.choice([1, 1, 3, 20])):
            content[draw.randrange(len(content))] = draw.randrange(256)
        (newest / name).write_bytes(content)
        checkpoint = latest_valid(tmp_path, on_invalid=lambda message: None)
        assert_is_step(checkpoint, checkpoint.step)
        (newest / name).write_bytes(pristine[name])
    assert_is_step(latest_valid(tmp_path), 2)


@pytest.mark.parametrize("content", ["[]", "1", "{}", '{"sha256": 3}', "[" * 100_000])
def test_a_foreign_manifest_is_damage(tmp_path, content):
    path = save(tmp_path, 1)
    (path / MANIFEST).write_text(content)
    with pytest.raises(module.InvalidCheckpoint, match=MANIFEST):
        verify(path)


def test_another_format_is_not_guessed_at(tmp_path):
    path = save(tmp_path, 1)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["format"] = 99
    del manifest["sha256"]
    (path / MANIFEST).write_text(json.dumps({**manifest, "sha256": module._digest(manifest)}))
    with pytest.raises(module.InvalidCheckpoint, match="format 99; this version reads format 1"):
        verify(path)


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


def test_killed_at_every_step_of_writing(tmp_path, monkeypatch):
    """Whatever call to the disk is the last one, the previous or the new checkpoint is there, whole."""
    save(tmp_path, 1)
    outcomes = []
    for last_call in range(100):
        calls = 0

        def killing(function, last_call=last_call):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls > last_call:
                    raise Killed
                return function(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", killing(os.fsync))
            patch.setattr(module, "save_file", killing(module.save_file))
            for method in ("mkdir", "write_text", "rename"):
                patch.setattr(Path, method, killing(getattr(Path, method)))
            try:
                save(tmp_path, 2)
                killed = False
            except Killed:
                killed = True
        checkpoint = latest_valid(tmp_path)
        assert_is_step(checkpoint, checkpoint.step)
        outcomes.append(checkpoint.step)
        for path in tmp_path.glob("step-00000002*"):
            shutil.rmtree(path)
        if not killed:
            break
    assert outcomes[0] == 1 and outcomes[-1] == 2 and len(outcomes) > 10
    assert outcomes == sorted(outcomes)


def test_kill_9_while_saving(tmp_path):
    script = (
        "import sys, fast_diffusers, paddle\n"
        "from distill.checkpoint import CheckpointWriter\n"
        "writer = CheckpointWriter(sys.argv[1], keep_last=2)\n"
        "for step in range(1, 10**6):\n"
        "    writer.save(step, {'a': {'x': paddle.full([200_000], float(step))}}, {'step': step})\n"
        "    print(step, flush=True)\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(module.__file__).parents[1])
    while int(process.stdout.readline()) < 10:
        pass
    time.sleep(random.Random(0).random() / 10)
    process.send_signal(signal.SIGKILL)
    told = [int(line) for line in process.communicate()[0].split()]
    checkpoint = latest_valid(tmp_path, on_invalid=pytest.fail)
    assert checkpoint.step >= max([10, *told]) - 1  # at most the one under way is not there yet
    assert checkpoint.state == {"step": checkpoint.step}
    np.testing.assert_array_equal(checkpoint.tensors("a")["x"].numpy(), checkpoint.step)
    CheckpointWriter(tmp_path).close()
    assert all(path.name.startswith("step-") for path in tmp_path.iterdir())


def test_a_damaged_step_can_be_saved_again(tmp_path):
    save(tmp_path, 1)
    damaged = save(tmp_path, 2)
    (damaged / "student.safetensors").unlink()
    again = save(tmp_path, 2)
    assert again != damaged
    assert_is_step(latest_valid(tmp_path, on_invalid=lambda message: None), 2)


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in folder.iterdir())


def test_keep_last_and_best(tmp_path):
    for step, quality in enumerate([3.0, 1.0, None, 2.0, 5.0, 4.0], start=1):
        save(tmp_path, step, quality=quality)
    prune(tmp_path, keep_last=2, keep_best=2)
    assert steps(tmp_path) == [2, 4, 5, 6]
    prune(tmp_path, keep_last=1)
    assert steps(tmp_path) == [6]


def test_pruning_never_deletes_the_only_usable_one(tmp_path):
    save(tmp_path, 1)
    for step in (2, 3):
        flip(save(tmp_path, step) / "student.safetensors", -1)  # the right size: only the content tells
    prune(tmp_path, keep_last=1)
    assert_is_step(latest_valid(tmp_path, on_invalid=lambda message: None), 1)


def test_writer_snapshots_before_it_returns(tmp_path, monkeypatch):
    """Training goes on at once: changes made while the thread has not yet written are not saved."""
    written, may_write = module.save_checkpoint, threading.Event()

    def slow(*args, **kwargs):
        may_write.wait(10)
        return written(*args, **kwargs)

    monkeypatch.setattr(module, "save_checkpoint", slow)
    live, counters = tensors(1), state(1)
    with CheckpointWriter(tmp_path) as writer:
        writer.save(1, live, counters, recipe={"lr": 1e-4})
        for group in live.values():
            for tensor in group.values():
                tensor.zero_()
        counters["epoch"] = -1
        assert latest_valid(tmp_path) is None
        may_write.set()
    assert_is_step(latest_valid(tmp_path), 1)


def test_writer_loses_no_save_and_prunes(tmp_path):
    with CheckpointWriter(tmp_path, keep_last=3) as writer:
        for step in range(1, 8):
            writer.save(step, tensors(step), state(step), recipe={"lr": 1e-4})
    assert steps(tmp_path) == [5, 6, 7]
    for path in tmp_path.iterdir():
        assert_is_step(verify(path), int(path.name.split("-")[1]))


@pytest.mark.parametrize("finish", [lambda w: w.close(), lambda w: w.wait(), lambda w: w.save(2, tensors(2), {})])
def test_writer_raises_what_went_wrong_in_the_thread(tmp_path, monkeypatch, finish):
    def full_disk(*args):
        raise OSError(28, "No space left on device")

    writer = CheckpointWriter(tmp_path)
    monkeypatch.setattr(module, "save_file", full_disk)
    writer.save(1, tensors(1), {})
    with pytest.raises(UserError, match=r"step 1 could not be written to .*No space left on device"):
        finish(writer)
    assert not list(tmp_path.iterdir())


def test_writer_removes_left_overs(tmp_path):
    (tmp_path / ".tmp-step-00000003-17").mkdir()
    (tmp_path / ".tmp-step-00000003-17" / "student.safetensors").write_bytes(b"half")
    CheckpointWriter(tmp_path).close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bad", [{"x": float("nan")}, {"x": object()}])
def test_state_must_be_json(tmp_path, bad):
    with pytest.raises(UserError, match="cannot be written as JSON"):
        save_checkpoint(tmp_path, 1, {}, bad)
    with CheckpointWriter(tmp_path) as writer, pytest.raises(UserError, match="cannot be written as JSON"):
        writer.save(1, {}, bad)
    assert latest_valid(tmp_path) is None
