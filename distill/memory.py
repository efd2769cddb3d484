"""Peak memory of a FLUX distillation run, from its sizes alone: nothing is allocated.

On small models in float32 on a CPU the estimates are 0.9 to 1.1 times the peaks measured.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import paddle

from distill.config import OptimizerConfig
from distill.flux_lightning import Recipe
from distill.optim import state_values
from fast_diffusers.errors import UserError
from fast_diffusers.pipelines.shipped import SHIPPED

FLUX_DEV = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}
"""config.json of FLUX.1-dev's transformer; the defaults of every function here that takes a config."""


class Family(NamedTuple):
    """Models of one architecture.

    name: how the class names of its pipelines start, whatever the case. defaults: of its transformer's config.json.
    published: models whose sizes are known without their files, by the last part of a path, with what their config has
    other than the defaults. text_encoder, vae: the number of parameters of theirs.
    """

    name: str
    defaults: Mapping[str, Any]
    published: Mapping[str, Mapping[str, Any]]
    text_encoder: int
    vae: int


FLUX = Family(
    "FLUX",
    FLUX_DEV,
    {"FLUX.1-dev": {}, "FLUX.1-schnell": {"guidance_embeds": False}},
    text_encoder=4_762_310_656 + 123_060_480,  # T5-XXL, CLIP-L
    vae=83_819_683,
)

FLOAT32 = 4
HeadKind = Literal["patch", "ladd"]
LADD_KERNEL, HEAD_TENSORS = 9, {"patch": 6, "ladd": 5}
_ADAMW = OptimizerConfig()


