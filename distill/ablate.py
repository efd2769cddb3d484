"""What each term of FLUX-Lightning brings: `python distill/ablate.py --seeds 0 1 2`.

Trains one student for every variant and seed, measures each at 4 steps against the same 50-step teacher samples, and
prints a Markdown table of mean ± standard deviation. All variants update the student equally often: without heads,
which take every other step, the run is half as long. Finished runs are kept in results.jsonl and not repeated.
"""

import argparse
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

from distill.commands import run
from distill.evaluate import choose_extractor, compare, read_prompts
from distill.flux_lightning import STUDENT, Recipe
from distill.metrics.sampling import SampleSettings
from distill.recipe import load_recipe
from distill.roles import AdapterRole
from distill.train_flux_lightning import train
from fast_diffusers.pipelines.shipped import open_pipeline

OFF = {"adversarial_weight": 0, "dmd_weight": 0, "reflow_weight": 0}
VARIANTS: dict[str, dict[str, Any]] = {
    "consistency only": OFF,
    "+ adversarial": {name: value for name, value in OFF.items() if name != "adversarial_weight"},
    "+ DMD": {"reflow_weight": 0},
    "+ reflow (the recipe)": {},
    "the recipe, published formulas": {"reference_compat": "true"},
}
METRICS = {
    "frechet_teacher": "FD to teacher ↓",
    "frechet_same_noise": "FD, same noise ↓",
    "accuracy": "label accuracy ↑",
    "recall": "recall ↑",
    "diversity": "diversity",
}


def variant_recipe(name: str, settings: dict[str, Any], overrides: list[str], seed: int) -> Recipe:
    """The recipe with the variant's objective and as many student updates as without it."""
    overrides = [*overrides, f"trainer.seed={seed}"]
    if "adversarial_weight" in settings:
        overrides.append(f"trainer.steps={max(1, load_recipe(Recipe, name, overrides).trainer.steps // 2)}")
    return load_recipe(Recipe, name, [*overrides, *(f"objective.{key}={value}" for key, value in settings.items())])


def measure(recipe: Recipe, num_samples: int, cache: Path) -> dict[str, dict[str, float]]:
    """Train a recipe and measure student and teacher at as many steps as it has phases."""
    folder = train(recipe)
    pipe = open_pipeline(recipe.model.path)
    pipe.load_lora_weights(folder, adapter_name=STUDENT)
    steps = recipe.objective.num_phases
    report = compare(
        pipe,
        AdapterRole(pipe.denoiser, pipe.transformer, STUDENT),
        prompts=read_prompts(None, pipe),
        extractor=choose_extractor(recipe.data.kind, None),
        settings=SampleSettings(num_samples=num_samples, guidance_scale=recipe.objective.guidance_scale),
        steps=(steps,),
        num_cells=recipe.objective.num_cells,
        num_phases=steps,
        cache=cache,
    ).report
    return {role: dict(report.row(role, steps).metrics) for role in ("student", "teacher")}


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: one row a variant, mean ± standard deviation over the seeds, and the teacher at the same steps."""
    lines = [f"| variant | {' | '.join(METRICS.values())} |", "|---" * (len(METRICS) + 1) + "|"]
    for variant in VARIANTS:
        rows = [result["student"] for result in results if result["variant"] == variant]
        if rows:
            cells = [[row[name] for row in rows] for name in METRICS]
            spread = [statistics.stdev(cell) if len(cell) > 1 else 0.0 for cell in cells]
            figures = [f"{statistics.mean(cell):.3f} ± {s:.3f}" for cell, s in zip(cells, spread, strict=True)]
            lines.append(f"| {variant} | {' | '.join(figures)} |")
    teacher = [f"{results[0]['teacher'][name]:.3f}" for name in METRICS]
    lines.append(f"| teacher, same steps | {' | '.join(teacher)} |")
    return "\n".join(lines)


def main(argv: list[str] | None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--recipe", default="flux_lightning_digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num_samples", type=int, default=2000)
    parser.add_argument("--output", type=Path, default=Path("outputs/ablation"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe of all runs")
    arguments = parser.parse_args(argv)

    arguments.output.mkdir(parents=True, exist_ok=True)
    log = arguments.output / "results.jsonl"
    results = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    finished = {(result["variant"], result["seed"]) for result in results}
    for seed in arguments.seeds:
        for number, (variant, settings) in enumerate(VARIANTS.items()):
            if (variant, seed) in finished:
                continue
            folder = arguments.output / f"variant{number}-seed{seed}"
            shutil.rmtree(folder, ignore_errors=True)  # a run that did not finish
            recipe = variant_recipe(arguments.recipe, settings, [*arguments.set, f"trainer.output_dir={folder}"], seed)
            results.append({"variant": variant, "seed": seed, **measure(recipe, arguments.num_samples, log.parent)})
            with log.open("a") as stream:
                stream.write(json.dumps(results[-1]) + "\n")
    print(table(results))


if __name__ == "__main__":
    run(main)
