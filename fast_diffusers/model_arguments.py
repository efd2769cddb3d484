"""The command-line arguments that say which model to run: its folder, a LoRA, the grid of a phased student."""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # importing pipelines takes seconds
    from fast_diffusers.pipelines.base import Pipeline


def add_option(parser: argparse.ArgumentParser, name: str, **settings) -> None:
    """An option that may be spelled with underscores or hyphens."""
    parser.add_argument(*dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]), **settings)


def add_student_arguments(parser: argparse.ArgumentParser) -> None:
    """What makes a pipeline a few-step student: a LoRA, and the grid on which it was trained."""
    add = partial(add_option, parser)
    add("lora", metavar="PATH", help="LoRA file, or folder with one, to add to the model")
    add("lora_scale", type=float, default=1.0, help="strength of the LoRA (default: %(default)s)")
    add("lora_alpha", type=float, help="alpha of a LoRA file that does not store it")
    add("num_phases", type=int, help="follow the phase boundaries of a student trained with this many (default: none)")
    add("num_cells", type=int, default=100, help="cells of that student's solver grid (default: %(default)s)")


def open_student(model: str, arguments: argparse.Namespace, dtype: str | None = None) -> Pipeline:
    """The pipeline, its LoRA fused, with the student's scheduler.

    Raises:
        FileNotFoundError, UserError: a file is missing or does not fit.
    """
    from fast_diffusers.pipelines.shipped import open_pipeline
    from fast_diffusers.schedulers import PhasedConsistencyScheduler

    pipe = open_pipeline(model, dtype)
    if arguments.lora is not None:
        pipe.load_lora_weights(arguments.lora, alpha=arguments.lora_alpha)
        pipe.fuse_lora(arguments.lora_scale)
    if arguments.num_phases is not None:
        grid = {"num_phases": arguments.num_phases, "num_cells": arguments.num_cells}
        pipe.scheduler = PhasedConsistencyScheduler.from_config(dict(pipe.scheduler.config) | grid)
    return pipe
