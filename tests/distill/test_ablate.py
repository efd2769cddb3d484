"""The ablations, of tiny models and a step or two."""

import json

import paddle
import pytest

from distill import ablate
from distill.ablate import STUDIES
from fast_diffusers.errors import UserError
from fast_diffusers.models import SanaTransformer2DModel
from fast_diffusers.pipelines import SanaLabelPipeline
from fast_diffusers.schedulers import FlowMatchEulerDiscreteScheduler

SHORT = ["trainer.steps=2", "trainer.batch_size=4", "trainer.sample_every=null"]
TINY = {
    "flux_lightning": ["lora.rank=2", "objective.num_cells=8", *SHORT],
    "sana_sprint": SHORT,
}


@pytest.fixture(scope="module")
def teachers(tiny_teacher, tmp_path_factory):
    """Folders of random teachers by the name of their study."""
    paddle.seed(0)
    sizes = {"num_layers": 1, "num_attention_heads": 1, "cross_attention_dim": 32, "mlp_ratio": 1}
    cross = {"num_cross_attention_heads": 1, "cross_attention_head_dim": 32, "caption_channels": 10}
    image = {"in_channels": 1, "out_channels": 1, "patch_size": 2, "sample_size": 8}
    new = {"qk_norm": "rms_norm_across_heads", "timestep_scale": 0.001}
    transformer = SanaTransformer2DModel(**sizes, **cross, **image, **new)
    for parameter in transformer.parameters():  # the zero-initialised output would hide everything behind it
        parameter.set_value(parameter + 0.1 * paddle.randn(parameter.shape))
    folder = tmp_path_factory.mktemp("sana")
    SanaLabelPipeline(FlowMatchEulerDiscreteScheduler(shift=1.5), transformer).save_pretrained(folder)
    return {"flux_lightning": tiny_teacher, "sana_sprint": folder}


def command(study, teachers, output, *more):
    changes = [*TINY[study], f"model.path={teachers[study]}"]
    sets = [argument for value in changes for argument in ("--set", value)]
    return [study, "--output", str(output), "--num_samples", "20", "--seeds", "0", *sets, *more]


@pytest.mark.parametrize("study", STUDIES)
def test_every_variant_is_tabulated_and_finished_runs_are_kept(study, teachers, tmp_path, capsys):
    variants = list(STUDIES[study].variants)
    arguments = command(study, teachers, tmp_path)
    ablate.main(arguments)
    log = tmp_path / "results.jsonl"
    lines = log.read_text().splitlines()
    assert [json.loads(line)["variant"] for line in lines] == variants
    printed = capsys.readouterr().out
    assert all(f"| {variant} | " in printed for variant in variants)
    steps = {"flux_lightning": ["4"], "sana_sprint": ["4", "2", "1"]}[study]
    assert sum(line.startswith(f"| {variants[0]} |") for line in printed.splitlines()) == len(steps)
    log.write_text("\n".join(lines[:-1]) + "\n")
    ablate.main(arguments)  # continues the last run from its checkpoint, which is its end
    again = log.read_text().splitlines()
    assert again[:-1] == lines[:-1]
    rows = [json.loads(each[-1])["rows"] for each in (lines, again)]
    assert all(
        rows[0][name]["frechet_teacher"] == pytest.approx(rows[1][name]["frechet_teacher"], rel=1e-4)
        for name in rows[0]
        if "reference" not in name
    )


def test_runs_at_a_time(teachers, tmp_path, capsys):
    names = list(STUDIES["flux_lightning"].variants)[:2]
    ablate.main(command("flux_lightning", teachers, tmp_path, "--variants", *names, "--jobs", "2"))
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {result["variant"] for result in results} == set(names)
    assert all(f"| {name} |" in capsys.readouterr().out for name in names[:1])


@pytest.mark.parametrize("study", STUDIES)
def test_every_variant_updates_the_student_equally_often(study):
    """Heads take every other step; without them there are half as many."""
    each = STUDIES[study]
    for variant, changes in each.variants.items():
        recipe = ablate.variant_recipe(each, each.recipe, variant, ["trainer.steps=100"], 7)
        assert recipe.trainer.steps == (50 if "adversarial_weight" in changes else 100)
        assert recipe.trainer.seed == 7
        for name, value in changes.items():
            assert getattr(recipe.objective, name) == {"true": True}.get(value, value)


def test_table_has_mean_and_deviation_of_the_students_and_the_teacher_once():
    study = STUDIES["sana_sprint"]
    metrics = dict.fromkeys(study.metrics, 1.0)
    reference = {name: 1.0 for name in ("frechet_real", "accuracy")}
    results = [
        {
            "variant": "sCM only",
            "seed": seed,
            "rows": {
                "teacher, 20 steps (reference)": reference,
                "teacher, 4 steps": metrics,
                "student, 2 steps": metrics | {"frechet_teacher": value},
            },
        }
        for seed, value in enumerate((1.0, 2.0, 3.0))
    ]
    lines = ablate.table(study, results).splitlines()
    assert len(lines) == 5
    assert lines[2] == "| teacher | 20 steps (reference) | – | 1.000 | 1.000 | – | – |"
    assert lines[3].startswith("| teacher | 4 steps | 1.000 |")
    assert lines[4].startswith("| sCM only | 2 steps | 2.000 ± 1.000 | 1.000 ± 0.000 |")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--variants", "nothing"], "there is no variant 'nothing', but 'consistency only'"),
    ],
)
def test_mistakes(more, message):
    with pytest.raises(UserError, match=message):
        ablate.main(["flux_lightning", *more])
