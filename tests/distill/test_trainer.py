"""The loop on a two-parameter regression."""

import json
import signal

import numpy as np
import paddle
import pytest

from distill.checkpoint import latest_valid
from distill.config import OptimizerConfig, TrainerConfig
from distill.optim import EMA, AdamW
from distill.stopping import Interrupted
from distill.trainer import NonFiniteError, Trainer, frozen
from fast_diffusers.errors import UserError


class Regression:
    """Two players that take turns; the second one's loss also uses the first one's weights."""

    def __init__(self, steps, *poison_at):
        self.weights = {
            name: paddle.create_parameter([3], "float32", default_initializer=paddle.nn.initializer.Constant(0.1))
            for name in ("first", "second")
        }
        config = OptimizerConfig(lr=0.05, schedule="cosine", warmup_steps=2)
        self.optimizers = {name: AdamW({"w": w}, config, steps) for name, w in self.weights.items()}
        self.averages = {"first": EMA({"w": self.weights["first"]}, 0.9)}
        self.poison_at = poison_at

    def turns(self, step):
        return ["first"] if step % 2 == 0 else ["second", "first"]

    def loss(self, player, batch, draws):
        x = batch["x"] + draws.normal("noise", batch["x"].shape)
        error = (x * self.weights[player]).sum(-1) - batch["y"]
        if player == "second":
            error = error + self.weights["first"].detach().sum()
        term = (error**2).mean()
        if batch["step"] in self.poison_at:
            term = term * float("nan")
        return term, {"fit": term.detach()}


def read(step, micro_step, size=4):
    rng = np.random.default_rng([step, micro_step])
    x = paddle.to_tensor(rng.normal(size=(size, 3)).astype("float32"))
    return {"x": x, "y": x.sum(-1), "step": step}


def run(folder, steps, resume=False, method=None, **settings):
    method = method or Regression(10)
    defaults = {"checkpoint_every": 5, "log_every": 1, "sample_every": None, "output_dir": str(folder)}
    config = TrainerConfig(steps=steps, **(defaults | settings))
    trainer = Trainer(config, method, read, recipe={"steps": steps})
    trainer.fit(resume)
    return method, trainer


def values(method):
    averages, _ = method.averages["first"].state_dict()
    return [w.numpy() for w in (*method.weights.values(), *averages.values())]


def test_resumed_run_ends_bitwise_where_the_uninterrupted_one_does(tmp_path):
    whole, _ = run(tmp_path / "whole", 10)
    run(tmp_path / "parts", 5)
    continued, _ = run(tmp_path / "parts", 10, resume=True)
    for expected, actual in zip(values(whole), values(continued), strict=True):
        np.testing.assert_array_equal(expected, actual)
    lines = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert {"first_loss", "first_grad_norm", "first_lr", "fit", "steps_per_second"} <= lines[0].keys()


def test_buffers_of_a_method_resume(tmp_path):
    """A momentum of its own, which every loss changes in place and reads."""

    class Remembering(Regression):
        def __init__(self, steps):
            super().__init__(steps)
            self.buffers = {"seen": paddle.zeros([1])}

        def loss(self, player, batch, draws):
            term, parts = super().loss(player, batch, draws)
            with paddle.no_grad():
                self.buffers["seen"].set_value(0.5 * self.buffers["seen"] + term)
            return term * self.buffers["seen"].detach().sum(), parts

    whole, _ = run(tmp_path / "whole", 10, method=Remembering(10))
    run(tmp_path / "parts", 5, method=Remembering(10))
    continued, _ = run(tmp_path / "parts", 10, resume=True, method=Remembering(10))
    for expected, actual in zip(values(whole), values(continued), strict=True):
        np.testing.assert_array_equal(expected, actual)
    np.testing.assert_array_equal(whole.buffers["seen"].numpy(), continued.buffers["seen"].numpy())
    with pytest.raises(UserError, match=r"does not fit this recipe: .*has no tensors of buffers"):
        run(tmp_path / "plain", 5)
        run(tmp_path / "plain", 10, resume=True, method=Remembering(10))


