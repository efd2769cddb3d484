"""Draw digits along edges in one step: `python examples/control.py`.

Trains a ControlNet for a SANA-Sprint student on the edges of the training digits, then draws along the edges of the
test digits and measures how well the edges of what is drawn follow them. Without --student it is the student of the
recipe sana_sprint_digits, which is trained first if it is not there. What was stopped continues with the same command.

Writes the ControlNet, metrics.json, table.md, control.png and what every training run leaves.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import paddle

from distill.batches import open_data
from distill.checkpoint import latest_valid
from distill.commands import run
from distill.config import DataConfig
from distill.control import agreement, edge_map
from distill.data import ImageBatches
from distill.data.transforms import normalise
from distill.metrics.distances import frechet_distance, label_accuracy
from distill.metrics.features import ClassifierFeatures, FeatureSet, extract
from distill.metrics.report import comparison_grid
from distill.recipe import load_recipe, to_dict
from distill.sana_sprint import Recipe
from distill.train_sana_sprint import train
from fast_diffusers.errors import UserError
from fast_diffusers.models import SanaControlNetModel
from fast_diffusers.pipelines import SanaLabelPipeline
from fast_diffusers.pipelines.components import INDEX
from fast_diffusers.pipelines.shipped import open_pipeline
from fast_diffusers.random import Generator

STUDENT, CONTROL = "sana_sprint_digits", "sana_sprint_digits_control"
"""The recipes."""

REAL, ALONE, CONTROLLED, OTHER_LABEL = "the test digits", "without control", "with control", "with another label"
CHANCE = "with control, against the edges of another digit of that label"
COLUMNS = {
    "correlation": ("edge correlation ↑", ".3f"),
    "overlap": ("edge overlap ↑", ".3f"),
    "found": ("own control found ↑", ".1%"),
    "accuracy": ("label of the prompt ↑", ".1%"),
    "control_label": ("label of the control", ".1%"),
    "frechet": ("FD to training digits ↓", ".2f"),
}
"""Heading and format of a metric in the table."""


class Digits(NamedTuple):
    """Images uint8 [N, C, H, W], their labels [N], and their edges, float32 [N, C, H, W] in [-1, 1]."""

    images: np.ndarray
    labels: np.ndarray
    edges: np.ndarray


def open_digits(data: DataConfig, channels: int) -> Digits:
    """All of the data."""
    batches = ImageBatches(open_data(data), data.height, data.width, channels)
    found = batches.fetch(np.arange(len(batches)))
    return Digits(to_pixels(found["images"]), np.array(found["prompts"], np.int64), edge_map(found["images"]))


def to_pixels(images: np.ndarray) -> np.ndarray:
    """Images in [-1, 1] as uint8."""
    return np.rint((images.clip(-1, 1) + 1) * 127.5).astype(np.uint8)


def neighbours(labels: np.ndarray) -> np.ndarray:
    """The next index [N] with the same label, around the end; itself where there is no other."""
    order = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        (members,) = np.nonzero(labels == label)
        order[members] = np.roll(members, -1)
    return order


def draw(pipe: SanaLabelPipeline, labels: np.ndarray, edges: np.ndarray | None, seed: int, **call: float) -> np.ndarray:
    """An image uint8 [C, H, W] of each label, along its edges if there are any; image i has noise of its own."""
    images = pipe(
        [str(label) for label in labels],
        control_image=None if edges is None else paddle.to_tensor(edges),
        generator=[Generator((seed << 32) + i) for i in range(len(labels))],
        output_type="pd",
        **call,
    ).images
    return to_pixels(2 * images.numpy() - 1)


def measure(
    images: np.ndarray, features: FeatureSet, labels: np.ndarray, digits: Digits, real: FeatureSet
) -> dict[str, float]:
    """The metrics of COLUMNS for images that were asked for `labels` and the edges of `digits`."""
    return agreement(normalise(images), digits.edges) | {
        "accuracy": label_accuracy(features.predictions, labels),
        "control_label": label_accuracy(features.predictions, digits.labels),
        "frechet": frechet_distance(features.features, real.features),
    }


def compare(
    pipe: SanaLabelPipeline, data: DataConfig, seed: int, **call: float
) -> tuple[dict[str, dict[str, float]], dict[str, np.ndarray]]:
    """(metrics, a few images uint8) with and without control by name; `call` are settings of the pipeline's call."""
    extractor, channels = ClassifierFeatures(data.kind), pipe.image_channels
    real = extract(extractor, open_digits(data, channels).images)
    digits = open_digits(replace(data, split="test"), channels)
    others = (digits.labels + 1) % pipe.config.num_classes
    call |= {"height": data.height, "width": data.width}
    images = {
        REAL: digits.images,
        ALONE: draw(pipe, digits.labels, None, seed, **call),
        CONTROLLED: draw(pipe, digits.labels, digits.edges, seed, **call),
        OTHER_LABEL: draw(pipe, others, digits.edges, seed, **call),
    }
    metrics = {}
    for name, drawn in images.items():
        labels = others if name == OTHER_LABEL else digits.labels
        metrics[name] = measure(drawn, extract(extractor, drawn), labels, digits, real)
    metrics[CHANCE] = agreement(normalise(images[CONTROLLED]), digits.edges[neighbours(digits.labels)])
    chosen = [np.flatnonzero(digits.labels == label)[0] for label in np.unique(digits.labels)]
    edges = {"control": to_pixels(digits.edges)}
    return metrics, {name: each[chosen] for name, each in (edges | images).items()}


