import dataclasses
import gc
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import paddle
import pytest
from paddle.base import core

import fast_diffusers  # noqa: F401  (before paddle: this file also runs as a script)
from distill.config import DataConfig, LoraConfig, ModelConfig, OptimizerConfig, TrainerConfig
from distill.discriminators import PatchDiscriminator
from distill.draws import StepDraws
from distill.flux_lightning import FluxLightning, LightningConfig, Recipe
from distill.memory import (
    FLUX_DEV,
    Run,
    describe_run,
    estimate_memory,
    flux_linears,
    flux_parameters,
    format_memory,
    head_bytes,
    head_parameters,
    lora_parameters,
    run_of,
)
from fast_diffusers import lora
from fast_diffusers.errors import UserError
from fast_diffusers.models import FluxTransformer2DModel
from fast_diffusers.pipelines import FluxLabelPipeline
from fast_diffusers.schedulers import FlowMatchEulerDiscreteScheduler

TARGETS = LoraConfig().targets
TINY = {
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 10,
    "pooled_projection_dim": 7,
    "guidance_embeds": True,
}


def count(parameters) -> int:
    return sum(math.prod(parameter.shape) for parameter in parameters)


@pytest.mark.parametrize("changes", [{}, {"guidance_embeds": False}, {"out_channels": 6, "num_layers": 0}])
def test_counts_are_those_of_the_real_model(changes):
    config = TINY | changes
    model = FluxTransformer2DModel(**config, axes_dims_rope=(4, 6, 6))
    assert flux_parameters(config) == count(model.parameters())
    named = model.named_sublayers()
    layers = {path: tuple(layer.weight.shape) for path, layer in named if isinstance(layer, paddle.nn.Linear)}
    assert {path: (inputs, outputs) for path, inputs, outputs in flux_linears(config)} == layers
    targets = ["attn.to_q", "proj_mlp", "net.2"]
    assert lora_parameters(config, 3, targets[: 2 + config["num_layers"]]) == count(
        lora.inject(model, 3, 3.0, targets[: 2 + config["num_layers"]])
    )


def test_counts_of_the_heads():
    assert head_parameters(12, 3) == count(PatchDiscriminator(12, 3).parameters())


def test_published_sizes():
    assert flux_parameters(FLUX_DEV) == 11_901_408_320
    assert head_parameters(3072, 57) == 1_077_064_761
    assert lora_parameters(FLUX_DEV, 32, TARGETS) == 32 * 3072 * (19 * (8 * 2 + 4 * 5) + 38 * 3 * 2)


def test_estimate_reacts_to_every_size():
    run = Run(FLUX_DEV, tokens=1024, targets=TARGETS, dtype="bfloat16", checkpointing=False, taps=0)
    rows = estimate_memory(run)
    assert rows["transformer, frozen"] == 2 * 11_901_408_320
    assert rows["total"] == sum(value for name, value in rows.items() if name != "total")

    def change(row: str, **changes) -> float:
        return estimate_memory(dataclasses.replace(run, **changes))[row] / rows[row]

    assert change("transformer, frozen", dtype="float32") == 2
    assert change("activations, transformer", batch=3) == pytest.approx(3)
    assert change("activations, transformer", student_passes=1) == pytest.approx(1 / 2)
    assert change("activations, transformer", checkpointing=True) < 1 / 20
    assert change("activations, transformer", dtype="float32") > 28 * 4 / 64  # and the attention matrices
    assert change("adapters", ema=True) == 2
    assert change("optimiser moments", adapters=2) == 2
    assert change("optimiser moments", shards=4) == pytest.approx(1 / 4)
    assert change("total", taps=57) > 1.2


def test_checkpointed_heads_keep_their_inputs_and_factored_moments_are_small():
    run = Run(FLUX_DEV, tokens=4096, targets=TARGETS)
    rows = estimate_memory(run)
    features = 57 * 4096 * 3072 * 2  # bfloat16
    assert head_bytes(run)[0] == features
    assert head_bytes(dataclasses.replace(run, checkpointing=False))[0] == features * (1 + 7 * 2)
    factored = OptimizerConfig(kind="adafactor", betas=(0.0, 0.999))
    heads = rows["optimiser moments"] - estimate_memory(dataclasses.replace(run, taps=0))["optimiser moments"]
    assert heads == 2 * 4 * head_parameters(3072, 57)
    few = estimate_memory(dataclasses.replace(run, head_optimizer=factored))["optimiser moments"]
    assert rows["optimiser moments"] - few > 0.99 * heads


def test_table_adds_up_and_has_a_unit():
    text = format_memory({"weights": 3 * 2**29, "total": 3 * 2**29})
    assert text.splitlines() == ["weights       1.50 GiB", "total         1.50 GiB"]
    assert "3.00 MiB" in format_memory({"total": 3 * 2**20})