def test_accumulation_averages_the_micro_steps(tmp_path):
    method = Regression(10)
    trainer = Trainer(TrainerConfig(steps=1, gradient_accumulation=2, output_dir=str(tmp_path)), method, read)
    seen = {}
    step = method.optimizers["first"].step
    method.optimizers["first"].step = lambda: (seen.update(g=method.weights["first"].grad.numpy()), step())[1]
    metrics = trainer.update(0)
    from distill.draws import StepDraws

    fresh, parts = Regression(10), []
    for micro_step in range(2):
        loss, _ = fresh.loss("first", read(0, micro_step), StepDraws(0, 0, micro_step))
        loss.backward()
        parts.append(float(loss))
    np.testing.assert_allclose(seen["g"], fresh.weights["first"].grad.numpy() / 2, rtol=1e-6)
    assert float(metrics["first_loss"]) == pytest.approx(np.mean(parts))


def test_non_finite_loss_stops_names_the_term_and_keeps_the_checkpoint(tmp_path):
    method = Regression(10, 7)
    with pytest.raises(NonFiniteError, match=r"step 7, second: fit, second_loss not finite; stopped"):
        run(tmp_path, 10, method=method)
    assert latest_valid(tmp_path / "checkpoints").step == 5
    assert all(np.isfinite(w).all() for w in values(method))


def test_non_finite_loss_can_be_skipped_and_is_counted(tmp_path):
    method, trainer = run(tmp_path, 10, method=Regression(10, 6), on_nonfinite="skip")
    assert trainer.skipped == 1
    assert all(np.isfinite(w).all() for w in values(method))


def test_three_skipped_in_a_row_stop_the_run_and_keep_the_checkpoint(tmp_path):
    """In a row of one player's own updates: `second` has every other step, and `first` is fine in between."""

    class SecondFails(Regression):
        def loss(self, player, batch, draws):
            term, parts = super().loss(player, batch, draws)
            return (term * float("nan") if player == "second" and batch["step"] >= 7 else term), parts

    message = (
        r"step 11, second: second_loss not finite, update 3 in a row that cannot be used; stopped\. The checkpoints"
    )
    with pytest.raises(NonFiniteError, match=message):
        run(tmp_path, 20, method=SecondFails(20), on_nonfinite="skip")
    kept = latest_valid(tmp_path / "checkpoints")
    assert (kept.step, kept.state["skipped_in_a_row"]) == (10, {"first": 0, "second": 2})
    assert all(np.isfinite(value.numpy()).all() for value in kept.tensors("second").values())


def test_a_good_update_starts_the_count_again(tmp_path):
    _, trainer = run(tmp_path, 10, method=Regression(10, 0, 2, 4, 6), on_nonfinite="skip", max_skips=2)
    assert trainer.skipped == 4 and trainer.skipped_in_a_row == {"first": 0, "second": 0}


def test_how_many_in_a_row_stop_the_run_is_a_setting(tmp_path):
    with pytest.raises(NonFiniteError, match=r"step 3, first: .* update 2 in a row"):
        run(tmp_path, 10, method=Regression(10, 2, 3), on_nonfinite="skip", max_skips=2)


