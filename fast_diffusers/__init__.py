"""Few-step diffusion on PaddlePaddle."""

from fast_diffusers import compat  # noqa: F401  (sets CPU threads before paddle loads; must stay first)

__version__ = "0.1.0"
