"""Peak memory of a SANA-Sprint run, from its sizes alone: nothing is allocated. See `distill.memory` for FLUX."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import paddle

from distill.memory import (
    FLOAT32,
    FLUX,
    Family,
    ModelSizes,
    Run,
    estimate_memory,
    find_model,
    flux_parameters,
    format_memory,
    head_bytes,
    head_parameters,
    head_shapes,
    lora_parameters,
)
from distill.optim import state_values
from distill.sana_sprint import Recipe
from fast_diffusers.errors import UserError

SANA_1600M = {
    "in_channels": 32,
    "out_channels": 32,
    "num_attention_heads": 70,
    "attention_head_dim": 32,
    "num_layers": 20,
    "num_cross_attention_heads": 20,
    "cross_attention_head_dim": 112,
    "cross_attention_dim": 2240,
    "caption_channels": 2304,
    "mlp_ratio": 2.5,
    "attention_bias": False,
    "patch_size": 1,
    "guidance_embeds": False,
    "qk_norm": "rms_norm_across_heads",
}
"""config.json of the 1.6 B teacher's transformer; the defaults of every function here that takes a config."""

SANA_600M = {
    "num_attention_heads": 36,
    "num_layers": 28,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
}
"""What that of the 0.6 B teacher has other than SANA_1600M."""

SANA = Family(
    "SANA",
    SANA_1600M,
    {
        "SANA_Sprint_1.6B_1024px_teacher_diffusers": {},
        "SANA_Sprint_0.6B_1024px_teacher_diffusers": SANA_600M,
    },
    text_encoder=2_614_341_888,  # Gemma-2-2B
    vae=312_250_275,  # DC-AE
)
TEXT_TOKENS, PIXELS_PER_TOKEN = 300, 32  # of a published SANA
OUTER_TENSORS = 6  # kept by what comes before and after the blocks, in values a token and channel