def test_the_count_of_skips_in_a_row_goes_on_after_a_resume(tmp_path):
    """Two before the checkpoint and one after it are three."""
    settings = {"on_nonfinite": "skip", "checkpoint_every": 2}
    run(tmp_path, 6, method=Regression(10, 4, 5), **settings)
    with pytest.raises(NonFiniteError, match=r"step 6, first: .*update 3 in a row"):
        run(tmp_path, 10, resume=True, method=Regression(10, 6), **settings)
    assert latest_valid(tmp_path / "checkpoints").step == 6
    _, trainer = run(tmp_path, 10, resume=True, **settings)
    assert trainer.skipped == 3 and trainer.skipped_in_a_row == {"first": 0, "second": 0}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_saves(number, tmp_path):
    whole, _ = run(tmp_path / "whole", 10)
    method = Regression(10)
    loss = method.loss

    def signalled_loss(player, batch, draws):
        if batch["step"] == 6:
            signal.raise_signal(number)
        return loss(player, batch, draws)

    method.loss = signalled_loss
    with pytest.raises(Interrupted, match=rf"stopped by {number.name} after step 7, which is saved; continue"):
        run(tmp_path / "parts", 10, method=method)
    assert latest_valid(tmp_path / "parts" / "checkpoints").step == 7
    continued, _ = run(tmp_path / "parts", 10, resume=True)
    for expected, actual in zip(values(whole), values(continued), strict=True):
        np.testing.assert_array_equal(expected, actual)


def test_a_signal_in_the_last_step_does_not_stop_a_finished_run(tmp_path):
    config = TrainerConfig(steps=2, sample_every=2, output_dir=str(tmp_path))
    Trainer(config, Regression(2), read, sample=lambda done: signal.raise_signal(signal.SIGTERM)).fit()
    assert latest_valid(tmp_path / "checkpoints").step == 2


class Counter:
    """A health guard that warns at every line."""

    def __init__(self):
        self.seen = []

    def observe(self, step, metrics):
        self.seen.append([step, metrics["first_loss"]])
        return [f"step {step}: look"]

    def state(self):
        return {"seen": self.seen}

    def load_state(self, state):
        self.seen = [list(each) for each in state["seen"]]


def test_health_sees_the_log_and_resumes(tmp_path, caplog):
    def seen(folder, steps, resume=False):
        config = TrainerConfig(steps=steps, checkpoint_every=4, log_every=2, sample_every=None, output_dir=str(folder))
        trainer = Trainer(config, Regression(10), read, health=Counter())
        trainer.fit(resume)
        return trainer.health.seen

    whole = seen(tmp_path / "whole", 8)
    assert [step for step, _ in whole] == [2, 4, 6, 8]
    assert [record.message for record in caplog.records] == [f"step {step}: look" for step in (2, 4, 6, 8)]
    seen(tmp_path / "parts", 4)
    assert seen(tmp_path / "parts", 8, resume=True) == whole


def test_log_has_speed_waiting_and_what_sampling_measured(tmp_path):
    config = TrainerConfig(
        steps=4, batch_size=3, gradient_accumulation=2, log_every=2, sample_every=4, output_dir=str(tmp_path)
    )
    clock = iter([1.0, 1.0, 1.0 + 1e-9])
    trainer = Trainer(config, Regression(4), read, sample=lambda done: {"sharpness": done / 2}, waited=clock.__next__)
    trainer.fit()
    first, second = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    for line in (first, second):
        assert line["images_per_second"] == pytest.approx(6 * line["steps_per_second"])
    assert first["data_wait_fraction"] == 0 < second["data_wait_fraction"] < 1e-3
    assert "sharpness" not in first and second["sharpness"] == 2


def test_existing_run_is_not_overwritten(tmp_path):
    run(tmp_path, 5)
    with pytest.raises(UserError, match=r"already holds a run at step 5: continue it with --resume"):
        run(tmp_path, 10)


def test_resuming_another_model_is_refused(tmp_path):
    run(tmp_path, 5)
    method = Regression(10)
    method.optimizers["first"].parameters = {"renamed": method.weights["first"]}
    with pytest.raises(UserError, match=r"does not fit this recipe: 2 tensors are in only one of the two"):
        run(tmp_path, 10, resume=True, method=method)


def test_frozen_layers_collect_no_gradient():
    layer = paddle.nn.Linear(2, 2)
    x = paddle.ones([1, 2])
    x.stop_gradient = False
    with frozen(layer, None):
        layer(x).sum().backward()
    assert layer.weight.grad is None and x.grad is not None
    assert not layer.weight.stop_gradient
