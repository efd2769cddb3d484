"""Train one-step generation of handwritten digits from scratch: `python examples/mnist/train.py --data digits`.

RCGM or TwinFlow on a small U-Net, without a teacher. The result is model.safetensors, the running average of the
weights. The run continues exactly where a checkpoint left it with --resume.
"""

import argparse
import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import paddle

from distill.commands import run
from distill.config import HealthConfig, OptimizerConfig, TrainerConfig
from distill.data import ImageBatches, Loader, open_source
from distill.data.memory import ArraySource
from distill.draws import Draws
from distill.health import Health
from distill.logs import plot_losses, save_grid
from distill.objectives.rcgm import rcgm
from distill.objectives.twinflow import twinflow
from distill.optim import EMA, make_optimizer
from distill.recipe import to_dict
from distill.roles import Roles
from distill.trainer import Batch, Loss, Trainer
from fast_diffusers.conditioning import Cond
from fast_diffusers.errors import UserError
from fast_diffusers.random import Generator, randn
from fast_diffusers.samplers.unified import unified

from unet import NO_LABEL, NUM_CLASSES, UNet  # isort: skip  (beside this file)

log = logging.getLogger(__name__)
IMAGE_SIZE = {"mnist": 28, "digits": 8}
COMMON = {"order": 1, "delta": 0.1, "loss": "l2", "time_weighting": False, "enhanced_ratio": 0.55}
PARTS = {"e2e": 2.5, "mul": 1, "any": 0.5, "adv": 1}
OBJECTIVES: Mapping[str, tuple[Any, dict[str, Any]]] = {
    "rcgm": (rcgm, COMMON),
    "twinflow": (twinflow, COMMON | {"form": "split", "parts": PARTS, "rectify_weight": 2.0}),
}
"""The objective of each method, and its settings: a longer first piece than published, and guidance folded in, which a
training of minutes needs."""
STUDENT = "student"
DROP_RATE = 0.1


@dataclass(frozen=True)
class Settings:
    """Everything that a run depends on; the command line's arguments have the same names."""

    method: Literal["rcgm", "twinflow"] = "twinflow"
    data: Literal["mnist", "digits"] = "mnist"
    data_path: str | None = None
    epochs: float = 8.0
    batch_size: int = 64
    lr: float = 5e-3
    ema_decay: float = 0.99
    width: int = 32
    depth: int = 3
    seed: int = 0
    output_dir: str = "outputs/mnist"
    sample_every: int = 250
    log_every: int = 50

    def __post_init__(self) -> None:
        if self.epochs <= 0 or self.batch_size < 1 or not self.lr > 0 or self.seed < 0:
            raise UserError("epochs, batch_size and lr must be positive and the seed not negative")