# ---------------------------------------------------------------------------------------------- parameter counts
def flux_linears(config: Mapping[str, Any]) -> Iterator[tuple[str, int, int]]:
    """(path, inputs, outputs) of every linear layer of `FluxTransformer2DModel`."""
    config = FLUX_DEV | dict(config)
    d = config["num_attention_heads"] * config["attention_head_dim"]
    patch = config.get("patch_size", 1) ** 2 * (config.get("out_channels") or config["in_channels"])
    yield from (("x_embedder", config["in_channels"], d), ("context_embedder", config["joint_attention_dim"], d))
    scalars = ("timestep_embedder", "guidance_embedder")[: 1 + bool(config["guidance_embeds"])]
    for name, inputs in [*((scalar, 256) for scalar in scalars), ("text_embedder", config["pooled_projection_dim"])]:
        yield from ((f"time_text_embed.{name}.linear_1", inputs, d), (f"time_text_embed.{name}.linear_2", d, d))
    attention = ("to_q", "to_k", "to_v")
    joint = (*attention, "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    for i in range(config["num_layers"]):
        block = f"transformer_blocks.{i}"
        yield from ((f"{block}.{norm}.linear", d, 6 * d) for norm in ("norm1", "norm1_context"))
        yield from ((f"{block}.attn.{name}", d, d) for name in joint)
        for mlp in ("ff", "ff_context"):
            yield from ((f"{block}.{mlp}.net.0.proj", d, 4 * d), (f"{block}.{mlp}.net.2", 4 * d, d))
    for i in range(config["num_single_layers"]):
        block = f"single_transformer_blocks.{i}"
        yield from ((f"{block}.attn.{name}", d, d) for name in attention)
        yield from (
            (f"{block}.norm.linear", d, 3 * d),
            (f"{block}.proj_mlp", d, 4 * d),
            (f"{block}.proj_out", 5 * d, d),
        )
    yield from (("norm_out.linear", d, 2 * d), ("proj_out", d, patch))


def flux_parameters(config: Mapping[str, Any]) -> int:
    """Number of parameters of `FluxTransformer2DModel`; 11,901,408,320 for FLUX.1-dev."""
    config = FLUX_DEV | dict(config)
    norms = config["attention_head_dim"] * (4 * config["num_layers"] + 2 * config["num_single_layers"])
    return norms + sum(inputs * outputs + outputs for _, inputs, outputs in flux_linears(config))


def lora_shapes(config: Mapping[str, Any], rank: int, targets: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Shapes of the parameters of one adapter on the linear layers whose path is or ends with a target."""
    for path, inputs, outputs in flux_linears(config):
        if any(f".{path}".endswith(f".{target}") for target in targets):
            yield from ((inputs, rank), (rank, outputs))


def lora_parameters(config: Mapping[str, Any], rank: int, targets: Sequence[str]) -> int:
    """Number of parameters of one adapter; see `lora_shapes`."""
    return sum(map(math.prod, lora_shapes(config, rank, targets)))


def head_shapes(channels: int, taps: int, kind: HeadKind = "patch") -> list[tuple[int, ...]]:
    """Shapes of the parameters of `PatchDiscriminator` or `LaddDiscriminator`."""
    kernels = [(1, 1), (1, 1), (1, 1)] if kind == "patch" else [(1,), (LADD_KERNEL,), (1,)]
    first, second, last = ((channels, channels, *kernel) for kernel in kernels)
    vectors = [(channels,)] * 3
    return [first, *vectors, second, *vectors, (1, *last[1:]), (1,)] * taps


def head_parameters(channels: int, taps: int, kind: HeadKind = "patch") -> int:
    """Their number; 1,077,064,761 for `PatchDiscriminator` on FLUX.1-dev's 57 taps of 3072 channels."""
    return sum(map(math.prod, head_shapes(channels, taps, kind)))


# ---------------------------------------------------------------------------------------------- memory
@dataclass(frozen=True)
class Run:
    """The sizes that peak memory depends on.

    config: the transformer's. tokens, text_tokens: of one sample. batch: samples of a micro-step on one process.
    dtype: of the frozen weights and activations; trained weights are float32. rank, targets: of an adapter.
    adapters: 1, or 2 with a separate fake score. taps: discriminator heads, of kind `heads`. student_passes: passes
    through the student that one student step differentiates. optimizer, fake_optimizer, head_optimizer: of the
    student's adapter, the fake score's and the heads. encoder_bytes: text encoders and VAE, if they stay in the same
    memory. shards: processes that share the optimiser moments; gradients are whole on each until they are summed, see
    `distill.sharding`. gpu: its kernels broadcast modulation vectors and, in half precision, keep no attention matrix.
    """

    config: Mapping[str, Any]
    tokens: int
    text_tokens: int = 512
    batch: int = 1
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    rank: int = 32
    targets: Sequence[str] = ()
    adapters: int = 1
    taps: int = 57
    heads: HeadKind = "patch"
    student_passes: int = 2
    ema: bool = False
    checkpointing: bool = True
    optimizer: OptimizerConfig = _ADAMW
    fake_optimizer: OptimizerConfig = _ADAMW
    head_optimizer: OptimizerConfig = _ADAMW
    encoder_bytes: int = 0
    shards: int = 1
    gpu: bool = True

    @property
    def channels(self) -> int:
        """Inner channels of the transformer."""
        return self.config["num_attention_heads"] * self.config["attention_head_dim"]


def block_bytes(run: Run) -> tuple[float, float]:
    """What a (double, single) block keeps for its backward pass.

    Counted in tensors of one value a token and channel: inputs and outputs of norms, modulations, projections, MLP and
    gates. Four of them (queries and keys, at their normalisation and rotation) are float32 whatever the dtype. Each
    adapted projection adds `rank` values a token, six of them in a double and three in a single block.
    """
    size = FLOAT32 if run.dtype == "float32" else 2
    values = run.batch * (run.tokens + run.text_tokens) * run.channels
    matrix = 0 if run.gpu and size == 2 else (run.tokens + run.text_tokens) / run.config["attention_head_dim"]
    double, single = (28, 23) if run.gpu else (31, 25)
    low_rank = run.rank / run.channels
    return (
        values * (4 * FLOAT32 + (double - 4 + matrix + 6 * low_rank) * size),
        values * (4 * FLOAT32 + (single - 4 + matrix + 3 * low_rank) * size),
    )


def head_bytes(run: Run) -> tuple[float, float]:
    """What all heads keep of one pass for their backward pass, and what one of them needs while it is computed again.

    Each keeps its features and, without checkpointing, their cast to float32 and `HEAD_TENSORS` of that size. Those of
    LADD have no checkpointing.
    """
    size, cast = (FLOAT32, 0) if run.dtype == "float32" else (2, FLOAT32)
    values = run.batch * run.tokens * run.channels
    if not run.checkpointing or run.heads == "ladd":
        return run.taps * values * (size + cast + HEAD_TENSORS[run.heads] * FLOAT32), 0.0
    return run.taps * values * size, min(run.taps, 1) * values * (cast + 8 * FLOAT32)


def moment_bytes(run: Run) -> int:
    """State of all optimisers, before sharding."""
    adapter = list(lora_shapes(run.config, run.rank, run.targets))
    kept = [(adapter, run.optimizer), (head_shapes(run.channels, run.taps, run.heads), run.head_optimizer)]
    kept += [(adapter, run.fake_optimizer)] * (run.adapters - 1)
    return FLOAT32 * sum(state_values(shape, config) for shapes, config in kept for shape in shapes)


def estimate_memory(run: Run) -> dict[str, int]:
    """Bytes by purpose at the peak of one process; their sum is "total".

    The peak is in the step of the student or of the discriminator, whichever needs more. A student step differentiates
    `student_passes` passes of the student and, with heads, one of the teacher. A discriminator step keeps what the
    heads compute on fake and on real samples; while the transformer runs on the latter only the former are there. With
    gradient checkpointing a pass keeps only the inputs of blocks and heads; one at a time is computed again. All heads
    come before the first block: the gradient of a feature takes the place of the feature. The passes through the
    teacher and for reflow do not depend on each other; their backward passes run side by side, each with a block.
    """
    size = FLOAT32 if run.dtype == "float32" else 2
    blocks = run.config["num_layers"], run.config["num_single_layers"]
    kept = block_bytes(run)
    if run.checkpointing:
        kept = (run.batch * (run.tokens + run.text_tokens) * run.channels * size,) * 2
    one_pass = sum(count * each for count, each in zip(blocks, kept, strict=True))
    logits, one_head = head_bytes(run)
    adapter = lora_parameters(run.config, run.rank, run.targets) * FLOAT32
    heads = head_parameters(run.channels, run.taps, run.heads) * FLOAT32
    double, single = block_bytes(run)
    side_by_side = max(1, run.student_passes - 1 + bool(run.taps)) * (single if blocks[1] else double)
    one_block = max(double, single)
    names = "gradients", "activations, transformer", "activations, heads", "working memory"
    passes = one_pass * (run.student_passes + bool(run.taps))
    stay = (run.adapters * adapter + heads) / run.shards if run.shards > 1 else 0.0  # Paddle keeps these buffers
    student = adapter + stay, passes, logits, max(one_block, side_by_side * run.checkpointing, one_head)
    discriminator = heads + stay, 0.0, 2 * logits, max(one_head, one_block - logits)
    rows = {
        "transformer, frozen": flux_parameters(run.config) * size,
        "text encoders and VAE": run.encoder_bytes,
        "adapters": (run.adapters + run.ema) * adapter,
        "discriminator heads": heads,
        "optimiser moments": moment_bytes(run) / run.shards,
        **dict(zip(names, max(student, discriminator, key=sum), strict=True)),
    }
    rows = {name: round(value) for name, value in rows.items()}
    return rows | {"total": sum(rows.values())}


def format_memory(rows: Mapping[str, int]) -> str:
    """A table in GiB, or in MiB where that is too coarse."""
    unit, name = (2**30, "GiB") if rows["total"] >= 2**30 else (2**20, "MiB")
    width = max(map(len, rows))
    return "\n".join(f"{label:<{width}}  {value / unit:9.2f} {name}" for label, value in rows.items())


# ---------------------------------------------------------------------------------------------- a recipe's run
def run_of(recipe: Recipe) -> Run:
    """The sizes of a recipe. UserError if its model is neither on disk nor a published one.

    A sharded one is spread over as many processes as the launcher's environment says, and at least two.
    """
    config, encoders, label_conditioned = model_sizes(recipe.model.path)
    objective, trainer, data = recipe.objective, recipe.trainer, recipe.data
    edge = 2 if label_conditioned else 16
    blocks = config["num_layers"] + config["num_single_layers"]
    adversarial = objective.adversarial_weight > 0
    return Run(
        config,
        tokens=(data.height // edge) * (data.width // edge),
        text_tokens=1 if label_conditioned else 512,
        batch=trainer.batch_size,
        dtype=trainer.dtype,
        rank=recipe.lora.rank,
        targets=recipe.lora.targets,
        adapters=1 + (objective.fake_score == "adapter" and objective.dmd_weight > 0),
        taps=(len(objective.taps) if objective.taps else blocks) if adversarial else 0,
        student_passes=1 + (objective.reflow_weight > 0),
        ema=trainer.ema_decay is not None,
        checkpointing=trainer.gradient_checkpointing,
        optimizer=recipe.student_optimizer,
        fake_optimizer=recipe.fake_optimizer,
        head_optimizer=recipe.discriminator_optimizer,
        encoder_bytes=encoders["vae"] + (0 if data.cache else encoders["text"]),  # none of text's after caching
        shards=max(2, int(os.environ.get("PADDLE_TRAINERS_NUM", "1"))) if trainer.sharding else 1,
        gpu=trainer.dtype == "bfloat16" or paddle.is_compiled_with_cuda(),
    )


class ModelSizes(NamedTuple):
    """A model before it is loaded. encoders: bytes of "text" and "vae". in_pixels: labels for prompts, and no VAE."""

    config: dict[str, Any]
    encoders: dict[str, int]
    in_pixels: bool
    family: Family


def find_model(path: str, families: Sequence[Family]) -> ModelSizes:
    """A pipeline folder, a shipped pipeline or a published one, of one of the families. UserError if it is neither."""
    names = " or ".join(family.name for family in families)
    folder = SHIPPED.get(path, Path(path))
    if os.path.isdir(folder):  # unlike Path.is_dir false, not an error, for a name that is too long
        try:
            own = json.loads((folder / "transformer" / "config.json").read_text())
            pipeline = json.loads((folder / "model_index.json").read_text())["_class_name"].removeprefix("Paddle")
            family = next((each for each in families if pipeline.upper().startswith(each.name)), None)
            if family is None:
                raise ValueError(f"it holds a {pipeline}")
            config = {**family.defaults, **own}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"model {path} is not a {names} pipeline folder: {error}") from error
        encoders = {"text": 0, "vae": 0}
        for file in folder.rglob("*.safetensors"):
            if file.parent.name != "transformer":
                encoders["vae" if file.parent.name == "vae" else "text"] += file.stat().st_size
        return ModelSizes(config, encoders, "LabelPipeline" in pipeline, family)
    for family in families:
        if folder.name in family.published:
            config = {**family.defaults, **family.published[folder.name]}
            return ModelSizes(config, {"text": 2 * family.text_encoder, "vae": 2 * family.vae}, False, family)
    known = [*SHIPPED, *(name for family in families for name in family.published)]
    raise UserError(f"model {path} not found: give a pipeline folder, or one of {', '.join(known)}")


def model_sizes(path: str) -> tuple[dict[str, Any], dict[str, int], bool]:
    """(transformer config, bytes of "text" encoders and "vae", whether it has labels, in pixel space) of a FLUX."""
    return find_model(path, (FLUX,))[:3]


def describe_run(recipe: Recipe) -> str:
    """Parameter counts and peak memory of a recipe on each process, as text."""
    run = run_of(recipe)
    counts = {
        "transformer": flux_parameters(run.config),
        "adapter": lora_parameters(run.config, run.rank, run.targets),
        "discriminator heads": head_parameters(run.channels, run.taps),
    }
    lines = [f"{name:<20} {count:>16,}" for name, count in counts.items()]
    where = "GPU" if run.gpu else "CPU"
    sharded = f", optimisers sharded over {run.shards} processes" if run.shards > 1 else ""
    while_caching = []
    if recipe.data.cache:
        rest = estimate_memory(run)["transformer, frozen"] + sum(model_sizes(recipe.model.path)[1].values())
        while_caching = ["", "While the latent cache is written: all models", format_memory({"total": rest})]
    return "\n".join(
        [
            "Parameters",
            *lines,
            "",
            f"Estimated peak memory of one process ({where}{sharded})",
            format_memory(estimate_memory(run)),
            *while_caching,
        ]
    )
