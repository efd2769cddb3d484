import gzip
import json
import shutil
import sys
from pathlib import Path

import distill  # noqa: F401  # isort: skip  (before paddle)
import numpy as np
import paddle
import pytest
from PIL import Image

from distill.logs import read_metrics
from fast_diffusers.conditioning import Cond
from fast_diffusers.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "mnist"))

import compare
import figures
import sample
from train import OBJECTIVES, Settings, draw, main, train
from unet import NO_LABEL, UNet, along_positions, from_patches, modulate, rms_norm, to_patches

TINY = {"data": "digits", "epochs": 0.1, "batch_size": 24, "width": 4, "depth": 1, "sample_every": 2, "log_every": 2}


def random_model(image_size=8, width=4):
    """With weights that let every input matter; a new model's velocity is zero."""
    paddle.seed(0)
    model = UNet(image_size, width, depth=1)
    for parameter in model.parameters():
        parameter.set_value(paddle.randn(parameter.shape) * 0.3)
    return model


def case(size=8, batch=3):
    paddle.seed(1)
    return paddle.randn([batch, 1, size, size]), paddle.to_tensor([0.2, 0.6, 1.0][:batch])


class TestUNet:
    @pytest.mark.parametrize("size", [8, 28])
    def test_velocity_has_the_shape_of_the_image_and_starts_at_zero(self, size):
        x, t = case(size)
        velocity = UNet(size, 4)(x, t, {}, target_t=0.0)
        assert velocity.shape == x.shape and velocity.dtype == paddle.float32 and not velocity.any()

    @paddle.no_grad()
    def test_every_input_matters(self):
        model, (x, t) = random_model(), case()
        label = paddle.to_tensor([1, 2, 3])
        base = model(x, t, {"label": label}, target_t=0.5 * t)
        others = {
            "image": model(x + 1, t, {"label": label}, target_t=0.5 * t),
            "time": model(x, 0.9 * t, {"label": label}, target_t=0.5 * t),
            "sign": model(x, -t, {"label": label}, target_t=-0.5 * t),
            "target": model(x, t, {"label": label}, target_t=0.2 * t),
            "label": model(x, t, {"label": label + 1}, target_t=0.5 * t),
        }
        for name, other in others.items():
            assert (base - other).abs().max() > 1e-3, name

    @paddle.no_grad()
    def test_defaults_are_the_time_itself_and_no_label(self):
        model, (x, _) = random_model(), case()
        t = paddle.full([3], 0.5)
        none = Cond(label=paddle.full([3], NO_LABEL, dtype="int64"))
        assert (model(x, 0.5, {}) == model(x, t, none, target_t=t)).all()

    @paddle.no_grad()
    def test_rows_do_not_see_each_other(self):
        model, (x, t) = random_model(), case()
        whole = model(x, t, {}, target_t=0.0)
        alone = paddle.concat([model(x[i : i + 1], t[i : i + 1], {}, target_t=0.0) for i in range(3)])
        np.testing.assert_allclose(whole.numpy(), alone.numpy(), atol=1e-4)

    def test_every_weight_gets_a_gradient(self):
        model, (x, t) = random_model(), case()
        model(x, t, {"label": paddle.to_tensor([1, 2, 3])}, target_t=0.5 * t).square().sum().backward()
        assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())

    @pytest.mark.parametrize(("arguments", "named"), [((6,), "image_size"), ((8, 0), "width"), ((8, 4, 0), "depth")])
    def test_bad_sizes_are_named(self, arguments, named):
        with pytest.raises(UserError, match=named):
            UNet(*arguments)

    def test_an_image_of_another_size_is_an_error(self):
        with pytest.raises(ValueError, match=r"\[B, 1, 8, 8\]"):
            random_model()(paddle.zeros([1, 1, 28, 28]), 0.5, {})

    @paddle.no_grad()
    def test_a_saved_model_loads_the_same(self, tmp_path):
        model, (x, t) = random_model(), case()
        model.save(tmp_path / "model.safetensors")
        assert (UNet.load(tmp_path / "model.safetensors")(x, t, {}) == model(x, t, {})).all()

    @pytest.mark.parametrize("content", [b"", b"not safetensors"])
    def test_a_damaged_file_is_an_error(self, tmp_path, content):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(UserError, match="not a model"):
            UNet.load(tmp_path / "model.safetensors")


