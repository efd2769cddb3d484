"""FLUX's transformer in PyTorch, as a backend of `fast-diffusers bench infer --torch PYTHON`, which starts this there.

Needs PyTorch, diffusers, numpy and safetensors; onnx and onnxscript too for an ONNX file. Called with a benchmark's
folder, which holds the model in diffusers' layout and its inputs, and the name of a backend, or of the file to write:

    torch-fp32, torch-bf16                   eager
    torch-compile-fp32, torch-compile-bf16   torch.compile as it is
    torch-frozen-fp32, torch-frozen-bf16     torch.compile, whose inductor keeps the weights packed as constants
    torch.onnx                               write this file by torch.onnx.export, and the names of its inputs
"""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import torch
import torch._inductor.config
from diffusers import FluxTransformer2DModel, __version__
from safetensors.torch import load_file

LOOP = runpy.run_path(str(Path(__file__).parents[1] / "cinn_infer" / "bench_loop.py"))


def load(folder: Path, precision: str) -> tuple[FluxTransformer2DModel, dict[str, torch.Tensor]]:
    """The model and its inputs; positions stay as they are, whatever the precision."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    model = FluxTransformer2DModel.from_pretrained(folder / "torch", torch_dtype=dtype).eval()
    inputs = load_file(folder / "torch_inputs.safetensors")
    return model, {name: each if name.endswith("_ids") else each.to(dtype) for name, each in inputs.items()}


def open_task(folder: Path, backend: str):
    """What a backend runs, see `bench_loop.Task`."""
    *_, kind, precision = backend.split("-")
    model, inputs = load(folder, precision)
    torch._inductor.config.freezing = kind == "frozen"
    call = torch.compile(model) if kind in ("compile", "frozen") else model
    last = []

    @torch.no_grad()
    def run() -> None:
        last[:] = [call(**inputs, return_dict=False)[0]]

    def save(path: Path) -> None:
        np.save(path, last[0].float().numpy())

    return LOOP["Task"](run, save, {}, {"torch": torch.__version__, "diffusers": __version__})


class Forward(torch.nn.Module):
    """The model as a function of its tensors by place."""

    def __init__(self, model: FluxTransformer2DModel, names: list[str]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        """The velocity, packed."""
        return self.model(**dict(zip(self.names, tensors, strict=True)), return_dict=False)[0]


def write_onnx(folder: Path, name: str) -> None:
    """Write the graph, and the names of its inputs beside it."""
    model, inputs = load(folder, "fp32")
    names = list(inputs)
    wrapped = Forward(model, names).eval()
    torch.onnx.export(
        wrapped, tuple(inputs.values()), folder / name, input_names=names, dynamo=True, external_data=True
    )
    (folder / name).with_suffix(".json").write_text(json.dumps(names))


if __name__ == "__main__":
    folder, what = Path(sys.argv[1]), sys.argv[2]
    if what.endswith(".onnx"):
        write_onnx(folder, what)
    else:
        LOOP["serve"](lambda: open_task(folder, what))
