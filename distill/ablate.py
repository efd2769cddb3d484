"""What each term of an objective brings: `python distill/ablate.py [sana_sprint] --seeds 0 1 2 --jobs 2`.

Trains one student for every variant and seed, measures them against the same samples of the teacher, and prints a
Markdown table of mean ± standard deviation. All variants update the student equally often: without heads, which take
every other step, the run is half as long. Finished runs are kept in results.jsonl and not repeated; one that was
stopped continues from its last checkpoint.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill import flux_lightning, sana_sprint, train_flux_lightning, train_sana_sprint
from distill.commands import run
from distill.comparisons import add_result, in_processes, mean_and_deviation, read_results
from distill.evaluate import choose_extractor, compare, open_student, read_prompts, real_features
from distill.metrics.sampling import SampleSettings
from distill.recipe import load_recipe
from fast_diffusers.errors import UserError
from fast_diffusers.pipelines.shipped import open_pipeline


@dataclass(frozen=True)
class Study:
    """Variants of a recipe, and what is measured of each.

    variants: changes of the section `objective`. measured: from a recipe, the guidance scale and arguments of
    `evaluate.compare`. rows: role and steps of the rows to show. metrics: name to heading of the columns.
    """

    schema: type
    recipe: str
    train: Callable[..., Path]
    variants: Mapping[str, Mapping[str, Any]]
    measured: Callable[[Any], tuple[float, dict[str, Any]]]
    metrics: Mapping[str, str]


def of_lightning(recipe: flux_lightning.Recipe) -> tuple[float, dict[str, Any]]:
    """Teacher and student at as many steps as the student has phases."""
    s = recipe.objective
    grid = {"num_cells": s.num_cells, "num_phases": s.num_phases}
    return s.guidance_scale, {"steps": (s.num_phases,), **grid}


def of_sprint(recipe: sana_sprint.Recipe) -> tuple[float, dict[str, Any]]:
    """The student at 1, 2 and 4 steps, the teacher at as many and at 20."""
    sampler = recipe.sampler
    return sampler.guidance_scale, {"steps": (1, 2, 4), "reference_steps": 20, "student_sampler": sampler.sampler()}


LIGHTNING_OFF = {"adversarial_weight": 0, "dmd_weight": 0, "reflow_weight": 0}
STUDIES = {
    "flux_lightning": Study(
        flux_lightning.Recipe,
        "flux_lightning_digits",
        train_flux_lightning.train,
        {
            "consistency only": LIGHTNING_OFF,
            "+ adversarial": {name: value for name, value in LIGHTNING_OFF.items() if name != "adversarial_weight"},
            "+ DMD": {"reflow_weight": 0},
            "+ reflow (the recipe)": {},
            "the recipe, published formulas": {"reference_compat": "true"},
        },
        of_lightning,
        {
            "frechet_teacher": "FD to teacher ↓",
            "frechet_same_noise": "FD, same noise ↓",
            "accuracy": "label accuracy ↑",
            "recall": "recall ↑",
            "diversity": "diversity",
        },
    ),
    "sana_sprint": Study(
        sana_sprint.Recipe,
        "sana_sprint_digits",
        train_sana_sprint.train,
        {
            "sCM only": {"adversarial_weight": 0},
            "LADD only": {"scm_weight": 0},
            "sCM + LADD (the recipe)": {},
        },
        of_sprint,
        {
            "frechet_teacher": "FD to teacher's 20 steps ↓",
            "frechet_real": "FD to real images ↓",
            "accuracy": "label accuracy ↑",
            "diversity": "diversity",
            "diversity_within": "diversity in class",
        },
    ),
}


def variant_recipe(study: Study, name: str, variant: str, overrides: list[str], seed: int) -> Any:
    """The recipe with the variant's objective and as many student updates as without it."""
    settings, overrides = study.variants[variant], [*overrides, f"trainer.seed={seed}"]
    if "adversarial_weight" in settings:
        overrides.append(f"trainer.steps={max(1, load_recipe(study.schema, name, overrides).trainer.steps // 2)}")
    return load_recipe(
        study.schema, name, [*overrides, *(f"objective.{key}={value}" for key, value in settings.items())]
    )


