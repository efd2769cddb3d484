"""Time against quality of training-free caches: `python distill/bench_cache.py --model digits --steps 50`.

Every setting of every method draws the same images as the model without a cache: same prompts, same noise, same steps.
Reported are the time of an image relative to no cache (the median over pairs of runs, one with and one without, in
turns), the share of the arithmetic that was done, how far the images are from those without a cache (PSNR, LPIPS where
its weights are given) and how far the two sets are apart (Fréchet distance in the features of the data's classifier),
and the Fréchet distance to real images. A row with a star is on the frontier: no other is as fast and as close.

Writes cache.json, cache.png and, as rows are finished, rows.jsonl: a run that was stopped goes on from there.
`fast-diffusers bench cache` is the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from distill.cache_grid import default_grid, describe, fitting, read_configs
from distill.cache_report import frontier, plot, table
from distill.commands import num_tokens, run
from distill.comparisons import add_result, read_results
from distill.config import DataConfig
from distill.evaluate import choose_extractor, choose_sampler, class_labels, open_student, read_prompts, real_features
from distill.metrics.features import Extractor, FeatureSet, join, measure
from distill.metrics.lpips import LPIPS
from distill.metrics.pixels import psnr
from distill.metrics.sampling import Sampler, SampleRunner, Samples, SampleSettings
from distill.roles import AdapterRole
from distill.samplers import SAMPLERS
from fast_diffusers.caching import CacheConfig, Calibration, denoising_run, disable_cache, enable_cache
from fast_diffusers.denoisers import Denoiser
from fast_diffusers.errors import UserError
from fast_diffusers.pipelines import Pipeline
from fast_diffusers.pipelines.shipped import SHIPPED, open_pipeline
from fast_diffusers.samplers import euler, phased
from fast_diffusers.time_grids import PhaseGrid, scheduler_mu

BASELINE = "no cache"
SMALLEST_RUN = 8  # images, see SampleSettings


@dataclass(frozen=True)
class Plan:
    """What is sampled. A run is one batch of images; the n-th has seed `seed` + n; `pairs` runs are timed."""

    steps: int
    runs: int
    pairs: int
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.runs, self.pairs) < 1:
            raise UserError(f"steps, images and pairs must be positive, got {self.steps}, {self.runs}, {self.pairs}")


class Bench:
    """Samples one model with and without caches.

    Args:
        pipe: the pipeline; caches go to its transformer.
        denoiser: what is sampled, such as the pipeline's with a student's adapter.
        sampler: `sampler(velocity, noise, *, steps, generator)`.
        settings: of one run.
        guided: use classifier-free guidance where it is not embedded.
        lpips: also measure this distance.
        real: features of real images.
    """

    def __init__(
        self,
        pipe: Pipeline,
        denoiser: Denoiser,
        sampler: Sampler,
        prompts: Sequence[str],
        extractor: Extractor,
        settings: SampleSettings,
        plan: Plan,
        *,
        guided: bool = True,
        lpips: LPIPS | None = None,
        real: FeatureSet | None = None,
    ):
        self.transformer, self.denoiser, self.plan, self.guided = pipe.transformer, denoiser, plan, guided
        self.runner = SampleRunner(pipe, prompts, extractor, settings)
        self.lpips, self.real, self._sampler = lpips, real, sampler
        labels = class_labels(self.runner.prompts)
        self.labels = None if labels is None else np.tile(labels, plan.runs)
        self.baseline: list[Samples] = []

    def prepare(self, progress: tqdm) -> dict[str, float]:
        """Sample without a cache; the metrics of these images."""
        self.baseline = [self._sample(number, progress) for number in range(self.plan.runs)]
        features = join([each.features for each in self.baseline])
        return {"relative_time": 1.0, "speedup": 1.0, "compute_fraction": 1.0} | measure(
            features, real=self.real, labels=self.labels
        )

    def __call__(self, config: CacheConfig, progress: tqdm) -> dict[str, float]:
        """The metrics of a setting, after `prepare`."""
        plan, samples, fractions, ratios = self.plan, [], [], []
        for number in range(max(plan.runs, plan.pairs)):
            index, timed = number % plan.runs, number < plan.pairs
            before = self._sample(index, progress) if timed and number % 2 == 0 else None
            enable_cache(self.transformer, config)
            try:
                cached = self._sample(index, progress)
            finally:
                stats = disable_cache(self.transformer)
            if timed:
                without = before or self._sample(index, progress)
                ratios.append(cached.ms_per_image / without.ms_per_image)
            if number < plan.runs:
                samples.append(cached)
                fractions.append(stats.compute_fraction)
        return self._metrics(samples, fractions, ratios)

    def _metrics(
        self, samples: Sequence[Samples], fractions: Sequence[float], ratios: Sequence[float]
    ) -> dict[str, float]:
        low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75]).tolist()
        metrics = {"relative_time": middle, "relative_time_quartiles": [low, high], "speedup": 1 / middle}
        metrics["compute_fraction"] = statistics.mean(fractions)
        images, expected = (np.concatenate([each.images for each in some]) for some in (samples, self.baseline))
        metrics["psnr"] = float(psnr(images, expected).mean())
        if self.lpips is not None:
            metrics["lpips"] = float(self.lpips.distances(images, expected).mean())
        features, same = (join([each.features for each in some]) for some in (samples, self.baseline))
        return metrics | measure(features, same_noise=same, real=self.real, labels=self.labels)

    def calls(self, configs: int) -> int:
        """Samples times model calls that `configs` settings and the baseline take."""
        plan = self.plan
        runs = plan.runs + configs * (max(plan.runs, plan.pairs) + plan.pairs)
        return runs * plan.steps * self.runner.settings.num_samples

    def _sample(self, number: int, progress: tqdm) -> Samples:
        return self.runner.run(
            self.denoiser, self._declared, self.plan.steps, self.plan.seed + number, progress, self.guided
        )

    def _declared(self, velocity: Any, noise: Any, *, steps: int, generator: Any) -> Any:
        with denoising_run(self.transformer, steps):
            return self._sampler(velocity, noise, steps=steps, generator=generator)


def bench(
    measured: Bench, configs: Sequence[CacheConfig], output: Path, identity: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The rows of all settings, the baseline's first, with `pareto` in each. Those in rows.jsonl are not repeated.

    identity: changes with all that the rows depend on; rows of another identity are left alone.
    """
    log = output / "rows.jsonl"
    output.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:16]
    done = {row["name"]: row for row in read_results(log) if row.get("key") == key}
    missing = [config for config in configs if describe(config) not in done]

    def note(name: str, method: str, metrics: Mapping[str, Any]) -> None:
        done[name] = {"key": key, "name": name, "method": method, **metrics}
        add_result(log, done[name])

    if missing or BASELINE not in done:
        with tqdm(total=measured.calls(len(missing)), unit="call", unit_scale=True, disable=None) as progress:
            progress.set_description(BASELINE)
            metrics = measured.prepare(progress)
            if BASELINE not in done:
                note(BASELINE, BASELINE, metrics)
            for config in missing:
                progress.set_description(type(config).__name__)
                note(describe(config), type(config).__name__, measured(config, progress))
    rows = [done[name] for name in (BASELINE, *map(describe, configs))]
    return [{**row, "pareto": on} for row, on in zip(rows, frontier(rows), strict=True)]


