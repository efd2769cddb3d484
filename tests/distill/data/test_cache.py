import logging

import numpy as np
import paddle
import pytest

from distill.data.cache import LatentCache
from distill.data.images import ImageBatches
from distill.data.loader import Loader
from distill.data.memory import ArraySource
from distill.data.records import BadRecord
from fast_diffusers.errors import UserError

N = 23


@pytest.fixture
def batches():
    rng = np.random.default_rng(0)
    labels = np.array([0, 0, 1, 0, 1, 1, 0, 1, 0, 0, 0, 0, 2, 3, 0, 2, 3, 0, 1, 1, 4, 0, 0])
    return ImageBatches(ArraySource("x", rng.integers(0, 256, (N, 4, 4, 1), dtype=np.uint8), labels), 4, 4, 1)


class Encoders:
    """Stand-ins for a VAE and a text encoder that count what they are given."""

    def __init__(self, fail_after=None):
        self.images, self.prompts, self.fail_after = 0, [], fail_after

    def encode_images(self, images):
        self.images += len(images)
        if self.fail_after is not None and self.images > self.fail_after:
            raise KeyboardInterrupt
        return paddle.to_tensor(images[:, :, ::2, ::2] * 3)

    def encode_prompts(self, prompts):
        self.prompts += prompts
        numbers = paddle.to_tensor([float(prompt or -1) for prompt in prompts])
        return {
            "prompt_embeds": numbers.reshape([-1, 1, 1]).expand([-1, 2, 3]).astype("bfloat16"),
            "pooled_prompt_embeds": numbers.reshape([-1, 1]) + 0.5,
        }


def build(batches, directory, encoders=None, **settings):
    encoders = encoders or Encoders()
    settings = {"encoder": "toy", "batch_size": 3, "shard_size": 5, **settings}
    return LatentCache.build(batches, encoders.encode_images, encoders.encode_prompts, directory, **settings)


def content(cache):
    return cache.fetch(np.arange(len(cache)))


def assert_same(a, b):
    assert a.keys() == b.keys() and a["prompts"] == b["prompts"] and a["indices"].tolist() == b["indices"].tolist()
    np.testing.assert_array_equal(a["latents"], b["latents"])
    for name in a["cond"]:
        np.testing.assert_array_equal(a["cond"][name], b["cond"][name])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_round_trip(tmp_path, batches, dtype):
    cache = build(batches, tmp_path, dtype=dtype)
    assert len(cache) == N and cache.latent_shape == (1, 2, 2)
    indices = np.array([22, 3, 3, 12, 7])
    batch, images = cache.fetch(indices), batches.fetch(indices)
    np.testing.assert_allclose(
        batch["latents"], images["images"][:, :, ::2, ::2] * 3, atol=0 if dtype == "float32" else 2e-3
    )
    assert batch["prompts"] == images["prompts"] and batch["indices"].tolist() == indices.tolist()
    numbers = np.array([float(prompt) for prompt in images["prompts"]])
    assert batch["cond"]["prompt_embeds"].shape == (5, 2, 3)
    np.testing.assert_array_equal(batch["cond"]["prompt_embeds"][:, 1, 2], numbers)
    np.testing.assert_array_equal(batch["cond"]["pooled_prompt_embeds"], numbers[:, None] + 0.5)
    assert all(array.dtype == np.float32 for array in (batch["latents"], *batch["cond"].values()))


def test_each_prompt_is_encoded_once_and_the_empty_one_always(tmp_path, batches):
    encoders = Encoders()
    cache = build(batches, tmp_path, encoders)
    assert encoders.prompts == ["", "0", "1", "2", "3", "4"] and encoders.images == N
    np.testing.assert_array_equal(cache.embeddings(["", "4"])["pooled_prompt_embeds"], [[-0.5], [4.5]])
    with pytest.raises(KeyError):
        cache.embeddings(["unheard of"])


def test_opening_a_whole_cache_encodes_nothing(tmp_path, batches):
    first, encoders = build(batches, tmp_path), Encoders()
    again = build(batches, tmp_path, encoders)
    assert encoders.images == 0 and encoders.prompts == []
    assert_same(content(again), content(first))
    assert_same(content(LatentCache(first.folder, verify=True)), content(first))


