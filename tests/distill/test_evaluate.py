"""Evaluation of a teacher whose velocity is exact: the probability flow of a set of real digits."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import paddle
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from distill.commands import run
from distill.config import DataConfig
from distill.data import digits
from distill.evaluate import (
    REFERENCE,
    choose_extractor,
    class_labels,
    compare,
    evaluate_samples,
    main,
    read_prompts,
    real_features,
)
from distill.metrics.features import ClassifierFeatures, extract
from distill.metrics.report import Report
from distill.metrics.sampling import SampleSettings
from fast_diffusers import lora
from fast_diffusers.conditioning import Cond
from fast_diffusers.errors import UserError
from fast_diffusers.models import SanaTransformer2DModel
from fast_diffusers.pipelines import SanaLabelPipeline
from fast_diffusers.pipelines.shipped import open_pipeline
from fast_diffusers.samplers import euler
from fast_diffusers.schedulers import FlowMatchEulerDiscreteScheduler, SCMScheduler

LABELS = [str(label) for label in range(10)]
SETTINGS = SampleSettings(num_samples=300, batch_size=150, previews=6)


class ExactPipeline:
    """Denoiser v = (x - E[x0 | x, t, label]) / t for data drawn from the training digits of each class."""

    component_types: ClassVar = {"transformer": paddle.nn.Layer}
    latent_channels, pixels_per_latent, pixels_per_token, default_size = 1, 1, 2, 8
    scheduler = SimpleNamespace(config={"shift": 1.0})

    def __init__(self):
        self.transformer = paddle.nn.Linear(2, 2)
        self.transformer.config = SimpleNamespace(guidance_embeds=False)
        source = digits("train")
        self.images = source.images.reshape(-1, 64).astype(np.float32) / 127.5 - 1
        self.labels = source.labels
        self.calls = 0

    def conditioning(self, prompts):
        return Cond(label=paddle.to_tensor([int(prompt) for prompt in prompts]))

    def decode_latents(self, latents):
        return latents

    @property
    def denoiser(self):
        return self.velocity

    def velocity(self, x, t, cond, *, target_t=None, guidance=None):
        self.calls += 1
        rows, time = x.numpy().reshape(len(x), 64), float(t[0])
        data = (1 - time) * self.images
        distance = (rows**2).sum(1)[:, None] + (data**2).sum(1) - 2 * rows @ data.T
        distance[cond["label"].numpy()[:, None] != self.labels] = np.inf
        weights = np.exp(-(distance - distance.min(1, keepdims=True)) / (2 * time**2))
        mean = weights @ self.images / weights.sum(1, keepdims=True)
        return paddle.to_tensor((rows - mean) / time).reshape(x.shape)


@pytest.fixture(scope="module")
def extractor():
    return ClassifierFeatures("digits")


@pytest.fixture(scope="module")
def pipe():
    return ExactPipeline()


@pytest.fixture(scope="module")
def real(pipe, extractor):
    return real_features(pipe, DataConfig(kind="digits", height=8, width=8), extractor)


def many_small_steps(velocity, noise, *, steps, generator=None):
    """A perfect student: arrives where the teacher's 40 steps do."""
    return euler(velocity, noise, steps=40)


@pytest.fixture(scope="module")
def perfect(pipe, extractor, real):
    return compare(
        pipe,
        pipe.denoiser,
        prompts=LABELS,
        extractor=extractor,
        settings=SETTINGS,
        steps=(1, 4),
        reference_steps=40,
        student_sampler=many_small_steps,
        real=real,
    )


def test_rows_and_their_order(perfect):
    assert [row.name for row in perfect.report.rows] == [
        "teacher, 40 steps (reference)",
        "teacher, 40 steps",
        "teacher, 4 steps",
        "teacher, 1 step",
        "student, 4 steps",
        "student, 1 step",
    ]


def test_a_teacher_of_real_digits(perfect):
    reference = perfect.report.row("teacher", 40, REFERENCE).metrics
    assert reference["accuracy"] > 0.99
    assert reference.keys() == {"accuracy", "frechet_real", "ms_per_image"}
    floor = perfect.report.row("teacher", 40).metrics
    assert "frechet_same_noise" not in floor
    assert floor["precision"] > 0.75
    assert floor["recall"] > 0.75
    assert floor["diversity"] == pytest.approx(1, abs=0.03)
    assert floor["diversity_within"] == pytest.approx(1, abs=0.05)
    one = perfect.report.row("teacher", 1).metrics  # the class means
    assert one["frechet_teacher"] > 10 * floor["frechet_teacher"]
    assert one["frechet_same_noise"] == pytest.approx(one["frechet_teacher"], rel=0.1)
    assert one["frechet_real"] > 10 * reference["frechet_real"]
    assert one["diversity_within"] < 0.1
    assert one["recall"] < 0.1
    four = perfect.report.row("teacher", 4).metrics
    assert four["frechet_teacher"] < one["frechet_teacher"] / 5
    assert 0 < four["frechet_same_noise"] < four["frechet_teacher"] / 2


