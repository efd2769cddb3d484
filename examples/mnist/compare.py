"""RCGM against TwinFlow: `python examples/mnist/compare.py --data mnist --data_path FOLDER --seeds 0 1 2 --jobs 2`.

Trains every method with every seed, measures the samples, and prints a Markdown table of mean ± standard deviation.
Finished runs are kept in results.jsonl and not repeated; one that was stopped continues from its last checkpoint.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from distill.commands import run
from distill.comparisons import add_result, in_processes, mean_and_deviation, read_results
from distill.metrics.distances import frechet_distance, label_accuracy, within_class_distance
from distill.metrics.features import ClassifierFeatures, extract
from fast_diffusers.errors import UserError

from sample import open_model  # isort: skip  (beside this file)
from train import OBJECTIVES, Settings, add_arguments, draw, open_images, train  # isort: skip
from unet import NUM_CLASSES, UNet  # isort: skip

SAMPLERS = {"1 step": (1, "few"), "2 steps": (2, "few"), "4 steps": (4, "few"), "20 steps, mul": (20, "mul")}


def measure(model: UNet, data: str, data_path: str | None, num_samples: int, seed: int) -> dict[str, dict[str, float]]:
    """For each of SAMPLERS, in classifier features: label accuracy, Fréchet distance to the test images, and diversity,
    the mean distance between samples of the same digit over that between test images."""
    extractor = ClassifierFeatures(data)
    real = extract(extractor, open_images(data, data_path, "test").images.transpose(0, 3, 1, 2))
    spread = within_class_distance(real.features, real.predictions)
    labels = np.arange(num_samples) % NUM_CLASSES
    metrics = {}
    for name, (steps, style) in SAMPLERS.items():
        images = draw(model, labels, seed, steps=steps, style=style)
        samples = extract(extractor, np.rint((images.clip(-1, 1) + 1) * 127.5).astype(np.uint8))
        metrics[name] = {
            "accuracy": label_accuracy(samples.predictions, labels),
            "frechet": frechet_distance(samples.features, real.features),
            "diversity": within_class_distance(samples.features, labels) / spread,
        }
    return metrics


def run_one(settings: Settings, num_samples: int, log: Path) -> None:
    """Train and measure one run and append it to the log."""
    started = time.perf_counter()
    model = open_model(train(settings, resume=True))
    seconds = time.perf_counter() - started
    metrics = measure(model, settings.data, settings.data_path, num_samples, seed=settings.seed + 1000)
    result = {"method": settings.method, "seed": settings.seed, "seconds": seconds, "metrics": metrics}
    add_result(log, result)


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a row for each method and sampler, mean ± standard deviation over the seeds."""
    head = "| method | samples | label accuracy ↑ | FD to test images ↓ | FD over 20 steps' | diversity → 1 |"
    lines = [head, "|---" * 6 + "|"]
    for method in OBJECTIVES:
        runs = [result["metrics"] for result in results if result["method"] == method]
        for sampler in SAMPLERS if runs else ():
            rows = [each[sampler] for each in runs]
            ratios = [each[sampler]["frechet"] / each["20 steps, mul"]["frechet"] for each in runs]
            figures = [
                ([row["accuracy"] for row in rows], ".3f"),
                ([row["frechet"] for row in rows], ".2f"),
                (ratios, ".2f"),
                ([row["diversity"] for row in rows], ".2f"),
            ]
            lines.append(f"| {method} | {sampler} | {' | '.join(mean_and_deviation(*each) for each in figures)} |")
    return "\n".join(lines)


def main(argv: list[str] | None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_arguments(parser, skip=("method", "seed", "output_dir"))
    parser.add_argument("--methods", nargs="+", choices=list(OBJECTIVES), default=list(OBJECTIVES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num_samples", type=int, default=2000)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/mnist_comparison"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each in its own process")
    arguments = vars(parser.parse_args(argv))
    methods, seeds, num_samples, jobs = (arguments.pop(name) for name in ("methods", "seeds", "num_samples", "jobs"))
    output = arguments.pop("output_dir")
    if jobs < 1 or num_samples < 8:
        raise UserError("--jobs must be at least 1 and --num_samples at least 8")
    output.mkdir(parents=True, exist_ok=True)
    log = output / "results.jsonl"
    finished = {(result["method"], result["seed"]) for result in read_results(log)}
    wanted = [(method, seed) for seed in seeds for method in methods if (method, seed) not in finished]
    if jobs == 1 or len(wanted) == 1:
        for method, seed in wanted:
            folder = str(output / f"{method}-seed{seed}")
            run_one(Settings(method=method, seed=seed, output_dir=folder, **arguments), num_samples, log)
    else:
        common = {**arguments, "num_samples": num_samples, "output_dir": output}
        options = [word for name, value in common.items() if value is not None for word in (f"--{name}", str(value))]
        commands = {
            f"the run of {method} with seed {seed}": [*(__file__, "--methods", method, "--seeds", str(seed), *options)]
            for method, seed in wanted
        }
        in_processes(commands, jobs)
    print(table(read_results(log)))


if __name__ == "__main__":
    run(main)
