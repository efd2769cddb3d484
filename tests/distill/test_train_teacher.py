"""Teachers of each architecture, trained for a few steps."""

import numpy as np
import paddle
import pytest

from distill import train_teacher
from distill.architectures import ArchitectureConfig, FluxConfig, SanaConfig
from distill.recipe import RECIPES, load_recipe
from fast_diffusers.errors import UserError
from fast_diffusers.models import FluxTransformer2DModel, SanaTransformer2DModel
from fast_diffusers.pipelines import FluxLabelPipeline, SanaLabelPipeline
from fast_diffusers.pipelines.shipped import open_pipeline
from fast_diffusers.random import Generator
from fast_diffusers.schedulers import FlowMatchEulerDiscreteScheduler

SHORT = ["trainer.steps=3", "trainer.batch_size=4", "trainer.checkpoint_every=3", "optimizer.warmup_steps=0"]
SANA = ["architecture.sana.num_layers=2", "architecture.sana.num_attention_heads=1", "architecture.sana.mlp_ratio=1"]


def load(name: str, *overrides: str) -> train_teacher.Recipe:
    return load_recipe(train_teacher.Recipe, name, [*SHORT, *overrides])


def weights(folder) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in open_pipeline(folder).transformer.state_dict().items()}


def test_a_sana_teacher(tmp_path):
    """It can be distilled as it is, samples with classifier-free guidance, and its grids show that guidance."""
    recipe = load("teacher_sana_digits", *SANA, f"trainer.output_dir={tmp_path / 'a'}", "trainer.sample_every=3")
    folder = train_teacher.train(recipe)
    pipe = open_pipeline(folder)
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe, SanaLabelPipeline)
    config = pipe.transformer.config
    assert (config.qk_norm, config.timestep_scale) == ("rms_norm_across_heads", 0.001)
    assert (config.guidance_embeds, config.patch_size) == (False, 2)
    assert pipe.scheduler.config.shift == recipe.architecture.sana.shift
    assert len(list((tmp_path / "a" / "samples").iterdir())) == 1
    images = pipe(["1", "2"], num_inference_steps=2, generator=Generator(0), output_type="np").images
    assert images.shape == (2, 8, 8, 1) and np.isfinite(images).all()

    again = train_teacher.train(load("teacher_sana_digits", *SANA, f"trainer.output_dir={tmp_path / 'b'}"))
    first, second = weights(folder), weights(again)
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_preparation_keeps_the_weights_of_a_flow_teacher_and_trains_on(tmp_path):
    paddle.seed(0)
    sizes = {"num_layers": 1, "num_attention_heads": 1, "cross_attention_dim": 32}
    cross = {"num_cross_attention_heads": 1, "cross_attention_head_dim": 32, "caption_channels": 10}
    image = {"in_channels": 1, "out_channels": 1, "patch_size": 2, "sample_size": 8}
    transformer = SanaTransformer2DModel(**sizes, **cross, **image)
    SanaLabelPipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), transformer).save_pretrained(tmp_path / "flow")
    digits = ["data={kind: digits, height: 8, width: 8}", "trainer.sample_prompts=['1']"]
    more = [f"architecture.prepared.path={tmp_path / 'flow'}", f"trainer.output_dir={tmp_path / 'prepared'}"]
    recipe = load("teacher_sana_prepare", *digits, *more, "trainer.dtype=float32", "trainer.sample_every=3")

    start = train_teacher.new_pipeline(recipe)
    assert start.scheduler.config.shift == 3.0
    config = start.transformer.config
    assert (config.qk_norm, config.timestep_scale) == ("rms_norm_across_heads", 0.001)
    old, new = transformer.state_dict(), start.transformer.state_dict()
    assert all(np.array_equal(new[name].numpy(), value.numpy()) for name, value in old.items())
    added = set(new) - set(old)
    assert added == {f"transformer_blocks.0.attn{i}.norm_{x}.weight" for i in (1, 2) for x in "qk"}

    trained = weights(train_teacher.train(recipe))
    assert any(not np.array_equal(trained[name], value.numpy()) for name, value in new.items())
    assert sum(value.size for value in trained.values()) == recipe.architecture.chosen.parameters()


def test_a_student_cannot_be_prepared(tiny_teacher, tmp_path):
    recipe = load("teacher_sana_prepare", f"architecture.prepared.path={tiny_teacher}")
    with pytest.raises(UserError, match="cannot be prepared: it is not a SANA that flow matching has trained"):
        train_teacher.new_pipeline(recipe)


@pytest.mark.parametrize(
    ("config", "kind"),
    [(FluxConfig(num_attention_heads=1), FluxTransformer2DModel), (SanaConfig(patch_size=4), SanaTransformer2DModel)],
)
def test_parameters_are_those_of_the_model(config, kind):
    defaults = train_teacher.Recipe()
    pipe = config.pipeline(defaults.data, defaults.trainer)
    assert isinstance(pipe.transformer, kind)
    assert sum(parameter.size for parameter in pipe.transformer.parameters()) == config.parameters()


def test_the_flux_teacher_is_the_default():
    recipe = load("teacher_digits")
    assert isinstance(train_teacher.new_pipeline(recipe), FluxLabelPipeline)
    assert ArchitectureConfig().chosen is recipe.architecture.flux


@pytest.mark.parametrize("path", sorted(RECIPES.glob("teacher_*.yaml")), ids=lambda path: path.stem)
def test_dry_run(path, capsys):
    train_teacher.main(["--recipe", path.stem, "--dry-run"])
    assert "trained parameters" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("teacher_digits", ["architecture.sana={}"], "exactly one of flux, sana, prepared .*, not flux and sana"),
        ("teacher_digits", ["architecture.flux=null"], "must be given, not none; null takes one away"),
        ("teacher_digits", ["architecture.flux.attention_head_dim=32"], r"axes_dims_rope \[8, 28, 28\] must be even"),
        ("teacher_digits", ["architecture.num_layers=3"], "the nearest valid key is architecture.flux.num_layers"),
        ("teacher_digits", ["trainer.dtype=bfloat16"], "trainer.dtype must be float32"),
        ("teacher_sana_prepare", ["architecture.prepared={}", "architecture.prepared.path=null"], "expected text"),
    ],
)
def test_recipes_that_cannot_be(name, overrides, message):
    with pytest.raises(UserError, match=message):
        load(name, *overrides)


def test_a_model_without_embedded_guidance_cannot_learn_it(tmp_path):
    recipe = load("teacher_sana_digits", *SANA, "objective.guided_rate=0.5", f"trainer.output_dir={tmp_path}")
    with pytest.raises(UserError, match=r"set objective\.guided_rate to 0"):
        train_teacher.train(recipe)