def table(metrics: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown, a row for each kind of image; "-" where a metric does not apply."""
    lines = [f"| | {' | '.join(heading for heading, _ in COLUMNS.values())} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for name, found in metrics.items():
        cells = (f"{found[key]:{form}}" if key in found else "-" for key, (_, form) in COLUMNS.items())
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def trained_student(seed: int) -> Path:
    """The folder of the recipe's student, trained if it is not there."""
    recipe = load_recipe(Recipe, STUDENT, [f"trainer.seed={seed}"])
    folder = Path(recipe.trainer.output_dir) / "pipeline"
    if not (folder / INDEX).is_file():
        print(f"no student in {folder}: training the recipe {STUDENT} first, which takes longer than all that follows")
        started = time.perf_counter()
        train(recipe, resume=True)
        print(f"trained the student in {time.perf_counter() - started:.0f} s")
    return folder


def trained_controlnet(recipe: Recipe) -> Path:
    """The folder of the recipe's ControlNet, trained as far as it is not. UserError where another run is in its way."""
    output = Path(recipe.trainer.output_dir)
    kept = latest_valid(output / "checkpoints")
    if kept is not None and kept.recipe != to_dict(recipe):
        raise UserError(f"{output} holds a ControlNet of other settings: choose another --output, or remove it")
    return train(recipe, resume=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--student", type=Path, metavar="DIR", help=f"pipeline folder of a SANA-Sprint student (that of {STUDENT})")
    add("--steps", type=int, default=1, help="steps of the student (%(default)s)")
    add("--seed", type=int, default=0, help="of training and of the noise (%(default)s)")
    add("--output", type=Path, default=Path("outputs") / CONTROL, help="folder for the results (%(default)s)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help=f"change a setting of the recipe {CONTROL}")
    arguments = parser.parse_args(argv)
    if arguments.seed < 0:
        raise UserError(f"--seed must not be negative, got {arguments.seed}")
    if arguments.steps < 1:
        raise UserError(f"--steps must be positive, got {arguments.steps}")
    student = arguments.student or trained_student(arguments.seed)
    overrides = [f"model.path={student}", f"trainer.output_dir={arguments.output}", f"trainer.seed={arguments.seed}"]
    recipe = load_recipe(Recipe, CONTROL, [*overrides, *arguments.set])

    started = time.perf_counter()
    folder = trained_controlnet(recipe)
    trained = time.perf_counter()
    pipe = open_pipeline(student, controlnet=SanaControlNetModel.from_pretrained(folder))
    settings = {"num_inference_steps": arguments.steps, "guidance_scale": recipe.sampler.guidance_scale}
    metrics, images = compare(pipe, recipe.data, arguments.seed, **settings)
    comparison_grid(images).save(arguments.output / "control.png")
    (arguments.output / "table.md").write_text(table(metrics) + "\n", encoding="utf-8")
    result = {"student": str(student), "seed": arguments.seed, **settings, "metrics": metrics}
    (arguments.output / "metrics.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(table(metrics))
    print(
        f"trained the ControlNet in {trained - started:.0f} s, measured in {time.perf_counter() - trained:.0f} s; "
        f"{arguments.output} holds {folder.name}/, metrics.json, table.md, control.png and the training's log"
    )


if __name__ == "__main__":
    run(main)
