"""Sharded optimisers: what is asked of Paddle, and Paddle's own classes on two CPU processes.

Paddle offers group sharding on GPUs only, because of a few checks and copies between devices. `on_cpu` takes these
away: all else, Paddle's buffers, hooks, reductions and updates, runs here as it is, on gloo.
"""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import fast_diffusers  # noqa: F401  # isort: skip  (before paddle)
import numpy as np
import paddle
import pytest
from paddle.distributed.fleet.meta_parallel.sharding import (
    group_sharded_optimizer_stage2,
    group_sharded_stage2,
    group_sharded_stage3,
    group_sharded_storage,
    group_sharded_utils,
)

from distill import sharding, train_flux_lightning
from distill.checkpoint import verify
from distill.config import OptimizerConfig, TrainerConfig
from distill.flux_lightning import Recipe
from distill.memory import describe_run, estimate_memory, run_of
from distill.optim import EMA, AdamW, make_optimizer
from distill.parallel import World, barrier, init
from distill.recipe import build
from distill.sharding import Parameters, check_recipe, check_sharding, shard
from distill.trainer import Trainer
from fast_diffusers.errors import UserError

STEPS = 8
LEVELS = ["stage2", "stage3"]
TWO = World(0, 2)


class Pair:
    """Two players; the student's loss reads the heads too. The heads' loss of step 4 is not a number."""

    def __init__(self):
        rng = np.random.default_rng(0)

        def parameter(*shape):
            made = paddle.create_parameter(list(shape), "float32")
            made.set_value(rng.standard_normal(shape, dtype=np.float32))
            return made

        self.student = {"w": parameter(5, 7), "b": parameter(7), "v": parameter(7, 3)}
        self.heads = {"h": parameter(3, 4), "g": parameter(4)}
        config = OptimizerConfig(lr=0.05, schedule="cosine", warmup_steps=2, grad_clip_norm=0.3)
        self.optimizers = {name: AdamW(p, config, STEPS) for name, p in self.players().items()}
        self.averages = {"student": EMA(self.student, 0.9)}

    def players(self):
        return {"student": self.student, "heads": self.heads}

    def turns(self, step):
        return ["student", "heads"][step % 2 == 0 :][:1]

    def loss(self, player, batch, draws):
        fixed = {name: {k: p.detach() for k, p in own.items()} for name, own in self.players().items()}
        student, heads = (own if name == player else fixed[name] for name, own in self.players().items())
        features = paddle.tanh(draws.normal("x", [4, 5]) @ student["w"] + student["b"]) @ student["v"]
        loss = (features @ heads["h"] + heads["g"]).square().mean() + features.square().mean()
        return (loss * float("nan") if batch == 4 else loss), {}


def train(folder, level, world, steps=STEPS, resume=False):
    method = Pair()
    settings = {"gradient_accumulation": 2, "checkpoint_every": 2, "keep_last": STEPS, "log_every": 1}
    settings |= {"sample_every": 2, "on_nonfinite": "skip", "output_dir": str(folder), "sharding": level}

    def sample(done):
        with method.averages["student"].swapped():
            return {}

    trainer = Trainer(
        TrainerConfig(steps=steps, **settings), method, lambda step, micro_step: step, sample=sample, world=world
    )
    trainer.fit(resume)
    return trainer


# ---------------------------------------------------------------------------------------------- on two processes
def on_cpu():
    """Let Paddle's group sharding run where it refuses to."""
    modules = group_sharded_optimizer_stage2, group_sharded_stage2, group_sharded_stage3, group_sharded_storage
    core = group_sharded_stage2.core

    class Core:
        def __getattr__(self, name):
            return (lambda: True) if name == "is_compiled_with_cuda" else getattr(core, name)

    for module in (*modules, group_sharded_utils):
        if hasattr(module, "device_guard"):
            module.device_guard = lambda *arguments, **settings: contextlib.nullcontext()
    for module in modules[:3]:
        module.core = Core()
    storage = group_sharded_storage.ParamStorage
    add = storage._add_param_as_view  # a copy to the host shares memory here, and is cleared: so no copy
    storage._add_param_as_view = lambda self, parameter, align, convert_gpu=True: add(self, parameter, align, False)
    group_sharded_storage.cvt_to_device = lambda x, device, blocking=True: x
    paddle.get_device = lambda: "gpu:0"


