"""Parameter counts and peak memory of a TwinFlow run of any family, from its sizes alone: nothing is allocated.

Shapes are those of the model's class, built without its weights. What a pass keeps is counted as `distill.memory` does
it for FLUX, whose double-stream blocks SD3 and Qwen-Image share and whose single-stream blocks Z-Image's are like, and
as `distill.sana_sprint_memory` does for SANA.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import paddle
from paddle import nn

from distill.memory import FLOAT32, FLUX, Family, ModelSizes, Run, estimate_memory, find_model, format_memory
from distill.optim import state_values
from distill.sana_sprint_memory import PIXELS_PER_TOKEN, SANA, TEXT_TOKENS, estimate_sana
from distill.twinflow import Recipe
from fast_diffusers.lora.layers import linear_layers
from fast_diffusers.models import (
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)
from fast_diffusers.target_time import EMBEDDING_INPUTS, time_channels_of

SD35_MEDIUM = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
SD35_LARGE = {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "qk_norm": "rms_norm",
}
SD3 = Family(
    "STABLEDIFFUSION3",
    {},
    {"stable-diffusion-3.5-medium": SD35_MEDIUM, "stable-diffusion-3.5-large": SD35_LARGE},
    text_encoder=123_650_304 + 694_659_840 + 4_762_310_656,  # CLIP-L, OpenCLIP bigG, T5-XXL
    vae=83_819_683,
)
QWEN_IMAGE = Family(
    "QWENIMAGE",
    {},
    {"Qwen-Image": {}},
    text_encoder=7_070_619_136,  # Qwen2.5-VL-7B without images and language-model head
    vae=126_892_531,
)
Z_IMAGE = Family(
    "ZIMAGE",
    {},
    {"Z-Image-Turbo": {}, "Z-Image": {}},
    text_encoder=4_022_468_096,  # Qwen3-4B
    vae=83_819_683,
)
SANA_TEACHERS = SANA._replace(published={"Sana_1600M_1024px_diffusers": {"qk_norm": None}})


@dataclass(frozen=True)
class Architecture:
    """A family's class, and how many pixels and text tokens a published model has to a token and a prompt.

    block: what a block keeps for its backward pass, relative to FLUX's, as measured on small models; with_dual: where
    some blocks attend twice to the image.
    """

    family: Family
    model: type[nn.Layer]
    edge: int = 16
    text_tokens: int = 512
    block: float = 1.0
    with_dual: float = 1.0

    def build(self, config: Mapping[str, Any]) -> nn.Layer:
        """The transformer without its weights."""
        known = inspect.signature(self.model.__init__).parameters
        settings = {name: value for name, value in config.items() if name in known}
        if "pos_embed_max_size" in known:
            settings["pos_embed_max_size"] = 1  # a table, which would be filled
        with paddle.LazyGuard():
            return self.model(**settings)


ARCHITECTURES = (
    Architecture(FLUX, FluxTransformer2DModel),
    Architecture(SD3, SD3Transformer2DModel, text_tokens=77 + 256, block=0.8, with_dual=1.35),
    Architecture(SANA_TEACHERS, SanaTransformer2DModel, edge=PIXELS_PER_TOKEN, text_tokens=TEXT_TOKENS),
    Architecture(QWEN_IMAGE, QwenImageTransformer2DModel),
    Architecture(Z_IMAGE, ZImageTransformer2DModel, block=1.2),
)


def open_sizes(path: str) -> tuple[ModelSizes, Architecture]:
    """A pipeline by name or folder. UserError if it is neither on disk nor a published one."""
    sizes = find_model(path, [each.family for each in ARCHITECTURES])
    return sizes, next(each for each in ARCHITECTURES if each.family is sizes.family)


def adapter_shapes(model: nn.Layer, rank: int, targets: Sequence[str]) -> list[tuple[int, int]]:
    """Shapes of the parameters of one adapter on the linear layers whose path is or ends with a target."""
    shapes: list[tuple[int, int]] = []
    for path, layer in linear_layers(model).items():
        if any(f".{path}".endswith(f".{target}") for target in targets):
            inputs, outputs = layer.weight.shape
            shapes += [(inputs, rank), (rank, outputs)]
    return shapes


def blocks_of(model: nn.Layer, family: Family) -> dict[str, int]:
    """Numbers of double- and single-stream blocks and sizes of their heads, as a FLUX's config names them."""
    c = model.config
    if family is Z_IMAGE:
        layers = c.n_layers + 2 * c.n_refiner_layers
        heads, size = c.n_heads, c.dim // c.n_heads
        return {"num_layers": 0, "num_single_layers": layers, "num_attention_heads": heads, "attention_head_dim": size}
    names = ("num_layers", "num_attention_heads", "attention_head_dim")
    return {"num_single_layers": c.get("num_single_layers", 0), **{name: c[name] for name in names}}


