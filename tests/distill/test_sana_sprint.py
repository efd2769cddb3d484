import json
import re
from dataclasses import replace

import numpy as np
import paddle
import pytest

from distill.batches import Encoder
from distill.checkpoint import latest_valid
from distill.config import DataConfig
from distill.control import ControlEncoder, edge_map
from distill.draws import StepDraws
from distill.recipe import RECIPES, build, load_recipe
from distill.sana_sprint import DISCRIMINATOR, STUDENT, Recipe, SanaSprint
from distill.train_sana_sprint import main, train
from distill.trainer import NonFiniteError, Trainer
from fast_diffusers.conditioning import Cond
from fast_diffusers.errors import UserError
from fast_diffusers.models import SanaControlNetModel, SanaTransformer2DModel
from fast_diffusers.pipelines import SanaLabelPipeline
from fast_diffusers.pipelines.shipped import open_pipeline
from fast_diffusers.random import Generator
from fast_diffusers.samplers import trigflow
from fast_diffusers.schedulers import FlowMatchEulerDiscreteScheduler, SCMScheduler

RECIPE_NAMES = sorted(path.stem for path in RECIPES.glob("sana_sprint_*.yaml"))
FULL, LORA = {"train": "full"}, {"train": "lora"}
VARIANTS = {
    "both": ("sana", FULL, {}),
    "consistency only": ("sana", FULL, {"adversarial_weight": 0}),
    "adversarial only": ("sana", FULL, {"scm_weight": 0}),
    "no guidance": ("sana", FULL, {"guidance_scales": None}),
    "one tap, aligned": ("sana", FULL, {"taps": [1], "misaligned": False, "derivative": "finite_difference"}),
    "adapter of FLUX": ("flux", LORA, {}),
    "adapter of SANA": ("sana", LORA, {"guidance_scales": [4.5]}),
}


def sana_pipeline(**changes) -> SanaLabelPipeline:
    """Random, 8×8 gray, two blocks."""
    paddle.seed(0)
    config = {
        "in_channels": 1,
        "out_channels": 1,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": 10,
        "sample_size": 8,
        "patch_size": 2,
        "qk_norm": "rms_norm_across_heads",
        "timestep_scale": 0.001,
        **changes,
    }
    transformer = SanaTransformer2DModel(**config)
    for parameter in transformer.parameters():  # the zero-initialised output would hide everything behind it
        parameter.set_value(parameter + 0.1 * paddle.randn(parameter.shape))
    return SanaLabelPipeline(FlowMatchEulerDiscreteScheduler(), transformer)


