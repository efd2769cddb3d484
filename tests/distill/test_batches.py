import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from distill.batches import Encoder, open_batches, open_data, reload_text_encoders
from distill.config import DataConfig
from distill.data import LatentCache
from fast_diffusers.conditioning import Cond
from fast_diffusers.errors import UserError
from fast_diffusers.text_encoders import Gemma2Model

GEMMA = Path(__file__).parents[1] / "assets" / "text_encoders" / "gemma2"


class FakePipe:
    """Embeds a prompt as its length and remembers what it was asked."""

    def __init__(self, embeds_guidance=True):
        self.denoiser = SimpleNamespace(embeds_guidance=embeds_guidance)
        self.asked = []
        self.text_encoder = self.text_encoder_2 = self.tokenizer = self.vae = object()

    def register_modules(self, **components):
        vars(self).update(components)

    def conditioning(self, prompts):
        self.asked += prompts
        return Cond(length=paddle.to_tensor([[float(len(prompt))] for prompt in prompts]))

    def encode_images(self, images):
        return images * 2


def test_each_prompt_is_encoded_once():
    pipe = FakePipe()
    encoder = Encoder(pipe, 3.5)
    assert encoder.prompts(["aa", "b", "aa"])["length"].flatten().tolist() == [2, 1, 2]
    assert encoder.prompts(["b", "ccc"])["length"].flatten().tolist() == [1, 3]
    assert pipe.asked == ["aa", "b", "ccc"]


def test_prompts_are_forgotten_when_there_are_too_many():
    pipe = FakePipe()
    encoder = Encoder(pipe, 3.5, max_prompts=2)
    for prompts in (["a", "bb"], ["ccc"], ["a"]):
        assert encoder.prompts(prompts)["length"].flatten().tolist() == [len(p) for p in prompts]
    assert pipe.asked == ["a", "bb", "ccc", "a"]


@pytest.mark.parametrize("embeds_guidance", [True, False])
def test_batch_from_images(embeds_guidance):
    images = np.ones((2, 1, 4, 4), "float32")
    batch = Encoder(FakePipe(embeds_guidance), 3.5).batch({"images": images, "prompts": ["a", "bb"]})
    assert float(batch["latents"].mean()) == 2
    assert batch["cond"]["length"].flatten().tolist() == [1, 2]
    assert batch["null_cond"]["length"].flatten().tolist() == [0, 0]
    if embeds_guidance:
        assert batch["guidance"].tolist() == [3.5, 3.5]
    else:
        assert batch["guidance"] is None


class Level:
    """A denoiser whose velocity is its condition, plus what it is told as guidance."""

    def __init__(self, embeds_guidance):
        self.embeds_guidance = embeds_guidance

    def __call__(self, x, t, cond, *, target_t=None, guidance=None):
        assert (guidance is not None) == self.embeds_guidance
        return x + (cond["length"] + (guidance or 0)).reshape([-1, 1, 1, 1])


@pytest.mark.parametrize(
    "embeds_guidance, guided, expected",
    [
        (True, False, [4.5, 5.5]),
        (True, True, [4.5, 5.5]),
        (False, False, [1, 2]),
        (False, True, [3.5, 7]),  # away from the empty prompt, whose length is 0
    ],
)
def test_velocity_is_guided_as_the_denoiser_takes_it(embeds_guidance, guided, expected):
    velocity = Encoder(FakePipe(), 3.5).velocity(Level(embeds_guidance), ["a", "bb"], guided)
    assert velocity(paddle.zeros([2, 1, 1, 1]), paddle.ones([]), None).flatten().tolist() == expected


def test_a_function_is_told_the_guidance():
    velocity = Encoder(FakePipe(), 3.5).velocity(lambda x, t, cond, *, target_t, guidance: x + guidance, ["a"], True)
    assert float(velocity(paddle.zeros([1]), paddle.ones([]), None)) == 3.5


def test_cached_latents_give_the_same_batches(tmp_path):
    encoder = Encoder(FakePipe(), 3.5)
    plain = open_batches(DataConfig(), encoder, 1, "fake", tmp_path)
    cached = open_batches(DataConfig(cache=str(tmp_path / "cache")), encoder, 1, "fake", tmp_path)
    assert isinstance(cached, LatentCache)
    rows = np.array([5, 0, 7])
    expected, actual = (encoder.batch(batches.fetch(rows)) for batches in (plain, cached))
    np.testing.assert_array_equal(expected["latents"].numpy(), actual["latents"].numpy())
    np.testing.assert_array_equal(expected["cond"]["length"].numpy(), actual["cond"]["length"].numpy())


def test_text_encoders_are_dropped_after_caching(tmp_path):
    pipe = FakePipe()
    encoder, config = Encoder(pipe, 3.5, max_prompts=2), DataConfig(cache=str(tmp_path / "cache"))
    open_batches(config, encoder, 1, "fake", tmp_path)
    assert pipe.text_encoder is not None  # nobody said which prompts are still needed

    cached = open_batches(config, encoder, 1, "fake", tmp_path, keep_prompts=["aa", "bbb", "aa"])
    assert pipe.text_encoder is pipe.text_encoder_2 is pipe.tokenizer is None
    assert pipe.vae is not None and not hasattr(pipe, "tokenizer_2")
    pipe.asked.clear()
    assert encoder.batch(cached.fetch(np.array([0, 3])))["null_cond"]["length"].flatten().tolist() == [0, 0]
    assert encoder.prompts(["bbb", "aa"])["length"].flatten().tolist() == [3, 2]
    assert pipe.asked == []


def test_dropped_text_encoders_come_back_from_the_folder_of_the_teacher(tmp_path):
    index = {"text_encoder": ["transformers", "Gemma2Model"], "vae": ["diffusers", "AutoencoderDC"]}
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "SanaPipeline", **index}))
    shutil.copytree(GEMMA, tmp_path / "text_encoder", ignore=shutil.ignore_patterns("tokenizer"))
    pipe = FakePipe()
    pipe.component_types, vae = dict.fromkeys(("text_encoder", "tokenizer", "vae")), pipe.vae
    pipe.text_encoder = None
    reload_text_encoders(pipe, str(tmp_path))
    assert isinstance(pipe.text_encoder, Gemma2Model)
    assert pipe.vae is vae


def test_text_encoders_stay_without_a_cache(tmp_path):
    pipe = FakePipe()
    open_batches(DataConfig(), Encoder(pipe, 3.5), 1, "fake", tmp_path, keep_prompts=["a"])
    assert pipe.text_encoder is not None


@pytest.mark.parametrize(
    "config, message",
    [
        (DataConfig(kind="mnist", height=28, width=28), "name the folder that holds the four idx .gz files"),
        (DataConfig(kind="image_folder"), "needs dir"),
    ],
)
def test_missing_data_is_one_message(config, message):
    with pytest.raises(UserError, match=message):
        open_data(config)


def test_empty_folder_is_one_message(tmp_path):
    with pytest.raises(UserError, match="no image"):
        open_data(DataConfig(kind="image_folder", path=str(tmp_path)))