def test_a_perfect_student(perfect):
    student, teacher = perfect.report.row("student", 1).metrics, perfect.report.row("teacher", 40).metrics
    assert student["frechet_same_noise"] == pytest.approx(0, abs=1e-6)
    for name in ("frechet_teacher", "frechet_real", "precision", "recall", "diversity", "diversity_within", "accuracy"):
        assert student[name] == pytest.approx(teacher[name], rel=1e-9)


def test_batch_size_does_not_change_samples(pipe, extractor, perfect):
    settings = SampleSettings(num_samples=300, batch_size=77, previews=100)
    other = compare(pipe, prompts=LABELS, extractor=extractor, settings=settings, steps=(4,), reference_steps=40)
    images = other.images["teacher, 4 steps"]
    assert images.shape == (100, 1, 8, 8)
    np.testing.assert_array_equal(images[:6], perfect.images["teacher, 4 steps"])


def test_files(perfect, tmp_path):
    perfect.write(tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    loaded = Report.load(folder / "metrics.json")
    assert loaded == perfect.report
    assert loaded.settings["seed"] == 0
    assert (folder / "table.txt").read_text() == perfect.report.table() + "\n"
    assert list(perfect.images) == ["teacher, 40 steps", "teacher, 4 steps", "student, 4 steps", "student, 1 step"]
    with Image.open(folder / "comparison.png") as picture:
        assert picture.height > 4 * 64
        assert picture.width > 6 * 64


def test_cache(pipe, extractor, tmp_path, monkeypatch):
    sample = partial(compare, prompts=LABELS, extractor=extractor, cache=tmp_path, steps=(2, 1), reference_steps=4)
    settings = SampleSettings(num_samples=20, previews=3)

    def calls(settings=settings, **changes):
        pipe.calls = 0
        result = sample(pipe, pipe.denoiser, settings=settings, **changes)
        return pipe.calls, result.report

    student = 2 + 1
    first, report = calls()
    assert first == 4 + 4 + 2 + 1 + student
    again, cached = calls()
    assert again == student
    for row, other in zip(report.rows, cached.rows, strict=True):
        keep = row.metrics.keys() - {"ms_per_image"}
        assert {name: row.metrics[name] for name in keep} == pytest.approx({name: other.metrics[name] for name in keep})
    assert calls(SampleSettings(num_samples=20, previews=3, batch_size=7))[0] == 3 * student
    assert calls(SampleSettings(num_samples=20, previews=3, seed=1))[0] > student
    assert calls(SampleSettings(num_samples=21, previews=3))[0] > student
    assert calls(prompts=["3"])[0] > student
    pipe.transformer.weight.set_value(pipe.transformer.weight + 1)
    assert calls()[0] == first
    for path in tmp_path.iterdir():
        path.write_bytes(b"half a file")
    with pytest.raises(UserError, match=r"cached samples .* are damaged .*: delete the file"):
        calls()


def test_diverged_student_is_an_error(pipe, extractor):
    def diverged(x, t, cond, *, target_t=None, guidance=None):
        return x * float("nan")

    with pytest.raises(UserError, match="4 steps gave images with NaN"):
        compare(
            pipe, diverged, prompts=LABELS, extractor=extractor, steps=(4,), settings=SampleSettings(num_samples=20)
        )


def test_evaluate_samples(real, extractor):
    source = digits("test")
    images = source.images.transpose(0, 3, 1, 2)
    reference = extract(extractor, images)
    noise = np.random.default_rng(0).integers(0, 256, images.shape, dtype=np.uint8)
    result = evaluate_samples(reference, {"same": images, "noise": noise}, extractor, source.labels, real)
    assert result["same"]["frechet_teacher"] == pytest.approx(0, abs=1e-6)
    assert result["same"]["accuracy"] > 0.98
    assert result["noise"]["precision"] < 0.3
    assert result["noise"]["accuracy"] < 0.4
    assert result["noise"]["frechet_real"] > 5 * result["same"]["frechet_real"]


def test_class_labels():
    np.testing.assert_array_equal(class_labels(["3", "0"]), [3, 0])
    assert class_labels(["3", "a cat"]) is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda **k: compare(steps=(4, 4), **k), r"different positive integers, got \[4, 4\] and 50"),
        (lambda **k: compare(steps=(-1,), **k), r"different positive integers, got \[-1\]"),
        (lambda **k: compare(settings=SampleSettings(height=9), **k), "height must be a multiple of 2 .*, got 9"),
        (lambda **k: compare(settings=SampleSettings(num_samples=2), **k), "num_samples must be at least 8"),
        (lambda **k: compare(settings=SampleSettings(num_samples=19), **k), "two for each of the 10 labels"),
        (lambda **k: compare(settings=SampleSettings(batch_size=0), **k), "batch_size and previews must be positive"),
        (lambda **k: compare(**(k | {"prompts": []})), "no prompts to sample"),
    ],
)
def test_bad_settings(pipe, extractor, call, message):
    with pytest.raises(UserError, match=message):
        call(pipe=pipe, prompts=LABELS, extractor=extractor)


