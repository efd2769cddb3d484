"""Distillation objectives and training."""

import fast_diffusers  # noqa: F401  (sets CPU threads before paddle loads; must stay first)
