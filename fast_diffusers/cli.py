"""The `fast-diffusers` command: demo, train, sample, eval, export, bench, convert, doctor."""

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
from fast_diffusers.model_arguments import add_option, add_student_arguments, open_student

# Module and help. Imported when called: this package does not depend on the others.
SCRIPTS = {
    "demo": ("distill.demo", "distil, evaluate and draw the embedded digits in minutes"),
    "eval": ("distill.evaluate", "measure a student against its teacher and real data"),
    "export": ("cinn_infer.export_command", "write a pipeline as graphs for deployment"),
}
GROUPS = {
    "train": (
        "train a teacher or a few-step student",
        {
            "flux-lightning": ("distill.train_flux_lightning", "distil a flow model into a few-step LoRA student"),
            "sana-sprint": ("distill.train_sana_sprint", "distil by sCM and LADD: a SANA told its guidance, or a LoRA"),
            "twinflow": ("distill.train_twinflow", "train an any-step student by TwinFlow or RCGM"),
            "teacher": ("distill.train_teacher", "train a small FLUX teacher from scratch"),
        },
    ),
    "bench": (
        "measure backends or caches on this machine",
        {
            "infer": ("cinn_infer.benchmark", "what can run a model here, side by side"),
            "cache": ("distill.bench_cache", "time against quality of training-free caches"),
        },
    ),
}


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
    if arguments.command in SCRIPTS:
        return _run_script(SCRIPTS[arguments.command][0], arguments.command, rest)
    if arguments.command in GROUPS:
        module, _ = GROUPS[arguments.command][1][arguments.what]
        return _run_script(module, f"{arguments.command} {arguments.what}", rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return {"sample": sample, "convert": convert, "doctor": diagnose}[arguments.command](arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fast-diffusers", description="Few-step image diffusion on PaddlePaddle.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    for command, (_, text) in SCRIPTS.items():
        commands.add_parser(command, add_help=False, help=text)
    for command, (text, scripts) in GROUPS.items():
        choices = commands.add_parser(command, help=text).add_subparsers(dest="what", required=True, metavar="WHAT")
        for name, (_, help) in scripts.items():
            choices.add_parser(name, add_help=False, help=help)
    _add_sample_arguments(commands.add_parser("sample", help="generate images", allow_abbrev=False))
    _add_convert_arguments(
        commands.add_parser(
            "convert", help="rewrite a pipeline, model or LoRA in Paddle's or diffusers' layout", allow_abbrev=False
        )
    )
    report = commands.add_parser("doctor", help="check this installation and say what will run how")
    report.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def _add_sample_arguments(parser: argparse.ArgumentParser) -> None:
    add = partial(add_option, parser)
    add("model", default="digits", metavar="DIR", help="pipeline folder, or a shipped one (default: %(default)s)")
    add("prompt", action="append", required=True, help="what to draw; repeat for several")
    add_student_arguments(parser)
    add("steps", type=int, default=4, help="number of sampling steps (default: %(default)s)")
    add("guidance_scale", type=float, default=3.5, help="strength of the guidance (default: %(default)s)")
    add("num_images", type=int, default=1, help="images per prompt (default: %(default)s)")
    add("seed", type=int, default=0, help="image i has the noise of seed + i (default: %(default)s)")
    add("height", type=int, help="in pixels (default: the model's)")
    add("width", type=int, help="in pixels (default: the model's)")
    add("dtype", choices=["float32", "bfloat16", "float16"], help="of the weights (default: as stored)")
    add("output_dir", default="outputs/samples", metavar="DIR", help="where the PNG files go (default: %(default)s)")


def _add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    add = partial(add_option, parser)
    parser.add_argument("source", metavar="SOURCE", help="folder of a pipeline or model, or LoRA file")
    parser.add_argument("target", metavar="TARGET", help="what to write: a new folder, or LoRA file")
    add("layout", required=True, choices=["paddle", "diffusers"], help="of what is written")
    add("max_shard_size", default="10GB", metavar="SIZE", help="split larger weights (default: %(default)s)")
    add("without", action="append", default=[], metavar="NAME", help="leave a pipeline's component out; repeatable")
    add("model", metavar="DIR", help="model or pipeline that a LoRA is for, where its names do not tell its layers")
    add("lora_alpha", type=float, help="alpha of a LoRA file that does not store it")
    parser.add_argument("--json", action="store_true", help="print the report as JSON, with every name in it")


def sample(arguments: argparse.Namespace) -> int:
    """Generate images and write `image-000.png`, ...; images of one prompt are neighbours."""
    from fast_diffusers.random import Generator

    if arguments.num_images < 1:
        raise UserError(f"--num_images must be positive, got {arguments.num_images}")
    if arguments.seed < 0:
        raise UserError(f"--seed must not be negative, got {arguments.seed}")
    pipe = open_student(arguments.model, arguments, arguments.dtype)
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
    run = importlib.import_module(module).main
    if module.startswith("distill."):  # which can be stopped, and resumed
        importlib.import_module("distill.commands").run(run, argv)
    else:
        run(argv)
    return 0


if __name__ == "__main__":
    main()