# ---------------------------------------------------------------------------------------------- against measured peaks
NO_HEADS = {"adversarial_weight": 0.0, "reflow_weight": 0.0}
CASES = [
    {"trainer": {"gradient_checkpointing": True}, "objective": NO_HEADS},
    {"trainer": {"gradient_checkpointing": True}, "objective": {}},
    {
        "trainer": {"gradient_checkpointing": True},
        "objective": {},
        "heads": {"kind": "adafactor", "betas": (0.0, 0.999)},
        "config": {"num_single_layers": 8},
    },
    {"trainer": {}, "objective": NO_HEADS},
    {"trainer": {}, "objective": {}},
]
SIDE, BATCH = 32, 4
MEASURED = TINY | {"attention_head_dim": 64, "num_single_layers": 2, "pooled_projection_dim": 10}


def case_recipe(case: dict) -> Recipe:
    return Recipe(
        data=DataConfig(height=SIDE, width=SIDE),
        lora=LoraConfig(rank=4),
        objective=LightningConfig(**case["objective"]),
        discriminator_optimizer=OptimizerConfig(**case.get("heads", {})),
        trainer=TrainerConfig(batch_size=BATCH, **case["trainer"]),
    )


def measure() -> list[int]:
    """The highest number of bytes in tensors during two steps of every player, for each case."""
    peaks = []
    for case in CASES:
        model = FluxTransformer2DModel(**(MEASURED | case.get("config", {})), axes_dims_rope=(8, 28, 28))
        pipe = FluxLabelPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=model, num_classes=10)
        recipe = case_recipe(case)
        if recipe.trainer.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        model.train()
        core.host_memory_stat_reset_peak_value("Allocated", 0)
        method = FluxLightning(recipe, pipe, (SIDE // 2) ** 2)
        batch = {"latents": paddle.randn([BATCH, 1, SIDE, SIDE]), "guidance": paddle.full([BATCH], 3.5)}
        batch["cond"] = pipe.conditioning(["1"] * BATCH)
        for step in range(2):
            for player, optimizer in method.optimizers.items():
                loss, _ = method.loss(player, batch, StepDraws(0, step))
                loss.backward()
                optimizer.step()
                optimizer.clear_grad()
                del loss, _
        peaks.append(core.host_memory_stat_peak_value("Allocated", 0))
        del model, pipe, method, batch, optimizer
        gc.collect()
    return peaks


@pytest.mark.skipif(paddle.is_compiled_with_cuda(), reason="measures tensors in host memory")
def test_estimates_match_measured_peaks():
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "ignore", __file__]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, stdout=subprocess.PIPE, timeout=300, check=True)
    peaks = json.loads(done.stdout.splitlines()[-1])
    for case, peak in zip(CASES, peaks, strict=True):
        config = MEASURED | case.get("config", {})
        run = dataclasses.replace(run_of(with_model(case_recipe(case), "FLUX.1-dev")), config=config)
        run = dataclasses.replace(run, tokens=(SIDE // 2) ** 2, text_tokens=1, encoder_bytes=0)
        run = dataclasses.replace(run, taps=config["num_layers"] + config["num_single_layers"] if run.taps else 0)
        assert estimate_memory(run)["total"] == pytest.approx(peak, rel=0.15), case


# ---------------------------------------------------------------------------------------------- recipes
def with_model(recipe: Recipe, path) -> Recipe:
    return dataclasses.replace(recipe, model=ModelConfig(str(path)))


def test_a_published_model_needs_no_files():
    recipe = dataclasses.replace(Recipe(), data=DataConfig(height=1024, width=1024))
    run = run_of(with_model(recipe, "black-forest-labs/FLUX.1-dev"))
    assert (run.tokens, run.text_tokens, run.taps, run.student_passes) == (4096, 512, 57, 2)
    text = describe_run(with_model(recipe, "black-forest-labs/FLUX.1-dev"))
    assert "11,901,408,320" in text and "1,077,064,761" in text and "total" in text


def test_sizes_come_from_the_folder(tmp_path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(TINY))
    (tmp_path / "transformer" / "model.safetensors").write_bytes(bytes(10))
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "model.safetensors").write_bytes(bytes(30))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxLabelPipeline"}))
    run = run_of(with_model(Recipe(data=DataConfig(height=8, width=12)), tmp_path))
    assert (run.tokens, run.text_tokens, run.taps, run.encoder_bytes) == (24, 1, 5, 30)

    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "model.safetensors").write_bytes(bytes(70))
    assert run_of(with_model(Recipe(), tmp_path)).encoder_bytes == 100
    cached = with_model(Recipe(data=DataConfig(cache="cache")), tmp_path)
    assert run_of(cached).encoder_bytes == 30
    assert "While the latent cache is written" in describe_run(cached)
    assert f"{flux_parameters(TINY):,}" in describe_run(with_model(Recipe(), tmp_path))

    (tmp_path / "transformer" / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not a FLUX pipeline folder"):
        run_of(with_model(Recipe(), tmp_path))


def test_an_unknown_model_is_an_error():
    with pytest.raises(UserError, match=r"model nowhere not found: .*digits.*FLUX\.1-dev"):
        run_of(with_model(Recipe(), "nowhere"))


if __name__ == "__main__":
    print(json.dumps(measure()))
