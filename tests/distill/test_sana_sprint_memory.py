import gc
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import paddle
import pytest
from paddle.base import core

import fast_diffusers  # noqa: F401  (before paddle: this file also runs as a script)
from distill.config import DataConfig, OptimizerConfig, TrainerConfig
from distill.draws import StepDraws
from distill.sana_sprint import Recipe, SanaSprint, SprintConfig, StudentConfig
from distill.sana_sprint_memory import (
    SANA_600M,
    SANA_1600M,
    adapter_shapes,
    control_shapes,
    describe_run,
    estimate_sana,
    run_of,
    sana_parameters,
    sana_shapes,
)
from fast_diffusers import lora
from fast_diffusers.errors import UserError
from fast_diffusers.models import SanaControlNetModel, SanaTransformer2DModel
from fast_diffusers.pipelines import SanaLabelPipeline
from fast_diffusers.schedulers import FlowMatchEulerDiscreteScheduler

TINY = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_attention_heads": 3,
    "attention_head_dim": 8,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 12,
    "cross_attention_dim": 24,
    "caption_channels": 5,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"guidance_embeds": True, "qk_norm": None, "out_channels": None},
        {"attention_bias": True, "mlp_ratio": 2.0, "patch_size": 2, "num_cross_attention_heads": 3},
    ],
)
def test_shapes_are_those_of_the_real_model(changes):
    config = {**TINY, "qk_norm": "rms_norm_across_heads", **changes}
    model = SanaTransformer2DModel(**config)
    assert dict(sana_shapes(config)) == {path: tuple(p.shape) for path, p in model.named_parameters()}
    control = SanaControlNetModel.from_transformer(model, 1)
    assert sorted(control_shapes(config, 1)) == sorted(tuple(p.shape) for p in control.parameters())
    targets = ["attn1.to_q", "to_out.0", "time_embed.linear"]
    made = [tuple(p.shape) for p in lora.inject(model, 3, 3.0, targets)]
    assert sorted(adapter_shapes(config, 3, targets)) == sorted(made)


def test_published_sizes():
    guided = {"guidance_embeds": True}
    assert sana_parameters(SANA_1600M | guided) == 1_610_237_472
    assert sana_parameters(SANA_600M | guided) == 593_501_216


def test_a_published_recipe_needs_no_files():
    recipe = Recipe(
        model=StudentConfig("Efficient-Large-Model/SANA_Sprint_1.6B_1024px_teacher_diffusers"),
        data=DataConfig(height=1024, width=1024),
        student_optimizer=OptimizerConfig(kind="came"),
        trainer=TrainerConfig(dtype="bfloat16", ema_decay=0.9),
    )
    run, _ = run_of(recipe)
    assert (run.tokens, run.text_tokens, run.taps, run.student_passes) == (1024, 300, 20, 2)
    shapes = [shape for _, shape in sana_shapes(run.config)]
    rows = estimate_sana(run, shapes, copy=True)
    weights = 4 * sana_parameters(run.config)
    assert rows["teacher, frozen"] == weights / 2 and rows["student"] == 2 * weights
    assert rows["total"] == sum(value for name, value in rows.items() if name != "total")
    few = estimate_sana(replace(run, taps=0), shapes, copy=True)
    moments = few["optimiser moments"]  # the first moment, and factors
    assert weights < moments < 1.02 * weights
    adamw = estimate_sana(replace(run, taps=0, optimizer=OptimizerConfig()), shapes, copy=True)
    assert adamw["optimiser moments"] == 2 * weights
    assert "GiB" in describe_run(recipe)


def test_models_that_are_not_there_or_of_another_family(tiny_teacher):
    with pytest.raises(UserError, match=r"model nowhere not found: .*SANA_Sprint_1\.6B.*FLUX\.1-dev"):
        run_of(Recipe(model=StudentConfig("nowhere")))
    with pytest.raises(UserError, match=r"model\.train=full takes a SANA, and .* is a FLUX"):
        run_of(Recipe(model=StudentConfig(str(tiny_teacher))))


# ---------------------------------------------------------------------------------------------- against measured peaks
CASES = [
    {"checkpointing": True, "objective": {"adversarial_weight": 0.0}},
    {"checkpointing": True, "objective": {}},
    {"checkpointing": False, "objective": {"adversarial_weight": 0.0}},
    {"checkpointing": False, "objective": {"scm_weight": 0.0}},
    {"checkpointing": False, "objective": {}, "optimizer": {"kind": "came"}},
]
SIDE, BATCH = 32, 4
MEASURED = TINY | {
    "in_channels": 1,
    "out_channels": 1,
    "num_layers": 3,
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "num_cross_attention_heads": 4,
    "cross_attention_head_dim": 32,
    "cross_attention_dim": 128,
    "caption_channels": 10,
    "qk_norm": "rms_norm_across_heads",
    "timestep_scale": 0.001,
    "patch_size": 1,
}


def case_recipe(case: dict) -> Recipe:
    optimizer = OptimizerConfig(**case.get("optimizer", {}))
    return Recipe(
        data=DataConfig(height=SIDE, width=SIDE),
        objective=SprintConfig(**case["objective"]),
        student_optimizer=optimizer,
        discriminator_optimizer=optimizer,
        trainer=TrainerConfig(batch_size=BATCH, gradient_checkpointing=case["checkpointing"]),
    )


def measure() -> list[int]:
    """The highest number of bytes in tensors during two steps of every player, for each case."""
    peaks = []
    for case in CASES:
        model = SanaTransformer2DModel(**MEASURED)
        pipe = SanaLabelPipeline(FlowMatchEulerDiscreteScheduler(), model, sample_size=SIDE)
        recipe = case_recipe(case)
        if case["checkpointing"]:
            model.enable_gradient_checkpointing()
        model.train()
        core.host_memory_stat_reset_peak_value("Allocated", 0)
        method = SanaSprint(recipe, pipe)
        batch = {"latents": paddle.randn([BATCH, 1, SIDE, SIDE]), "guidance": None}
        batch |= {"cond": pipe.conditioning(["1"] * BATCH), "null_cond": pipe.conditioning([""] * BATCH)}
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
def test_estimates_match_measured_peaks(tmp_path):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "ignore", __file__]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, stdout=subprocess.PIPE, timeout=300, check=True)
    peaks = json.loads(done.stdout.splitlines()[-1])
    pipe = SanaLabelPipeline(FlowMatchEulerDiscreteScheduler(), SanaTransformer2DModel(**MEASURED), sample_size=SIDE)
    pipe.save_pretrained(tmp_path)
    ratios = []
    for case, peak in zip(CASES, peaks, strict=True):
        run, _ = run_of(replace(case_recipe(case), model=StudentConfig(str(tmp_path))))
        shapes = [shape for _, shape in sana_shapes(MEASURED | {"guidance_embeds": True})]
        ratios.append(estimate_sana(run, shapes, copy=True)["total"] / peak)
    assert all(math.isclose(ratio, 1, abs_tol=0.15) for ratio in ratios), ratios


if __name__ == "__main__":
    print(json.dumps(measure()))
