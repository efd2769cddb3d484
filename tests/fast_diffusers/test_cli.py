import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import paddle
import pytest
from PIL import Image

from fast_diffusers import __version__, cli, doctor, lora
from fast_diffusers.doctor import Finding
from fast_diffusers.errors import UserError
from fast_diffusers.pipelines.shipped import open_pipeline


def run(*arguments: str) -> int:
    """Exit code of a command."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    return stopped.value.code or 0


@pytest.fixture
def error_of(capsys):
    """The one line on stderr with which a command fails."""

    def error(*arguments: str) -> str:
        assert run(*arguments) == 1
        captured = capsys.readouterr()
        (line,) = captured.err.splitlines()
        assert line.startswith("error: ")
        return line

    return error


@pytest.fixture
def script(monkeypatch):
    """Put a module with the given main in place of one of distill's."""

    def put(module: str, main) -> None:
        fake = ModuleType(module)
        fake.main = main
        monkeypatch.setitem(sys.modules, module, fake)

    monkeypatch.setattr(sys, "argv", list(sys.argv))
    return put


class TestDispatch:
    @pytest.mark.parametrize(
        "module",
        [
            module
            for scripts in [cli.SCRIPTS, *(group for _, group in cli.GROUPS.values())]
            for module, _ in scripts.values()
        ],
    )
    def test_modules_exist(self, module):
        assert importlib.util.find_spec(module) is not None

    @pytest.mark.parametrize(
        ("command", "module"),
        [
            (["train", "flux-lightning"], "distill.train_flux_lightning"),
            (["train", "sana-sprint"], "distill.train_sana_sprint"),
            (["train", "teacher"], "distill.train_teacher"),
            (["export"], "cinn_infer.export_command"),
            (["bench", "infer"], "cinn_infer.benchmark"),
            (["bench", "cache"], "distill.bench_cache"),
            (["eval"], "distill.evaluate"),
            (["demo"], "distill.demo"),
        ],
    )
    def test_arguments_reach_the_script_as_they_are(self, script, command, module):
        received = []
        script(module, lambda argv: received.append((sys.argv[0], argv)))
        arguments = ["--recipe", "r.yaml", "--set", "a=1", "--set", "b=2", "--help"]
        assert run(*command, *arguments) == 0
        assert received == [(f"fast-diffusers {' '.join(command)}", arguments)]

    def test_user_errors_are_one_line(self, script, error_of):
        def main(argv):
            raise UserError("recipe.yaml: no key 'lrr';\n  did you mean 'lr'?")

        script("distill.demo", main)
        assert error_of("demo") == "error: recipe.yaml: no key 'lrr'; did you mean 'lr'?"

    def test_a_missing_file_is_one_line(self, script, error_of):
        def main(argv):
            Path("/does/not/exist").read_text()

        script("distill.demo", main)
        assert "/does/not/exist" in error_of("demo")

    @pytest.mark.parametrize("error", [TypeError("a bug"), ValueError("\n\n---- C++ Traceback ----\nlong\n")])
    def test_bugs_keep_their_traceback(self, script, error):
        def main(argv):
            raise error

        script("distill.demo", main)
        with pytest.raises(type(error)):
            cli.main(["demo"])

    def test_interrupt(self, script, capsys):
        def main(argv):
            raise KeyboardInterrupt

        script("distill.demo", main)
        assert run("demo") == 130
        assert capsys.readouterr().err == "interrupted\n"

    @pytest.mark.parametrize(
        "arguments",
        [(), ("paint",), ("train",), ("train", "gan"), ("bench",), ("bench", "all"), ("doctor", "--fast"), ("sample",)],
    )
    def test_usage(self, arguments, capsys):
        assert run(*arguments) == 2
        assert "usage: fast-diffusers" in capsys.readouterr().err

    def test_version(self, capsys):
        assert run("--version") == 0
        assert capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("note", 0), ("broken", 1)])
def test_doctor_exit_code(monkeypatch, capsys, status, code):
    monkeypatch.setattr(doctor, "diagnose", lambda: [Finding("cpu", "cores", "2", status)])
    assert run("doctor") == run("doctor", "--json") == code
    assert '"value": "2"' in capsys.readouterr().out


@pytest.fixture(scope="module")
def model(tiny_teacher, tmp_path_factory) -> str:
    """Folder of a random pipeline of 8x8 images, `pipe`, and of a LoRA for it, `lora`."""
    folder = tmp_path_factory.mktemp("model")
    shutil.copytree(tiny_teacher, folder / "pipe")
    transformer = open_pipeline(tiny_teacher).transformer
    for parameter in lora.inject(transformer, rank=2, alpha=2, targets=["to_q"]):
        parameter.set_value(paddle.randn(parameter.shape))
    lora.save(transformer, folder / "lora", "default")
    return str(folder)


