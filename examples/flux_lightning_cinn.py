"""FLUX-Lightning compiled by CINN, with the time of every stage.

    python examples/flux_lightning_cinn.py --prompt 3 --lora outputs/demo/lora --num_phases 4    # the digits student
    python examples/flux_lightning_cinn.py --model FLUX.1-dev --dtype bfloat16 --lora LORA --num_phases 4 --prompt "..."

The LoRA is fused, the transformer compiled: by CINN where the installed PaddlePaddle has it and a GPU is there, else as
Paddle's static graphs (`--backend auto`). The images are those after warm-up calls. With `--export DIR` the pipeline is
exported too, opened again and run on the same noise.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import cinn_infer
from cinn_infer.backends import BACKENDS
from cinn_infer.engines import PRECISIONS, RUNTIMES
from cinn_infer.export_command import available_format
from cinn_infer.stages import Stages, with_rest
from distill.commands import run
from fast_diffusers.errors import UserError
from fast_diffusers.model_arguments import add_option, add_student_arguments, open_student
from fast_diffusers.random import Generator


def parser() -> argparse.ArgumentParser:
    """The script's arguments."""
    made = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = partial(add_option, made)
    add("model", default="digits", metavar="DIR", help="pipeline folder, or a shipped one (default: %(default)s)")
    add_student_arguments(made)
    add("prompt", action="append", required=True, help="what to draw; repeat for several")
    add("steps", type=int, default=4, help="number of sampling steps (default: %(default)s)")
    add("guidance_scale", type=float, default=3.5, help="strength of the guidance (default: %(default)s)")
    add("seed", type=int, default=0, help="image i has the noise of seed + i (default: %(default)s)")
    add("height", type=int, help="in pixels (default: the model's)")
    add("width", type=int, help="in pixels (default: the model's)")
    add("dtype", choices=["float32", "bfloat16", "float16"], help="of the weights (default: float32)")
    add("backend", default="auto", choices=BACKENDS, help="what compiles (default: %(default)s)")
    add("granularity", default="model", choices=["model", "loop", "block"], help="of graphs (default: %(default)s)")
    add("warmup", type=int, default=2, help="calls before those that count (default: %(default)s)")
    add("export", type=Path, metavar="DIR", help="export to this folder too, open that and run it")
    add("runtime", default="auto", choices=["auto", *RUNTIMES], help="of the export (default: %(default)s)")
    add("precision", default="fp32", choices=PRECISIONS, help="of the export (default: %(default)s)")
    add("output_dir", type=Path, default=Path("outputs/flux_lightning_cinn"), metavar="DIR", help="(%(default)s)")
    return made


def timed(pipe: Any, call: Callable[[], np.ndarray], warmup: int) -> tuple[np.ndarray, float, dict[str, float]]:
    """(images [N, H, W, C] of the last call, milliseconds of the first one, milliseconds of the last one by stage)."""
    stages, first = Stages(pipe), 0.0
    for _ in range(warmup + 1):
        stages.seconds.clear()
        started = time.perf_counter()
        images = call()
        seconds = time.perf_counter() - started
        first = first or 1000 * seconds
    stages.remove()
    parts = {name: 1000 * each for name, each in with_rest(stages.seconds, seconds).items()}
    return images, first, parts | {"all": 1000 * seconds}


def show(title: str, first: float, parts: dict[str, float]) -> None:
    """One line."""
    print(
        f"{title}: " + ", ".join(f"{name} {ms:.1f} ms" for name, ms in parts.items()) + f"; first call {first:.0f} ms"
    )


def write(pipe: Any, images: np.ndarray, folder: Path) -> None:
    """`image-000.png`, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(pipe.numpy_to_pil(images)):
        image.save(folder / f"image-{i:03d}.png")
    print(f"{len(images)} images in {folder}")


def main(argv: Sequence[str] | None = None) -> None:
    """Write images, with the times of what made them."""
    arguments = parser().parse_args(argv)
    if arguments.warmup < 0:
        raise UserError(f"--warmup must not be negative, got {arguments.warmup}")
    size = {"height": arguments.height, "width": arguments.width}

    def images_of(pipe: Any) -> np.ndarray:
        return pipe(
            arguments.prompt,
            **size,
            num_inference_steps=arguments.steps,
            guidance_scale=arguments.guidance_scale,
            generator=[Generator(arguments.seed + i) for i in range(len(arguments.prompt))],
            output_type="np",
        ).images

    pipe = open_student(arguments.model, arguments, arguments.dtype)
    pipe.set_progress_bar_config(disable=True)
    compiled = cinn_infer.compile(pipe, arguments.backend, arguments.granularity)
    images, first, parts = timed(pipe, lambda: images_of(pipe), arguments.warmup)
    report = compiled.report()
    print(
        f"backend_used {compiled.backend_used}; {report['graph_count']} graphs, compiled in "
        f"{report['compile_seconds']:.1f} s, {report['recompilations']} recompilations, "
        f"{report['cache']['hits']} graphs read from {report['cache']['directory']}"
    )
    for fallback in report["fallbacks"]:
        print(f"fallback: {fallback}")
    show("compiled", first, parts)
    write(pipe, images, arguments.output_dir)
    compiled.restore()

    if arguments.export is None:
        return
    started = time.perf_counter()
    format = "paddle" if arguments.runtime == "paddle" else available_format()
    cinn_infer.export(pipe, arguments.export, format, [size])
    exported = time.perf_counter()
    loaded = cinn_infer.load(arguments.export, arguments.runtime, arguments.precision)
    loaded.set_progress_bar_config(disable=True)
    opened = time.perf_counter()
    print(f"exported in {exported - started:.1f} s, checked and opened in {opened - exported:.1f} s")
    again, first, parts = timed(loaded, lambda: images_of(loaded), arguments.warmup)
    ran = loaded.graphs.report()
    show(f"exported, {ran['runtime']} {ran['precision']}", first, parts)
    print(f"largest difference of the images, of values from 0 to 1: {np.abs(again - images).max():.1e}")
    write(loaded, again, arguments.output_dir / "exported")


if __name__ == "__main__":
    run(main)
