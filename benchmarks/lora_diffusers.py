"""The same LoRA file in this package and in PyTorch diffusers: the largest difference of their outputs.

    python benchmarks/lora_diffusers.py write FOLDER --model MODEL --inputs IO.npz     # in this project's environment
    python benchmarks/lora_diffusers.py compare FOLDER                                 # with torch, diffusers and peft

`write` puts a random adapter on a FLUX transformer, saves it in Paddle's layout, converts that file to diffusers'
layout and keeps the output next to it. `compare` loads that file into diffusers' model by `load_lora_adapter` and
prints the difference as JSON; it fails above --tolerance.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

TARGETS = ("attn.to_q", "attn.add_k_proj", "attn.to_out.0", "ff.net.0.proj", "proj_mlp", "x_embedder")
LORA_FILE = "pytorch_lora_weights.safetensors"


def write(folder: Path, model_folder: Path, inputs_file: Path, rank: int = 3, alpha: float = 5.0) -> None:
    """The half in Paddle: FOLDER/paddle and FOLDER/diffusers with the LoRA file of each layout, FOLDER/paddle.npz.

    `inputs_file` has the arguments of the model's forward as arrays "in_<name>".
    """
    import paddle

    import fast_diffusers  # noqa: F401  (before paddle's use)
    from fast_diffusers import lora
    from fast_diffusers.convert import convert
    from fast_diffusers.models import FluxTransformer2DModel

    model = FluxTransformer2DModel.from_pretrained(model_folder)
    record = np.load(inputs_file)
    inputs = {name: record[name] for name in record if name.startswith("in_")}
    arguments = {name.removeprefix("in_"): paddle.to_tensor(value) for name, value in inputs.items()}
    generator = np.random.default_rng(0)
    with paddle.no_grad():
        base = model(**arguments, return_dict=False)[0].numpy()
        for parameter in lora.inject(model, rank, alpha, TARGETS):
            parameter.set_value(0.1 * generator.standard_normal(parameter.shape).astype(np.float32))
        output = model(**arguments, return_dict=False)[0].numpy()
    lora.save(model, folder / "paddle")
    print(convert(folder / "paddle", folder / "diffusers", "diffusers").as_text())
    np.savez(folder / "paddle.npz", base=base, output=output, model=str(model_folder.resolve()), **inputs)


def compare(folder: Path) -> dict[str, float]:
    """The half in PyTorch: largest differences from Paddle's outputs, without and with the adapter."""
    import torch
    from diffusers import FluxTransformer2DModel

    record = np.load(folder / "paddle.npz")
    model = FluxTransformer2DModel.from_pretrained(str(record["model"])).eval()
    inputs = {name.removeprefix("in_"): torch.from_numpy(record[name]) for name in record if name.startswith("in_")}
    with torch.no_grad():
        base = model(**inputs, return_dict=False)[0].numpy()
        model.load_lora_adapter(folder / "diffusers", weight_name=LORA_FILE, prefix="transformer")
        output = model(**inputs, return_dict=False)[0].numpy()
    return {
        "base_difference": float(np.abs(base - record["base"]).max()),
        "lora_difference": float(np.abs(output - record["output"]).max()),
        "largest_output": float(np.abs(record["output"]).max()),
        "lora_effect": float(np.abs(output - base).max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    halves = parser.add_subparsers(dest="half", required=True)
    first = halves.add_parser("write", help="in this project's environment")
    first.add_argument("folder", type=Path, help="what is exchanged")
    first.add_argument("--model", type=Path, required=True, help="folder of a FLUX transformer in diffusers' layout")
    first.add_argument("--inputs", type=Path, required=True, help=".npz with the arguments in_<name> of its forward")
    second = halves.add_parser("compare", help="in an environment with torch, diffusers and peft")
    second.add_argument("folder", type=Path, help="as for write")
    second.add_argument("--tolerance", type=float, default=1e-5, help="default: %(default)s")
    arguments = parser.parse_args()
    if arguments.half == "write":
        write(arguments.folder, arguments.model, arguments.inputs)
        return
    figures = compare(arguments.folder)
    print(json.dumps(figures, indent=2))
    if not figures["lora_difference"] < arguments.tolerance:
        sys.exit(f"the outputs differ by {figures['lora_difference']:.2e}, which is not below {arguments.tolerance:g}")


if __name__ == "__main__":
    main()