class TestSample:
    @pytest.fixture
    def sample(self, model, tmp_path, capsys):
        """Images [N, H, W] that `sample` writes, by arguments."""
        runs = []

        def images(*arguments: str) -> np.ndarray:
            folder = tmp_path / str(len(runs))
            runs.append(folder)
            assert run("sample", "--model", f"{model}/pipe", "--output_dir", str(folder), *arguments) == 0
            assert str(folder) in capsys.readouterr().out
            return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())])

        return images

    def test_every_prompt_gets_its_images(self, sample):
        images = sample("--prompt", "3", "--prompt", "5", "--num_images", "2", "--steps", "2")
        assert images.shape == (4, 8, 8)
        assert len({image.tobytes() for image in images}) == 4

    def test_image_i_has_seed_plus_i_whatever_the_batch(self, sample):
        batch = sample("--prompt", "3", "--num_images", "2", "--seed", "7")
        alone = sample("--prompt", "3", "--seed", "8")
        assert np.abs(batch[1].astype(int) - alone[0]).max() <= 1
        assert np.array_equal(alone, sample("--prompt", "3", "--seed", "8"))

    @pytest.mark.parametrize(
        "arguments", [("--steps", "1"), ("--num_phases", "3"), ("--lora", "LORA"), ("--seed", "1")]
    )
    def test_settings_matter(self, sample, model, arguments):
        arguments = [f"{model}/lora" if a == "LORA" else a for a in arguments]
        assert not np.array_equal(sample("--prompt", "3"), sample("--prompt", "3", *arguments))

    def test_a_lora_of_strength_zero_changes_nothing(self, sample, model):
        off = sample("--prompt", "3", "--lora", f"{model}/lora", "--lora-scale", "0")
        assert np.array_equal(sample("--prompt", "3"), off)

    def test_size(self, sample):
        assert sample("--prompt", "3", "--height", "12", "--width", "6").shape == (1, 12, 6)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--model", "nowhere"), "nowhere"),
            (("--prompt", "cat"), "cat"),
            (("--seed", "-1"), "--seed must not be negative, got -1"),
            (("--num_images", "0"), "--num_images must be positive, got 0"),
            (("--steps", "-4"), "-4"),
            (("--num_phases", "0"), "phases"),
            (("--num_phases", "4", "--num_cells", "3"), "cells"),
            (("--height", "7"), "7"),
            (("--lora", "nowhere"), "nowhere"),
        ],
    )
    def test_bad_arguments(self, model, error_of, tmp_path, arguments, message):
        defaults = ["--model", f"{model}/pipe", "--prompt", "3", "--output_dir", str(tmp_path / "out")]
        assert message in error_of("sample", *defaults, *arguments)
        assert not (tmp_path / "out").exists()


class TestConvert:
    def test_a_pipeline_there_and_back(self, model, tmp_path, capsys):
        assert run("convert", f"{model}/pipe", str(tmp_path / "a"), "--layout", "diffusers") == 0
        printed = capsys.readouterr().out
        assert "pipeline" in printed and "transformer: FluxTransformer2DModel, from paddle layout" in printed
        arguments = ["--layout", "paddle", "--max-shard-size", "8KB", "--without", "scheduler", "--json"]
        assert run("convert", str(tmp_path / "a"), str(tmp_path / "b"), *arguments) == 0
        report = json.loads(capsys.readouterr().out)
        assert {part["name"]: part["action"] for part in report["parts"]} == {
            "scheduler": "left out",
            "transformer": "converted",
        }
        assert len(list((tmp_path / "b" / "transformer").glob("*.safetensors"))) > 1

    def test_a_lora(self, model, tmp_path, capsys):
        target = tmp_path / "lora.safetensors"
        arguments = ["--layout", "diffusers", "--model", f"{model}/pipe", "--lora_alpha", "3"]
        assert run("convert", f"{model}/lora", str(target), *arguments) == 0
        assert "alpha 3 (given)" in capsys.readouterr().out
        assert target.is_file()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("nowhere", "out", "--layout", "paddle"), "nowhere does not exist"),
            (("PIPE", "PIPE", "--layout", "paddle"), "exists already"),
            (("PIPE", "out", "--layout", "paddle", "--without", "vae"), "has no component vae"),
            (("PIPE", "out", "--layout", "paddle", "--max_shard_size", "big"), "bad size 'big'"),
        ],
    )
    def test_errors_are_one_line(self, model, error_of, tmp_path, monkeypatch, arguments, message):
        monkeypatch.chdir(tmp_path)
        assert message in error_of("convert", *(a.replace("PIPE", f"{model}/pipe") for a in arguments))
        assert not list(tmp_path.iterdir())

    def test_a_layout_is_needed(self, model, tmp_path, capsys):
        assert run("convert", f"{model}/pipe", str(tmp_path / "a")) == 2
        assert "--layout" in capsys.readouterr().err
