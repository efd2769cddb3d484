import re
from dataclasses import replace

import numpy as np
import paddle
import pytest

from distill.batches import Encoder
from distill.checkpoint import latest_valid
from distill.draws import StepDraws
from distill.memory import flux_parameters
from distill.optim import ema_decay
from distill.recipe import RECIPES, build, load_recipe
from distill.roles import AdapterRole
from distill.train_twinflow import main, train
from distill.trainer import Trainer
from distill.twinflow import STUDENT, Recipe, TwinFlow
from fast_diffusers import lora
from fast_diffusers.errors import UserError
from fast_diffusers.pipelines.shipped import open_pipeline
from fast_diffusers.samplers import unified
from fast_diffusers.schedulers import UnifiedScheduler

SHIPPED = ["twinflow_digits", *sorted(path.stem for path in RECIPES.glob("twinflow_flux_*.yaml"))]
LORA, FULL = {"train": "lora"}, {"train": "full"}
VARIANTS = {
    "adapter, average": (LORA, {}),
    "adapter, student": (LORA | {"target_time": "auxiliary"}, {"reference": "student", "form": "whole"}),
    "adapter, teacher": (LORA, {"reference": "teacher", "real_score": "teacher", "order": 2}),
    "adapter, rcgm": (LORA | {"target_time": "auxiliary"}, {"method": "rcgm", "enhanced_ratio": 0.5}),
    "full, average": (FULL | {"target_time": "auxiliary"}, {"velocity_target": "teacher"}),
    "full, student": (FULL, {"reference": "student", "image_free": True}),
    "full, teacher": (FULL, {"reference": "teacher", "form": "whole"}),
}


def recipe_for(teacher, output, steps=3, model=None, objective=None, **trainer):
    settings = {
        "model": {"path": str(teacher), **(model or {})},
        "lora": {"rank": 2, "alpha": 2},
        "objective": objective or {},
        "optimizer": {"lr": 1e-2},
        "trainer": {
            "steps": steps,
            "batch_size": 4,
            "checkpoint_every": 2,
            "log_every": 1,
            "sample_every": None,
            "ema_decay": 0.5,
            "output_dir": str(output),
            "sample_prompts": ["0", "1"],
            **trainer,
        },
    }
    return build(Recipe, settings)


def method_for(recipe):
    pipe = open_pipeline(recipe.model.path)
    return TwinFlow(recipe, pipe, lambda: open_pipeline(recipe.model.path))


def values(tensors):
    return {path: each.numpy() for path, each in tensors.items()}


def batch_for(method):
    images = np.random.default_rng(0).uniform(-1, 1, size=(4, 1, 8, 8)).astype("float32")
    return Encoder(method.pipe, 3.5).batch({"images": images, "prompts": ["3", "1", "4", "1"]})