def record(function, calls):
    def recorded(*arguments, **settings):
        calls.append((arguments, settings))
        return function(*arguments, **settings)

    return recorded


def work(folder):
    world = init()
    train(folder / "plain", None, world)
    on_cpu()
    report = {}
    for level in LEVELS:
        calls, sums = [], []
        sharding.group_sharded_parallel = record(sharding.group_sharded_parallel, calls)
        trainer = train(folder / level, level, world)
        for (layer, optimizer, name), settings in calls:
            assert isinstance(layer, Parameters) and name == sharding.LEVELS[level]
            assert settings == sharding.SETTINGS[level]
            assert type(optimizer) is paddle.optimizer.AdamW
        for player, own in trainer.method.players().items():
            given = [
                call for call, _ in calls if {id(p) for p in call[0].parameters()} == {id(p) for p in own.values()}
            ]
            assert len(given) == 1 and given[0][1] is trainer.optimizers[player].rule
        report[level] = {
            player: sum(moment.size for moment in each.rule._accumulators["moment1"].values())
            for player, each in trainer.optimizers.items()
        }
        reduce = "reduce" if level == "stage2" else "all_reduce"
        real = getattr(paddle.distributed, reduce)
        setattr(paddle.distributed, reduce, record(real, sums))
        trainer.update(STEPS + 1)  # two micro-steps of the student
        setattr(paddle.distributed, reduce, real)
        report[level]["reductions"] = len(sums)
        train(folder / f"{level} twice", level, world, steps=4)
        train(folder / f"{level} twice", level, world, resume=True)
        train(folder / f"{level} then plain", level, world, steps=4)
        train(folder / f"{level} then plain", None, world, resume=True)
        train(folder / f"plain then {level}", None, world, steps=4)
        train(folder / f"plain then {level}", level, world, resume=True)
    (folder / f"report{world.rank}.json").write_text(json.dumps(report))
    barrier(world)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharding")
    command = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", "2"]
    command += ["--log_dir", str(folder / "log"), __file__, str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=300)
    logs = "".join(path.read_text() for path in sorted((folder / "log").glob("workerlog.*")))
    assert done.returncode == 0, logs[-4000:]
    return folder


def saved(folder, step):
    checkpoint = verify(folder / "checkpoints" / f"step-{step:08d}")
    tensors = {f"{g}/{n}": t.numpy() for g in checkpoint.groups for n, t in checkpoint.tensors(g).items()}
    return tensors, checkpoint.state


@pytest.mark.parametrize("run", ["{}", "{} twice", "{} then plain", "plain then {}"])
@pytest.mark.parametrize(("level", "bound"), [("stage2", 0.0), ("stage3", 1e-6)])
def test_checkpoints_are_those_of_data_parallel_training(folder, level, bound, run):
    for step in (4, STEPS):  # clipped, with a skipped update between them
        expected, counters = saved(folder / "plain", step)
        actual, actual_counters = saved(folder / run.format(level), step)
        assert actual_counters == counters and counters["skipped"] == (step > 4)
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(actual[name], value, rtol=0, atol=bound, err_msg=name)


def test_each_rank_keeps_a_part_of_the_moments(folder):
    first, second = (json.loads((folder / f"report{rank}.json").read_text()) for rank in range(2))
    sizes = {"student": 5 * 7 + 7 + 7 * 3, "heads": 3 * 4 + 4}
    for player, size in sizes.items():
        assert first["stage2"][player] + second["stage2"][player] == size
        assert 0 < first["stage2"][player] < size
        assert first["stage3"][player] == second["stage3"][player]  # of tensors padded to 64 values


def test_gradients_are_summed_once_an_update_however_many_micro_steps(folder):
    report = json.loads((folder / "report0.json").read_text())
    assert report["stage2"]["reductions"] == 2  # one a rank's buffer
    assert report["stage3"]["reductions"] == 3 + 1  # one a parameter, and the norm


