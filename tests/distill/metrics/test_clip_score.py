import json
import shutil
from pathlib import Path

import numpy as np
import paddle
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from distill.metrics.clip_score import ClipScorer, preprocess
from fast_diffusers.errors import UserError

ASSETS = Path(__file__).parents[2] / "assets"
GOLDEN = ASSETS / "metrics" / "clip_outputs.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIP folder as on the hub: model and tokenizer together."""
    folder = tmp_path_factory.mktemp("clip")
    shutil.copytree(ASSETS / "metrics" / "clip", folder, dirs_exist_ok=True)
    shutil.copytree(ASSETS / "text_encoders" / "clip" / "tokenizer", folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def golden():
    with safe_open(GOLDEN, framework="np") as file:
        return load_file(GOLDEN) | {"prompts": json.loads(file.metadata()["prompts"])}


def test_preprocess_equals_transformers(golden):
    pixels = np.stack([preprocess(image, 32) for image in golden["images"]])
    np.testing.assert_allclose(pixels, golden["pixels"], atol=1e-6)


def test_scores_equal_transformers(folder, golden):
    scorer = ClipScorer(folder)
    embeds = scorer.model.embed_images(paddle.to_tensor(golden["pixels"])).numpy()
    np.testing.assert_allclose(embeds, golden["image_embeds"], atol=2e-6)
    np.testing.assert_allclose(
        scorer.model.embed_texts(scorer.tokenizer(golden["prompts"])).numpy(), golden["text_embeds"], atol=2e-6
    )
    scores = scorer(golden["images"], golden["prompts"])
    assert scores.dtype == np.float64
    np.testing.assert_allclose(scores, golden["scores"], atol=2e-6)
    assert np.ptp(golden["scores"]) > 0.05  # the comparison means something


def test_gray_images(folder):
    gray = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 1), dtype=np.uint8)
    scorer = ClipScorer(folder)
    np.testing.assert_array_equal(scorer(gray, ["a", "b"]), scorer(np.repeat(gray, 3, axis=-1), ["a", "b"]))


def test_missing_folder_and_wrong_weights(tmp_path, folder):
    with pytest.raises(UserError, match="is not a folder"):
        ClipScorer(tmp_path / "nothing")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["projection_dim"] += 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"visual_projection\.weight"):
        ClipScorer(tmp_path)
