"""The whole path on one machine: distil the digits teacher, measure the student, write it all to one folder."""

import argparse
import shutil
import time
from pathlib import Path

from distill.config import DataConfig
from distill.evaluate import choose_extractor, compare, read_prompts, real_features
from distill.flux_lightning import STUDENT, Recipe
from distill.metrics.sampling import SampleSettings
from distill.recipe import load_recipe
from distill.roles import AdapterRole
from distill.train_flux_lightning import train
from fast_diffusers.pipelines.shipped import open_pipeline


def main(argv: list[str] | None = None) -> None:
    """Run the demo; arguments as `--help` says."""
    parser = argparse.ArgumentParser(prog="fast-diffusers demo", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"), help="folder for everything (%(default)s)")
    parser.add_argument("--num_samples", type=int, default=1000, help="samples a row of the table (%(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the digits recipe")
    arguments = parser.parse_args(argv)
    output: Path = arguments.output

    started = time.perf_counter()
    recipe = load_recipe(Recipe, "flux_lightning_digits", [f"trainer.output_dir={output}", *arguments.set])
    shutil.rmtree(output / "checkpoints", ignore_errors=True)  # every demo starts anew
    lora_folder = train(recipe)
    trained = time.perf_counter()

    pipe = open_pipeline(recipe.model.path)
    pipe.load_lora_weights(lora_folder, adapter_name=STUDENT)
    extractor = choose_extractor("digits", None)
    data = DataConfig(height=recipe.data.height, width=recipe.data.width)
    comparison = compare(
        pipe,
        AdapterRole(pipe.denoiser, pipe.transformer, STUDENT),
        prompts=read_prompts(None, pipe),
        extractor=extractor,
        settings=SampleSettings(num_samples=arguments.num_samples, guidance_scale=recipe.objective.guidance_scale),
        num_cells=recipe.objective.num_cells,
        num_phases=recipe.objective.num_phases,
        real=real_features(pipe, data, extractor),
    )
    comparison.write(output)
    print(comparison.report.table())
    print(
        f"trained in {trained - started:.0f} s, evaluated in {time.perf_counter() - trained:.0f} s; "
        f"{output} holds lora/, metrics.json, table.txt, comparison.png, losses.png, samples/ and metrics.jsonl"
    )