# ---------------------------------------------------------------------------------------------- on one
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("device", "world", "changes", "message"),
    [
        ("cpu", TWO, {}, r"needs GPUs: .* runs on the CPU; set trainer\.sharding=null"),
        ("gpu", World(), {}, r"needs several processes, .* paddle\.distributed\.launch"),
        ("gpu", TWO, {"kind": "adafactor"}, r"kind adamw only, and discriminator_optimizer has adafactor"),
    ],
)
def test_what_cannot_be_sharded_is_refused(level, device, world, changes, message, monkeypatch):
    monkeypatch.setattr(sharding, "device_kind", lambda: device)
    recipe = build(Recipe, {"discriminator_optimizer": changes, "trainer": {"sharding": level}})
    with pytest.raises(UserError, match=rf"trainer\.sharding={level} .*{message}"):
        check_recipe(recipe, world)


def test_what_can_be_sharded_is_not_refused(monkeypatch):
    check_recipe(Recipe(), World())
    monkeypatch.setattr(sharding, "device_kind", lambda: "gpu")
    check_sharding(TrainerConfig(sharding="stage2"), {"student": OptimizerConfig()}, TWO)


def test_the_trainer_refuses_too():
    with pytest.raises(UserError, match="needs GPUs"):
        Trainer(TrainerConfig(sharding="stage2"), Pair(), lambda step, micro_step: step, world=TWO)


@pytest.mark.parametrize(("level", "name"), [("stage2", "os_g"), ("stage3", "p_g_os")])
def test_paddle_is_asked_for_the_level_with_exactly_the_trained_parameters(level, name, monkeypatch):
    class Asked(Exception):
        pass

    def ask(layer, optimizer, asked, **settings):
        raise Asked(layer, optimizer, asked)

    monkeypatch.setattr(sharding, "group_sharded_parallel", ask)
    optimizer = Pair().optimizers["student"]
    with pytest.raises(Asked) as call:
        shard(optimizer, level, TWO)
    layer, inner, asked = call.value.args
    assert asked == name and inner is optimizer.inner
    expected = [id(parameter) for parameter in optimizer.parameters.values()]
    assert [id(parameter) for parameter in layer.parameters()] == expected
    assert [id(parameter) for parameter in inner._parameter_list] == expected


def test_only_adamw_is_sharded():
    with pytest.raises(TypeError, match="Adafactor"):
        shard(make_optimizer(Pair().student, OptimizerConfig(kind="adafactor"), 1), "stage2", TWO)


def test_the_layer_hands_gradients_over():
    parameters = list(Pair().student.values())
    gradients = [paddle.full(parameter.shape, i + 1.0) for i, parameter in enumerate(parameters)]
    Parameters(parameters)(gradients).backward()
    assert gradients == []
    assert [float(parameter.grad.mean()) for parameter in parameters] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(("processes", "shards"), [(None, 2), ("8", 8)])
def test_the_dry_run_counts_shards(processes, shards, monkeypatch):
    if processes:
        monkeypatch.setenv("PADDLE_TRAINERS_NUM", processes)
    else:
        monkeypatch.delenv("PADDLE_TRAINERS_NUM", raising=False)
    settings = {"model": {"path": "FLUX.1-dev"}, "data": {"height": 1024, "width": 1024}}
    whole = build(Recipe, settings)
    split = build(Recipe, settings | {"trainer": {"sharding": "stage2"}})
    moments = "optimiser moments"
    assert run_of(whole).shards == 1 and run_of(split).shards == shards
    assert estimate_memory(run_of(split))[moments] == pytest.approx(estimate_memory(run_of(whole))[moments] / shards)
    assert f"sharded over {shards} processes" in describe_run(split)
    assert "sharded" not in describe_run(whole)


def test_no_model_is_loaded_for_a_run_that_cannot_be_sharded(tmp_path):
    settings = {"model": {"path": "nowhere"}, "trainer": {"sharding": "stage2", "output_dir": str(tmp_path)}}
    with pytest.raises(UserError, match="needs GPUs"):  # not: model nowhere not found
        train_flux_lightning.train(build(Recipe, settings))


if __name__ == "__main__":
    work(Path(sys.argv[1]))
