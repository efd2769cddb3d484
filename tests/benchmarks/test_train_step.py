import runpy
from pathlib import Path

from distill.flux_lightning import Recipe
from distill.recipe import load_recipe

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "train_step.py"


def test_every_part_of_a_step_is_timed(tiny_teacher, tmp_path):
    settings = [f"model.path={tiny_teacher}", f"trainer.output_dir={tmp_path}", "trainer.batch_size=4", "lora.rank=2"]
    recipe = load_recipe(Recipe, "flux_lightning_digits", settings)
    figures = runpy.run_path(str(SCRIPT))["measure"](recipe, repeats=1)
    assert all(milliseconds > 0 for milliseconds in figures.values())
    for turn in ("student", "heads"):
        parts = sum(value for name, value in figures.items() if name.startswith(f"{turn}:"))
        assert parts > 0 and figures[f"whole step: {turn}"] > 0
