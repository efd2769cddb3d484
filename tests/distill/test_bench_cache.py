"""The whole of `bench_cache` on a tiny random teacher."""

import json

import numpy as np
import pytest
from PIL import Image

from distill.bench_cache import BASELINE, main
from distill.commands import run
from distill.metrics.pixels import ROUNDING
from distill.metrics.sampling import SampleRunner
from fast_diffusers import lora
from fast_diffusers.errors import UserError
from fast_diffusers.pipelines.shipped import open_pipeline


@pytest.fixture
def bench(tiny_teacher, tmp_path):
    """Runs the command and gives the rows by name."""

    def call(configs, *arguments):
        (tmp_path / "configs.yaml").write_text("\n".join(f"- {config}" for config in configs))
        settings = dict(model=tiny_teacher, data="digits", num_images=16, batch_size=8, pairs=2, steps=4)
        settings |= dict(configs=tmp_path / "configs.yaml", output=tmp_path / "out")
        main([*(f"--{name}={value}" for name, value in settings.items()), *arguments])
        rows = json.loads((tmp_path / "out" / "cache.json").read_text())["rows"]
        return {row["name"]: row for row in rows}

    return call


NEVER, ALWAYS = "FirstBlockTaylor: {threshold: 0.0}", "BlockDance: {period: 4, start: 1000, end: 0, depth: 1.0}"


def test_rows_are_what_the_caches_did(bench, tmp_path, capsys):
    rows = list(bench([NEVER, ALWAYS]).values())
    assert rows[0]["name"] == BASELINE and rows[0]["speedup"] == 1 and "psnr" not in rows[0]
    exact, other = rows[1:]
    assert exact["compute_fraction"] == 1 and exact["frechet_same_noise"] == pytest.approx(0, abs=1e-6)
    assert exact["psnr"] == pytest.approx(-10 * np.log10(ROUNDING), abs=0.01)
    assert other["compute_fraction"] < 0.8 and other["psnr"] < exact["psnr"] and other["frechet_same_noise"] > 1e-3
    assert exact["pareto"] and all(row["accuracy"] >= 0 and row["frechet_real"] > 0 for row in rows)
    assert all(row["relative_time"] == pytest.approx(1 / row["speedup"]) for row in rows)
    assert Image.open(tmp_path / "out" / "cache.png").size
    assert "* FirstBlockTaylor(threshold=0.0)" in capsys.readouterr().out


def test_finished_rows_are_kept(bench, monkeypatch):
    first = bench([NEVER])
    sampled, original = [], SampleRunner.run
    monkeypatch.setattr(SampleRunner, "run", lambda *given: sampled.append(1) or original(*given))
    again = bench([ALWAYS, NEVER])
    assert len(sampled) == 2 + 4  # the images without a cache, and pairs for what is new
    assert all({**again[name], "pareto": row["pareto"]} == row for name, row in first.items())
    bench([NEVER], "--seed=1")
    assert len(sampled) > 6


def test_a_student_is_measured_in_place_of_its_teacher(bench, tiny_teacher, tmp_path):
    pipe = open_pipeline(tiny_teacher)
    lora.inject(pipe.transformer, 2, 2, ["attn.to_q", "ff.net.2"], "default")
    for name, parameter in pipe.transformer.named_parameters():
        if "lora" in name:
            parameter.set_value(parameter + 1.0)
    lora.save(pipe.transformer, tmp_path / "lora", "default")
    teacher = bench([NEVER])[BASELINE]
    student = bench([NEVER], f"--lora={tmp_path / 'lora'}")
    assert student[BASELINE]["frechet_real"] != teacher["frechet_real"]
    assert student["FirstBlockTaylor(threshold=0.0)"]["compute_fraction"] == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model=nowhere", "--data=digits"], "neither a pipeline folder"),
        (["--lpips=nowhere"], "no LPIPS weights"),
        (["--configs=nowhere"], "no file of cache settings"),
        (["--pairs=0"], "must be positive"),
        (["--sampler=phased", "--steps=200"], "cannot have 4 phases and 200 steps"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        run(main, [*arguments, f"--output={tmp_path}"])
    error = capsys.readouterr().err
    assert stopped.value.code == 1 and message in error and len(error.splitlines()) == 1


def test_a_method_that_does_not_fit_is_an_error_if_it_was_asked_for(bench):
    with pytest.raises(UserError, match="does not fit"):
        bench(["BlockDance: {depth: [9, 9]}"])
