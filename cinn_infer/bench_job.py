"""What a benchmark measures: a pipeline folder and one call of it, on disk for its processes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from safetensors.numpy import load_file, save_file

from cinn_infer.calls import Call
from fast_diffusers.caching.intercept import Interceptor
from fast_diffusers.models import FluxTransformer2DModel
from fast_diffusers.pipelines import FluxPipeline
from fast_diffusers.pipelines.base import Pipeline
from fast_diffusers.pipelines.shipped import SHIPPED, open_pipeline, pipeline_folder
from fast_diffusers.random import Generator
from fast_diffusers.schedulers import FlowMatchEulerDiscreteScheduler

FLUX_BLOCK = dict(
    in_channels=64,
    num_layers=4,
    num_single_layers=8,
    attention_head_dim=64,
    num_attention_heads=8,
    joint_attention_dim=512,
    pooled_projection_dim=512,
    axes_dims_rope=(16, 24, 24),
)
FLUX_BLOCK_SIDE, FLUX_BLOCK_TEXT = 16, 32  # 256 + 32 tokens

FILE, TENSORS = "job.json", "call.safetensors"


@dataclass(frozen=True)
class Job:
    """A benchmark's object.

    Attributes:
        model: pipeline folder.
        call: arguments of its call; arrays stand for tensors.
        forward: measure one forward of the transformer, with the inputs it gets in that call, in place of the call.
        threads: of every backend.
    """

    model: str
    call: Mapping[str, Any]
    forward: bool
    threads: int

    def write(self, folder: Path) -> None:
        """Write it into a folder."""
        tensors = {name: value for name, value in self.call.items() if isinstance(value, np.ndarray)}
        plain = {name: value for name, value in self.call.items() if name not in tensors}
        save_file(tensors, folder / TENSORS)
        content = {"model": self.model, "call": plain, "forward": self.forward, "threads": self.threads}
        (folder / FILE).write_text(json.dumps(content), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Job:
        """Read it again."""
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return cls(**content | {"call": {**content["call"], **load_file(folder / TENSORS)}})

    def open(self) -> Pipeline:
        """The pipeline."""
        return open_pipeline(self.model)

    def arguments(self) -> dict[str, Any]:
        """Of the pipeline's call, with tensors and a new generator."""
        call = {name: paddle.to_tensor(v) if isinstance(v, np.ndarray) else v for name, v in self.call.items()}
        return {**call, "generator": Generator(0)}


def preset(name: str, folder: Path, call: Mapping[str, Any], forward: bool, threads: int) -> Job:
    """The job of a preset or pipeline folder; files that it needs go to `folder`.

    Raises:
        UserError: neither a preset nor a pipeline folder.
    """
    if name == "flux-block":
        write_flux_block(folder / "flux-block")
        rng = np.random.default_rng(0)
        embeds = {
            "prompt_embeds": rng.standard_normal([1, FLUX_BLOCK_TEXT, FLUX_BLOCK["joint_attention_dim"]], np.float32),
            "pooled_prompt_embeds": rng.standard_normal([1, FLUX_BLOCK["pooled_projection_dim"]], np.float32),
        }
        size = {"height": 16 * FLUX_BLOCK_SIDE, "width": 16 * FLUX_BLOCK_SIDE}
        made = {"output_type": "latent", "num_inference_steps": 1, **embeds, **size}
        return Job(str(folder / "flux-block"), {**made, **call}, True, threads)
    steps, prompt = (4, "3") if name in SHIPPED else (1, "a photo of a cat")
    made = {"output_type": "np", "num_inference_steps": steps, "prompt": prompt}
    return Job(str(pipeline_folder(name).resolve()), {**made, **call}, forward, threads)


def write_flux_block(folder: Path) -> None:
    """A FLUX pipeline folder with nothing but a scheduler and a transformer of random weights, none of them zero."""
    paddle.seed(0)
    model = FluxTransformer2DModel(**FLUX_BLOCK)
    for weight in model.parameters():
        if not float(weight.abs().max()):  # what starts at zero would hide the rest
            weight.set_value(0.02 * paddle.randn(weight.shape))
    FluxPipeline(FlowMatchEulerDiscreteScheduler(), *[None] * 5, model).save_pretrained(folder)


class _Caught(Exception):
    """Carries the arguments of a call that did not take place."""


def forward_arguments(pipe: Pipeline, job: Job) -> tuple[tuple, dict[str, Any]]:
    """(args, kwargs) of the first call of the transformer's forward in the job's call; the model does not run."""

    def catch(original: Callable, args: tuple, kwargs: dict) -> None:
        raise _Caught(args, kwargs)

    hook = Interceptor(pipe.transformer, "forward", catch)
    try:
        pipe(**job.arguments())
    except _Caught as caught:
        return caught.args
    finally:
        hook.remove()
    raise AssertionError("the pipeline made an image without its transformer")


def forward_tensors(pipe: Pipeline, job: Job) -> dict[str, np.ndarray]:
    """The tensors among `forward_arguments`, by name."""
    args, kwargs = forward_arguments(pipe, job)
    call = Call(type(pipe.transformer).forward.__get__(pipe.transformer), args, kwargs)
    return {name: tensor.numpy() for name, tensor in zip(call.names, call.tensors, strict=True)}