@pytest.fixture(scope="session")
def tiny_sana(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sana")
    sana_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sprint(tmp_path_factory):
    """Folder of a random student."""
    folder = tmp_path_factory.mktemp("sprint")
    sana_pipeline(guidance_embeds=True, timestep_scale=1.0).save_pretrained(folder)
    return folder


@pytest.fixture
def teachers(tiny_sana, tiny_sprint, tiny_teacher):
    return {"sana": tiny_sana, "sprint": tiny_sprint, "flux": tiny_teacher}


def recipe_for(teacher, output, steps=4, model=None, objective=None, optimizer=None, **trainer):
    settings = {
        "model": {"path": str(teacher), **(model or {})},
        "lora": {"rank": 2, "alpha": 2, "targets": ["to_q", "to_k", "to_v", "to_out.0"]},
        "objective": {"tangent_warmup": 0, **(objective or {})},
        "student_optimizer": {"lr": 1e-3, **(optimizer or {})},
        "discriminator_optimizer": {"lr": 1e-3, **(optimizer or {})},
        "trainer": {
            "steps": steps,
            "batch_size": 4,
            "checkpoint_every": 2,
            "log_every": 1,
            "sample_every": None,
            "output_dir": str(output),
            "sample_prompts": ["0", "1"],
            **trainer,
        },
    }
    return build(Recipe, settings)


def method_for(recipe):
    return SanaSprint(recipe, open_pipeline(recipe.model.path, recipe.trainer.dtype))


def batch_for(method):
    images = np.random.default_rng(0).uniform(-1, 1, size=(4, 1, 8, 8)).astype("float32")
    return Encoder(method.student.pipe, 3.5).batch({"images": images, "prompts": ["3", "1", "4", "1"]})


def values(tensors):
    return {path: each.numpy() for path, each in tensors.items()}


# ---------------------------------------------------------------------------------------------- the method
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_turn_changes_its_player_and_nothing_else(variant, teachers, tmp_path):
    family, model, objective = VARIANTS[variant]
    recipe = recipe_for(teachers[family], tmp_path, model=model, objective=objective)
    method = method_for(recipe)
    data = batch_for(method)
    trainer = Trainer(recipe.trainer, method, lambda step, micro_step: data)
    x, t = data["latents"], paddle.full([4], 0.7)
    guidance = data["guidance"] if family == "flux" else None
    teacher = method.roles.teacher(x, t, data["cond"], guidance=guidance).numpy()
    for step in range(4):
        before = {name: values(player.parameters) for name, player in method.optimizers.items()}
        metrics = trainer.update(step)
        turns = method.turns(step)
        for name, player in method.optimizers.items():
            after = values(player.parameters)
            changed = [not np.array_equal(before[name][path], value) for path, value in after.items()]
            assert any(changed) == (name in turns), (step, name)
            assert (f"{name}_loss" in metrics) == (name in turns)
        assert all(np.isfinite(float(value)) for value in metrics.values())
    np.testing.assert_array_equal(method.roles.teacher(x, t, data["cond"], guidance=guidance).numpy(), teacher)


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_that_is_trained_gets_a_gradient_and_nothing_else_does(variant, teachers, tmp_path):
    """Of the guidance embedder's first layer only once its last one, which starts at zero, has moved."""
    family, model, objective = VARIANTS[variant]
    method = method_for(recipe_for(teachers[family], tmp_path, model=model, objective=objective))
    data = batch_for(method)
    for seed, parameter in enumerate(method.optimizers[STUDENT].parameters.values()):
        noise = np.random.default_rng(seed).normal(scale=0.05, size=parameter.shape)
        parameter.set_value(parameter + paddle.to_tensor(noise.astype("float32")))
    for player, optimizer in method.optimizers.items():
        method.loss(player, data, StepDraws(0, 1))[0].backward()
        dead = [p for p, each in optimizer.parameters.items() if each.grad is None or not np.any(each.grad.numpy())]
        assert [path for path in dead if not without_effect(path)] == []
        others = [p for name, each in method.optimizers.items() if name != player for p in each.parameters.values()]
        assert all(p.grad is None for p in others)
        optimizer.clear_grad()


def without_effect(path: str) -> bool:
    """A single text token has all the attention, whatever its key and the queries."""
    return "attn2" in path and any(f".{name}." in path for name in ("to_q", "to_k", "norm_q", "norm_k"))


def test_the_student_starts_as_the_teacher_and_is_told_its_guidance(tiny_sana, tmp_path):
    method = method_for(recipe_for(tiny_sana, tmp_path))
    data = batch_for(method)
    given = (data["latents"], paddle.to_tensor([0.1, 0.4, 0.7, 1.0]), data["cond"])

    def student(guidance):
        return method.roles.student(*given, guidance=guidance).numpy()

    np.testing.assert_allclose(student(4.5), method.roles.teacher(*given).numpy(), rtol=1e-4, atol=1e-5)
    embedder = {path: p for path, p in method.student.weights.items() if "guidance_embedder" in path}
    assert len(embedder) == 4
    trainer = Trainer(recipe_for(tiny_sana, tmp_path).trainer, method, lambda step, micro_step: data)
    first = {path: values(embedder)[path] for path in embedder}
    for step in range(4):
        trainer.update(step)
    moved = [path for path, value in values(embedder).items() if not np.array_equal(value, first[path])]
    assert sorted(moved) == sorted(embedder)
    assert np.abs(student(4.0) - student(5.0)).max() > 0


def test_terms_of_weight_zero_cost_nothing(tiny_sana, tmp_path, monkeypatch):
    def refuse(*arguments, **settings):
        raise AssertionError("not asked for")

    batch = batch_for(method_for(recipe_for(tiny_sana, tmp_path)))
    monkeypatch.setattr("distill.sana_sprint.trigflow_adversarial", refuse)
    method = method_for(recipe_for(tiny_sana, tmp_path, objective={"adversarial_weight": 0}))
    assert list(method.optimizers) == [STUDENT] and method.discriminator is None
    assert [list(method.turns(step)) for step in range(2)] == [[STUDENT]] * 2
    method.loss(STUDENT, batch, StepDraws(0, 0))
    monkeypatch.undo()
    monkeypatch.setattr("distill.sana_sprint.trigflow_consistency", refuse)
    monkeypatch.setattr("fast_diffusers.forward_ad.jvp", refuse)
    method = method_for(recipe_for(tiny_sana, tmp_path, objective={"scm_weight": 0}))
    assert method.log_variance is None
    assert [list(method.turns(step)) for step in range(2)] == [[DISCRIMINATOR], [STUDENT]]
    for player in method.optimizers:
        method.loss(player, batch, StepDraws(0, 0))


def test_weights_scale_the_terms(tiny_sana, tmp_path):
    def loss(**objective):
        method = method_for(recipe_for(tiny_sana, tmp_path, objective=objective))
        return float(method.loss(STUDENT, batch_for(method), StepDraws(0, 0))[0])

    both = loss(scm_weight=2.0, adversarial_weight=0.25)
    expected = 2 * loss(adversarial_weight=0) + 0.25 * loss(scm_weight=0, adversarial_weight=1)
    assert both == pytest.approx(expected, rel=1e-5)


def test_players_count_their_own_updates(tiny_sana, tmp_path):
    """So the tangent warms up with the student's, not with all steps."""
    recipe = recipe_for(tiny_sana, tmp_path, steps=9, objective={"tangent_warmup": 4})
    method = method_for(recipe)
    data = batch_for(method)
    trainer = Trainer(recipe.trainer, method, lambda step, micro_step: data)
    ratios = []
    for step in range(10):
        ratios.append(method.tangent_ratio)
        trainer.update(step)
    assert ratios == [0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1, 1]
    assert {name: each.steps for name, each in method.optimizers.items()} == {STUDENT: 5, DISCRIMINATOR: 5}
    assert {name: each.total_steps for name, each in method.optimizers.items()} == {STUDENT: 4, DISCRIMINATOR: 5}
    assert method_for(recipe_for(tiny_sana, tmp_path)).tangent_ratio == 1


@pytest.mark.parametrize("rate", [0.0, 3.0])
def test_the_learned_weighting_has_a_rate_of_its_own(rate, tiny_sana, tmp_path):
    def moved(rate):
        recipe = recipe_for(tiny_sana, tmp_path, objective={"adversarial_weight": 0, "log_variance_rate": rate})
        method = method_for(recipe)
        data = batch_for(method)
        learned = dict(method.log_variance.named_parameters())
        before = values(learned)
        Trainer(recipe.trainer, method, lambda step, micro_step: data).update(0)
        return np.concatenate([(value - before[path]).ravel() for path, value in values(learned).items()])

    assert moved(1.0).any()
    np.testing.assert_allclose(moved(rate), rate * moved(1.0), rtol=1e-3, atol=1e-6)


def test_trained_weights_are_float32_whatever_the_frozen_ones(tiny_sana, tmp_path):
    method = method_for(recipe_for(tiny_sana, tmp_path, dtype="bfloat16", ema_decay=0.5))
    trained = [p for optimizer in method.optimizers.values() for p in optimizer.parameters.values()]
    assert {p.dtype for p in (*trained, *method.averages[STUDENT].averages.values())} == {paddle.float32}
    teacher = method.roles.teacher.transformer
    assert {p.dtype for p in teacher.parameters()} == {paddle.bfloat16}
    assert all(p.stop_gradient for p in teacher.parameters())


# ---------------------------------------------------------------------------------------------- training runs
def sampled(pipe, guidance, steps=2):
    noise = paddle.to_tensor(np.random.default_rng(0).normal(size=(2, 1, 8, 8)).astype("float32"))
    velocity = Encoder(pipe, guidance).velocity(pipe.denoiser, ["7", "1"])
    return trigflow(velocity, noise, steps=steps, generator=Generator(0)).numpy()


RUNS = {
    "adamw": ({}, {}),
    "came, average": ({"kind": "came"}, {"ema_decay": 0.5}),
    "came, accumulated": ({"kind": "came", "warmup_steps": 2}, {"gradient_accumulation": 2, "on_nonfinite": "skip"}),
}


@pytest.mark.parametrize("run", RUNS)
def test_students_resume_exactly_and_load(run, tiny_sana, tmp_path):
    optimizer, trainer = RUNS[run]
    settings = {"optimizer": optimizer, "objective": {"tangent_warmup": 2}, **trainer}
    train(recipe_for(tiny_sana, tmp_path / "whole", 6, **settings))
    train(recipe_for(tiny_sana, tmp_path / "parts", 2, **settings))
    folder = train(recipe_for(tiny_sana, tmp_path / "parts", 6, sample_every=6, **settings), resume=True)
    assert folder == tmp_path / "parts" / "pipeline"
    assert len(list((tmp_path / "parts" / "samples").glob("*.png"))) == 1
    checkpoints = [latest_valid(tmp_path / name / "checkpoints") for name in ("whole", "parts")]
    assert checkpoints[0].state["student_optimizer"] == checkpoints[1].state["student_optimizer"]
    for group in checkpoints[0].groups:
        np.testing.assert_equal(*(values(checkpoint.tensors(group)) for checkpoint in checkpoints))
    images = [sampled(open_pipeline(tmp_path / name / "pipeline"), 4.5) for name in ("whole", "parts")]
    np.testing.assert_array_equal(*images)
    saved = open_pipeline(folder)
    assert type(saved) is SanaLabelPipeline and isinstance(saved.scheduler, SCMScheduler)
    assert saved.transformer.config.guidance_embeds
    kept = checkpoints[1].tensors("student_average" if "ema_decay" in trainer else "student")
    for path, parameter in saved.transformer.named_parameters():
        np.testing.assert_array_equal(kept[path].numpy(), parameter.numpy())
    saved.set_progress_bar_config(disable=True)
    noise = paddle.to_tensor(np.random.default_rng(0).normal(size=(2, 1, 8, 8)).astype("float32"))
    found = saved(["7", "1"], num_inference_steps=1, guidance_scale=4.5, latents=noise, output_type="latent").images
    np.testing.assert_allclose(found.numpy(), sampled(saved, 4.5, steps=1), rtol=1e-4, atol=1e-5)
    lines = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {"student_loss", "student_grad_norm"} <= lines[1].keys() and "discriminator_loss" in lines[2]


def test_adapters_resume_exactly_and_load(tiny_teacher, tmp_path):
    settings = {"model": LORA, "ema_decay": 0.5}
    train(recipe_for(tiny_teacher, tmp_path / "whole", 4, **settings))
    train(recipe_for(tiny_teacher, tmp_path / "parts", 2, **settings))
    folder = train(recipe_for(tiny_teacher, tmp_path / "parts", 4, sample_every=4, **settings), resume=True)
    assert folder == tmp_path / "parts" / "lora"
    images = []
    for run in ("whole", "parts"):
        for file in ("paddle_lora_weights.safetensors", "pytorch_lora_weights.safetensors"):
            pipe = open_pipeline(tiny_teacher)
            pipe.load_lora_weights(tmp_path / run / "lora", weight_name=file)
            images.append(sampled(pipe, 3.5))
    for image in images[1:]:
        np.testing.assert_array_equal(image, images[0])
    assert np.abs(images[0] - sampled(open_pipeline(tiny_teacher), 3.5)).max() > 1e-5


def test_a_loss_that_is_not_finite_is_skipped_and_three_stop(tiny_sana, tmp_path, monkeypatch):
    loss = SanaSprint.loss

    def poisoned(self, player, batch, draws):
        value, parts = loss(self, player, batch, draws)
        fails = player == STUDENT and self.optimizers[STUDENT].steps >= 2
        return (value * float("nan") if fails else value), parts

    monkeypatch.setattr(SanaSprint, "loss", poisoned)
    with pytest.raises(NonFiniteError, match=r"step 9, student: .*update 3 in a row that cannot be used"):
        train(recipe_for(tiny_sana, tmp_path, 20, on_nonfinite="skip"))
    kept = latest_valid(tmp_path / "checkpoints")
    assert (kept.step, kept.state["skipped"]) == (8, 2)
    monkeypatch.undo()
    assert train(recipe_for(tiny_sana, tmp_path, 10, on_nonfinite="skip"), resume=True).is_dir()


# ---------------------------------------------------------------------------------------------- ControlNet
CONTROL = {"train": "controlnet", "control_blocks": 1}


REGRESSION = {"scm_weight": 0, "adversarial_weight": 0, "regression_weight": 1}


@pytest.mark.parametrize("objective", [{}, {"adversarial_weight": 0}, {"regression_weight": 1}, REGRESSION])
def test_a_controlnet_starts_without_effect_and_learns_alone(objective, tiny_sprint, tmp_path):
    recipe = recipe_for(tiny_sprint, tmp_path, model=CONTROL, objective=objective)
    method = method_for(recipe)
    images = np.random.default_rng(0).uniform(-1, 1, size=(4, 1, 8, 8)).astype("float32")
    encoder = ControlEncoder(method.student.pipe, 4.5, recipe.data)
    data = encoder.batch({"images": images, "prompts": ["3", "1", "4", "1"]})
    np.testing.assert_array_equal(data["null_cond"]["control"].numpy(), edge_map(images))
    given = (data["latents"], paddle.full([4], 0.7))
    base = method.student.pipe.denoiser
    expected = base(*given, data["cond"], guidance=4.5).numpy()
    np.testing.assert_array_equal(method.student.role(*given, data["cond"], guidance=4.5).numpy(), expected)
    frozen = values(dict(base.transformer.named_parameters()))
    trainer = Trainer(recipe.trainer, method, lambda step, micro_step: data)
    for step in range(6):
        assert np.isfinite(float(trainer.update(step)[f"{method.turns(step)[0]}_loss"]))
    np.testing.assert_equal(values(dict(base.transformer.named_parameters())), frozen)
    np.testing.assert_array_equal(base(*given, data["cond"], guidance=4.5).numpy(), expected)
    controlled = method.student.role(*given, data["cond"], guidance=4.5).numpy()
    other = Cond(data["cond"], control=data["cond"]["control"].flip(0))
    assert np.abs(controlled - expected).max() > 1e-6
    assert np.abs(controlled - method.student.role(*given, other, guidance=4.5).numpy()).max() > 1e-7


def test_a_controlnet_is_told_what_the_data_say(tiny_sprint, tmp_path, monkeypatch):
    """Its teacher's velocity is that of the batch, which is the target of flow matching."""
    seen = []

    def consistency(roles, batch, draws, **settings):
        noise = draws.normal("noise", batch["latents"].shape)
        velocity = roles.teacher(noise, paddle.ones([4]), batch["cond"], guidance=4.5)
        seen.append(np.abs((velocity - (noise - batch["latents"])).numpy()).max())
        return velocity.mean(), {}

    monkeypatch.setattr("distill.sana_sprint.trigflow_consistency", consistency)
    method = method_for(recipe_for(tiny_sprint, tmp_path, model=CONTROL, objective={"adversarial_weight": 0}))
    method.loss(STUDENT, batch_for(method), StepDraws(0, 0))
    assert seen == [0]


def test_controlnets_resume_exactly_and_load(tiny_sprint, tmp_path):
    settings = {"model": CONTROL, "ema_decay": 0.5}
    train(recipe_for(tiny_sprint, tmp_path / "whole", 4, **settings))
    train(recipe_for(tiny_sprint, tmp_path / "parts", 2, **settings))
    folder = train(recipe_for(tiny_sprint, tmp_path / "parts", 4, sample_every=4, **settings), resume=True)
    assert folder == tmp_path / "parts" / "controlnet"
    whole, parts = (SanaControlNetModel.from_pretrained(tmp_path / run / "controlnet") for run in ("whole", "parts"))
    np.testing.assert_equal(values(whole.state_dict()), values(parts.state_dict()))
    kept = latest_valid(tmp_path / "parts" / "checkpoints").tensors("student_average")
    np.testing.assert_equal(values(dict(parts.named_parameters())), values(kept))


# ---------------------------------------------------------------------------------------------- recipes
@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_shipped_recipes_run(name, teachers, tmp_path):
    """On a small model and small images, for a step of each player."""
    recipe = load_recipe(Recipe, name)
    family = "flux" if "flux" in name else "sprint" if recipe.model.train == "controlnet" else "sana"
    small = replace(
        recipe,
        model=replace(recipe.model, path=str(teachers[family]), control_blocks=1),
        data=replace(recipe.data, kind="digits", path=None, height=8, width=8),
        lora=replace(recipe.lora, rank=2),
        objective=replace(recipe.objective, taps=(0, 1) if recipe.objective.taps else None),
        trainer=replace(
            recipe.trainer, steps=2, batch_size=4, dtype="float32", output_dir=str(tmp_path), sample_prompts=("0", "1")
        ),
    )
    assert list(train(small).rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["objective.scm_weight=0", "objective.adversarial_weight=0"],
            "adversarial_weight and regression_weight are 0",
        ),
        (["objective.guidance_scales=[]"], "guidance_scales is an empty list"),
        (["objective.taps=[]"], "taps is an empty list"),
        (["objective.max_time_probability=2"], "objective.max_time_probability is 2; expected a number at most 1"),
    ],
)
def test_bad_recipes(changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load_recipe(Recipe, "sana_sprint_digits", changes)


def test_models_that_cannot_learn_it(tiny_teacher, tiny_sana, tiny_sprint, tmp_path):
    with pytest.raises(UserError, match=r"model\.train=full takes a SANA, and this is a FluxTransformer2DModel"):
        method_for(recipe_for(tiny_teacher, tmp_path))
    with pytest.raises(UserError, match="does not embed its guidance, which an adapter cannot change"):
        method_for(recipe_for(tiny_sana, tmp_path, model=LORA))
    with pytest.raises(UserError, match=r"model\.train=controlnet takes a SANA-Sprint student, which .* is not"):
        method_for(recipe_for(tiny_sana, tmp_path, model=CONTROL))
    with pytest.raises(UserError, match=r"model\.control_blocks: num_layers must lie in 1\.\.1"):
        method_for(recipe_for(tiny_sprint, tmp_path, model=CONTROL | {"control_blocks": 2}))
    with pytest.raises(UserError, match=r"data\.cache keeps no control images"):
        ControlEncoder(None, 4.5, DataConfig(cache="cache"))
    with pytest.raises(UserError, match=r"objective\.taps \[0, 2\]: this model has blocks 0 to 1"):
        method_for(recipe_for(tiny_sana, tmp_path, objective={"taps": [0, 2]}))
    with pytest.raises(UserError, match=r"objective\.regression_weight .* is for model\.train=controlnet"):
        method_for(recipe_for(tiny_sana, tmp_path, objective={"regression_weight": 1}))
    with pytest.raises(UserError, match="told times up to 1000, and a student times up to 1: prepare it first"):
        SanaSprint(recipe_for(tiny_sana, tmp_path), sana_pipeline(timestep_scale=1.0))


def test_dry_run_counts_what_is_trained(tiny_sana, tiny_sprint, tiny_teacher, tmp_path, capsys):
    for teacher, sets in (
        (tiny_sana, ["model.train=full"]),
        (tiny_sana, ["model.train=lora", "objective.guidance_scales=null", "lora.targets=[to_q, to_out.0]"]),
        (tiny_teacher, ["model.train=lora"]),
        (tiny_sprint, ["model.train=controlnet", "model.control_blocks=1"]),
    ):
        sets = [f"model.path={teacher}", "lora.rank=2", *sets]
        method = method_for(load_recipe(Recipe, "sana_sprint_digits", sets))
        main(["--dry-run", *(word for each in sets for word in ("--set", each))])
        printed = capsys.readouterr().out
        found = re.findall(r"^([a-z ]+?) +([\d,]+)$", printed, re.M)
        numbers = {name: int(number.replace(",", "")) for name, number in found}
        assert numbers["student"] == sum(int(p.size) for p in method.student.weights.values())
        assert numbers["discriminator heads"] == sum(int(p.size) for p in method.discriminator.parameters())
        frozen = open_pipeline(teacher).transformer.parameters()
        assert numbers["teacher"] == sum(int(p.size) for p in frozen)


@pytest.mark.parametrize(("name", "count"), [("sana_sprint_1600m", 1_610_237_472), ("sana_sprint_600m", 593_501_216)])
def test_published_sizes(name, count, capsys):
    main(["--recipe", name, "--dry-run"])
    printed = capsys.readouterr().out
    assert f"{count:,}" in printed and "GiB" in printed
