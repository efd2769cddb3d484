"""Memory and time of loading a large sharded checkpoint: `python benchmarks/load_memory.py [--dtype bfloat16]`.

Writes random weights of a SANA transformer as diffusers does, in shards, loads them in a process of its own and deletes
them. The figure is that process's peak of resident memory over what it was before, as a share of the model's size.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import paddle

import fast_diffusers  # noqa: F401  (before paddle)
from fast_diffusers.models import SanaTransformer2DModel
from fast_diffusers.models.checkpoint_io import Entry, linear_weights, write_checkpoint, write_text


def lazy_model(num_bytes: float) -> SanaTransformer2DModel:
    """SANA, without its weights, with so many layers of the usual width that they have about that size in float32."""

    def model(num_layers: int) -> SanaTransformer2DModel:
        with paddle.LazyGuard():
            return SanaTransformer2DModel(num_layers=num_layers)

    one, two = (sum(4 * math.prod(w.shape) for w in model(n).parameters()) for n in (1, 2))
    return model(1 + max(0, round((num_bytes - one) / (two - one))))


def write_random(model: SanaTransformer2DModel, folder: Path, max_shard_size: str) -> int:
    """Write random float32 weights in diffusers' layout without ever holding them; their bytes."""
    linear, generator = linear_weights(model), np.random.default_rng(0)

    def random(shape: tuple[int, ...]) -> np.ndarray:
        return generator.standard_normal(shape, np.float32)

    entries = {}
    for name, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)[:: -1 if name in linear else 1]
        entries[name] = Entry(shape, "F32", lambda shape=shape: random(shape))
    write_checkpoint(entries, folder, model.weight_stems["diffusers"], "diffusers", max_shard_size)
    write_text(folder / model.config_name, model.to_json_string(to_diffusers=True))
    return sum(entry.num_bytes for entry in entries.values())


def load(folder: Path, dtype: str) -> dict[str, float]:
    """Load the model in this process, which must have done nothing large before."""
    paddle.zeros([1])  # what Paddle itself takes is not the checkpoint's
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, start = _memory("VmRSS"), time.perf_counter()
    model = SanaTransformer2DModel.from_pretrained(folder, paddle_dtype=dtype)
    seconds = time.perf_counter() - start
    size = sum(weight.size * weight.element_size() for weight in model.state_dict().values())
    peak = _memory("VmHWM") - before
    return {"model_bytes": size, "peak_bytes": peak, "ratio": peak / size, "seconds": seconds}


def measure(num_bytes: float, max_shard_size: str, dtype: str, folder: str | None) -> dict[str, float]:
    """Write, load in a fresh process that shares this one's terminal, delete."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        size = write_random(lazy_model(num_bytes), Path(temporary), max_shard_size)
        shards = len(list(Path(temporary).glob("*.safetensors")))
        command = [sys.executable, os.path.abspath(__file__), "--load", temporary, "--dtype", dtype]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return {"file_bytes": size, "shards": shards, **json.loads(run.stdout.splitlines()[-1])}


def _memory(field: str) -> int:
    """Bytes of resident memory, now (VmRSS) or at its peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the checkpoint (default: %(default)s)")
    parser.add_argument("--max_shard_size", default="500MB", help="default: %(default)s")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="to load as")
    parser.add_argument("--folder", help="where to put the checkpoint for the time being (default: the system's)")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        print(json.dumps(load(arguments.load, arguments.dtype)))
        return
    figures = measure(arguments.gigabytes * 1e9, arguments.max_shard_size, arguments.dtype, arguments.folder)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