def measure(study: Study, recipe: Any, num_samples: int, cache: Path) -> dict[str, dict[str, float]]:
    """Train a recipe, or continue to, and measure student and teacher: metrics by the name of the row."""
    folder = study.train(recipe, resume=True)
    pipe = open_pipeline(recipe.model.path)
    extractor = choose_extractor(recipe.data.kind, None)
    guidance, arguments = study.measured(recipe)
    report = compare(
        pipe,
        open_student(pipe, folder),
        prompts=read_prompts(None, pipe),
        extractor=extractor,
        settings=SampleSettings(num_samples=num_samples, guidance_scale=guidance),
        real=real_features(pipe, recipe.data, extractor),
        cache=cache,
        **arguments,
    ).report
    return {row.name: dict(row.metrics) for row in report.rows}


def table(study: Study, results: list[dict[str, Any]]) -> str:
    """Markdown: the teacher, whose samples all runs share, and each variant with mean ± standard deviation."""
    lines = [f"| | samples | {' | '.join(study.metrics.values())} |", "|---" * (len(study.metrics) + 2) + "|"]

    def add(title: str, role: str, cell: Callable[[list[float]], str], runs: list[dict[str, Any]]) -> None:
        for name in runs[0] if runs else ():
            who, _, samples = name.partition(", ")
            if who == role:
                columns = [
                    [each[name][metric] for each in runs] if metric in runs[0][name] else None
                    for metric in study.metrics
                ]
                figures = ["–" if values is None else cell(values) for values in columns]
                lines.append(f"| {title} | {samples} | {' | '.join(figures)} |")

    add("teacher", "teacher", lambda values: f"{values[0]:.3f}", [result["rows"] for result in results][:1])
    for variant in study.variants:
        rows = [result["rows"] for result in results if result["variant"] == variant]
        add(variant, "student", mean_and_deviation, rows)
    return "\n".join(lines)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("study", nargs="?", choices=list(STUDIES), default="flux_lightning", help="(%(default)s)")
    parser.add_argument("--recipe", help="the digits' by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="as the table calls them; all by default")
    parser.add_argument("--num_samples", type=int, default=2000)
    parser.add_argument("--output", type=Path, help="outputs/ablation_STUDY by default")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each in its own process")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe of all runs")
    arguments = parser.parse_args(argv)
    study = STUDIES[arguments.study]
    arguments.recipe = arguments.recipe or study.recipe
    arguments.output = arguments.output or Path(f"outputs/ablation_{arguments.study}")
    arguments.variants = arguments.variants or list(study.variants)
    if unknown := set(arguments.variants) - set(study.variants):
        raise UserError(f"there is no variant {min(unknown)!r}, but {', '.join(map(repr, study.variants))}")
    if arguments.jobs < 1:
        raise UserError(f"--jobs must be at least 1, got {arguments.jobs}")
    return arguments


def main(argv: list[str] | None) -> None:
    """Command line."""
    arguments = parse_arguments(argv)
    study, output = STUDIES[arguments.study], arguments.output
    output.mkdir(parents=True, exist_ok=True)
    log = output / "results.jsonl"
    finished = {(result["variant"], result["seed"]) for result in read_results(log)}
    wanted = [(v, seed) for seed in arguments.seeds for v in arguments.variants if (v, seed) not in finished]
    if arguments.jobs > 1 and len(wanted) > 1:
        common = ["--recipe", arguments.recipe, "--num_samples", str(arguments.num_samples), "--output", str(output)]
        common += [word for override in arguments.set for word in ("--set", override)]
        commands = {
            f"the run of {variant!r} with seed {seed}": [
                *(__file__, arguments.study, "--variants", variant, "--seeds", str(seed), *common)
            ]
            for variant, seed in wanted
        }
        in_processes(commands, arguments.jobs)
    else:
        for variant, seed in wanted:
            folder = output / f"variant{list(study.variants).index(variant)}-seed{seed}"
            overrides = [*arguments.set, f"trainer.output_dir={folder}"]
            recipe = variant_recipe(study, arguments.recipe, variant, overrides, seed)
            rows = measure(study, recipe, arguments.num_samples, output)
            add_result(log, {"variant": variant, "seed": seed, "rows": rows})
    print(table(study, read_results(log)))


if __name__ == "__main__":
    run(main)
