"""Two processes on gloo. One launch runs all scenarios of `work`; the tests compare what it leaves with one process.

Measured over 4 steps (two of each player): no weight, of magnitudes up to 1, is further than 2.1e-7 from that of one
process with twice the batch. Adam divides by the gradient's size plus eps; without the large eps in the recipe here,
biases in front of a normalisation, whose exact gradient is zero, would be moved by amplified rounding errors.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import fast_diffusers  # noqa: F401  # isort: skip  (before paddle)
import numpy as np
import paddle
import pytest

from distill.checkpoint import latest_valid
from distill.config import OptimizerConfig, TrainerConfig
from distill.evaluate import compare
from distill.flux_lightning import Recipe
from distill.metrics.sampling import SampleRunner, SampleSettings
from distill.optim import AdamW
from distill.parallel import (
    World,
    _buckets,
    any_rank,
    average_gradients,
    average_values,
    barrier,
    broadcast_parameters,
    gather_rows,
    init,
    main_first,
)
from distill.recipe import build
from distill.stopping import Interrupted
from distill.train_flux_lightning import train
from distill.trainer import NonFiniteError, Trainer
from fast_diffusers.errors import UserError
from fast_diffusers.pipelines.shipped import open_pipeline
from fast_diffusers.samplers import euler

BOUND = 2e-6
STEPS = 4
SETTINGS = SampleSettings(num_samples=21, batch_size=4, previews=16)


def recipe_for(teacher, output, batch_size, steps=STEPS):
    return build(
        Recipe,
        {
            "model": {"path": str(teacher)},
            "lora": {"rank": 2, "alpha": 2},
            "objective": {"num_cells": 8, "num_phases": 2},
            "student_optimizer": {"lr": 1e-2, "eps": 1e-3},
            "discriminator_optimizer": {"lr": 1e-2, "eps": 1e-3},
            "trainer": {
                "steps": steps,
                "batch_size": batch_size,
                "gradient_accumulation": 2,
                "ema_decay": 0.5,
                "checkpoint_every": 2,
                "log_every": 1,
                "sample_every": 2,
                "sample_prompts": ["0", "1"],
                "output_dir": str(output),
            },
        },
    )


class PixelFeatures:
    identity = "pixels"

    def __call__(self, images):
        flat = images.reshape(len(images), -1)
        return flat.astype(np.float32), flat.argmax(-1)


def sampled(teacher, world):
    pipe = open_pipeline(str(teacher))
    runner = SampleRunner(pipe, ["0", "1", "2"], PixelFeatures(), SETTINGS, world=world)
    with paddle.no_grad():
        samples = runner.run(pipe.denoiser, euler, 2, 0, ProgressCounter())
    return {"features": samples.features.features, "labels": samples.features.predictions, "images": samples.images}


def compared(teacher, cache, world):
    pipe = open_pipeline(str(teacher))
    settings = {"settings": SETTINGS, "steps": (2,), "reference_steps": 4}
    comparison = compare(pipe, prompts=["0", "1", "2"], extractor=PixelFeatures(), cache=cache, world=world, **settings)
    return {row.name: {k: v for k, v in row.metrics.items() if k != "ms_per_image"} for row in comparison.report.rows}


class ProgressCounter:
    def update(self, count):
        pass


class Line:
    """w·x with one weight; from step `at` on something happens on rank 1."""

    def __init__(self, world, poison_at=None, stop_at=None):
        self.world, self.poison_at, self.stop_at = world, poison_at, stop_at
        self.weight = paddle.create_parameter([1], "float32")
        self.optimizers = {"line": AdamW({"w": self.weight}, OptimizerConfig(), 100)}
        self.averages = {}

    def turns(self, step):
        return ["line"]

    def loss(self, player, batch, draws):
        term = (self.weight * draws.normal("x", [2])).square().mean()
        if self.world.rank == 1 and self.poison_at == batch:
            term = term * float("nan")
        if self.world.rank == 1 and self.stop_at == batch:
            os.kill(os.getpid(), signal.SIGTERM)
        return term, {"term": term.detach()}


def line_trainer(world, folder, method, **settings):
    settings = {"steps": 6, "log_every": 1, "sample_every": None, "output_dir": str(folder), **settings}
    return Trainer(TrainerConfig(**settings), method, lambda step, micro_step: step, world=world)


# ---------------------------------------------------------------------------------------------- on two processes
def check_collectives(world):
    rank = world.rank
    weights = [paddle.create_parameter([2, 3], "float32"), *(paddle.create_parameter([2], "float32") for _ in "ab")]
    weights.append(paddle.create_parameter([3], "float64"))
    (weights[0].sum() * (rank + 1) + (weights[3] * 2).sum().astype("float32")).backward()
    if rank == 1:
        (weights[1].sum() * 4).backward()
    average_gradients(weights, world)
    assert (weights[0].grad.numpy() == 1.5).all() and (weights[3].grad.numpy() == 2).all()
    assert (weights[1].grad.numpy() == 2).all()
    assert weights[2].grad is None
    check_buckets(world)

    broadcast_parameters(weights, world)
    assert not any_rank(False, world) and any_rank(rank == 1, world)
    assert average_values({"b": paddle.to_tensor(rank), "a": 2.0}, world) == {"b": 0.5, "a": 2.0}
    share = world.share(5)
    for dtype in ("uint8", "int64", "float32", "float64"):
        whole = np.arange(10).reshape(5, 2).astype(dtype) / (3 if "float" in dtype else 1)
        whole = whole.astype(dtype)
        gathered = gather_rows(whole[share.start : share.stop], share.start, 5, world)
        np.testing.assert_array_equal(gathered, whole)
        assert gathered.dtype == whole.dtype


def check_buckets(world):
    """Buckets of any size give the bits that one sum of everything gives."""
    shapes = [[3, 5], [7], [2, 2], [1], [40], [6]]
    results = []
    for limit in (1, 60, 100, 2**25):
        draw = np.random.default_rng(world.rank)
        weights = [paddle.create_parameter(shape, "float32") for shape in shapes]
        for weight in weights:
            weight.grad = paddle.to_tensor(draw.standard_normal(weight.shape, dtype=np.float32))
        if world.is_main:
            weights[3].clear_gradient(False)
        average_gradients(weights, world, bucket_bytes=limit)
        results.append(np.concatenate([weight.grad.numpy().ravel() for weight in weights]))
    for result in results:
        np.testing.assert_array_equal(result, results[-1])


def check_agreement(world, folder):
    method = Line(world, poison_at=3)
    trainer = line_trainer(world, folder / "skip", method, on_nonfinite="skip")
    trainer.fit()
    assert trainer.skipped == 1 and np.isfinite(method.weight.numpy()).all()
    with pytest.raises(NonFiniteError, match=r"step 3, line: term, line_loss not finite"):
        line_trainer(world, folder / "stop", Line(world, poison_at=3)).fit()
    with pytest.raises(Interrupted, match=r"after step 4, which is saved; continue with --resume"):
        line_trainer(world, folder / "signal", Line(world, stop_at=3)).fit()
    assert latest_valid(folder / "signal" / "checkpoints").step == 4
    with pytest.raises(UserError, match="the processes find different checkpoints"):
        line_trainer(world, folder / ("signal" if world.is_main else "nothing"), Line(world)).fit(resume=True)


def check_main_first(world, folder):
    with main_first(world):
        if world.is_main:
            (folder / "first").touch()
        else:
            assert (folder / "first").exists()


def work(teacher, folder):
    world = init()
    assert init() == world and world.size == 2
    check_collectives(world)
    check_agreement(world, folder)
    check_main_first(world, folder)
    train(recipe_for(teacher, folder / "two", 4), world=world)
    train(recipe_for(teacher, folder / "one_then_two", 4), resume=True, world=world)
    samples = sampled(teacher, world)
    np.savez(folder / f"samples{world.rank}.npz", **samples)
    rows = compared(teacher, folder / "cache", world)
    assert compared(teacher, folder / "cache", world) == rows  # now from the cache
    (folder / f"compared{world.rank}.json").write_text(json.dumps(rows))
    barrier(world)


# ---------------------------------------------------------------------------------------------- tests
@pytest.fixture(scope="module")
def folder(tiny_teacher, tmp_path_factory):
    """What two processes left, and beside it what one process makes with twice the batch."""
    folder = tmp_path_factory.mktemp("parallel")
    train(recipe_for(tiny_teacher, folder / "one_then_two", 8, steps=2))
    command = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", "2"]
    command += ["--log_dir", str(folder / "log"), __file__, str(tiny_teacher), str(folder)]
    with (folder / "launch.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
        try:
            train(recipe_for(tiny_teacher, folder / "one", 8))
            code = process.wait(timeout=300)
        finally:
            process.terminate()
    assert code == 0, "".join(path.read_text() for path in sorted((folder / "log").glob("workerlog.*")))[-4000:]
    return folder


def weights(folder):
    checkpoint = latest_valid(folder / "checkpoints")
    assert checkpoint.step == STEPS
    return {
        f"{group}.{name}": tensor.numpy()
        for group in checkpoint.groups
        if not group.endswith("_optimizer")
        for name, tensor in checkpoint.tensors(group).items()
    }


def assert_close(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=0, atol=BOUND, err_msg=name)


def test_two_processes_train_what_one_trains_with_twice_the_batch(folder):
    assert_close(weights(folder / "two"), weights(folder / "one"))


def test_saved_on_one_resumed_on_two(folder):
    assert_close(weights(folder / "one_then_two"), weights(folder / "one"))


def test_saved_on_two_resumed_on_one(folder, tiny_teacher):
    checkpoints = folder / "two_then_one" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "step-00000002").symlink_to(folder / "two" / "checkpoints" / "step-00000002")
    train(recipe_for(tiny_teacher, folder / "two_then_one", 8), resume=True)
    assert_close(weights(folder / "two_then_one"), weights(folder / "one"))


def test_only_rank_0_writes_and_its_log_is_the_average(folder):
    one, two = (
        [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert [line["step"] for line in two] == list(range(1, STEPS + 1))
    for expected, actual in zip(one, two, strict=True):
        losses = [name for name in expected if name.endswith("_loss") or name.startswith("sample_")]
        assert {name: actual[name] for name in losses} == pytest.approx({name: expected[name] for name in losses}, 1e-3)
        assert 0 <= actual["data_wait_fraction"] <= 1
        assert actual["images_per_second"] == pytest.approx(16 * actual["steps_per_second"])
    assert sorted(path.name for path in (folder / "two" / "samples").iterdir()) == [
        "step-00000002.png",
        "step-00000004.png",
    ]
    assert {path.name for path in (folder / "two").iterdir()} == {path.name for path in (folder / "one").iterdir()}


def test_evaluation_is_split_over_the_ranks(folder, tiny_teacher):
    expected = sampled(tiny_teacher, World())
    for rank in range(2):
        with np.load(folder / f"samples{rank}.npz") as actual:
            assert actual["images"].dtype == np.uint8 and actual["images"].shape == (16, 1, 8, 8)
            for name, value in expected.items():
                difference = np.abs(actual[name].astype(float) - value)
                assert difference.max() <= (0 if name == "labels" else 1), name  # other batches round differently


def test_comparison_is_the_same_on_all_ranks(folder, tiny_teacher):
    first, second = (json.loads((folder / f"compared{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert len(list((folder / "cache").iterdir())) == 3
    expected = compared(tiny_teacher, None, World())
    assert first.keys() == expected.keys() and len(expected) == 3
    for name, metrics in expected.items():
        assert first[name] == pytest.approx(metrics, rel=0.02, abs=1e-6), name


def test_one_process_calls_no_collective(monkeypatch):
    def forbidden(*arguments, **settings):
        raise AssertionError("a collective was called")

    for name in ("all_reduce", "broadcast", "barrier", "init_parallel_env"):
        monkeypatch.setattr(f"distill.parallel.dist.{name}", forbidden)
    monkeypatch.delenv("PADDLE_TRAINERS_NUM", raising=False)
    world = init()
    assert world == World(0, 1)
    parameter = paddle.create_parameter([2], "float32")
    average_gradients([parameter], world)
    broadcast_parameters([parameter], world)
    barrier(world)
    assert parameter.grad is None and any_rank(True, world) and not any_rank(False, world)
    assert average_values({"a": paddle.to_tensor(2.0)}, world) == {"a": 2.0}
    rows = np.arange(3)
    assert gather_rows(rows, 0, 3, world) is rows


def test_buckets_hold_whole_parameters_of_one_dtype():
    sizes = [("float32", 4), ("float64", 1), ("float32", 2), ("float32", 100), ("float32", 1), ("float64", 2)]
    parameters = [paddle.create_parameter([size], dtype) for dtype, size in sizes]
    indices = {id(parameter): index for index, parameter in enumerate(parameters)}
    buckets = [[indices[id(parameter)] for parameter in bucket] for bucket in _buckets(parameters, 24)]
    assert buckets == [[0, 2], [3], [4], [1, 5]]
    assert list(_buckets([], 24)) == []


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_cover_everything_once(size):
    shares = [World(rank, size).share(20) for rank in range(size)]
    assert [i for share in shares for i in share] == list(range(20))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_samples_cannot_be_split_finer_than_one_by_one(tiny_teacher):
    with pytest.raises(UserError, match="8 samples cannot be split over 9 processes"):
        SampleRunner(
            open_pipeline(str(tiny_teacher)), ["0"], PixelFeatures(), SampleSettings(num_samples=8), world=World(0, 9)
        )


if __name__ == "__main__":
    work(sys.argv[1], Path(sys.argv[2]))
