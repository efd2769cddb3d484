import numpy as np
import paddle
import pytest

from fast_diffusers import lora
from fast_diffusers.errors import UserError
from fast_diffusers.random import Generator


@pytest.fixture
def pipe(make_label_pipeline):
    return make_label_pipeline()


@pytest.fixture
def files(make_label_pipeline, tmp_path):
    """Two adapters, saved from another copy of the model in the folders "a" and "b"."""
    model = make_label_pipeline().transformer
    for name in "ab":
        for parameter in lora.inject(model, 4, 8, ["to_q", "to_v"], name=name):
            parameter.set_value(0.3 * paddle.randn(parameter.shape))
        lora.save(model, tmp_path / name, name=name)
    return tmp_path


def generate(pipe, scale=None):
    kwargs = None if scale is None else {"scale": scale}
    images = pipe(
        "3", num_inference_steps=2, generator=Generator(0), output_type="np", joint_attention_kwargs=kwargs
    ).images
    return images


def test_load_scale_and_unload(pipe, files):
    base = generate(pipe)
    pipe.load_lora_weights(files / "a")
    adapted = generate(pipe)
    assert np.abs(adapted - base).max() > 1e-3
    assert np.array_equal(generate(pipe, 0.0), base) or np.allclose(generate(pipe, 0.0), base, atol=1e-6)
    assert np.array_equal(generate(pipe, 1.0), adapted)
    half = generate(pipe, 0.5)
    assert min(np.abs(half - base).max(), np.abs(half - adapted).max()) > 1e-4
    assert np.array_equal(generate(pipe), adapted)  # the scale was of that call only
    pipe.unload_lora_weights()
    assert np.array_equal(generate(pipe), base)
    assert not lora.adapters(pipe.transformer)


def test_file_name_adapter_name_and_alpha(pipe, files):
    (files / "a" / "paddle_lora_weights.safetensors").rename(files / "mine.safetensors")
    pipe.load_lora_weights(files, weight_name="mine.safetensors", adapter_name="style", alpha=4.0)
    assert lora.adapters(pipe.transformer)["style"].alpha == 4.0
    quiet = generate(pipe)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(files / "mine.safetensors")  # alpha 8 in the file
    assert np.allclose(generate(pipe, 0.5), quiet, atol=1e-6)


def test_fuse_and_unfuse(pipe, files):
    base = generate(pipe)
    pipe.load_lora_weights(files / "a")
    half = generate(pipe, 0.5)
    pipe.fuse_lora(lora_scale=0.5)
    assert np.allclose(generate(pipe), half, atol=1e-5)
    with pytest.raises(UserError, match="fused"):
        generate(pipe, 0.5)
    pipe.unfuse_lora()
    assert np.allclose(generate(pipe, 0.5), half, atol=1e-6)
    pipe.unload_lora_weights()
    assert np.array_equal(generate(pipe), base)


def test_unloading_after_fusing_keeps_the_weights(pipe, files):
    pipe.load_lora_weights(files / "a")
    pipe.fuse_lora()
    fused = generate(pipe)
    pipe.unload_lora_weights()
    assert np.array_equal(generate(pipe), fused)
    assert not lora.adapters(pipe.transformer)
    with pytest.raises(UserError, match="no LoRA adapter is fused"):
        pipe.unfuse_lora()


def test_several_adapters(pipe, files):
    pipe.load_lora_weights(files / "a", adapter_name="a")
    only_a = generate(pipe)
    pipe.load_lora_weights(files / "b", adapter_name="b")
    only_b = generate(pipe)
    pipe.set_adapters(["a", "b"], [1.0, 0.0])
    assert np.allclose(generate(pipe), only_a, atol=1e-6)
    pipe.set_adapters(["a", "b"])
    both = generate(pipe)
    assert min(np.abs(both - one).max() for one in (only_a, only_b)) > 1e-4
    pipe.set_adapters("b")
    assert np.array_equal(generate(pipe), only_b)
    with pytest.raises(UserError, match="3 weights for 2 adapters"):
        pipe.set_adapters(["a", "b"], [1, 2, 3])


def test_saving_leaves_the_adapters_out(pipe, files, tmp_path):
    base = generate(pipe)
    pipe.load_lora_weights(files / "a")
    pipe.save_pretrained(tmp_path / "saved")
    again = type(pipe).from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(generate(again), base)


def test_errors(pipe, files, make_label_pipeline):
    for method in (lambda: generate(pipe, 0.5), pipe.fuse_lora):
        with pytest.raises(UserError, match="no LoRA is running in this pipeline: call load_lora_weights"):
            method()
    with pytest.raises(UserError, match="no LoRA adapter is fused"):
        pipe.unfuse_lora()
    pipe.unload_lora_weights()  # nothing to do
    with pytest.raises(FileNotFoundError, match="no LoRA file"):
        pipe.load_lora_weights(files / "c")
    other = make_label_pipeline(num_attention_heads=3)
    with pytest.raises(UserError, match="does not fit this model"):
        other.load_lora_weights(files / "a")