def run_of(recipe: Recipe) -> tuple[Run, nn.Layer, Architecture]:
    """The sizes of a recipe, its model without weights, and the architecture of that.

    Of the passes with gradient, form whole has one for each term, and the one-step sample.
    """
    sizes, architecture = open_sizes(recipe.model.path)
    model = architecture.build(sizes.config)
    trainer, data, s = recipe.trainer, recipe.data, recipe.objective
    edge = architecture.edge
    if sizes.in_pixels:
        edge = model.config.patch_size if sizes.family is SANA_TEACHERS else 2
    whole = s.method == "twinflow" and s.form == "whole"
    is_sana = sizes.family is SANA_TEACHERS
    run = Run(
        {**sizes.config, **model.config} if is_sana else blocks_of(model, sizes.family),
        tokens=max(1, data.height // edge) * max(1, data.width // edge),
        text_tokens=1 if sizes.in_pixels else architecture.text_tokens,
        batch=trainer.batch_size,
        dtype=trainer.dtype,
        rank=recipe.lora.rank if recipe.model.train == "lora" else 0,
        taps=0,
        student_passes=1 + sum(weight > 0 for weight in asdict(s.weights).values()) if whole else 1,
        checkpointing=trainer.gradient_checkpointing,
        encoder_bytes=sizes.encoders["vae"] + (0 if data.cache else sizes.encoders["text"]),
        gpu=trainer.dtype == "bfloat16" or paddle.is_compiled_with_cuda(),
    )
    return run, model, architecture


def activations(run: Run, model: nn.Layer, architecture: Architecture) -> dict[str, int]:
    """Bytes that the passes with gradient keep, and those of a block that is computed again."""
    if architecture.family is SANA_TEACHERS:
        rows = estimate_sana(run, [], copy=False)
        return {"activations": rows["activations, transformers"], "working memory": rows["working memory"]}
    rows = estimate_memory(run)
    factor = architecture.with_dual if model.config.get("dual_attention_layers") else architecture.block
    kept = rows["activations, transformer"] * (1.0 if run.checkpointing else factor)  # else the blocks' inputs
    return {"activations": round(kept), "working memory": round(rows["working memory"] * factor)}


def describe_run(recipe: Recipe) -> str:
    """Parameter counts and peak memory of a recipe on each process, as text.

    UserError if its model is neither on disk nor a published one.
    """
    run, model, architecture = run_of(recipe)
    own = [tuple(weight.shape) for weight in model.parameters()]
    is_adapter, averages = recipe.model.train == "lora", recipe.trainer.ema_decay is not None
    trained = adapter_shapes(model, run.rank, recipe.lora.targets) if is_adapter else own
    parameters, learned = (sum(map(math.prod, shapes)) for shapes in (own, trained))
    table = open_sizes(recipe.model.path)[0].config.get("pos_embed_max_size", 0) ** 2 * run.channels  # not trained
    counts = {"transformer": parameters, "trained": learned}
    if recipe.model.target_time == "auxiliary":
        channels = time_channels_of(model)
        counts["target-time embedding"] = EMBEDDING_INPUTS * channels + channels * (channels + 2)
    copies = 0 if is_adapter else averages + recipe.objective.needs_teacher
    rows = {
        "transformer": (parameters + table) * (FLOAT32 if run.dtype == "float32" else 2),
        "copies of it": copies * FLOAT32 * parameters,
        "text encoders and VAE": run.encoder_bytes,
        "adapters": (1 + averages) * FLOAT32 * learned if is_adapter else 0,
        "optimiser moments": FLOAT32 * sum(state_values(shape, recipe.optimizer) for shape in trained),
        "gradients": FLOAT32 * learned,
        **activations(run, model, architecture),
    }
    rows = {name: each for name, each in rows.items() if each}
    lines = [f"{name:<22} {number:>16,}" for name, number in counts.items()]
    where = f"Estimated peak memory of one process ({'GPU' if run.gpu else 'CPU'})"
    return "\n".join(["Parameters", *lines, "", where, format_memory(rows | {"total": sum(rows.values())})])
