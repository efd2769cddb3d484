from importlib import metadata

import pytest

from fast_diffusers import versions


@pytest.fixture
def environment(monkeypatch):
    """Pretend that only these distributions are installed."""

    def install(*requires: str, **installed: str) -> None:
        found = {name.replace("_", "-"): version for name, version in installed.items()}

        def version(name):
            if name not in found:
                raise metadata.PackageNotFoundError(name)
            return found[name]

        monkeypatch.setattr(metadata, "requires", lambda name: list(requires) or None)
        monkeypatch.setattr(metadata, "version", version)

    return install


@pytest.mark.parametrize(
    ("requirement", "installed", "expected"),
    [
        ("numpy<2", {"numpy": "1.26.4"}, []),
        ("numpy<2", {"numpy": "2.1.0"}, ["numpy is 2.1.0, needs <2"]),
        ("numpy<2", {}, ["numpy is not installed, needs <2"]),
        ("tqdm", {}, ["tqdm is not installed, needs any version"]),
        ("paddlepaddle==3.3.1", {"paddlepaddle_gpu": "3.3.1"}, []),
        ("paddlepaddle==3.3.1", {"paddlepaddle_gpu": "3.2.0"}, ["paddlepaddle-gpu is 3.2.0, needs ==3.3.1"]),
        ('ruff; extra == "dev"', {}, []),
        ('setuptools; python_version < "3"', {}, []),
    ],
)
def test_problems(environment, requirement, installed, expected):
    environment(requirement, **installed)
    assert versions.problems() == expected


def test_every_problem_is_listed(environment):
    environment("numpy<2", "tqdm>=4", "scipy", numpy="2.0", tqdm="3.0", scipy="1.1")
    assert versions.problems() == ["numpy is 2.0, needs <2", "tqdm is 3.0, needs >=4"]


def test_a_bare_checkout_has_no_requirements(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    assert versions.requirements() == []
