"""Objectives: pure functions of (roles, batch, draws) that return (loss, metrics).

`batch` is a mapping with `latents` [B, C, H, W], `cond` and, where needed, `null_cond` and `guidance` [B]. Metrics are
detached scalars on the device.
"""

from distill.objectives.adversarial import adversarial
from distill.objectives.consistency import phased_consistency
from distill.objectives.distribution_matching import distribution_matching, fake_score
from distill.objectives.rcgm import rcgm
from distill.objectives.reflow import reflow
from distill.objectives.trigflow_adversarial import trigflow_adversarial
from distill.objectives.trigflow_consistency import trigflow_consistency
from distill.objectives.trigflow_regression import trigflow_regression
from distill.objectives.twinflow import twinflow

__all__ = [
    "adversarial",
    "distribution_matching",
    "fake_score",
    "phased_consistency",
    "rcgm",
    "reflow",
    "trigflow_adversarial",
    "trigflow_consistency",
    "trigflow_regression",
    "twinflow",
]
