"""The training loop: batches and draws by counter, one optimiser a player, logs, samples, checkpoints, resume."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import paddle
from paddle import nn

from distill.checkpoint import CheckpointWriter, latest_valid
from distill.config import TrainerConfig
from distill.draws import Draws, StepDraws
from distill.health import Health, UnhealthyError
from distill.logs import MetricsLog, progress
from distill.optim import EMA, Optimizer
from distill.parallel import (
    World,
    any_rank,
    average_values,
    barrier,
    broadcast_parameters,
)
from distill.sharding import check_sharding, shard
from distill.stopping import Interrupted, StopRequest
from fast_diffusers.errors import UserError

log = logging.getLogger(__name__)

Batch = Mapping[str, Any]
Loss = tuple[paddle.Tensor, dict[str, paddle.Tensor]]


class Method(Protocol):
    """What is trained, and how. A player is a set of parameters with an optimiser of its own.

    A method with state beside its parameters, such as the vectors of a spectral normalisation, has an attribute
    `buffers` too: path -> tensor, changed in place; the same on all ranks.
    """

    optimizers: Mapping[str, Optimizer]
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
        read: `read(step, micro_step)` gives this rank's batch of these counters, whatever was read before.
        sample: called with the steps done every `config.sample_every` steps, on every rank; the numbers that it
            returns are logged.
        recipe: the resolved recipe, stored in every checkpoint.
        world: gradients and metrics are averaged over its ranks; only rank 0 writes.
        health: sees the metrics of every line of the log; its state is part of the checkpoints.
        waited: total seconds that `read` has waited for data.
    """

    def __init__(
        self,
        config: TrainerConfig,
        method: Method,
        read: Callable[[int, int], Batch],
        *,
        sample: Callable[[int], Mapping[str, float] | None] | None = None,
        recipe: Mapping[str, Any] | None = None,
        world: World | None = None,
        health: Health | None = None,
        waited: Callable[[], float] = lambda: 0.0,
    ):
        self.config, self.method, self.read, self.sample = config, method, read, sample
        self.recipe = dict(recipe or {})
        self.world, self.health, self.waited = world or World(), health, waited
        self.optimizers = dict(method.optimizers)  # from `fit` on sharded, here and in the method, if `config` says so
        check_sharding(config, {name: each.config for name, each in self.optimizers.items()}, self.world)
        self.folder = Path(config.output_dir)
        self.skipped = 0
        self.skipped_in_a_row = dict.fromkeys(self.optimizers, 0)

    def fit(self, resume: bool = False) -> None:
        """Train. `resume` continues from the newest whole checkpoint in the output folder, if there is one.

        SIGTERM and SIGINT, on any rank, finish the running step and save a checkpoint.

        Raises:
            NonFiniteError: naming the step, the player and the terms; the last checkpoint is untouched.
            UnhealthyError: a guard of `health` says to stop.
            UserError: the folder already holds a run and `resume` is False, or no checkpoint in it is usable.
            Interrupted: a signal came; the checkpoint is on disk.
        """
        start = self._start(resume)
        with StopRequest() as request:
            try:
                done = self._train(start, request)
            except (NonFiniteError, UnhealthyError):  # which all ranks raise
                barrier(self.world)  # the launcher ends all with the first, and rank 0 may have been writing
                raise
            barrier(self.world)
        if done < self.config.steps:
            name = request.name or "a signal to another process"
            raise Interrupted(f"stopped by {name} after step {done}, which is saved; continue with --resume")

    def _train(self, start: int, request: StopRequest) -> int:
        """The loop; returns the steps done, with everything on disk."""
        config, main = self.config, self.world.is_main
        with (
            CheckpointWriter(self.folder / "checkpoints", config.keep_last) if main else nullcontext() as writer,
            MetricsLog(self.folder / "metrics.jsonl", start, visualdl=config.visualdl, enabled=main) as metrics_log,
            progress(config.steps, start, enabled=main) as bar,
        ):
            rates = self._rates(start)
            metrics: dict[str, Any] = {}  # the newest of every player, since players may take turns
            done = start
            for step in range(start, config.steps):
                metrics |= self.update(step)
                done = step + 1
                last = done == config.steps
                if self.sample and config.sample_every and (last or done % config.sample_every == 0):
                    metrics |= self.sample(done) or {}
                if last or done % config.log_every == 0:
                    values = self._to_floats(step, metrics)
                    metrics.clear()
                    metrics_log.write(done, {**values, **rates(done), "skipped": self.skipped})
                    bar.set_postfix({k: f"{v:.3g}" for k, v in values.items() if k.endswith("loss")})
                    for warning in self.health.observe(done, values) if self.health else ():
                        log.warning("%s", warning)
                bar.update()
                stop = any_rank(request.name is not None, self.world)
                if stop or last or done % config.checkpoint_every == 0:
                    state = self.state()  # on all ranks: each may hold a part
                    if main:
                        writer.save(done, *state, recipe=self.recipe)
                    del state
                if stop:
                    break
        return done

    def _rates(self, start: int) -> Callable[[int], dict[str, float]]:
        """A function of the steps done: the speed since it was last called, on all ranks together."""
        images_per_step = self.config.batch_size * self.config.gradient_accumulation * self.world.size
        before = start, time.perf_counter(), self.waited()

        def rates(done: int) -> dict[str, float]:
            nonlocal before
            now = done, time.perf_counter(), self.waited()
            steps, seconds, waiting = (new - old for new, old in zip(now, before, strict=True))
            before = now
            return {
                "steps_per_second": steps / seconds,
                "images_per_second": steps * images_per_step / seconds,
                "data_wait_fraction": waiting / seconds,
            }

        return rates

    def update(self, step: int) -> dict[str, Any]:
        """One training step: every player whose turn it is. Returns device metrics and plain numbers."""
        count = self.config.gradient_accumulation
        batches = [self.read(step, micro_step) for micro_step in range(count)]
        metrics: dict[str, Any] = {}
        for player in self.method.turns(step):
            optimizer = self.optimizers[player]
            terms: dict[str, Any] = {}
            for micro_step, batch in enumerate(batches):
                draws = StepDraws(self.config.seed, step, micro_step, self.world.rank)
                for each in self.optimizers.values():
                    each.gather()
                loss, parts = self.method.loss(player, batch, draws)
                (loss / count).backward()
                for name, value in {**parts, f"{player}_loss": loss.detach()}.items():
                    terms[name] = terms.get(name, 0) + value / count
            optimizer.synchronise(self.world)
            report = optimizer.step()
            for each in self.optimizers.values():
                each.clear_grad()
            if report.finite:
                self.skipped_in_a_row[player] = 0
                if player in self.method.averages:
                    self.method.averages[player].update()
            else:
                self._not_finite(step, player, terms)
            metrics |= {**terms, f"{player}_grad_norm": report.grad_norm, f"{player}_lr": report.lr}
        return metrics

    def _not_finite(self, step: int, player: str, terms: Mapping[str, Any]) -> None:
        named = [name for name, value in average_values(terms, self.world).items() if not math.isfinite(value)]
        what = f"{', '.join(named)} not finite" if named else "the gradient is not finite, though every loss term is"
        message = f"step {step}, {player}: {what}"
        intact = f"The checkpoints in {self.folder / 'checkpoints'} are intact"
        if self.config.on_nonfinite == "stop":
            raise NonFiniteError(f"{message}; stopped. {intact}")
        self.skipped += 1
        self.skipped_in_a_row[player] += 1
        if (count := self.skipped_in_a_row[player]) >= self.config.max_skips:
            raise NonFiniteError(f"{message}, update {count} in a row that cannot be used; stopped. {intact}")
        log.warning("%s; update skipped (%d so far)", message, self.skipped)

    def _to_floats(self, step: int, metrics: Mapping[str, Any]) -> dict[str, float]:
        values = average_values(metrics, self.world)
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad and self.config.on_nonfinite == "stop":
            raise NonFiniteError(f"step {step}: {', '.join(bad)} not finite; stopped")
        return values

    # ------------------------------------------------------------------------------------------ state
    def state(self) -> tuple[dict[str, dict[str, paddle.Tensor]], dict[str, Any]]:
        """(tensors by group, JSON-able counters): all that a resumed run needs besides the recipe.

        Sharded or not, it is the same, and whole, on rank 0; all ranks must call it.
        """
        tensors: dict[str, dict[str, paddle.Tensor]] = {}
        counters: dict[str, Any] = {"skipped": self.skipped, "skipped_in_a_row": dict(self.skipped_in_a_row)}
        for player, optimizer in self.optimizers.items():
            tensors[player] = dict(optimizer.parameters)
            tensors[f"{player}_optimizer"], counters[f"{player}_optimizer"] = optimizer.state_dict()
        for player, average in self.method.averages.items():
            tensors[f"{player}_average"], counters[f"{player}_average"] = average.state_dict()
        if buffers := self._buffers():
            tensors["buffers"] = buffers
        if self.health is not None:
            counters["health"] = self.health.state()
        return tensors, counters

    def _buffers(self) -> dict[str, paddle.Tensor]:
        return dict(getattr(self.method, "buffers", {}))

    def _start(self, resume: bool) -> int:
        """The first step to run, with all state restored, and the same on all ranks."""
        step = self._restore(resume)
        main_step = paddle.to_tensor([step])
        broadcast_parameters([main_step], self.world)
        if any_rank(main_step.item() != step, self.world):
            raise UserError(f"the processes find different checkpoints: all of them must see the same {self.folder}")
        if self.world.size > 1:
            for group in self.state()[0].values():
                broadcast_parameters(group.values(), self.world)
        if self.config.sharding:  # after the state is there: whole tensors cannot be loaded into shards
            self.optimizers = {n: shard(each, self.config.sharding, self.world) for n, each in self.optimizers.items()}
            self.method.optimizers = self.optimizers  # it must not use the given ones any more, nor their counters
        return step

    @paddle.no_grad()
    def _restore(self, resume: bool) -> int:
        """Load the newest checkpoint, if there is one; returns its step."""
        checkpoint = latest_valid(self.folder / "checkpoints")
        if checkpoint is None:
            return 0
        if not resume:
            raise UserError(
                f"{self.folder} already holds a run at step {checkpoint.step}: "
                "continue it with --resume, or choose another trainer.output_dir"
            )
        self.skipped = checkpoint.state["skipped"]
        self.skipped_in_a_row |= checkpoint.state.get("skipped_in_a_row", {})  # older checkpoints have none
        parts = {f"{name}_optimizer": each for name, each in self.optimizers.items()}
        parts |= {f"{name}_average": each for name, each in self.method.averages.items()}
        try:
            for player, optimizer in self.optimizers.items():
                load_parameters(optimizer.parameters, checkpoint.tensors(player))
            if buffers := self._buffers():
                load_parameters(buffers, checkpoint.tensors("buffers"))
            for name, part in parts.items():
                part.load_state_dict(checkpoint.tensors(name), checkpoint.state[name])
            if self.health is not None and "health" in checkpoint.state:
                self.health.load_state(checkpoint.state["health"])
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
