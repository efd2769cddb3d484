"""ppdiffusers schedulers over the step functions of `fast_diffusers.samplers`."""

from fast_diffusers.schedulers.flow_match_euler import FlowMatchEulerDiscreteScheduler
from fast_diffusers.schedulers.phased_consistency import PhasedConsistencyScheduler
from fast_diffusers.schedulers.scm import SCMScheduler
from fast_diffusers.schedulers.unified import UnifiedScheduler

__all__ = ["FlowMatchEulerDiscreteScheduler", "PhasedConsistencyScheduler", "SCMScheduler", "UnifiedScheduler"]