class TestParts:
    def test_patches_are_two_by_two_pixels_in_the_stated_order(self):
        image = np.arange(2 * 64, dtype=np.float32).reshape(2, 1, 8, 8)
        patches = to_patches(paddle.to_tensor(image)).numpy().reshape(2, 2, 2, 2, 2, 4)
        for row, column in np.ndindex(4, 4):
            expected = image[:, 0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].reshape(2, 4)
            found = patches[row % 2, column % 2, row // 2, column // 2]
            np.testing.assert_array_equal(found, expected)

    @pytest.mark.parametrize("size", [4, 8, 28])
    def test_patches_go_back_to_the_image(self, size):
        image = paddle.randn([3, 1, size, size])
        assert (from_patches(to_patches(image), size) == image).all()

    def test_norm_and_modulation(self):
        h, scale, shift = paddle.randn([5, 3, 8]), paddle.randn([3, 8]), paddle.randn([3, 8])
        x = h.numpy()
        norm = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        np.testing.assert_allclose(rms_norm(h).numpy(), norm, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(
            modulate(h, scale, shift).numpy(), x * (1 + scale.numpy()) + shift.numpy(), rtol=1e-5, atol=1e-6
        )
        assert (along_positions(scale, 5) == scale.expand([5, 3, 8])).all()


class TestTrain:
    @pytest.mark.parametrize("method", OBJECTIVES)
    def test_a_stopped_run_continues_bit_for_bit(self, method, tmp_path):
        whole, resumed = tmp_path / "whole", tmp_path / "resumed"
        train(Settings(method=method, output_dir=str(whole), **TINY))
        checkpoints = sorted((whole / "checkpoints").iterdir())
        assert len(checkpoints) == 2
        shutil.copytree(whole, resumed)
        shutil.rmtree(resumed / "checkpoints" / checkpoints[-1].name)
        (resumed / "model.safetensors").unlink()
        train(Settings(method=method, output_dir=str(resumed), **TINY), resume=True)
        assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()

    def test_what_a_run_leaves(self, tmp_path):
        options = [word for name, value in TINY.items() for word in (f"--{name}", str(value))]
        main([*options, "--method", "rcgm", "--output_dir", str(tmp_path)])
        assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [2, 4, 6]
        assert {path.name for path in (tmp_path / "samples").iterdir()} == {f"step-{n:08d}.png" for n in (2, 4, 6)}
        assert (tmp_path / "losses.png").is_file()
        with pytest.raises(UserError, match="--resume"):
            train(Settings(output_dir=str(tmp_path), **TINY))

    @pytest.mark.parametrize("bad", [{"epochs": 0}, {"batch_size": 0}, {"lr": 0.0}, {"lr": float("nan")}, {"seed": -1}])
    def test_bad_settings(self, bad):
        with pytest.raises(UserError, match="positive"):
            Settings(**bad)

    def test_mnist_needs_a_folder(self, tmp_path):
        with pytest.raises(UserError, match="idx"):
            train(Settings(data="mnist", output_dir=str(tmp_path)))

    @pytest.mark.parametrize(
        ("damage", "message"),
        [(lambda data: b"\x00\x00\x09\x03" + data[4:], "magic number"), (lambda data: data[:-1], "header says")],
    )
    def test_a_bad_mnist_file_is_named(self, tmp_path, damage, message):
        images, labels = np.zeros([2, 28, 28], np.uint8), np.zeros([2], np.uint8)
        for stem, array in (("train-images-idx3-ubyte", images), ("train-labels-idx1-ubyte", labels)):
            header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
            (tmp_path / f"{stem}.gz").write_bytes(gzip.compress(header + array.tobytes()))
        path = tmp_path / "train-images-idx3-ubyte.gz"
        path.write_bytes(gzip.compress(damage(gzip.decompress(path.read_bytes()))))
        with pytest.raises(UserError, match=f"train-images.*{message}"):
            train(Settings(data="mnist", data_path=str(tmp_path), output_dir=str(tmp_path / "out")))

    def test_mnist_trains(self, mnist_dir, tmp_path):
        settings = {**TINY, "data": "mnist", "data_path": str(mnist_dir), "epochs": 48 / 60000}
        model = UNet.load(train(Settings(output_dir=str(tmp_path), **settings)))
        assert model.config["image_size"] == 28


class TestSample:
    @pytest.mark.parametrize(("steps", "style"), [(1, "few"), (2, "any"), (3, "mul")])
    def test_the_same_seed_gives_the_same_grid(self, tmp_path, steps, style):
        random_model().save(tmp_path / "model.safetensors")
        grids = []
        for folder in (tmp_path / "a", tmp_path / "b"):
            options = ["--steps", str(steps), "--style", style, "--num_samples", "12", "--output_dir", str(folder)]
            sample.main(["--model_path", str(tmp_path), *options])
            (path,) = folder.iterdir()
            grids.append(np.asarray(Image.open(path)))
        assert grids[0].std() > 0
        np.testing.assert_array_equal(*grids)

    def test_a_sample_does_not_depend_on_the_batch(self):
        model, labels = random_model(), [3, 1, 4, 1, 5]
        np.testing.assert_allclose(draw(model, labels, 7), draw(model, labels, 7, batch_size=2), atol=1e-4)

    @pytest.mark.parametrize("option", ["--steps", "--num_samples"])
    def test_bad_numbers(self, tmp_path, option):
        with pytest.raises(UserError, match=option):
            sample.main(["--model_path", str(tmp_path), option, "0"])

    def test_no_model(self, tmp_path):
        with pytest.raises(UserError, match="does not exist"):
            sample.main(["--model_path", str(tmp_path)])


class TestCompare:
    def options(self, folder, *more):
        tiny = [word for name, value in TINY.items() for word in (f"--{name}", str(value))]
        return [*tiny, "--num_samples", "80", "--output_dir", str(folder), *more]

    def test_finished_runs_are_kept(self, tmp_path, capsys):
        compare.main(self.options(tmp_path, "--seeds", "0", "--methods", "rcgm"))
        kept = (tmp_path / "results.jsonl").read_text()
        compare.main(self.options(tmp_path, "--seeds", "0"))
        assert (tmp_path / "results.jsonl").read_text().startswith(kept)
        results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
        assert [(result["method"], result["seed"]) for result in results] == [("rcgm", 0), ("twinflow", 0)]
        rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| rcgm", "| twinflow"))]
        assert len(rows[-8:]) == 2 * len(compare.SAMPLERS)

    def test_table(self):
        def result(seed, accuracy):
            metrics = {name: {"accuracy": accuracy, "frechet": 4.0, "diversity": 1.0} for name in compare.SAMPLERS}
            metrics["20 steps, mul"]["frechet"] = 2.0
            return {"method": "rcgm", "seed": seed, "metrics": metrics}

        lines = compare.table([result(0, 0.9), result(1, 1.0)]).splitlines()
        assert lines[2] == "| rcgm | 1 step | 0.950 ± 0.071 | 4.00 ± 0.00 | 2.00 ± 0.00 | 1.00 ± 0.00 |"
        assert len(lines) == 2 + len(compare.SAMPLERS)

    def test_bad_numbers(self, tmp_path):
        with pytest.raises(UserError, match="--jobs"):
            compare.main(self.options(tmp_path, "--jobs", "0"))

    @pytest.mark.slow
    def test_runs_in_processes(self, tmp_path):
        compare.main(self.options(tmp_path, "--seeds", "0", "--jobs", "2"))
        assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2


def test_figures_of_the_tutorial(tmp_path):
    for method in OBJECTIVES:
        (tmp_path / f"{method}-seed0").mkdir()
        random_model().save(tmp_path / f"{method}-seed0" / "model.safetensors")
    figures.main(["--runs", str(tmp_path), "--output_dir", str(tmp_path / "images")])
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "images").iterdir()}
    assert set(sizes) == {"mnist_one_step.png", "mnist_paths.png"} and max(sizes.values()) < 100_000
