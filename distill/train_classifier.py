"""Train the classifier that measures samples of the embedded data sets: its features and labels enter every metric.

    python distill/train_classifier.py --data digits --seed 0 --output distill/assets/classifier_digits.safetensors
    python distill/train_classifier.py --data mnist --data_dir FOLDER --seed 0 --output ...

A .json beside the weights records the command, the seed, the accuracy on the test split and the versions. The same
seed, machine and thread count give the same weights.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import distill  # noqa: F401  # isort: skip  (before paddle)
import numpy as np
import paddle
import paddle.nn.functional as F
from tqdm import tqdm

from distill.commands import run
from distill.data import digits, mnist
from distill.data.memory import ArraySource
from distill.data.order import batch_indices
from distill.data.transforms import normalise
from distill.metrics.classifier import ImageClassifier
from fast_diffusers.errors import UserError


@dataclass(frozen=True)
class Plan:
    """How one data set is trained: image side, channel widths, epochs, and the largest shift in pixels."""

    image_size: int
    widths: tuple[int, ...]
    epochs: int
    max_shift: float
    batch_size: int = 64
    learning_rate: float = 3e-3


PLANS = {
    "digits": Plan(image_size=8, widths=(24, 48), epochs=40, max_shift=0.5),
    "mnist": Plan(image_size=32, widths=(8, 16, 32, 48), epochs=6, max_shift=2.0, batch_size=128),
}
MAX_ROTATION, MAX_SCALE, MAX_SHEAR = np.deg2rad(10), 0.1, 0.1


def open_split(data: str, data_dir: str | None, split: str) -> ArraySource:
    """The embedded digits or MNIST padded to 32 x 32."""
    return digits(split) if data == "digits" else mnist(data_dir, split, size=32)


def arrays(source: ArraySource) -> tuple[np.ndarray, np.ndarray]:
    """(images float32 [N, 1, H, W] in [-1, 1], labels int64 [N])."""
    return normalise(source.images.transpose(0, 3, 1, 2)), source.labels


def augment(images: np.ndarray, rng: np.random.Generator, max_shift: float) -> paddle.Tensor:
    """Random small rotation, scale, shear and shift of each image [B, 1, H, W], so that features vary smoothly."""
    batch, _, height, width = images.shape
    angle, scale, shear, dx, dy = rng.uniform(-1, 1, (5, batch))
    angle, scale, shear = angle * MAX_ROTATION, 1 + scale * MAX_SCALE, shear * MAX_SHEAR
    rows = [
        [np.cos(angle) * scale, -np.sin(angle) * scale + shear, dx * 2 * max_shift / width],
        [np.sin(angle) * scale, np.cos(angle) * scale, dy * 2 * max_shift / height],
    ]
    theta = paddle.to_tensor(np.array(rows).transpose(2, 0, 1).astype(np.float32))
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(paddle.to_tensor(images) + 1, grid, align_corners=False) - 1  # what comes in is black


def train(plan: Plan, images: np.ndarray, labels: np.ndarray, seed: int) -> ImageClassifier:
    """Cross-entropy with AdamW and a cosine schedule; returns the classifier in evaluation mode."""
    paddle.seed(seed)
    model = ImageClassifier(plan.image_size, plan.widths)
    steps = len(images) // plan.batch_size * plan.epochs
    schedule = paddle.optimizer.lr.CosineAnnealingDecay(plan.learning_rate, steps)
    optimizer = paddle.optimizer.AdamW(schedule, parameters=model.parameters(), weight_decay=1e-2)
    for step in tqdm(range(steps), desc="classifier", mininterval=1):
        chosen = batch_indices(len(images), plan.batch_size, seed, step)
        batch = augment(images[chosen], np.random.default_rng([seed, step]), plan.max_shift)
        loss = F.cross_entropy(model(batch)[1], paddle.to_tensor(labels[chosen]))
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        schedule.step()
    model.eval()
    return model


def accuracy(model: ImageClassifier, images: np.ndarray, labels: np.ndarray, batch_size: int = 1000) -> float:
    """Share of correctly labelled images [N, 1, H, W]."""
    with paddle.no_grad():
        logits = [model(paddle.to_tensor(images[i : i + batch_size]))[1] for i in range(0, len(images), batch_size)]
    return float((paddle.concat(logits).argmax(-1).numpy() == labels).mean())


def main(argv: list[str] | None) -> None:
    """Train from the command line; mistakes of the user raise UserError."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", choices=sorted(PLANS), required=True)
    parser.add_argument("--data_dir", help="folder of MNIST's four idx .gz files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="safetensors file to write; a .json goes beside it")
    arguments = parser.parse_args(argv)
    make(arguments.data, arguments.data_dir, arguments.seed, arguments.output)


def make(data: str, data_dir: str | None, seed: int, output: Path) -> dict:
    """Train, test and write the weights and their record, which is returned."""
    if output.suffix != ".safetensors":
        raise UserError(f"--output must name a .safetensors file, not {output}")
    train_split, test_split = (open_split(data, data_dir, split) for split in ("train", "test"))
    model = train(PLANS[data], *arrays(train_split), seed)
    output.parent.mkdir(parents=True, exist_ok=True)
    model.save(output)
    folder = ["--data_dir", "FOLDER"] if data_dir else []
    command = ["python", "distill/train_classifier.py", "--data", data, *folder, "--seed", str(seed)]
    record = {
        "command": shlex.join([*command, "--output", output.as_posix()]),
        "seed": seed,
        "test_accuracy": round(accuracy(model, *arrays(test_split)), 5),
        "train_images": len(train_split),
        "test_images": len(test_split),
        "sha256": hashlib.sha256(output.read_bytes()).hexdigest(),
        "versions": {"python": sys.version.split()[0], "paddle": paddle.__version__, "numpy": np.__version__},
    }
    output.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"{output}: test accuracy {record['test_accuracy']:.2%} on {len(test_split)} images")
    return record


if __name__ == "__main__":
    run(main)
