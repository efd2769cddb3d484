"""How good a few-step student is: `python distill/evaluate.py --model digits --lora FILE --output DIR`.

Teacher and student sample the same prompts from the same noise with few steps and are measured against the teacher's
samples at many steps: Fréchet distance, precision, recall, diversity; also Fréchet distance to real data and label
accuracy. These reference samples come from other noise. So do not expect zeros and ones: the row of the teacher at as
many steps shows what a perfect student gets with this number of samples. The column "same noise" compares with that
row's samples instead, and would be zero for a student that follows the teacher's paths exactly.

Writes metrics.json, table.txt and comparison.png. Digits and MNIST are measured in the features of a small classifier
that ships with the project; other data needs --inception (FID) and can add --clip (CLIP score).

On several devices: `python -m paddle.distributed.launch --nproc_per_node 2 distill/evaluate.py ...` splits the samples.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from distill.batches import open_data
from distill.commands import run
from distill.config import DataConfig
from distill.data import ImageBatches
from distill.metrics.clip_score import ClipScorer
from distill.metrics.features import (
    ClassifierFeatures,
    Extractor,
    FeatureSet,
    InceptionFeatures,
    extract,
    join,
    measure,
)
from distill.metrics.report import Report, Row, comparison_grid
from distill.metrics.sampling import Sampler, SampleRunner, Samples, SampleSettings
from distill.parallel import World, any_rank, init
from distill.recipe import from_overrides
from distill.roles import AdapterRole
from distill.samplers import SAMPLERS
from fast_diffusers.denoisers import Denoiser
from fast_diffusers.errors import UserError
from fast_diffusers.pipelines import Pipeline
from fast_diffusers.pipelines.components import INDEX
from fast_diffusers.pipelines.label import LabelMethods
from fast_diffusers.pipelines.shipped import SHIPPED, open_pipeline
from fast_diffusers.samplers import euler, phased
from fast_diffusers.time_grids import PhaseGrid, scheduler_mu

REFERENCE = "reference"
MAX_REAL_IMAGES = 10_000


@dataclass(frozen=True, eq=False)
class Comparison:
    """A report, and images to look at: row name to uint8 [K, C, H, W], one column for each noise."""

    report: Report
    images: Mapping[str, np.ndarray]

    def write(self, folder: str | Path) -> None:
        """Write metrics.json, table.txt and comparison.png to `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.report.save(folder / "metrics.json")
        (folder / "table.txt").write_text(self.report.table() + "\n", encoding="utf-8")
        comparison_grid(self.images).save(folder / "comparison.png")


def evaluate_samples(
    reference: FeatureSet,
    samples: Mapping[str, np.ndarray],
    extractor: Extractor,
    labels: np.ndarray | None = None,
    real: FeatureSet | None = None,
) -> dict[str, dict[str, float]]:
    """Metrics of images from anywhere: name to uint8 [N, C, H, W]; see `distill.metrics.features.measure`."""
    return {
        name: measure(extract(extractor, images), reference, real=real, labels=labels)
        for name, images in samples.items()
    }


@dataclass(frozen=True)
class _Run:
    """A row of the table before it is sampled.

    cache_key: names the sampler of a run that may be cached. guided: see `SampleRunner.run`.
    """

    role: str
    steps: int
    seed: int
    denoiser: Denoiser
    sampler: Sampler
    cache_key: str | None = None
    guided: bool = False
    note: str = ""


def compare(
    pipe: Pipeline,
    student: Denoiser | None = None,
    *,
    prompts: Sequence[str],
    extractor: Extractor,
    settings: SampleSettings | None = None,
    steps: Sequence[int] = (1, 2, 4, 8),
    reference_steps: int = 50,
    num_cells: int = 100,
    num_phases: int = 4,
    student_sampler: Sampler | None = None,
    real: FeatureSet | None = None,
    clip: ClipScorer | None = None,
    cache: str | Path | None = None,
    world: World | None = None,
) -> Comparison:
    """Sample teacher and student from the same noise and prompts, and measure both.

    The teacher, `pipe` without adapters, takes Euler steps along its scheduler's shift, with classifier-free guidance
    where it embeds none.

    Args:
        student: what to compare with it, such as `AdapterRole(pipe.denoiser, pipe.transformer, "default")`.
        prompts: one a sample, repeated in order; numbers count as class labels.
        extractor: of the features that everything is measured in.
        steps: step counts of teacher and student.
        reference_steps: steps of the teacher's samples that all others are measured against; their noise has seed + 1.
        num_cells, num_phases: the solver grid that the student was trained on (`time_grids.PhaseGrid`).
        student_sampler: `sampler(velocity, noise, *, steps, generator)` instead of `phased` on that grid.
        real: features of real images.
        clip: also report the CLIP score.
        cache: folder where the teacher's samples are kept and found again.
        world: its ranks share the sampling; the result is the same on all, and so must be the arguments.
    """
    if len(set(steps)) != len(steps) or not steps or min(*steps, reference_steps) < 1:
        raise UserError(f"step counts must be different positive integers, got {list(steps)} and {reference_steps}")
    if not 1 <= num_phases <= num_cells:
        raise UserError(f"a student's grid cannot have {num_phases} phases in {num_cells} cells")
    if student is not None and student_sampler is None and max(steps) > num_cells:
        raise UserError(f"{max(steps)} steps, but the student's grid has {num_cells} cells")
    settings = settings or SampleSettings()
    runner = SampleRunner(pipe, prompts, extractor, settings, clip, world)
    labels = class_labels(runner.prompts)
    if labels is not None and settings.num_samples < 2 * len(set(prompts)):
        raise UserError(f"num_samples must be at least two for each of the {len(set(prompts))} labels")
    mu = scheduler_mu(pipe.scheduler.config, runner.num_tokens)
    described = asdict(settings) | {"reference_steps": reference_steps, "extractor": extractor.identity, "shift": mu}
    if student_sampler is None:
        student_sampler = partial(phased, grid=PhaseGrid(num_cells, num_phases, mu))
        described |= {"num_cells": num_cells, "num_phases": num_phases}
    elif isinstance(student_sampler, partial):
        described |= {"student_sampler": student_sampler.func.__name__, **student_sampler.keywords}
    runs = _plan(pipe, student, student_sampler, mu, settings.seed, steps, reference_steps)
    samples = _sample_all(runner, runs, cache and Path(cache))
    reference, same_noise = samples[:2]
    rows, images = [], {}
    for each, sample in zip(runs, samples, strict=True):
        metrics = measure(
            sample.features,
            None if sample is reference else reference.features,
            None if sample in (reference, same_noise) else same_noise.features,
            real,
            labels,
        )
        rows.append(Row(each.role, each.steps, metrics | {"ms_per_image": sample.ms_per_image}, each.note))
        few = each.steps == num_phases or (each.role == "student" and each.steps < num_phases)
        if sample is same_noise or (few and not each.note):
            images[rows[-1].name] = sample.images
    return Comparison(Report(tuple(rows), described), images)


def _plan(
    pipe: Pipeline,
    student: Denoiser | None,
    student_sampler: Sampler,
    mu: float,
    seed: int,
    steps: Sequence[int],
    reference_steps: int,
) -> list[_Run]:
    """The reference first, the same from the common noise, then teacher and student at each number of steps."""
    teacher = AdapterRole(pipe.denoiser, pipe.transformer, None)
    along_shift = (teacher, partial(euler, mu=mu), f"euler {mu!r}", True)
    runs = [_Run("teacher", reference_steps, seed + 1, *along_shift, note=REFERENCE)]
    runs.append(_Run("teacher", reference_steps, seed, *along_shift))
    runs += [_Run("teacher", n, seed, *along_shift) for n in sorted(steps, reverse=True) if n != reference_steps]
    if student is not None:
        runs += [_Run("student", n, seed, student, student_sampler) for n in sorted(steps, reverse=True)]
    return runs


def _sample_all(runner: SampleRunner, runs: Sequence[_Run], cache: Path | None) -> list[Samples]:
    """The samples of every run, from the cache where they are there."""
    paths = [
        cache / runner.cache_name(each.cache_key, each.steps, each.seed) if cache and each.cache_key else None
        for each in runs
    ]
    found = [Samples.load(path) if path is not None and path.is_file() else None for path in paths]
    found = [None if any_rank(sample is None, runner.world) else sample for sample in found]
    steps = sum(each.steps for each, sample in zip(runs, found, strict=True) if sample is None)
    calls = steps * len(runner.world.share(runner.settings.num_samples))
    off = None if runner.world.is_main else True  # None: a bar on a terminal only
    with tqdm(total=calls, unit="call", unit_scale=True, disable=off) as progress:
        for index, (each, path) in enumerate(zip(runs, paths, strict=True)):
            if found[index] is None:
                progress.set_description(f"{each.role}, {each.steps} steps")
                found[index] = runner.run(each.denoiser, each.sampler, each.steps, each.seed, progress, each.guided)
                if path is not None and runner.world.is_main:
                    found[index].save(path)
    return found


def class_labels(prompts: Sequence[str]) -> np.ndarray | None:
    """Prompts "0", "1", ... as int64 labels [N]; None where they are texts."""
    return np.array([int(p) for p in prompts]) if all(p.isdecimal() for p in prompts) else None


def real_features(pipe: Pipeline, data: DataConfig, extractor: Extractor) -> FeatureSet:
    """Features of a data set at the size in `data`; of at most 10,000 images, evenly spread."""
    channels = pipe.latent_channels if pipe.pixels_per_latent == 1 else 3
    images = ImageBatches(open_data(data), data.height, data.width, channels)
    chosen = np.unique(np.linspace(0, len(images) - 1, min(len(images), MAX_REAL_IMAGES)).astype(np.int64))
    parts = []
    for start in range(0, len(chosen), 500):
        pixels = images.fetch(chosen[start : start + 500])["images"]
        parts.append(FeatureSet(*extractor(np.rint((pixels + 1) * 127.5).astype(np.uint8))))
    return join(parts)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])

    def add(name: str, **settings: Any) -> None:
        parser.add_argument(*dict.fromkeys([name, f"--{name[2:].replace('_', '-')}"]), **settings)

    add(
        "--model",
        default="digits",
        help=f"the teacher: a pipeline folder, or a shipped one: {', '.join(SHIPPED)} (%(default)s)",
    )
    add("--lora", type=Path, help="the student's LoRA file or folder; without it the teacher alone is measured")
    add("--student", type=Path, help="the student's pipeline folder, where it is a whole model and not a LoRA")
    add("--lora_alpha", type=float, help="alpha of a LoRA file that does not store it")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights (as stored)")
    add("--num_samples", type=int, default=2000, help="(%(default)s)")
    add("--steps", type=int, nargs="+", default=[1, 2, 4, 8], help="few-step counts (1 2 4 8)")
    add("--reference_steps", type=int, default=50, help="of the teacher's reference samples (%(default)s)")
    add("--sampler", choices=["phased", *SAMPLERS], default="phased", help="of the student (%(default)s)")
    setting = "a setting of --sampler unified or trigflow, such as style=few or angles=[1.5,1,0]; repeat for several"
    add("--set", action="append", default=[], metavar="KEY=VALUE", help=setting)
    add("--num_cells", type=int, default=100, help="of the student's training recipe (%(default)s)")
    add("--num_phases", type=int, default=4, help="of the student's training recipe (%(default)s)")
    add("--guidance_scale", type=float, default=3.5, help="1: none, for models that take none (%(default)s)")
    add("--height", type=int, help="pixels; the model's own by default")
    add("--width", type=int, help="pixels; the model's own by default")
    add("--batch_size", type=int, default=250, help="does not change the noise (%(default)s)")
    add("--seed", type=int, default=0, help="of the noise (%(default)s)")
    add("--prompts", type=Path, help="text file, one prompt a line; models of labels sample all labels without it")
    kinds = ["digits", "mnist", "image_folder", "laion_list", "parquet"]
    add("--data", choices=kinds, help="real images to compare with; digits for the shipped models")
    add("--data_path", help="folder or file of --data")
    add("--inception", type=Path, help="measure in the features of these FID weights (distill/metrics/inception.py)")
    add("--clip", type=Path, help="folder of a CLIP model, to add the CLIP score")
    add("--cache", type=Path, default=Path("outputs/cache"), help="where the teacher's samples are kept (%(default)s)")
    add("--output", type=Path, default=Path("outputs/evaluate"), help="folder for the results (%(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.data is None and arguments.model in SHIPPED:
        arguments.data = "digits"
    return arguments


def choose_extractor(data: str | None, inception: Path | None) -> Extractor:
    """Inception where its weights are given, else the classifier of the data set."""
    if inception is not None:
        return InceptionFeatures(inception)
    if data not in ("digits", "mnist"):
        raise UserError(
            f"nothing ships that measures {'this model' if data is None else data}: "
            "give --inception FILE, or --data digits or mnist"
        )
    return ClassifierFeatures(data)


def choose_sampler(name: str, settings: Sequence[str]) -> Sampler | None:
    """The student's sampler; None for `phased`, whose settings are arguments of `compare`."""
    if name in SAMPLERS:
        return from_overrides(SAMPLERS[name], settings).sampler()
    if settings:
        raise UserError(f"--set {settings[0]} is for --sampler {' or '.join(SAMPLERS)}")
    return None


def read_prompts(path: Path | None, pipe: Pipeline) -> list[str]:
    """The lines of a file that are not empty; without a file, the labels of a model of labels."""
    if path is None:
        if isinstance(pipe, LabelMethods):
            return [str(label) for label in range(pipe.config.num_classes)]
        raise UserError("this model takes texts: give --prompts FILE, with one prompt a line")
    if not path.is_file():
        raise FileNotFoundError(f"no prompt file {path}")
    prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"{path} holds no prompts")
    return prompts


def open_student(pipe: Pipeline, folder: Path, paddle_dtype: str | None = None, alpha: float | None = None) -> Denoiser:
    """The student that a training run has left: a whole pipeline, or an adapter (file or folder) for the teacher's.

    `alpha`: of a LoRA file that does not store it.
    """
    if (folder / INDEX).is_file():
        return open_pipeline(folder, paddle_dtype).denoiser
    pipe.load_lora_weights(folder, adapter_name="student", alpha=alpha)
    return AdapterRole(pipe.denoiser, pipe.transformer, "student")


def main(argv: list[str] | None) -> None:
    """Evaluate from the command line; mistakes of the user raise UserError or FileNotFoundError."""
    arguments, world = parse_arguments(argv), init()
    sampler = choose_sampler(arguments.sampler, arguments.set)
    extractor = choose_extractor(arguments.data, arguments.inception)
    clip = ClipScorer(arguments.clip) if arguments.clip else None
    pipe = open_pipeline(arguments.model, arguments.dtype)
    student = None
    if arguments.lora is not None:
        student = open_student(pipe, arguments.lora, alpha=arguments.lora_alpha)
    if arguments.student is not None:
        if student is not None:
            raise UserError("give --student or --lora, not both")
        student = open_pipeline(arguments.student, arguments.dtype).denoiser
    names = ("num_samples", "seed", "batch_size", "guidance_scale", "height", "width")
    settings = SampleSettings(**{name: getattr(arguments, name) for name in names})
    real = None
    if arguments.data is not None:
        size = {name: getattr(arguments, name) or pipe.default_size for name in ("height", "width")}
        real = real_features(pipe, DataConfig(kind=arguments.data, path=arguments.data_path, **size), extractor)
    comparison = compare(
        pipe,
        student,
        prompts=read_prompts(arguments.prompts, pipe),
        extractor=extractor,
        settings=settings,
        steps=arguments.steps,
        reference_steps=arguments.reference_steps,
        num_cells=arguments.num_cells,
        num_phases=arguments.num_phases,
        student_sampler=sampler,
        real=real,
        clip=clip,
        cache=arguments.cache,
        world=world,
    )
    if world.is_main:
        comparison.write(arguments.output)
        print(comparison.report.table())
        print(f"written to {arguments.output}")


if __name__ == "__main__":
    run(main)