def sana_shapes(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(path, shape) of every parameter of `SanaTransformer2DModel`."""
    c = SANA_1600M | dict(config)
    d, cross = c["num_attention_heads"] * c["attention_head_dim"], c["num_cross_attention_heads"]
    cross, patch, hidden = cross * c["cross_attention_head_dim"], c["patch_size"], round(c["mlp_ratio"] * d)

    def linear(path: str, inputs: int, outputs: int, bias: bool = True) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{path}.weight", (inputs, outputs)
        if bias:
            yield f"{path}.bias", (outputs,)

    def attention(path: str, inner: int, source: int, bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from linear(f"{path}.to_q", d, inner, bias)
        for name in ("to_k", "to_v"):
            yield from linear(f"{path}.{name}", source, inner, bias)
        yield from linear(f"{path}.to_out.0", inner, d)
        if c["qk_norm"] is not None:
            yield from ((f"{path}.{name}.weight", (inner,)) for name in ("norm_q", "norm_k"))

    yield from (("patch_embed.proj.weight", (d, c["in_channels"], patch, patch)), ("patch_embed.proj.bias", (d,)))
    guided = ("time_embed.timestep_embedder", "time_embed.guidance_embedder")
    for embedder in guided if c["guidance_embeds"] else ("time_embed.emb.timestep_embedder",):
        yield from (*linear(f"{embedder}.linear_1", 256, d), *linear(f"{embedder}.linear_2", d, d))
    yield from linear("time_embed.linear", d, 6 * d)
    yield from linear("caption_projection.linear_1", c["caption_channels"], d)
    yield from linear("caption_projection.linear_2", d, d)
    yield "caption_norm.weight", (d,)
    for i in range(c["num_layers"]):
        block = f"transformer_blocks.{i}"
        yield f"{block}.scale_shift_table", (6, d)
        yield from attention(f"{block}.attn1", d, d, c["attention_bias"])
        yield from attention(f"{block}.attn2", cross, c["cross_attention_dim"], True)
        yield from ((f"{block}.ff.conv_inverted.weight", (2 * hidden, d, 1, 1)),)
        yield from ((f"{block}.ff.conv_{name}.bias", (2 * hidden,)) for name in ("inverted", "depth"))
        yield f"{block}.ff.conv_depth.weight", (2 * hidden, 1, 3, 3)
        yield f"{block}.ff.conv_point.weight", (d, hidden, 1, 1)
    yield "scale_shift_table", (2, d)
    yield from linear("proj_out", d, patch * patch * (c["out_channels"] or c["in_channels"]))


def sana_parameters(config: Mapping[str, Any]) -> int:
    """Number of parameters of `SanaTransformer2DModel`."""
    return sum(math.prod(shape) for _, shape in sana_shapes(config))


def sana_block_bytes(run: Run) -> float:
    """What a block keeps for its backward pass.

    Counted in tensors of one value a token and channel, in float32 on a CPU: 21 and 8 for each unit of `mlp_ratio`, and
    6 of queries and keys with QK-norm; 6 of the text's tokens; the cross-attention's matrix.
    """
    size = FLOAT32 if run.dtype == "float32" else 2
    config = SANA_1600M | dict(run.config)
    each = 21 + 8 * config["mlp_ratio"] + (6 if config["qk_norm"] is not None else 0)
    matrix = config["num_cross_attention_heads"] * run.tokens * run.text_tokens
    return size * run.batch * ((run.tokens * each + 6 * run.text_tokens) * run.channels + matrix)


def estimate_sana(run: Run, trained: Sequence[tuple[int, ...]], copy: bool, control_blocks: int = 0) -> dict[str, int]:
    """Bytes by purpose at the peak of one process; their sum is "total".

    The teacher of `run` is frozen, in its dtype. `trained`: shapes of the student's own weights, float32; they are all
    weights of a `copy`, or an adapter of the teacher, or a ControlNet of `control_blocks`. A student step
    differentiates `student_passes` passes of the student and, with heads, one of the teacher.
    """
    size = FLOAT32 if run.dtype == "float32" else 2
    layers, value = run.config["num_layers"] + control_blocks, run.batch * run.tokens * run.channels
    student = replace(run, dtype="float32") if copy else run
    passes = [student] * run.student_passes + [run] * bool(run.taps)
    kept = 0.0
    for each in passes:
        one = value * (FLOAT32 if each.dtype == "float32" else 2)
        kept += layers * (one if run.checkpointing else sana_block_bytes(each)) + OUTER_TENSORS * one
    heads = head_shapes(run.channels, run.taps, run.heads)
    moments = sum(state_values(shape, run.optimizer) for shape in trained)
    moments += sum(state_values(shape, run.head_optimizer) for shape in heads)
    weights = sum(map(math.prod, trained)) * FLOAT32
    rows = {
        "teacher, frozen": sana_parameters(run.config) * size,
        "text encoders and VAE": run.encoder_bytes,
        "student": weights * (1 + run.ema),
        "discriminator heads": sum(map(math.prod, heads)) * FLOAT32,
        "optimiser moments": FLOAT32 * moments,
        "gradients": weights,
        "activations, transformers": kept,
        "activations, heads": head_bytes(run)[0],
        "working memory": sana_block_bytes(student) if run.checkpointing else 0,  # a block computed again
    }
    rows = {name: round(value) for name, value in rows.items()}
    return rows | {"total": sum(rows.values())}


def control_shapes(config: Mapping[str, Any], blocks: int) -> list[tuple[int, ...]]:
    """Shapes of the parameters of a ControlNet of this many blocks."""
    d = config["num_attention_heads"] * config["attention_head_dim"]
    own = sana_shapes({**config, "num_layers": blocks})
    shared = [shape for path, shape in own if not path.startswith(("scale_shift_table", "proj_out"))]
    return shared + [(d, d), (d,)] * (blocks + 1)


def adapter_shapes(config: Mapping[str, Any], rank: int, targets: Sequence[str]) -> list[tuple[int, int]]:
    """Shapes of the parameters of one adapter on the linear layers whose path is or ends with a target."""
    shapes: list[tuple[int, int]] = []
    for path, shape in sana_shapes(config):
        layer, is_weight = path.removesuffix(".weight"), path.endswith(".weight") and len(shape) == 2
        if is_weight and any(f".{layer}".endswith(f".{target}") for target in targets):
            shapes += [(shape[0], rank), (rank, shape[1])]
    return shapes


def run_of(recipe: Recipe) -> tuple[Run, ModelSizes]:
    """The sizes of a recipe, and its model. UserError if the model is neither on disk nor a published one."""
    model = find_model(recipe.model.path, (SANA, FLUX))
    config, trainer, data, s = model.config, recipe.trainer, recipe.data, recipe.objective
    is_sana = model.family is SANA
    if recipe.model.train != "lora" and not is_sana:
        wanted = f"model.train={recipe.model.train}"
        raise UserError(f"{wanted} takes a SANA, and {recipe.model.path} is a FLUX: set model.train=lora")
    if is_sana:
        edge, blocks = config["patch_size"] if model.in_pixels else PIXELS_PER_TOKEN, config["num_layers"]
        text = TEXT_TOKENS
    else:
        edge, blocks = 2 if model.in_pixels else 16, config["num_layers"] + config["num_single_layers"]
        text = 512
    run = Run(
        config,
        tokens=max(1, data.height // edge) * max(1, data.width // edge),
        text_tokens=1 if model.in_pixels else text,
        batch=trainer.batch_size,
        dtype=trainer.dtype,
        rank=recipe.lora.rank,
        targets=recipe.lora.targets,
        taps=(len(s.taps) if s.taps else blocks) if s.adversarial_weight > 0 else 0,
        heads="ladd",
        student_passes=(s.scm_weight > 0) + (s.adversarial_weight > 0) + (s.regression_weight > 0),
        ema=trainer.ema_decay is not None,
        checkpointing=trainer.gradient_checkpointing,
        optimizer=recipe.student_optimizer,
        head_optimizer=recipe.discriminator_optimizer,
        encoder_bytes=model.encoders["vae"] + (0 if data.cache else model.encoders["text"]),
        gpu=trainer.dtype == "bfloat16" or paddle.is_compiled_with_cuda(),
    )
    return run, model


def describe_run(recipe: Recipe) -> str:
    """Parameter counts and peak memory of a recipe on each process, as text."""
    run, model = run_of(recipe)
    if model.family is FLUX:
        teacher, trained = flux_parameters(run.config), lora_parameters(run.config, run.rank, run.targets)
        rows = estimate_memory(run)
    else:
        guided = {"guidance_embeds": True} if recipe.objective.guidance_scales is not None else {}
        way, blocks = recipe.model.train, 0
        if way == "full":
            shapes = [shape for _, shape in sana_shapes(run.config | guided)]
        elif way == "lora":
            shapes = adapter_shapes(run.config, run.rank, run.targets)
        else:
            blocks = recipe.model.control_blocks
            shapes = control_shapes(run.config, blocks)
        teacher, trained = sana_parameters(run.config), sum(map(math.prod, shapes))
        rows = estimate_sana(run, shapes, way == "full", blocks)
    heads = head_parameters(run.channels, run.taps, run.heads)
    counts = {"teacher": teacher, "student": trained, "discriminator heads": heads}
    lines = [f"{name:<20} {count:>16,}" for name, count in counts.items() if count]
    where = f"Estimated peak memory of one process ({'GPU' if run.gpu else 'CPU'})"
    return "\n".join(["Parameters", *lines, "", where, format_memory({name: n for name, n in rows.items() if n})])
