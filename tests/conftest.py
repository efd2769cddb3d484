import os
from pathlib import Path

import pytest

import fast_diffusers  # noqa: F401  (before paddle)

SHARED = Path(os.environ.get("FAST_DIFFUSERS_SHARED", Path(__file__).parents[2] / "shared"))
"""Folder of reference files that are not part of the repository."""


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
