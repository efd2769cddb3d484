import os
from pathlib import Path

import paddle
import pytest

import fast_diffusers  # noqa: F401  (before paddle)
from fast_diffusers.models import FluxTransformer2DModel
from fast_diffusers.pipelines import FluxLabelPipeline
from fast_diffusers.schedulers import FlowMatchEulerDiscreteScheduler

SHARED = Path(os.environ.get("FAST_DIFFUSERS_SHARED", Path(__file__).parents[2] / "shared"))
"""Folder of reference files that are not part of the repository."""


@pytest.fixture(autouse=True, scope="session")
def _no_cache_of_the_user():
    """Neither read nor written; tests of what is kept there name a folder."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("FAST_DIFFUSERS_CACHE", "off")
        yield


def _shared_folder(*parts: str) -> Path:
    path = SHARED.joinpath(*parts)
    if not path.is_dir():
        pytest.skip(f"reference files not found at {path}; FAST_DIFFUSERS_SHARED says where to look")
    return path


@pytest.fixture(scope="session")
def fixtures_dir() -> Path:
    """Inputs and outputs of reference models."""
    return _shared_folder("fixtures", "models")


@pytest.fixture(scope="session")
def mnist_dir() -> Path:
    """The four idx .gz files of MNIST."""
    return _shared_folder("data", "mnist")


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory):
    """Folder of a random FLUX label pipeline, 8×8 gray, two blocks."""
    paddle.seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=10,
        pooled_projection_dim=10,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    for parameter in transformer.parameters():  # the zero-initialised output would hide everything behind it
        parameter.set_value(parameter + 0.1 * paddle.randn(parameter.shape))
    folder = tmp_path_factory.mktemp("teacher")
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    FluxLabelPipeline(scheduler, transformer).save_pretrained(folder)
    return folder
