"""The training loop: batches and draws by counter, one optimiser a player, logs, samples, checkpoints, resume."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import paddle
from paddle import nn

from distill.checkpoint import CheckpointWriter, latest_valid
from distill.config import TrainerConfig
from distill.draws import Draws, StepDraws
from distill.logs import MetricsLog, progress
from distill.optim import EMA, AdamW
from fast_diffusers.errors import UserError

log = logging.getLogger(__name__)

Batch = Mapping[str, Any]
Loss = tuple[paddle.Tensor, dict[str, paddle.Tensor]]


class Method(Protocol):
    """What is trained, and how. A player is a set of parameters with an optimiser of its own."""

    optimizers: Mapping[str, AdamW]
    averages: Mapping[str, EMA]

    def turns(self, step: int) -> Sequence[str]:
        """The players that step `step` updates, in that order."""

    def loss(self, player: str, batch: Batch, draws: Draws) -> Loss:
        """The player's objective on one batch."""


@contextmanager
def frozen(*layers: nn.Layer | None) -> Iterator[None]:
    """Within the context the parameters of the layers collect no gradient, which saves computing it."""
    changed = [p for layer in layers if layer is not None for p in layer.parameters() if not p.stop_gradient]
    for parameter in changed:
        parameter.stop_gradient = True
    try:
        yield
    finally:
        for parameter in changed:
            parameter.stop_gradient = False


class NonFiniteError(UserError):
    """A loss or gradient was not finite and the recipe says to stop."""


