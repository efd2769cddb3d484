"""Where the time of a FLUX-Lightning training step goes: `python benchmarks/train_step.py [--recipe NAME] [--set K=V]`.

Every part is timed by itself on the recipe's first batches; shares are medians over the repeats. The last row compares
their sum with whole steps as the trainer runs them.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import paddle

import fast_diffusers  # noqa: F401  (before paddle)
from distill.batches import Encoder
from distill.commands import num_tokens, open_loader
from distill.draws import StepDraws
from distill.flux_lightning import STUDENT, FluxLightning, Recipe
from distill.objectives import adversarial, distribution_matching, phased_consistency, reflow
from distill.objectives.consistency import consistency_target
from distill.objectives.phases import student_jump
from distill.parallel import World
from distill.recipe import load_recipe
from distill.trainer import Trainer, frozen
from fast_diffusers.pipelines.shipped import open_pipeline


def timed(times: dict[str, list[float]], name: str, function: Callable[[], Any]) -> Any:
    """Call and append the seconds it took, the device's work included."""
    start = time.perf_counter()
    result = function()
    if paddle.device.is_compiled_with_cuda():
        paddle.device.synchronize()
    times[name].append(time.perf_counter() - start)
    return result


def measure(recipe: Recipe, repeats: int) -> dict[str, float]:
    """Median milliseconds of each part of the student's and the heads' turn."""
    pipe = open_pipeline(recipe.model.path, recipe.trainer.dtype)
    encoder = Encoder(pipe, recipe.objective.guidance_scale)
    method = FluxLightning(recipe, pipe, num_tokens(pipe, recipe.data))
    s, roles, grid = recipe.objective, method.roles, method.grid
    times: dict[str, list[float]] = defaultdict(list)

    def student_turn(batch: dict[str, Any], draws: StepDraws) -> None:
        given = (roles, batch, draws)
        jump = timed(times, "student: jump, forward", lambda: student_jump(*given, grid))
        target = timed(
            times, "student: teacher cell + target, no gradient", lambda: consistency_target(roles, batch, jump, grid)
        )
        shared = {"grid": grid, "jump": jump}
        loss, _ = timed(times, "student: consistency loss", lambda: phased_consistency(*given, target=target, **shared))
        with frozen(method.discriminator):
            g, _ = timed(times, "student: features + heads, forward", lambda: adversarial(*given, **shared))
        d, _ = timed(times, "student: two scores (DMD), no gradient", lambda: distribution_matching(*given, **shared))
        r, _ = timed(times, "student: reflow, forward", lambda: reflow(*given, **shared))
        total = loss + s.adversarial_weight * g + s.dmd_weight * d + s.reflow_weight * r
        timed(times, "student: backward of all terms", total.backward)
        timed(times, "student: AdamW", method.optimizers[STUDENT].step)
        method.optimizers[STUDENT].clear_grad()

    def heads_turn(batch: dict[str, Any], draws: StepDraws) -> None:
        given = (roles, batch, draws)
        loss, _ = timed(
            times,
            "heads: jump, target, features, heads",
            lambda: adversarial(*given, grid=grid, side="discriminator"),
        )
        timed(times, "heads: backward", loss.backward)
        timed(times, "heads: AdamW", method.optimizers["discriminator"].step)
        method.optimizers["discriminator"].clear_grad()

    with open_loader(pipe, recipe.data, recipe.trainer, encoder, recipe.model.path, World()) as loader:
        trainer = Trainer(recipe.trainer, method, lambda step, micro: encoder.batch(loader.batch(step, micro)))
        for step in range(2 * repeats + 4):
            raw = timed(times, "both: wait for data", lambda step=step: loader.batch(step))
            batch = timed(times, "both: encode", lambda raw=raw: encoder.batch(raw))
            draws = StepDraws(recipe.trainer.seed, step)
            timed(times, "both: draws (of one student turn)", lambda draws=draws, batch=batch: draw_all(draws, batch))
            (heads_turn if step % 2 == 0 else student_turn)(batch, draws)
            name = "whole step: heads" if step % 2 == 0 else "whole step: student"
            timed(times, name, lambda step=step: trainer.update(step))
    return {name: 1e3 * statistics.median(values[2:]) for name, values in times.items()}


def draw_all(draws: StepDraws, batch: dict[str, Any]) -> None:
    """The normal draws of a student's turn."""
    for name in ("noise", "adv.fake_noise", "dmd.noise", "reflow.noise"):
        draws.normal(name, batch["latents"].shape)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="flux_lightning_digits")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    overrides = [*arguments.set, "trainer.output_dir=outputs/benchmark"]
    figures = measure(load_recipe(Recipe, arguments.recipe, overrides), arguments.repeats)
    for name, milliseconds in sorted(figures.items()):
        print(f"{name:45s} {milliseconds:9.2f} ms")
    for turn in ("student", "heads"):
        parts = sum(value for name, value in figures.items() if name.startswith(f"{turn}:"))
        whole = figures[f"whole step: {turn}"]
        print(f"{turn}: parts {parts:.1f} ms, whole step {whole:.1f} ms, {100 * parts / whole:.0f}% accounted for")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
