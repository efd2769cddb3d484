import paddle
import pytest

from distill.cache_grid import METHODS, default_grid, describe, fitting, read_configs
from fast_diffusers.caching import BlockDance, Calibration, SortBlock, TaylorSeer, TeaCache, TGate
from fast_diffusers.errors import UserError
from fast_diffusers.models import FluxTransformer2DModel


@pytest.mark.parametrize("steps", [4, 50])
def test_the_grid_has_every_method_and_no_setting_twice(steps):
    grid = default_grid(steps)
    assert {type(config).__name__ for config in grid} == set(METHODS) and len(METHODS) == 9
    assert len({describe(config) for config in grid}) == len(grid)
    calibration = Calibration("model", (2.0, 1.0), (3.0, 4.0), 0.0, 0.0, 9)
    for config in default_grid(steps, calibration):
        assert getattr(config, "coefficients", (2.0, 1.0)) == (2.0, 1.0)
        assert getattr(config, "schedule", (3.0, 4.0)) == (3.0, 4.0)


def test_describe_leaves_defaults_out():
    assert describe(TGate()) == "TGate()"
    assert describe(TeaCache(0.1, (1.0, 0.0))) == "TeaCache(threshold=0.1, coefficients=(1.0, 0.0))"


def test_configs_of_a_file(tmp_path):
    file = tmp_path / "configs.yaml"
    file.write_text("- TeaCache: {threshold: 0.1, coefficients: [1.0, 0.0]}\n- TGate\n- SortBlock:\n- TGate: {}\n")
    assert read_configs(file) == [TeaCache(0.1, (1.0, 0.0)), TGate(), SortBlock()]


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: [", "is not YAML"),
        ("TeaCache", "must be a list of entries"),
        ("[]", "must be a list of entries"),
        ("- {TeaCache: {}, TGate: {}}", "entry 1: expected one method"),
        ("- TGate\n- TeaCahce", "entry 2.*did you mean 'TeaCache'"),
        ("- TeaCache: 0.1", "settings of TeaCache must be a mapping"),
        ("- TeaCache: {treshold: 1}", "did you mean 'threshold'"),
        ("- TeaCache: {threshold: -1}", "entry 1: TeaCache: threshold must be"),
    ],
)
def test_files_that_are_wrong(tmp_path, text, message):
    file = tmp_path / "configs.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        read_configs(file)
    with pytest.raises(FileNotFoundError):
        read_configs(tmp_path / "none.yaml")


def test_what_a_model_has_no_use_for():
    paddle.seed(0)
    model = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=0,
        attention_head_dim=8,
        num_attention_heads=1,
        joint_attention_dim=4,
        pooled_projection_dim=4,
        axes_dims_rope=(2, 2, 4),
    )
    fit, unfit = fitting([TaylorSeer(), TeaCache(), BlockDance(depth=(1, 1))], model)
    assert fit == [TaylorSeer()]
    assert "at least two blocks" in unfit["TeaCache()"] and "does not fit" in unfit["BlockDance(depth=(1, 1))"]