# ----------------------------------------------------------------------------------------------------- command line
def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])

    def add(name: str, **settings: Any) -> None:
        parser.add_argument(*dict.fromkeys([name, f"--{name[2:].replace('_', '-')}"]), **settings)

    add("--model", default="digits", help=f"pipeline folder, or a shipped one: {', '.join(SHIPPED)} (%(default)s)")
    add("--lora", type=Path, help="LoRA file or folder of a few-step student, which is measured instead of the model")
    add("--lora_alpha", type=float, help="alpha of a LoRA file that does not store it")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights (as stored)")
    add("--configs", type=Path, help="YAML list such as '- TeaCache: {threshold: 0.25}' instead of the built-in grid")
    add("--calibration", type=Path, help="JSON of fast_diffusers.caching.calibrate, for the built-in grid")
    add("--steps", type=int, help="of the sampler (50; with --lora 4)")
    add("--guidance_scale", type=float, default=3.5, help="1: none, for models that take none (%(default)s)")
    add("--sampler", choices=["euler", "phased", *SAMPLERS], help="(euler; with --lora phased)")
    setting = "a setting of --sampler unified or trigflow, such as style=few; repeat for several"
    add("--set", action="append", default=[], metavar="KEY=VALUE", help=setting)
    add("--num_cells", type=int, default=100, help="of the student's training recipe (%(default)s)")
    add("--num_phases", type=int, default=4, help="of the student's training recipe (%(default)s)")
    add("--num_images", type=int, default=100, help="of each setting (%(default)s)")
    add(
        "--batch_size",
        type=int,
        default=10,
        help="images at a time; more than 8 of them are timed as one (%(default)s)",
    )
    add("--pairs", type=int, default=5, help="pairs of runs, with and without a cache, that are timed (%(default)s)")
    add("--height", type=int, help="pixels; the model's own by default")
    add("--width", type=int, help="pixels; the model's own by default")
    add("--seed", type=int, default=0, help="of the noise (%(default)s)")
    add("--prompts", type=Path, help="text file, one prompt a line; models of labels sample all labels without it")
    kinds = ["digits", "mnist", "image_folder", "laion_list", "parquet"]
    add("--data", choices=kinds, help="real images to compare with; digits for the shipped models")
    add("--data_path", help="folder or file of --data; without it mnist's classifier is used, but not its images")
    add("--inception", type=Path, help="measure in the features of these FID weights (distill/metrics/inception.py)")
    add("--lpips", type=Path, help="also measure LPIPS, with these weights (distill/metrics/lpips.py)")
    add("--output", type=Path, default=Path("outputs/bench_cache"), help="folder for the results (%(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.data is None and arguments.model in SHIPPED:
        arguments.data = "digits"
    if arguments.configs is not None and arguments.calibration is not None:
        parser.error("--calibration is for the built-in grid: put its coefficients into --configs")
    arguments.steps = arguments.steps or (4 if arguments.lora else 50)
    arguments.sampler = arguments.sampler or ("phased" if arguments.lora else "euler")
    return arguments


def _sampler(arguments: argparse.Namespace, mu: float) -> Sampler:
    chosen = choose_sampler(arguments.sampler, arguments.set)
    if chosen is not None:
        return chosen
    if arguments.sampler == "euler":
        return partial(euler, mu=mu)
    if not 1 <= arguments.num_phases <= arguments.num_cells or arguments.steps > arguments.num_cells:
        raise UserError(
            f"{arguments.num_cells} cells cannot have {arguments.num_phases} phases and {arguments.steps} steps"
        )
    return partial(phased, grid=PhaseGrid(arguments.num_cells, arguments.num_phases, mu))


def _adapter_hash(path: Path | None) -> str | None:
    files = [] if path is None else [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest() if files else None


def main(argv: list[str] | None) -> None:
    """Measure from the command line; mistakes of the user raise UserError or FileNotFoundError."""
    arguments = parse_arguments(argv)
    extractor = choose_extractor(arguments.data, arguments.inception)
    lpips = LPIPS.load(arguments.lpips) if arguments.lpips else None
    given = read_configs(arguments.configs) if arguments.configs else None
    calibration = Calibration.load(arguments.calibration) if arguments.calibration else None
    pipe = open_pipeline(arguments.model, arguments.dtype)
    configs, unfit = fitting(given or default_grid(arguments.steps, calibration), pipe.transformer)
    for name, problem in unfit.items():
        if given:
            raise UserError(problem)
        print(f"left out: {name}: {problem}")
    denoiser = AdapterRole(pipe.denoiser, pipe.transformer, None)
    if arguments.lora is not None:
        denoiser = open_student(pipe, arguments.lora, alpha=arguments.lora_alpha)
    per_run = max(SMALLEST_RUN, arguments.batch_size)
    size = {name: getattr(arguments, name) or pipe.default_size for name in ("height", "width")}
    settings = SampleSettings(
        per_run, arguments.seed, arguments.batch_size, arguments.guidance_scale, **size, previews=per_run
    )
    plan = Plan(arguments.steps, -(-arguments.num_images // per_run), arguments.pairs, arguments.seed)
    data = DataConfig(kind=arguments.data or "digits", path=arguments.data_path, **size)
    real = None
    if arguments.data is not None and (arguments.data == "digits" or arguments.data_path):
        real = real_features(pipe, data, extractor)
    mu = scheduler_mu(pipe.scheduler.config, num_tokens(pipe, data))
    measured = Bench(
        pipe,
        denoiser,
        _sampler(arguments, mu),
        read_prompts(arguments.prompts, pipe),
        extractor,
        settings,
        plan,
        guided=arguments.lora is None,
        lpips=lpips,
        real=real,
    )
    described = {name: value for name, value in vars(arguments).items() if name not in ("output", "configs")}
    described |= {**asdict(plan), "images": plan.runs * per_run, "shift": mu, "extractor": extractor.identity}
    identity = [measured.runner.cache_name(arguments.sampler, arguments.steps, arguments.seed), described]
    rows = bench(measured, configs, arguments.output, [*identity, _adapter_hash(arguments.lora)])
    described = {name: str(value) if isinstance(value, Path) else value for name, value in described.items()}
    content = {"settings": described, "rows": [{k: v for k, v in row.items() if k != "key"} for row in rows]}
    (arguments.output / "cache.json").write_text(
        json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8"
    )
    plot(rows, arguments.output / "cache.png")
    print(table(rows))
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    run(main)