class Trainer:
    """Runs a method from its last checkpoint, or from the start, to `config.steps`.

    Args:
        read: `read(step, micro_step)` gives the batch of these counters, whatever was read before.
        sample: called with the steps done every `config.sample_every` steps, under the averaged weights if there are.
        recipe: the resolved recipe, stored in every checkpoint.
    """

    def __init__(
        self,
        config: TrainerConfig,
        method: Method,
        read: Callable[[int, int], Batch],
        *,
        sample: Callable[[int], None] | None = None,
        recipe: Mapping[str, Any] | None = None,
    ):
        self.config, self.method, self.read, self.sample = config, method, read, sample
        self.recipe = dict(recipe or {})
        self.folder = Path(config.output_dir)
        self.skipped = 0

    def fit(self, resume: bool = False) -> None:
        """Train. `resume` continues from the newest whole checkpoint in the output folder, if there is one.

        Raises:
            NonFiniteError: naming the step, the player and the terms; the last checkpoint is untouched.
            UserError: the folder already holds a run and `resume` is False, or no checkpoint in it is usable.
        """
        start = self._start(resume)
        with (
            CheckpointWriter(self.folder / "checkpoints", self.config.keep_last) as writer,
            MetricsLog(self.folder / "metrics.jsonl", start, visualdl=self.config.visualdl) as metrics_log,
            progress(self.config.steps, start) as bar,
        ):
            logged = time.perf_counter(), start
            metrics: dict[str, Any] = {}  # the newest of every player, since players may take turns
            for step in range(start, self.config.steps):
                metrics |= self.update(step)
                done = step + 1
                last = done == self.config.steps
                if last or done % self.config.log_every == 0:
                    values = self._to_floats(step, metrics)
                    metrics.clear()
                    now = time.perf_counter()
                    rate = (done - logged[1]) / (now - logged[0])
                    logged = now, done
                    metrics_log.write(done, {**values, "steps_per_second": rate, "skipped": self.skipped})
                    bar.set_postfix({k: f"{v:.3g}" for k, v in values.items() if k.endswith("loss")})
                bar.update()
                if last or done % self.config.checkpoint_every == 0:
                    writer.save(done, *self.state(), recipe=self.recipe)
                if self.sample and self.config.sample_every and (last or done % self.config.sample_every == 0):
                    self.sample(done)

    def update(self, step: int) -> dict[str, Any]:
        """One training step: every player whose turn it is. Returns device metrics and plain numbers."""
        count = self.config.gradient_accumulation
        batches = [self.read(step, micro_step) for micro_step in range(count)]
        metrics: dict[str, Any] = {}
        for player in self.method.turns(step):
            optimizer = self.method.optimizers[player]
            terms: dict[str, Any] = {}
            for micro_step, batch in enumerate(batches):
                loss, parts = self.method.loss(player, batch, StepDraws(self.config.seed, step, micro_step))
                (loss / count).backward()
                for name, value in {**parts, f"{player}_loss": loss.detach()}.items():
                    terms[name] = terms.get(name, 0) + value / count
            report = optimizer.step()
            for each in self.method.optimizers.values():
                each.clear_grad()
            if report.finite:
                if player in self.method.averages:
                    self.method.averages[player].update()
            else:
                self._not_finite(step, player, terms)
            metrics |= {**terms, f"{player}_grad_norm": report.grad_norm, f"{player}_lr": report.lr}
        return metrics

    def _not_finite(self, step: int, player: str, terms: Mapping[str, Any]) -> None:
        named = [name for name, value in terms.items() if not math.isfinite(float(value))]
        what = f"{', '.join(named)} not finite" if named else "the gradient is not finite, though every loss term is"
        message = f"step {step}, {player}: {what}"
        if self.config.on_nonfinite == "stop":
            raise NonFiniteError(f"{message}; stopped. The checkpoints in {self.folder / 'checkpoints'} are intact")
        self.skipped += 1
        log.warning("%s; update skipped (%d so far)", message, self.skipped)

    def _to_floats(self, step: int, metrics: Mapping[str, Any]) -> dict[str, float]:
        values = {name: float(value) for name, value in metrics.items()}
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad and self.config.on_nonfinite == "stop":
            raise NonFiniteError(f"step {step}: {', '.join(bad)} not finite; stopped")
        return values

    # ------------------------------------------------------------------------------------------ state
    def state(self) -> tuple[dict[str, dict[str, paddle.Tensor]], dict[str, Any]]:
        """(tensors by group, JSON-able counters): all that a resumed run needs besides the recipe."""
        tensors: dict[str, dict[str, paddle.Tensor]] = {}
        counters: dict[str, Any] = {"skipped": self.skipped}
        for player, optimizer in self.method.optimizers.items():
            tensors[player] = dict(optimizer.parameters)
            tensors[f"{player}_optimizer"], counters[f"{player}_optimizer"] = optimizer.state_dict()
        for player, average in self.method.averages.items():
            tensors[f"{player}_average"], counters[f"{player}_average"] = average.state_dict()
        return tensors, counters

    @paddle.no_grad()
    def _start(self, resume: bool) -> int:
        """The first step to run, with all state restored."""
        checkpoint = latest_valid(self.folder / "checkpoints")
        if checkpoint is None:
            return 0
        if not resume:
            raise UserError(
                f"{self.folder} already holds a run at step {checkpoint.step}: "
                "continue it with --resume, or choose another trainer.output_dir"
            )
        self.skipped = checkpoint.state["skipped"]
        parts = {f"{name}_optimizer": each for name, each in self.method.optimizers.items()}
        parts |= {f"{name}_average": each for name, each in self.method.averages.items()}
        try:
            for player, optimizer in self.method.optimizers.items():
                load_parameters(optimizer.parameters, checkpoint.tensors(player))
            for name, part in parts.items():
                part.load_state_dict(checkpoint.tensors(name), checkpoint.state[name])
        except (ValueError, KeyError) as error:
            raise UserError(f"{checkpoint.path} does not fit this recipe: {error}") from error
        log.info("resumed from %s", checkpoint.path)
        return checkpoint.step


def load_parameters(parameters: Mapping[str, paddle.Tensor], saved: Mapping[str, paddle.Tensor]) -> None:
    """Copy saved tensors into parameters of the same names and shapes, or raise ValueError naming what differs."""
    if differing := sorted(parameters.keys() ^ saved.keys()):
        raise ValueError(f"{len(differing)} tensors are in only one of the two, such as {differing[0]}")
    for path, parameter in parameters.items():
        if list(parameter.shape) != list(saved[path].shape):
            raise ValueError(f"{path} has shape {list(saved[path].shape)}, expected {list(parameter.shape)}")
        paddle.assign(saved[path], parameter)
