"""Text-to-image pipelines with ppdiffusers' interface."""

from fast_diffusers.pipelines.base import Pipeline
from fast_diffusers.pipelines.flux import FluxPipeline
from fast_diffusers.pipelines.flux_label import FluxLabelPipeline

__all__ = ["FluxLabelPipeline", "FluxPipeline", "Pipeline"]
