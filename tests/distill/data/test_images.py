import numpy as np
import pytest

from distill.data.folder import image_folder
from distill.data.images import ImageBatches
from distill.data.memory import ArraySource, digits
from fast_diffusers.errors import UserError


class Slow:
    """The records of a source, without its fast path."""

    def __init__(self, source):
        self._source = source
        self.identity = source.identity

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        return self._source[index]


def test_values_of_the_digits():
    batch = ImageBatches(digits("all"), 8, 8, 1).fetch(np.array([5, 0]))
    assert batch["images"].shape == (2, 1, 8, 8) and batch["images"].dtype == np.float32
    np.testing.assert_allclose(batch["images"][1, 0], digits("all").images[0, ..., 0] / 127.5 - 1, atol=1e-6)
    assert batch["prompts"] == ["5", "0"] and batch["indices"].tolist() == [5, 0]


@pytest.mark.parametrize("shape", [(8, 8, 1), (16, 12, 3)])
def test_memory_path_equals_record_path(shape):
    source = digits("test")
    indices = np.array([3, 100, 3, 7])
    fast, slow = (ImageBatches(s, *shape).fetch(indices) for s in (source, Slow(source)))
    np.testing.assert_array_equal(fast["images"], slow["images"])
    assert fast["prompts"] == slow["prompts"] and fast["indices"].tolist() == slow["indices"].tolist()


def test_memory_path_decodes_once(monkeypatch):
    source = ArraySource("x", np.zeros((3, 4, 4, 1), np.uint8), np.arange(3))
    batches = ImageBatches(source, 8, 8, 3)
    monkeypatch.setattr("distill.data.images.fit_image", None)
    assert batches.fetch(np.array([1]))["images"].shape == (1, 3, 8, 8)


def test_bad_records_are_replaced_counted_and_reported(tmp_path, png, pictures):
    for index, picture in enumerate(pictures):
        (tmp_path / f"{index}.png").write_bytes(png(picture))
        (tmp_path / f"{index}.txt").write_text(str(index))
    (tmp_path / "2.png").write_text("not a picture")
    reported = []
    batches = ImageBatches(
        image_folder(tmp_path),
        5,
        7,
        max_bad_fraction=0.5,
        on_bad=lambda index, error: reported.append((index, str(error))),
    )
    batch = batches.fetch(np.array([1, 2, 3]))
    assert batch["prompts"] == ["1", "3", "3"] and batch["indices"].tolist() == [1, 3, 3]
    np.testing.assert_array_equal(batch["images"][1], batch["images"][2])
    assert reported == [(2, "2.png: not an image")] and batches.bad_count == 1


def test_identity_includes_the_size():
    source = digits("test")
    assert ImageBatches(source, 8, 8, 1).identity != ImageBatches(source, 8, 16, 1).identity


@pytest.mark.parametrize(
    ("shape", "message"),
    [((0, 8, 1), "image height must be"), ((8, "8", 1), "image width must be"), ((8, 8, 4), "channels must be 1 or 3")],
)
def test_bad_sizes(shape, message):
    with pytest.raises(UserError, match=message):
        ImageBatches(digits("test"), *shape)
