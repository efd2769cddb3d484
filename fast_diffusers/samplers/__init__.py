"""Few-step samplers: pure functions `sampler(velocity, noise, *, steps, ...) -> x0`."""

from fast_diffusers.samplers.euler import euler
from fast_diffusers.samplers.phased import phased
from fast_diffusers.samplers.trigflow import trigflow
from fast_diffusers.samplers.unified import unified

__all__ = ["euler", "phased", "trigflow", "unified"]