@pytest.mark.parametrize("fail_after", [0, 4, 5, 13, 22])
def test_an_interrupted_build_continues(tmp_path, batches, fail_after):
    whole = content(build(batches, tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        build(batches, tmp_path / "killed", Encoders(fail_after))
    (folder,) = (tmp_path / "killed").iterdir()
    kept = len(list(folder.glob("*.safetensors")))
    assert kept == fail_after // 5 and not list(folder.glob("*.tmp"))
    encoders = Encoders()
    assert_same(content(build(batches, tmp_path / "killed", encoders)), whole)
    assert encoders.images == N - 5 * kept


def damage_truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


def damage_flip(path):
    data = bytearray(path.read_bytes())
    data[-2] ^= 4
    path.write_bytes(data)


def damage_empty(path):
    path.write_bytes(b"")


def damage_header(path):
    data = bytearray(path.read_bytes())
    data[:8] = b"\xff" * 8
    path.write_bytes(data)


def damage_swap(path):
    path.write_bytes((path.parent / "shard-00000.safetensors").read_bytes())


@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, damage_empty, damage_header, damage_swap])
@pytest.mark.parametrize("number", [2, 4])
def test_a_damaged_shard_is_named_and_encoded_again(tmp_path, batches, caplog, damage, number):
    cache = build(batches, tmp_path)
    whole = content(cache)
    path = cache.folder / f"shard-{number:05d}.safetensors"
    damage(path)
    with pytest.raises(UserError, match=f"{path.name} .*build it again"):
        LatentCache(cache.folder, verify=True)
    encoders = Encoders()
    with caplog.at_level(logging.WARNING):
        assert_same(content(build(batches, tmp_path, encoders)), whole)
    assert path.name in caplog.text and "encoding it again" in caplog.text
    assert encoders.images == min(5, N - 5 * number)


def test_every_flipped_byte_is_noticed(tmp_path):
    source = ArraySource("x", np.zeros((1, 2, 2, 1), np.uint8), np.arange(1))
    cache = build(ImageBatches(source, 2, 2, 1), tmp_path)
    (path,) = cache.folder.glob("*.safetensors")
    data, whole = path.read_bytes(), content(cache)
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        try:
            opened = LatentCache(cache.folder, verify=True)
        except UserError:
            continue
        assert_same(content(opened), whole)  # a byte that carries nothing, such as padding


def test_missing_parts_are_named(tmp_path, batches):
    cache = build(batches, tmp_path)
    (cache.folder / "shard-00001.safetensors").unlink()
    with pytest.raises(UserError, match=r"shard-00001.safetensors is missing; build it again"):
        LatentCache(cache.folder)
    with pytest.raises(UserError, match=r"no latent cache in .* \(cache.json: .*build it first"):
        LatentCache(tmp_path)
    (cache.folder / "cache.json").write_text("{}")
    with pytest.raises(UserError, match=r"no latent cache in .* \(cache.json"):
        LatentCache(cache.folder)


def test_other_data_size_encoder_or_dtype_is_another_cache(tmp_path, batches):
    other_size = ImageBatches(batches.source, 8, 8, 1)
    folders = {
        build(batches, tmp_path).folder,
        build(other_size, tmp_path).folder,
        build(batches, tmp_path, encoder="other").folder,
        build(batches, tmp_path, dtype="float16").folder,
    }
    assert len(folders) == 4


def test_training_from_the_cache_sees_the_records_of_the_images(tmp_path, batches):
    class Holes:
        identity = "holes"

        def __len__(self):
            return N

        def __getitem__(self, index):
            if index in (4, 22):
                raise BadRecord(str(index), "hole")
            return batches.source[index]

    def holes():
        return ImageBatches(Holes(), 4, 4, 1, max_bad_fraction=0.5)

    with Loader(holes(), 4, seed=2) as direct, Loader(build(holes(), tmp_path), 4, seed=2, num_workers=3) as cached:
        for step in range(12):
            a, b = direct.batch(step), cached.batch(step)
            assert a["prompts"] == b["prompts"] and a["indices"].tolist() == b["indices"].tolist()
            np.testing.assert_array_equal(a["images"][:, :, ::2, ::2] * 3, b["latents"])


@pytest.mark.parametrize(
    ("encode_images", "settings", "message"),
    [
        (lambda images: images[:1], {}, r"gave latents of shape \[1, 1, 4, 4\] for a batch of 3"),
        (lambda images: images * np.nan, {}, "latents with values that are not finite in float32"),
        (lambda images: images * 1e6, {"dtype": "float16"}, "latents with values that are not finite in float16"),
        (lambda images: images, {"dtype": "int8"}, "unknown cache dtype 'int8'"),
        (lambda images: images, {"batch_size": 0}, "cache batch_size must be a whole number from 1 up, not 0"),
        (lambda images: images, {"shard_size": "5"}, "cache shard_size must be a whole number from 1 up, not '5'"),
    ],
)
def test_bad_encoders_and_settings(tmp_path, batches, encode_images, settings, message):
    settings = {"encoder": "toy", "batch_size": 3, **settings}
    with pytest.raises(UserError, match=message):
        LatentCache.build(batches, encode_images, Encoders().encode_prompts, tmp_path, **settings)
