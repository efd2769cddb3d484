import numpy as np
import pytest

from distill.config import DataConfig
from distill.control import ControlEncoder, agreement, edge_map
from fast_diffusers.pipelines.shipped import open_pipeline


def test_edges_of_a_step_lie_on_both_its_sides():
    images = np.full([1, 2, 5, 6], -1.0, np.float32)
    images[0, 0, :, 3:] = 1  # from black to white between columns 2 and 3; the other channel is flat
    expected = np.full([5, 6], -1.0)
    expected[:, 2:4] = 1
    np.testing.assert_array_equal(edge_map(images)[0], [expected, np.full([5, 6], -1.0)])
    np.testing.assert_array_equal(edge_map(images.transpose([0, 1, 3, 2])), edge_map(images).transpose([0, 1, 3, 2]))


def test_edges_grow_with_the_contrast_and_stay_in_range():
    images = np.random.default_rng(0).uniform(-1, 1, [3, 1, 8, 8]).astype(np.float32)
    edges = edge_map(images)
    assert edges.dtype == np.float32 and edges.min() >= -1 and edges.max() <= 1
    np.testing.assert_allclose(edge_map(images / 4) + 1, np.hypot(*sobel(images / 4)) / 4, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(edge_map(-images), edges)


def sobel(images):
    x, kernel = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge"), np.outer([1, 2, 1], [-1, 0, 1])
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(2, 3))
    return (windows * kernel).sum((-1, -2)), (windows * kernel.T).sum((-1, -2))


def test_agreement_is_that_of_the_edges():
    images = np.random.default_rng(0).uniform(-1, 1, [6, 1, 8, 8]).astype(np.float32)
    controls = edge_map(images)
    assert agreement(images, controls) == {"correlation": pytest.approx(1), "overlap": pytest.approx(1), "found": 1}
    assert agreement(-images, controls)["correlation"] == pytest.approx(1)  # edges have no sign
    others = agreement(images, np.roll(controls, 1, 0))
    pairs = list(zip(controls.astype(np.float64) + 1, np.roll(controls, 1, 0).astype(np.float64) + 1, strict=True))
    truth = np.mean([np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in pairs])
    assert others["correlation"] == pytest.approx(truth, rel=1e-4)
    assert others["overlap"] == pytest.approx(np.mean([np.minimum(*p).sum() / np.maximum(*p).sum() for p in pairs]))
    assert others["found"] == 0
    half = agreement(np.concatenate([images[:3], images[:3]]), controls)
    assert half["found"] == 0.5 and half["correlation"] < 1


def test_images_without_edges_agree_with_nothing():
    images = np.random.default_rng(0).uniform(-1, 1, [2, 1, 8, 8]).astype(np.float32)
    flat = np.zeros_like(images)
    found = agreement(flat, edge_map(images))
    assert found["correlation"] == found["overlap"] == 0
    assert agreement(flat, edge_map(flat)) == {"correlation": 0, "overlap": 0, "found": 1}


@pytest.mark.parametrize("prompts", [["3", "1", "3"], ["no digit", "3"]])
def test_examples_have_the_prompts_where_there_are_some(prompts, tiny_teacher):
    encoder = ControlEncoder(open_pipeline(tiny_teacher), 4.5, DataConfig())
    images = encoder.examples(prompts)
    assert images.shape == (len(prompts), 1, 8, 8)
    assert len(np.unique(images, axis=0)) == len(prompts)
    again = encoder.examples(["3"])
    assert any(np.array_equal(again[0], image) for image in images)
