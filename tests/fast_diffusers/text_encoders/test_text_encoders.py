"""CLIP and T5 against PyTorch transformers (tests/assets/make_text_encoder_goldens.py)."""

import json
import shutil
from pathlib import Path

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file, save_file

from fast_diffusers.errors import UserError
from fast_diffusers.text_encoders import CLIPTextModel, T5EncoderModel
from fast_diffusers.text_encoders.t5 import relative_position_buckets

ASSETS = Path(__file__).parents[2] / "assets" / "text_encoders"
GOLDEN = load_file(ASSETS / "outputs.safetensors")
IDS = json.loads((ASSETS / "ids.json").read_text(encoding="utf-8"))
MODELS = {"clip": CLIPTextModel, "clip_legacy": CLIPTextModel, "t5": T5EncoderModel}


@pytest.fixture
def folder(request, tmp_path) -> Path:
    """A folder with the golden model of the test's `name`."""
    name = request.getfixturevalue("name")
    kind = name.removesuffix("_legacy")
    for file in (ASSETS / kind).iterdir():
        if file.is_file():
            shutil.copy(file, tmp_path)
    if name == "clip_legacy":
        shutil.copy(ASSETS / "clip" / "legacy" / "config.json", tmp_path)
    return tmp_path


@paddle.no_grad()
def outputs(model, name: str) -> dict[str, np.ndarray]:
    result = model(paddle.to_tensor(IDS[name.removesuffix("_legacy")]))
    return {f"{name}.{field}": value.numpy() for field, value in result._asdict().items()}


def check(model, name: str) -> None:
    values = outputs(model, name)
    assert {key for key in GOLDEN if key.startswith(f"{name}.")} == values.keys()
    for key, value in values.items():
        assert np.abs(value - GOLDEN[key]).max() < 1e-5 * np.abs(GOLDEN[key]).max(), key


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_those_of_transformers(name, folder):
    check(MODELS[name].from_pretrained(folder), name)


@pytest.mark.parametrize("name", ["clip"])
def test_clip_files_with_the_older_prefix(name, folder):
    tensors = {f"text_model.{key}": value for key, value in load_file(folder / "model.safetensors").items()}
    tensors["text_model.embeddings.position_ids"] = np.arange(77)[None]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    check(CLIPTextModel.from_pretrained(folder), name)


@pytest.mark.parametrize("name", ["t5"])
def test_t5_files_with_the_embedding_twice(name, folder):
    shard = folder / "model-00001-of-00002.safetensors"
    tensors = load_file(shard)
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
    save_file(tensors, shard, metadata={"format": "pt"})
    check(T5EncoderModel.from_pretrained(folder), name)


@pytest.mark.parametrize("layout", ["paddle", "diffusers"])
@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name, folder, layout, tmp_path):
    model = MODELS[name].from_pretrained(folder)
    model.save_pretrained(tmp_path / "again", layout=layout)
    again = MODELS[name].from_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["model_type"] == json.loads((folder / "config.json").read_text())["model_type"]
    for key, value in outputs(again, name).items():
        assert np.array_equal(value, outputs(model, name)[key])


def test_position_buckets_are_those_of_transformers():
    golden = np.array(IDS["t5_buckets"])  # offsets -199 .. 199 with 32 buckets up to distance 128
    buckets = relative_position_buckets(200, 32, 128)
    assert np.array_equal(buckets[-1], golden[:200]) and np.array_equal(buckets[0], golden[199:])


@pytest.mark.parametrize("name", ["clip"])
def test_errors(name, folder):
    model = CLIPTextModel.from_pretrained(folder)
    with pytest.raises(ValueError, match="at most 77 tokens, got 78"):
        model(paddle.zeros([1, 78], dtype="int64"))
    with pytest.raises(UserError, match="hidden_act 'relu' is not one of"):
        CLIPTextModel(hidden_act="relu")
    with pytest.raises(UserError, match="T5 leaves the range of float16: load the text encoder in bfloat16 or float32"):
        T5EncoderModel.from_pretrained(ASSETS / "t5", paddle_dtype="float16")
    with pytest.raises(UserError, match=r"T5 v1\.1, 'gated-gelu'; got feed_forward_proj 'relu'"):
        T5EncoderModel(feed_forward_proj="relu")
    tensors = load_file(folder / "model.safetensors")
    del tensors["final_layer_norm.bias"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"do not fit CLIPTextModel.*missing: .*final_layer_norm.bias"):
        CLIPTextModel.from_pretrained(folder)