class OneStep:
    """The method for `distill.trainer.Trainer`: the reference network is the running average of the student."""

    def __init__(self, settings: Settings, steps: int):
        self.objective, self.options = OBJECTIVES[settings.method]
        paddle.seed(settings.seed)
        self.student = UNet(IMAGE_SIZE[settings.data], settings.width, settings.depth)
        self.reference = copy.deepcopy(self.student)
        parameters = dict(self.student.named_parameters())
        config = OptimizerConfig(
            lr=settings.lr, betas=(0.9, 0.99), schedule="cosine", warmup_steps=min(100, steps // 5)
        )
        self.optimizers = {STUDENT: make_optimizer(parameters, config, steps)}
        for parameter in self.reference.parameters():
            parameter.stop_gradient = True
        average = EMA(parameters, settings.ema_decay, into=dict(self.reference.named_parameters()))
        self.averages = {STUDENT: average}
        self.roles = Roles(student=self.student, teacher=None, target=self.reference)

    def turns(self, step: int) -> Sequence[str]:
        """See `Method`."""
        return [STUDENT]

    def loss(self, player: str, batch: Batch, draws: Draws) -> Loss:
        """See `Method`. One label in ten is dropped, so that the model can also draw any digit."""
        label = batch["cond"]["label"]
        dropped = draws.uniform("drop", label.shape) < DROP_RATE
        cond = Cond(label=paddle.where(dropped, paddle.full_like(label, NO_LABEL), label))
        return self.objective(self.roles, {**batch, "cond": cond}, draws, **self.options)


def open_images(data: str, data_path: str | None, split: str) -> ArraySource:
    """A split of MNIST from the folder `data_path`, or of scikit-learn's digits. UserError for missing or bad files."""
    return open_source({"kind": data, "split": split} | ({"folder": data_path} if data == "mnist" else {}))


def to_batch(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What a loader gives as an objective's batch."""
    label = paddle.to_tensor(np.array(raw["prompts"], dtype=np.int64))
    return {
        "latents": paddle.to_tensor(raw["images"]),
        "cond": Cond(label=label),
        "null_cond": Cond(label=paddle.full_like(label, NO_LABEL)),
    }


@paddle.no_grad()
def draw(
    model: UNet, labels: Sequence[int], seed: int, *, steps: int = 1, batch_size: int = 250, **how: Any
) -> np.ndarray:
    """Samples float32 [N, 1, H, W] of the labels [N]; sample i depends on its label and the seed only.

    how: settings of `fast_diffusers.samplers.unified`.
    """
    size, parts = model.config["image_size"], []
    for start in range(0, len(labels), batch_size):
        label = np.asarray(labels[start : start + batch_size], dtype=np.int64)
        cond = Cond(label=paddle.to_tensor(label))
        noise = randn([len(label), 1, size, size], [Generator((seed << 32) + start + i) for i in range(len(label))])

        def velocity(x: paddle.Tensor, t: paddle.Tensor, target_t: paddle.Tensor, cond: Cond = cond) -> paddle.Tensor:
            return model(x, t, cond, target_t=target_t)

        parts.append(unified(velocity, noise, steps=steps, **how).astype("float32").numpy())
    return np.concatenate(parts)


def train(settings: Settings, resume: bool = False) -> Path:
    """Train and save; returns the file of the averaged model."""
    source = open_images(settings.data, settings.data_path, "train")
    steps = max(1, round(settings.epochs * len(source) / settings.batch_size))
    size, output = IMAGE_SIZE[settings.data], Path(settings.output_dir)
    method = OneStep(settings, steps)
    config = TrainerConfig(
        steps=steps,
        batch_size=settings.batch_size,
        seed=settings.seed,
        ema_decay=settings.ema_decay,
        output_dir=settings.output_dir,
        log_every=settings.log_every,
        sample_every=settings.sample_every,
        checkpoint_every=settings.sample_every,
    )

    def sample(done: int) -> None:
        digits = list(range(NUM_CLASSES)) * 8
        save_grid(draw(method.reference, digits, seed=0), output / "samples" / f"step-{done:08d}.png", NUM_CLASSES)

    with Loader(ImageBatches(source, size, size, 1), settings.batch_size, settings.seed, num_workers=0) as loader:
        trainer = Trainer(
            config,
            method,
            lambda step, micro_step: to_batch(loader.batch(step, micro_step)),
            sample=sample,
            recipe=to_dict(settings),
            health=Health(HealthConfig()),
            waited=lambda: loader.wait_seconds,
        )
        trainer.fit(resume)
    plot_losses(output / "metrics.jsonl", output / "losses.png")
    method.reference.save(output / "model.safetensors")
    log.info("the model is %s", output / "model.safetensors")
    return output / "model.safetensors"


def add_arguments(parser: argparse.ArgumentParser, *, skip: Sequence[str] = ()) -> None:
    """--epochs, --batch_size and the other settings, with their defaults."""
    d, choices = Settings(), {"method": list(OBJECTIVES), "data": list(IMAGE_SIZE)}
    meaning = {
        "method": "the objective",
        "data": "data set; digits needs no download",
        "data_path": "folder of MNIST's four idx .gz files",
        "epochs": "passes over the images",
        "batch_size": "images a step",
        "lr": "peak learning rate",
        "ema_decay": "of the running average of the weights, which is also the reference network",
        "width": "channels of the U-Net",
        "depth": "blocks of its lower level",
        "seed": "of weights, data order and noise",
        "output_dir": "folder for the model, checkpoints, logs and samples",
        "sample_every": "steps between grids of samples, and checkpoints",
        "log_every": "steps between lines of metrics.jsonl",
    }
    for name, text in meaning.items():
        if name not in skip:
            default = getattr(d, name)
            kind = str if default is None else type(default)
            parser.add_argument(
                f"--{name}", type=kind, default=default, choices=choices.get(name), help=f"{text} (%(default)s)"
            )


def main(argv: list[str] | None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_arguments(parser)
    parser.add_argument("--resume", action="store_true", help="continue from the newest whole checkpoint")
    arguments = vars(parser.parse_args(argv))
    resume = arguments.pop("resume")
    train(Settings(**arguments), resume)


if __name__ == "__main__":
    run(main)
