"""Few-step diffusion on PaddlePaddle."""

from typing import Any

from fast_diffusers import compat  # noqa: F401  (sets CPU threads before paddle loads; must stay first)

__version__ = "0.1.0"
__all__ = ["UnifiedSampler"]


def __getattr__(name: str) -> Any:
    if name == "UnifiedSampler":  # imports the pipelines, which takes seconds
        from fast_diffusers.unified_sampler import UnifiedSampler

        return UnifiedSampler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