def test_extractor_choice(tmp_path):
    assert choose_extractor("mnist", None).identity.startswith("mnist classifier:")
    with pytest.raises(UserError, match="nothing ships that measures image_folder: give --inception FILE"):
        choose_extractor("image_folder", None)
    with pytest.raises(UserError, match="nothing ships that measures this model"):
        choose_extractor(None, None)
    with pytest.raises(FileNotFoundError, match="no Inception weights"):
        choose_extractor("digits", tmp_path / "inception.safetensors")


def test_prompt_file(tmp_path, pipe):
    path = tmp_path / "prompts.txt"
    with pytest.raises(FileNotFoundError, match="no prompt file"):
        read_prompts(path, pipe)
    path.write_text("a cat\n\n  a dog \n", encoding="utf-8")
    assert read_prompts(path, pipe) == ["a cat", "a dog"]
    path.write_text(" \n")
    with pytest.raises(UserError, match="holds no prompts"):
        read_prompts(path, pipe)
    with pytest.raises(UserError, match="give --prompts FILE"):
        read_prompts(None, pipe)


@pytest.fixture(scope="module")
def folders(tiny_teacher, tmp_path_factory):
    """A random teacher, and a LoRA for it."""
    folder = tmp_path_factory.mktemp("student")
    transformer = open_pipeline(tiny_teacher).transformer
    for weight in lora.inject(transformer, 2, 2, ["attn.to_q", "attn.to_v"], name="student"):
        weight.set_value(paddle.randn(weight.shape))
    lora.save(transformer, folder, "student")
    return tiny_teacher, folder


def command_line(folders: tuple[Path, Path], output: Path, *more: str) -> list[str]:
    paths = ["--model", folders[0], "--lora", folders[1], "--output", output, "--cache", output / "cache"]
    small = ["--data", "digits", "--num_samples", "40", "--reference_steps", "3", "--steps", "1", "2"]
    return [str(argument) for argument in (*paths, *small, *more)]


def test_command_line(folders, tmp_path, capsys):
    main(command_line(folders, tmp_path))
    out = capsys.readouterr().out
    report = Report.load(tmp_path / "metrics.json")
    assert report.table() in out
    assert len(report.rows) == 6
    assert report.row("student", 1).metrics["frechet_teacher"] > 0.1
    assert report.row("student", 2).metrics != report.row("teacher", 2).metrics
    assert {"frechet_real", "accuracy", "precision", "recall", "diversity_within"} <= set(report.rows[-1].metrics)
    main([*command_line(folders, tmp_path), "--num_phases", "2"])
    assert json.loads((tmp_path / "metrics.json").read_text())["settings"]["num_phases"] == 2


def test_unified_sampler_of_the_student(folders, tmp_path):
    """Told what `samplers.unified` takes; what it draws does not depend on the size of a batch."""
    few = ["--sampler", "unified", "--set", "style=few", "--set", "stochasticity=1", "--set", "gap=[0.001, 0.6]"]
    rows = {}
    for name, more in {"phased": [], "few": few, "again": [*few, "--batch_size", "7"]}.items():
        main(command_line(folders, tmp_path / name, *more))
        report = Report.load(tmp_path / name / "metrics.json")
        rows[name] = {n: report.row("student", n).metrics["frechet_teacher"] for n in (1, 2)}
    assert rows["few"] == pytest.approx(rows["again"], rel=1e-3)
    assert rows["few"][2] != pytest.approx(rows["phased"][2], rel=1e-3)
    assert report.settings["student_sampler"] == "unified"
    assert report.settings["gap"] == [0.001, 0.6]
    assert "num_phases" not in report.settings


def test_a_student_that_is_a_whole_pipeline(folders, tmp_path):
    """A fused LoRA, saved as a pipeline, is measured as the LoRA is."""
    pipe = open_pipeline(folders[0])
    pipe.load_lora_weights(folders[1])
    pipe.fuse_lora()
    pipe.save_pretrained(tmp_path / "fused")
    main(command_line(folders, tmp_path / "lora"))
    line = [*command_line(folders, tmp_path / "whole"), "--student", str(tmp_path / "fused")]
    with pytest.raises(UserError, match="give --student or --lora, not both"):
        main(line)
    at = line.index("--lora")
    main(line[:at] + line[at + 2 :])
    distances = [
        Report.load(tmp_path / name / "metrics.json").row("student", 2).metrics["frechet_teacher"]
        for name in ("lora", "whole")
    ]
    assert distances[0] == pytest.approx(distances[1], rel=0.02)


