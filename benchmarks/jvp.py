"""What a forward-mode derivative costs, and how exact it is: `python benchmarks/jvp.py [--families NAME ...]`.

For every family, a model with random weights and its derivative in latents and time together. Times and memory are
those of `jvp` in float32, divided by those of a plain forward without gradients; calls alternate, medians are compared.
Memory is the allocator's peak above what is held before the call, and, in the last column, the whole peak with weights.
The error is the relative L2 distance from central differences of order 6, both in float64, for the first sample.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import paddle
from paddle import Tensor

from fast_diffusers import models
from fast_diffusers.forward_ad import central_difference, jvp
from fast_diffusers.pipelines.shipped import open_pipeline

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """A model and a point: `build()` -> model, `inputs(model, batch)` -> forward arguments in float32.

    `names` are those of the latents and the time, `time_change` the change of time that moves embedded angles by one,
    `eps` the step of the differences (smaller where a ReLU could cross zero within it).
    """

    build: Callable[[], paddle.nn.Layer]
    inputs: Callable[[int], Inputs]
    batch: int
    names: tuple[str, str] = field(default=("hidden_states", "timestep"))
    time_change: float = 1.0
    eps: float = 1e-6


def random_model(name: str, **config: Any) -> Callable[[], paddle.nn.Layer]:
    """A model of a class in `fast_diffusers.models`, no weight of it zero."""

    def build() -> paddle.nn.Layer:
        paddle.seed(0)
        model = getattr(models, name)(**config)
        with paddle.no_grad():
            for weight in model.parameters():
                weight.set_value(weight + 0.02 * paddle.randn(weight.shape))
        model.eval()
        return model

    return build


def digits_teacher() -> paddle.nn.Layer:
    """The transformer that ships with the project."""
    return open_pipeline("digits").transformer


def _positions(rows: int, columns: int) -> Tensor:
    grid = paddle.meshgrid(paddle.arange(rows), paddle.arange(columns))
    return paddle.stack([paddle.zeros_like(grid[0]), *grid], axis=-1).reshape([-1, 3]).astype("float32")


def flux_inputs(side: int, channels: int, tokens: int, width: int, pooled: int, guidance: bool) -> Callable:
    """Inputs of FLUX: side x side image tokens, text tokens, guidance where the model embeds it."""

    def inputs(batch: int) -> Inputs:
        return dict(
            hidden_states=paddle.randn([batch, side * side, channels]),
            encoder_hidden_states=paddle.randn([batch, tokens, width]),
            pooled_projections=paddle.randn([batch, pooled]),
            timestep=paddle.linspace(0.2, 0.8, batch),
            img_ids=_positions(side, side),
            txt_ids=paddle.zeros([tokens, 3]),
            guidance=paddle.full([batch], 3.0) if guidance else None,
        )

    return inputs


def sd3_inputs(batch: int) -> Inputs:
    """32 x 32 latents, 77 text tokens."""
    return dict(
        hidden_states=paddle.randn([batch, 16, 32, 32]),
        encoder_hidden_states=paddle.randn([batch, 77, 512]),
        pooled_projections=paddle.randn([batch, 256]),
        timestep=paddle.linspace(200.0, 800.0, batch),
    )


def sana_inputs(batch: int) -> Inputs:
    """16 x 16 latents, 77 text tokens, time in [0, 1] as SANA-Sprint has it."""
    return dict(
        hidden_states=paddle.randn([batch, 32, 16, 16]),
        encoder_hidden_states=paddle.randn([batch, 77, 256]),
        timestep=paddle.linspace(0.2, 0.8, batch),
        guidance=paddle.full([batch], 0.45),
        encoder_attention_mask=paddle.ones([batch, 77], "int64"),
    )


def qwen_image_inputs(batch: int) -> Inputs:
    """16 x 16 image tokens, 77 text tokens."""
    return dict(
        hidden_states=paddle.randn([batch, 256, 64]),
        encoder_hidden_states=paddle.randn([batch, 77, 256]),
        encoder_hidden_states_mask=paddle.ones([batch, 77], "int64"),
        timestep=paddle.linspace(0.2, 0.8, batch),
        img_shapes=[[(1, 16, 16)]] * batch,
    )


def z_image_inputs(batch: int) -> Inputs:
    """32 x 32 latents, captions of 77 tokens."""
    return dict(
        x=paddle.randn([batch, 16, 1, 32, 32]),
        t=paddle.linspace(0.2, 0.8, batch),
        cap_feats=[paddle.randn([77, 256]) for _ in range(batch)],
    )


FAMILIES = {
    "flux digits teacher": Family(digits_teacher, flux_inputs(4, 4, 1, 10, 10, True), 64, time_change=1e-3),
    "flux": Family(
        random_model(
            "FluxTransformer2DModel",
            num_layers=2,
            num_single_layers=4,
            attention_head_dim=64,
            num_attention_heads=8,
            joint_attention_dim=256,
            pooled_projection_dim=128,
            axes_dims_rope=(16, 24, 24),
        ),
        flux_inputs(16, 64, 77, 256, 128, False),
        2,
        time_change=1e-3,
    ),
    "sd3": Family(
        random_model(
            "SD3Transformer2DModel",
            sample_size=32,
            num_layers=4,
            num_attention_heads=8,
            joint_attention_dim=512,
            caption_projection_dim=512,
            pooled_projection_dim=256,
            pos_embed_max_size=32,
        ),
        sd3_inputs,
        2,
    ),
    "sana sprint": Family(
        random_model(
            "SanaTransformer2DModel",
            num_attention_heads=16,
            attention_head_dim=32,
            num_layers=4,
            num_cross_attention_heads=8,
            cross_attention_head_dim=64,
            cross_attention_dim=512,
            caption_channels=256,
            guidance_embeds=True,
            qk_norm="rms_norm_across_heads",
        ),
        sana_inputs,
        2,
        eps=1e-7,
    ),
    "qwen image": Family(
        random_model(
            "QwenImageTransformer2DModel",
            in_channels=64,
            num_layers=3,
            attention_head_dim=64,
            num_attention_heads=8,
            joint_attention_dim=256,
            axes_dims_rope=(16, 24, 24),
        ),
        qwen_image_inputs,
        2,
        time_change=1e-3,
    ),
    "z image": Family(
        random_model(
            "ZImageTransformer2DModel",
            dim=512,
            n_layers=3,
            n_refiner_layers=1,
            n_heads=8,
            n_kv_heads=8,
            cap_feat_dim=256,
            axes_dims=(16, 24, 24),
            axes_lens=(256, 64, 64),
        ),
        z_image_inputs,
        2,
        names=("x", "t"),
        time_change=1e-3,
    ),
}


def measure(family: Family, batch: int | None = None, repeats: int = 5) -> dict[str, float]:
    """Error, and time and memory of `jvp` over those of a forward."""
    model = family.build()
    paddle.seed(1)
    inputs = family.inputs(batch or family.batch)
    fn, primals, tangents = problem(family, model, inputs)

    def forward() -> Any:
        with paddle.no_grad():
            return fn(*primals)

    def derivative() -> Any:
        return jvp(fn, primals, tangents)

    seconds: dict[Callable, list[float]] = {forward: [], derivative: []}
    peaks = {call: peak_memory(call) for call in seconds}
    for _ in range(repeats):
        for call, times in seconds.items():
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    plain, dual = (statistics.median(seconds[call]) for call in (forward, derivative))
    held = held_memory()
    figures = {
        "parameters (M)": sum(weight.size for weight in model.parameters()) / 1e6,
        "forward (ms)": plain * 1e3,
        "jvp (ms)": dual * 1e3,
        "time ratio": dual / plain,
        "memory ratio": peaks[derivative] / peaks[forward],
        "memory ratio with weights": (held + peaks[derivative]) / (held + peaks[forward]),
    }
    return {"error": error(family, model, family.inputs(1)), **figures}


def problem(family: Family, model: paddle.nn.Layer, inputs: Inputs) -> tuple[Callable, list[Tensor], list[Tensor]]:
    """(function of latents and time, the point, a random direction)."""
    primals = [inputs[name] for name in family.names]
    x, t = (paddle.randn(primal.shape).astype(primal.dtype) for primal in primals)

    def fn(*values: Tensor) -> Any:
        return model(**{**inputs, **dict(zip(family.names, values, strict=True))}, return_dict=False)[0]

    return fn, primals, [x, t * family.time_change]


def error(family: Family, model: paddle.nn.Layer, inputs: Inputs) -> float:
    """Relative L2 distance of `jvp` from differences in float64; makes the model a float64 one."""
    model.to(dtype="float64")
    fn, primals, tangents = problem(family, model, {name: _double(x) for name, x in inputs.items()})
    slope = _joined(jvp(fn, primals, tangents)[1])
    with paddle.no_grad():
        expected = _joined(central_difference(fn, primals, tangents, family.eps, order=6))
    return ((slope - expected).norm() / expected.norm()).item()


def _double(x: Any) -> Any:
    if isinstance(x, list):
        return [_double(y) for y in x]
    return x.astype("float64") if isinstance(x, Tensor) and x.dtype == paddle.float32 else x


def _joined(x: Tensor | Sequence[Tensor]) -> Tensor:
    return x if isinstance(x, Tensor) else paddle.stack(list(x))


def held_memory() -> int:
    """Bytes that tensors hold now."""
    if paddle.is_compiled_with_cuda():
        return paddle.device.cuda.memory_allocated()
    return paddle.base.core.host_memory_stat_current_value("Allocated", 0)


def peak_memory(call: Callable[[], Any]) -> int:
    """Most bytes that tensors hold during a call, above what they held before."""
    call()
    held = held_memory()
    core = paddle.base.core
    if paddle.is_compiled_with_cuda():
        paddle.device.cuda.reset_max_memory_allocated()
        call()
        return paddle.device.cuda.max_memory_allocated() - held
    core.host_memory_stat_reset_peak_value("Allocated", 0)
    call()
    return core.host_memory_stat_peak_value("Allocated", 0) - held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    results = {}
    for name in args.families:
        results[name] = measure(FAMILIES[name], repeats=args.repeats)
        if len(results) == 1:
            print("| family | " + " | ".join(results[name]) + " |\n|---|" + "---|" * len(results[name]))
        cells = (f"{x:.1e}" if key == "error" else f"{x:.2f}" for key, x in results[name].items())
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