# ---------------------------------------------------------------------------------------------- the method
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_changes_the_student_and_its_average_alone(variant, tiny_teacher, tmp_path):
    model, objective = VARIANTS[variant]
    recipe = recipe_for(tiny_teacher, tmp_path, model=model, objective=objective)
    method = method_for(recipe)
    data = batch_for(method)
    trainer = Trainer(recipe.trainer, method, lambda step, micro_step: data)
    x, t = data["latents"], paddle.full([4], 0.7)
    untouched = method.roles.teacher or open_pipeline(tiny_teacher).denoiser
    teacher = untouched(x, t, data["cond"], guidance=data["guidance"]).numpy()
    np.testing.assert_array_equal(
        method.student.role(x, t, data["cond"], target_t=t, guidance=data["guidance"]).numpy(),
        untouched(x, t / 2 if recipe.model.target_time == "shortcut" else t, data["cond"], guidance=data["guidance"]),
    )
    expected = values(method.student.parameters)
    np.testing.assert_equal(values(method.average.parameters), expected)
    for step in range(3):
        before = values(method.student.parameters)
        metrics = trainer.update(step)
        after = values(method.student.parameters)
        assert np.isfinite(float(metrics["student_loss"]))
        assert any(not np.array_equal(before[path], after[path]) for path in before)
        decay = ema_decay(step, 0.5, 10)
        expected = {path: decay * expected[path] + (1 - decay) * after[path] for path in after}
        for path, average in values(method.average.parameters).items():
            np.testing.assert_allclose(average, expected[path], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(untouched(x, t, data["cond"], guidance=data["guidance"]).numpy(), teacher)


def test_all_that_is_trained_gets_a_gradient(tiny_teacher, tmp_path):
    method = method_for(recipe_for(tiny_teacher, tmp_path, model=FULL | {"target_time": "auxiliary"}))
    for parameter in method.student.target_time.embedding.parameters():
        parameter.set_value(0.1 * paddle.randn(parameter.shape))  # its last layer starts at zero
    method.loss(STUDENT, batch_for(method), StepDraws(0, 0))[0].backward()
    without = [path for path, each in method.student.parameters.items() if each.grad is None]
    assert without == []


def test_who_is_asked_for_what(tiny_teacher, tmp_path):
    def roles(model, **objective):
        method = method_for(recipe_for(tiny_teacher, tmp_path, model=model, objective=objective))
        return method, method.roles

    method, found = roles(LORA, reference="average")
    assert found.target is method.average.role
    method, found = roles(LORA, reference="student")
    assert found.target is found.student is method.student.role
    method, found = roles(LORA, reference="teacher")
    assert found.target is found.teacher
    assert isinstance(found.teacher, AdapterRole) and found.teacher.adapter is None
    assert roles(FULL, reference="average")[1].teacher is None  # no third copy unless somebody asks
    assert roles(FULL, real_score="teacher")[1].teacher is not None
    assert roles(FULL, real_score="teacher", method="rcgm")[1].teacher is None


@pytest.mark.parametrize("model", [LORA, FULL], ids=["adapter", "full"])
def test_the_average_can_be_evaluated_between_forward_and_backward(model, tiny_teacher, tmp_path):
    """Swapped weights could not: their change would be an error, or worse, in the backward pass."""
    method = method_for(recipe_for(tiny_teacher, tmp_path, model=model))
    data = batch_for(method)
    given = (data["latents"], paddle.full([4], 0.7), data["cond"])
    with paddle.no_grad():
        for parameter in method.average.parameters.values():
            parameter.set_value(parameter + 0.1)
    gradients = []
    for between in (False, True):
        loss = method.student.role(*given, guidance=data["guidance"]).square().mean()
        if between:
            with paddle.no_grad():
                other = method.average.role(*given, guidance=data["guidance"])
            assert not np.allclose(other.square().mean().item(), loss.item())
        loss.backward()
        found = {path: p.grad.numpy() for path, p in method.student.parameters.items() if p.grad is not None}
        gradients.append(found)
        method.optimizers[STUDENT].clear_grad()
    np.testing.assert_equal(gradients[1], gradients[0])


@pytest.mark.parametrize("form", ["whole", "split"])
def test_gradient_checkpointing_does_not_change_the_gradients(form, tiny_teacher, tmp_path):
    gradients = []
    for checkpointing in (False, True):
        model = LORA | {"target_time": "auxiliary"}
        method = method_for(recipe_for(tiny_teacher, tmp_path, model=model, objective={"form": form}))
        if checkpointing:
            method.pipe.transformer.enable_gradient_checkpointing()
        for seed, parameter in enumerate(method.student.parameters.values()):
            noise = np.random.default_rng(seed).normal(scale=0.1, size=parameter.shape)
            parameter.set_value(noise.astype("float32"))
        method.loss(STUDENT, batch_for(method), StepDraws(0, 1))[0].backward()
        gradients.append({path: p.grad.numpy() for path, p in method.student.parameters.items()})
    for path, plain in gradients[0].items():
        np.testing.assert_allclose(gradients[1][path], plain, rtol=1e-3, atol=1e-6, err_msg=path)


# ---------------------------------------------------------------------------------------------- training runs
def sampled(pipe, steps=2):
    noise = paddle.to_tensor(np.random.default_rng(0).normal(size=(2, 1, 8, 8)).astype("float32"))
    velocity = Encoder(pipe, 3.5).velocity(pipe.denoiser, ["7", "1"])
    return unified(velocity, noise, steps=steps, style="any").numpy()


@pytest.mark.parametrize("mode", ["shortcut", "auxiliary"])
def test_adapters_resume_exactly_and_load(mode, tiny_teacher, tmp_path):
    model = LORA | {"target_time": mode}
    train(recipe_for(tiny_teacher, tmp_path / "whole", 4, model))
    train(recipe_for(tiny_teacher, tmp_path / "parts", 2, model))
    train(recipe_for(tiny_teacher, tmp_path / "parts", 4, model, sample_every=4), resume=True)
    assert len(list((tmp_path / "parts" / "samples").glob("*.png"))) == 1
    images = {}
    for folder in ("lora", "lora_last"):
        found = []
        for run in ("whole", "parts"):
            for file in ("paddle_lora_weights.safetensors", "pytorch_lora_weights.safetensors"):
                pipe = open_pipeline(tiny_teacher)
                pipe.load_lora_weights(tmp_path / run / folder, weight_name=file)
                assert pipe.denoiser.takes_target_time
                found.append(sampled(pipe))
        for each in found[1:]:
            np.testing.assert_array_equal(each, found[0])
        images[folder] = found[0]
    assert np.abs(images["lora"] - images["lora_last"]).max() > 1e-4
    checkpoint = latest_valid(tmp_path / "parts" / "checkpoints")
    saved = lora.state_dict(pipe.transformer)  # that of lora_last
    for path, parameter in saved.items():
        np.testing.assert_array_equal(checkpoint.tensors("student")[path].numpy(), parameter.numpy())


@pytest.mark.parametrize("mode", ["shortcut", "auxiliary"])
def test_a_pipeline_tells_the_student_its_target_times(mode, tiny_teacher, tmp_path):
    """As `samplers.unified` does, with the scheduler's; Euler's method with the same pipeline has none to tell."""
    folder = train(recipe_for(tiny_teacher, tmp_path, 2, LORA | {"target_time": mode}))
    pipe = open_pipeline(tiny_teacher)
    pipe.load_lora_weights(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = UnifiedScheduler.from_config(dict(pipe.scheduler.config), style="any")
    noise = paddle.to_tensor(np.random.default_rng(0).normal(size=(2, 1, 8, 8)).astype("float32"))
    images = pipe(["7", "1"], num_inference_steps=2, latents=noise, output_type="latent").images
    np.testing.assert_allclose(images.numpy(), sampled(pipe), rtol=1e-4, atol=1e-5)


def test_whole_models_resume_exactly_and_load(tiny_teacher, tmp_path):
    model = FULL | {"target_time": "auxiliary"}
    train(recipe_for(tiny_teacher, tmp_path / "whole", 4, model))
    train(recipe_for(tiny_teacher, tmp_path / "parts", 2, model))
    folder = train(recipe_for(tiny_teacher, tmp_path / "parts", 4, model, sample_every=4), resume=True)
    assert folder == tmp_path / "parts" / "pipeline"
    images = [sampled(open_pipeline(tmp_path / run / "pipeline")) for run in ("whole", "parts")]
    np.testing.assert_array_equal(*images)
    averages = latest_valid(tmp_path / "parts" / "checkpoints").tensors("student_average")
    for path, parameter in open_pipeline(folder).transformer.named_parameters():
        np.testing.assert_array_equal(averages[path].numpy(), parameter.numpy())


def test_without_an_average_the_student_is_what_is_saved(tiny_teacher, tmp_path):
    folder = train(recipe_for(tiny_teacher, tmp_path, 2, objective={"reference": "student"}, ema_decay=None))
    assert not (tmp_path / "lora_last").exists()
    checkpoint = latest_valid(tmp_path / "checkpoints")
    pipe = open_pipeline(tiny_teacher)
    pipe.load_lora_weights(folder)
    for path, parameter in lora.state_dict(pipe.transformer).items():
        np.testing.assert_array_equal(checkpoint.tensors("student")[path].numpy(), parameter.numpy())


# ---------------------------------------------------------------------------------------------- recipes
@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_run(name, tiny_teacher, tmp_path, capsys):
    """As they are in a dry run, and on a small model and small images for a step."""
    main(["--recipe", name, "--dry-run"])
    assert "GiB" in (printed := capsys.readouterr().out) or "MiB" in printed
    recipe = load_recipe(Recipe, name)
    small = replace(
        recipe,
        model=replace(recipe.model, path=str(tiny_teacher)),
        data=replace(recipe.data, kind="digits", path=None, height=8, width=8),
        lora=replace(recipe.lora, rank=2),
        trainer=replace(
            recipe.trainer, steps=1, batch_size=4, dtype="float32", output_dir=str(tmp_path), sample_prompts=("0", "1")
        ),
    )
    folder = train(small)
    assert list(folder.glob("*.safetensors")) or list(folder.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["trainer.ema_decay=null"], "objective.reference is average: set trainer.ema_decay"),
        (["model.train=full", "trainer.dtype=bfloat16"], "model.train is full: trained weights are float32"),
        (["objective.parts={e2e: 0, mul: 0, any: 0, adv: 0, one: 0}"], "every part of the batch has weight 0"),
        (["objective.times=[1, 1, 1.5]"], "times must not exceed 1, c is 1.5"),
        (["objective.order=0"], "objective.order is 0; expected a whole number at least 1"),
        (["sampler.gap=[0.5, 0.5]"], "leaves no time to sample"),
        (["sampler.order=3"], "sampler.order is 3; expected a whole number at most 2"),
    ],
)
def test_bad_recipes(changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load_recipe(Recipe, "twinflow_digits", ["objective.reference=average", *changes])


@pytest.mark.parametrize("mode", ["shortcut", "auxiliary"])
@pytest.mark.parametrize("model", [LORA, FULL], ids=["adapter", "full"])
def test_dry_run_counts_what_is_trained(model, mode, tiny_teacher, capsys):
    sets = [f"model.path={tiny_teacher}", f"model.train={model['train']}", f"model.target_time={mode}", "lora.rank=2"]
    method = method_for(load_recipe(Recipe, "twinflow_digits", sets))
    main(["--dry-run", *(word for each in sets for word in ("--set", each))])
    printed = capsys.readouterr().out
    numbers = {
        name.strip(): int(n.replace(",", "")) for name, n in re.findall(r"^([a-z -]+?) +([\d,]+)$", printed, re.M)
    }
    assert numbers["transformer"] == flux_parameters(method.pipe.transformer.config)
    trained = sum(int(each.size) for each in method.student.parameters.values())
    assert numbers["trained"] + numbers.get("target-time embedding", 0) == trained
