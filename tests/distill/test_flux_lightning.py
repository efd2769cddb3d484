import json

import numpy as np
import paddle
import pytest

from distill.batches import Encoder
from distill.draws import StepDraws
from distill.flux_lightning import FluxLightning, Recipe
from distill.recipe import build, load_recipe
from distill.train_flux_lightning import main, train
from distill.trainer import Trainer
from fast_diffusers.errors import UserError
from fast_diffusers.pipelines.shipped import open_pipeline

VARIANTS = {
    "published": {},
    "consistency only": {"adversarial_weight": 0, "dmd_weight": 0, "reflow_weight": 0},
    "separate fake score": {"fake_score": "adapter"},
    "one tap": {"taps": [1], "gan_loss": "non_saturating"},
    "reference": {"reference_compat": True},
    "true guidance": {"cfg_weight": 2.0},
}


def recipe_for(teacher, output, steps=4, objective=None, heads="adamw", **trainer):
    settings = {
        "model": {"path": str(teacher)},
        "lora": {"rank": 2, "alpha": 2},
        "objective": {"num_cells": 8, "num_phases": 2, **(objective or {})},
        "student_optimizer": {"lr": 1e-2},
        "discriminator_optimizer": {"kind": heads},
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


def weights(player):
    return {name: p.numpy() for name, p in player.parameters.items()}


@pytest.fixture
def batch(tiny_teacher):
    images = np.random.default_rng(0).uniform(-1, 1, size=(4, 1, 8, 8)).astype("float32")
    return lambda pipe: Encoder(pipe, 3.5).batch({"images": images, "prompts": ["3", "1", "4", "1"]})


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_turn_changes_its_player_and_nothing_else(variant, tiny_teacher, tmp_path, batch):
    recipe = recipe_for(tiny_teacher, tmp_path, objective=VARIANTS[variant])
    pipe = open_pipeline(tiny_teacher)
    method = FluxLightning(recipe, pipe, num_tokens=16)
    data = batch(pipe)
    trainer = Trainer(recipe.trainer, method, lambda step, micro_step: data)
    base = {name: p.numpy() for name, p in pipe.transformer.named_parameters() if "lora" not in name}
    for step in range(4):
        before = {name: weights(player) for name, player in method.optimizers.items()}
        metrics = trainer.update(step)
        turns = method.turns(step)
        for name, player in method.optimizers.items():
            changed = [not np.array_equal(before[name][path], value) for path, value in weights(player).items()]
            assert any(changed) == (name in turns), (step, name)
            assert (f"{name}_loss" in metrics) == (name in turns)
    for name, p in pipe.transformer.named_parameters():
        if name in base:
            np.testing.assert_array_equal(p.numpy(), base[name])


def test_turns_alternate_as_published(tiny_teacher, tmp_path):
    method = FluxLightning(recipe_for(tiny_teacher, tmp_path), open_pipeline(tiny_teacher), 16)
    assert [list(method.turns(step)) for step in range(3)] == [["discriminator"], ["student"], ["discriminator"]]


@pytest.mark.parametrize("player", ["student", "discriminator"])
def test_gradient_checkpointing_does_not_change_the_gradients(player, tiny_teacher, tmp_path, batch):
    gradients = []
    for checkpointing in (False, True):
        pipe = open_pipeline(tiny_teacher)
        if checkpointing:
            pipe.transformer.enable_gradient_checkpointing()
        method = FluxLightning(recipe_for(tiny_teacher, tmp_path, gradient_checkpointing=checkpointing), pipe, 16)
        assert all(head.checkpointing == checkpointing for head in method.discriminator.heads)
        for name, parameter in method.optimizers["student"].parameters.items():
            if "lora_B" in name:  # zero at the start, which hides lora_A's gradient
                parameter.set_value(paddle.full(parameter.shape, 0.05))
        method.loss(player, batch(pipe), StepDraws(0, 1))[0].backward()
        gradients.append([p.grad.numpy() for p in method.optimizers[player].parameters.values()])
        others = [p for name, each in method.optimizers.items() if name != player for p in each.parameters.values()]
        assert all(p.grad is None for p in others)
    for plain, recomputed in zip(*gradients, strict=True):
        np.testing.assert_allclose(plain, recomputed, rtol=1e-5, atol=1e-7)


def test_trained_weights_are_float32_whatever_the_frozen_ones(tiny_teacher, tmp_path):
    pipe = open_pipeline(tiny_teacher, "bfloat16")
    method = FluxLightning(recipe_for(tiny_teacher, tmp_path, dtype="bfloat16", ema_decay=0.5), pipe, 16)
    trained = [p for optimizer in method.optimizers.values() for p in optimizer.parameters.values()]
    frozen = [p for p in pipe.transformer.parameters() if p.stop_gradient]
    assert {p.dtype for p in frozen} == {paddle.bfloat16}
    assert {p.dtype for p in (*trained, *method.averages["student"].averages.values())} == {paddle.float32}


@pytest.mark.parametrize(("ema_decay", "heads"), [(None, "adamw"), (0.5, "adafactor")])
def test_train_resumes_exactly_and_the_saved_lora_is_the_student(ema_decay, heads, tiny_teacher, tmp_path):
    settings = {"ema_decay": ema_decay, "heads": heads, "objective": {"fake_score": "adapter"}}
    train(recipe_for(tiny_teacher, tmp_path / "whole", 4, **settings))
    train(recipe_for(tiny_teacher, tmp_path / "parts", 2, **settings))
    # The number of steps belongs to the recipe; with a constant rate it changes nothing but the end.
    train(recipe_for(tiny_teacher, tmp_path / "parts", 4, sample_every=4, **settings), resume=True)
    images = {}
    for run in ("whole", "parts"):
        for file in ("paddle_lora_weights.safetensors", "pytorch_lora_weights.safetensors"):
            pipe = open_pipeline(tiny_teacher)
            pipe.set_progress_bar_config(disable=True)
            pipe.load_lora_weights(tmp_path / run / "lora", weight_name=file)
            noise = paddle.to_tensor(np.random.default_rng(0).normal(size=(1, 1, 8, 8)).astype("float32"))
            images[run, file] = pipe("7", num_inference_steps=2, latents=noise, output_type="np").images
    reference = next(iter(images.values()))
    for image in images.values():
        np.testing.assert_array_equal(image, reference)
    assert (tmp_path / "parts" / "losses.png").is_file()
    assert len(list((tmp_path / "parts" / "samples").glob("*.png"))) == 1
    lines = (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


def test_size_that_does_not_fit_the_model(tiny_teacher, tmp_path):
    recipe = recipe_for(tiny_teacher, tmp_path)
    recipe = load_recipe(Recipe, "flux_lightning_digits", [f"model.path={tiny_teacher}", "data.height=9"])
    with pytest.raises(UserError, match=r"data\.height is 9; this model takes multiples of 2"):
        train(recipe)


def test_dry_run_prints_the_recipe_and_the_memory(tiny_teacher, capsys):
    main(["--dry-run", "--set", f"model.path={tiny_teacher}", "--set", "trainer.steps=7"])
    printed = capsys.readouterr().out
    assert "steps: 7" in printed and "memory" in printed
