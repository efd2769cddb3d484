"""The `fast-diffusers` command: demo, train, sample, eval, convert, doctor."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import paddle

from fast_diffusers import __version__, doctor
from fast_diffusers.errors import UserError

# Imported when called: this package does not depend on distill.
TRAINERS = {
    "flux-lightning": "distill.train_flux_lightning",
    "twinflow": "distill.train_twinflow",
    "teacher": "distill.train_teacher",
}
SCRIPTS = {"demo": "distill.demo", "eval": "distill.evaluate"}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 1 a user's mistake (one line on stderr) or an unsound installation, 2 usage,
    130 interrupted.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        sys.exit(_dispatch(sys.argv[1:] if argv is None else argv))
    except (ValueError, OSError) as error:
        if "\n" in str(error).strip() and not isinstance(error, UserError):
            raise  # an operator's error, which is long: a mistake of the program, not of the user
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _dispatch(argv: Sequence[str]) -> int:
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command == "train":
        return _run_script(TRAINERS[arguments.method], f"train {arguments.method}", rest)
    if arguments.command in SCRIPTS:
        return _run_script(SCRIPTS[arguments.command], arguments.command, rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return {"sample": sample, "convert": convert, "doctor": diagnose}[arguments.command](arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fast-diffusers", description="Few-step image diffusion on PaddlePaddle.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    commands.add_parser("demo", add_help=False, help="distil, evaluate and draw the embedded digits in minutes")
    train = commands.add_parser("train", help="train a teacher or a few-step student")
    methods = train.add_subparsers(dest="method", required=True, metavar="METHOD")
    methods.add_parser("flux-lightning", add_help=False, help="distil a flow model into a few-step LoRA student")
    methods.add_parser("twinflow", add_help=False, help="train an any-step student by TwinFlow or RCGM")
    methods.add_parser("teacher", add_help=False, help="train a small FLUX teacher from scratch")
    _add_sample_arguments(commands.add_parser("sample", help="generate images", allow_abbrev=False))
    commands.add_parser("eval", add_help=False, help="measure a student against its teacher and real data")
    _add_convert_arguments(
        commands.add_parser(
            "convert", help="rewrite a pipeline, model or LoRA in Paddle's or diffusers' layout", allow_abbrev=False
        )
    )
    report = commands.add_parser("doctor", help="check this installation and say what will run how")
    report.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def _add_sample_arguments(parser: argparse.ArgumentParser) -> None:
    add = partial(_add_option, parser)
    add("model", default="digits", metavar="DIR", help="pipeline folder, or a shipped one (default: %(default)s)")
    add("prompt", action="append", required=True, help="what to draw; repeat for several")
    add("lora", metavar="PATH", help="LoRA file, or folder with one, to add to the model")
    add("lora_scale", type=float, default=1.0, help="strength of the LoRA (default: %(default)s)")
    add("lora_alpha", type=float, help="alpha of a LoRA file that does not store it")
    add("num_phases", type=int, help="follow the phase boundaries of a student trained with this many (default: none)")
    add("num_cells", type=int, default=100, help="cells of that student's solver grid (default: %(default)s)")
    add("steps", type=int, default=4, help="number of sampling steps (default: %(default)s)")
    add("guidance_scale", type=float, default=3.5, help="strength of the guidance (default: %(default)s)")
    add("num_images", type=int, default=1, help="images per prompt (default: %(default)s)")
    add("seed", type=int, default=0, help="image i has the noise of seed + i (default: %(default)s)")
    add("height", type=int, help="in pixels (default: the model's)")
    add("width", type=int, help="in pixels (default: the model's)")
    add("dtype", choices=["float32", "bfloat16", "float16"], help="of the weights (default: as stored)")
    add("output_dir", default="outputs/samples", metavar="DIR", help="where the PNG files go (default: %(default)s)")


def _add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    add = partial(_add_option, parser)
    parser.add_argument("source", metavar="SOURCE", help="folder of a pipeline or model, or LoRA file")
    parser.add_argument("target", metavar="TARGET", help="what to write: a new folder, or LoRA file")
    add("layout", required=True, choices=["paddle", "diffusers"], help="of what is written")
    add("max_shard_size", default="10GB", metavar="SIZE", help="split larger weights (default: %(default)s)")
    add("without", action="append", default=[], metavar="NAME", help="leave a pipeline's component out; repeatable")
    add("model", metavar="DIR", help="model or pipeline that a LoRA is for, where its names do not tell its layers")
    add("lora_alpha", type=float, help="alpha of a LoRA file that does not store it")
    parser.add_argument("--json", action="store_true", help="print the report as JSON, with every name in it")


def _add_option(parser: argparse.ArgumentParser, name: str, **settings) -> None:
    """An option that may be spelled with underscores or hyphens."""
    parser.add_argument(*dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]), **settings)


def sample(arguments: argparse.Namespace) -> int:
    """Generate images and write `image-000.png`, ...; images of one prompt are neighbours."""
    from fast_diffusers.pipelines.shipped import open_pipeline
    from fast_diffusers.random import Generator
    from fast_diffusers.schedulers import PhasedConsistencyScheduler

    if arguments.num_images < 1:
        raise UserError(f"--num_images must be positive, got {arguments.num_images}")
    if arguments.seed < 0:
        raise UserError(f"--seed must not be negative, got {arguments.seed}")
    pipe = open_pipeline(arguments.model, arguments.dtype)
    if arguments.lora is not None:
        pipe.load_lora_weights(arguments.lora, alpha=arguments.lora_alpha)
        pipe.fuse_lora(arguments.lora_scale)
    if arguments.num_phases is not None:
        grid = {"num_phases": arguments.num_phases, "num_cells": arguments.num_cells}
        pipe.scheduler = PhasedConsistencyScheduler.from_config(dict(pipe.scheduler.config) | grid)
    count = len(arguments.prompt) * arguments.num_images
    images = pipe(
        arguments.prompt,
        height=arguments.height,
        width=arguments.width,
        num_inference_steps=arguments.steps,
        guidance_scale=arguments.guidance_scale,
        num_images_per_prompt=arguments.num_images,
        generator=[Generator(arguments.seed + i) for i in range(count)],
    ).images
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        image.save(folder / f"image-{i:03d}.png")
    print(f"{count} images in {folder} ({arguments.steps} steps on {paddle.get_device()})")
    return 0


def convert(arguments: argparse.Namespace) -> int:
    """Convert files, see `fast_diffusers.convert`, and print what was done."""
    from fast_diffusers.convert import convert as run

    report = run(
        arguments.source,
        arguments.target,
        arguments.layout,
        max_shard_size=arguments.max_shard_size,
        without=arguments.without,
        model=arguments.model,
        alpha=arguments.lora_alpha,
    )
    print(json.dumps(report.as_json(), indent=2) if arguments.json else report.as_text())
    return 0


def diagnose(arguments: argparse.Namespace) -> int:
    """Print the report of `fast_diffusers.doctor`."""
    findings = doctor.diagnose()
    print(doctor.as_json(findings) if arguments.json else doctor.as_text(findings))
    return 0 if doctor.is_sound(findings) else 1


def _run_script(module: str, command: str, argv: list[str]) -> int:
    """Run `main(argv)` of a module as the script itself does; its own parser reads and explains the arguments."""
    sys.argv[0] = f"fast-diffusers {command}"  # argparse takes the program's name from here
    importlib.import_module("distill.commands").run(importlib.import_module(module).main, argv)
    return 0


if __name__ == "__main__":
    main()