@pytest.fixture(scope="module")
def sana(tmp_path_factory):
    """Folders of a random SANA and of a student of it, which embeds its guidance and starts as the same function."""
    paddle.seed(0)
    sizes = {"num_layers": 1, "num_attention_heads": 1, "cross_attention_dim": 32, "mlp_ratio": 1}
    cross = {"num_cross_attention_heads": 1, "cross_attention_head_dim": 32, "caption_channels": 10}
    image = {"in_channels": 1, "out_channels": 1, "patch_size": 2, "sample_size": 8}
    teacher = SanaTransformer2DModel(**sizes, **cross, **image, timestep_scale=0.001)
    for parameter in teacher.parameters():
        parameter.set_value(parameter + 0.1 * paddle.randn(parameter.shape))
    teacher.caption_norm.weight.set_value(paddle.ones([32]))  # so that labels count
    student = SanaTransformer2DModel.from_transformer(teacher, guidance_embeds=True)
    folders = [tmp_path_factory.mktemp(name) for name in ("teacher", "student")]
    schedulers = FlowMatchEulerDiscreteScheduler(shift=1.5), SCMScheduler()
    for folder, scheduler, model in zip(folders, schedulers, (teacher, student), strict=True):
        SanaLabelPipeline(scheduler, model).save_pretrained(folder)
    return folders


def test_a_teacher_without_embedded_guidance_has_classifier_free_guidance(sana, tmp_path):
    """And a new student, which is the same function whatever it is told, has none."""
    teacher, student = sana
    options = ["--student", student, "--sampler", "trigflow", "--set", "angles=[1.5708, 0]"]
    small = ["--data", "digits", "--num_samples", "40", "--reference_steps", "2", "--steps", "1"]
    distances = {}
    for scale in ("1", "8"):
        line = ["--model", teacher, *options, *small, "--guidance_scale", scale, "--output", tmp_path / scale]
        main([str(argument) for argument in (*line, "--cache", tmp_path / "cache")])
        report = Report.load(tmp_path / scale / "metrics.json")
        distances[scale] = {role: report.row(role, 1).metrics["frechet_real"] for role in ("teacher", "student")}
        assert report.settings["student_sampler"] == "trigflow"
    assert distances["1"]["teacher"] == pytest.approx(distances["1"]["student"], rel=1e-3)
    assert distances["1"]["student"] == pytest.approx(distances["8"]["student"], rel=1e-6)
    assert distances["1"]["teacher"] != pytest.approx(distances["8"]["teacher"], rel=1e-2)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--set", "style=few"], "--set style=few is for --sampler unified or trigflow"),
        (["--sampler", "trigflow", "--set", "angles=[1, 1.5, 0]"], "angles must descend"),
        (["--sampler", "unified", "--set", "order=3"], "order is 3; expected a whole number at most 2"),
        (["--sampler", "unified", "--set", "stile=few"], "unknown key stile; the nearest valid key is style"),
        (["--sampler", "unified", "--set", "gap=[0.5, 0.5]"], "leaves no time to sample"),
        (["--student", "nowhere"], "give --student or --lora, not both"),
        (["--model", "nowhere"], "model nowhere is neither a pipeline folder nor one of"),
        (["--lora", "nowhere"], "no LoRA file nowhere"),
        (["--steps", "0"], "must be different positive integers"),
        (["--num_phases", "200"], "200 phases in 100 cells"),
        (["--steps", "101"], "101 steps, but the student's grid has 100 cells"),
        (["--height", "7"], "height must be a multiple of 2"),
        (["--clip", "nowhere"], "nowhere is not a folder"),
        (["--data", "mnist"], "mnist size must be .* from 28 up, not 8"),
    ],
)
def test_command_line_errors(folders, tmp_path, more, message):
    with pytest.raises((UserError, FileNotFoundError), match=message):
        main(command_line(folders, tmp_path, *more))


def test_corrupt_lora(folders, tmp_path):
    path = tmp_path / "pytorch_lora_weights.safetensors"
    state = load_file(next(folders[1].iterdir()))
    save_file({name: array[..., :1] for name, array in state.items()}, path)
    with pytest.raises(UserError, match="does not fit this model"):
        main(command_line(folders, tmp_path, "--lora", str(path)))


def test_a_mistake_ends_with_one_line(folders, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        run(lambda _: main(command_line(folders, tmp_path, "--steps", "0")))
    assert exit_.value.code == 1
    assert capsys.readouterr().err == "error: step counts must be different positive integers, got [0] and 3\n"
