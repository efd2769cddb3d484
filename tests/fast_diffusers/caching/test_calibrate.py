import numpy as np
import pytest

from fast_diffusers.caching import Calibration, SortBlock, TeaCache, cache_stats, calibrate, disable_cache, enable_cache
from fast_diffusers.caching.calibrate import Measurements, fit
from fast_diffusers.caching.method import polynomial
from fast_diffusers.errors import UserError

TEA, SORT = (3.0, -2.0, 0.5, 1.0, 0.25), (2e-15, -3e-12, 1e-9, 1e-6, -5e-4, 1.0)


def measured(count=40):
    changes, times = np.linspace(0.01, 0.5, count).tolist(), np.linspace(1000, 20, count).tolist()
    blocks = [0.4 * polynomial(SORT, t) for t in times]
    return Measurements(times, changes, [polynomial(TEA, x) for x in changes], blocks)


def test_polynomials_are_recovered():
    found = fit(measured(), "Model")
    np.testing.assert_allclose(found.tea_coefficients, TEA, rtol=1e-6)
    largest = max(polynomial(SORT, t) for t in measured().noise_level)
    times = np.linspace(20, 1000, 9)
    np.testing.assert_allclose(
        [polynomial(found.sort_schedule, t) for t in times], [polynomial(SORT, t) / largest for t in times], rtol=1e-6
    )
    assert found.tea_error < 1e-9 and found.sort_error < 1e-9 and found.measurements == 40


def test_too_few_measurements():
    with pytest.raises(UserError, match="4 measurements at 4 times do not fix polynomials of degree 4 and 5: use more"):
        fit(measured(4), "Model")


def test_files(tmp_path):
    calibration = fit(measured(), "Model")
    calibration.save(tmp_path / "model.json")
    again = Calibration.load(tmp_path / "model.json")
    assert again == calibration
    assert again.tea_cache(threshold=0.1) == TeaCache(0.1, calibration.tea_coefficients)
    assert again.sort_block(beta=0.2) == SortBlock(beta=0.2, schedule=calibration.sort_schedule)


@pytest.mark.parametrize("content", ["{", "[]", '{"model": "x"}', None])
def test_what_is_not_a_calibration_file(tmp_path, content):
    path = tmp_path / "model.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"model.json is not a calibration file"):
        Calibration.load(path)


def test_calibrating_a_model(family, sample):
    """The measured runs compute everything; what is fitted can be used at once."""
    images = []
    calibration = calibrate(
        family.model,
        [0, 1],
        generate=lambda seed: images.append(sample(family, seed=seed)),
        tea_degree=2,
        sort_degree=2,
    )
    assert len(images) == 2 and np.array_equal(images[0], sample(family, declared=False))
    assert calibration.model == type(family.model).__name__ and calibration.measurements == 8
    assert len(calibration.tea_coefficients) == len(calibration.sort_schedule) == 3
    assert np.isfinite(calibration.tea_error) and np.isfinite(calibration.sort_error)
    enable_cache(family.model, calibration.tea_cache(threshold=9))
    try:
        sample(family)
        assert cache_stats(family.model).runs == 1
    finally:
        disable_cache(family.model)


def test_a_pipeline_is_called_with_each_prompt(tiny_teacher):
    from fast_diffusers.pipelines import FluxLabelPipeline

    pipe = FluxLabelPipeline.from_pretrained(tiny_teacher)
    pipe.set_progress_bar_config(disable=True)
    calibration = calibrate(pipe, ["1", "2", "3"], num_inference_steps=8, output_type="latent")
    assert calibration.measurements == 3 * 7
    assert "progress_bar" not in vars(pipe)
