"""Training-free caches: a denoising run reuses what a transformer computed at earlier steps of it.

`enable_cache(pipe, FirstBlockTaylor(threshold=0.05))` is all that a user has to write.
"""

from fast_diffusers.caching.block_dance import BlockDance
from fast_diffusers.caching.calibrate import Calibration, calibrate
from fast_diffusers.caching.cg_taylor import CGTaylor
from fast_diffusers.caching.engine import cache_stats, denoising_run, disable_cache, enable_cache
from fast_diffusers.caching.first_block_taylor import FirstBlockTaylor
from fast_diffusers.caching.method import CacheConfig
from fast_diffusers.caching.pyramid_attention_broadcast import PyramidAttentionBroadcast
from fast_diffusers.caching.sortblock import SortBlock
from fast_diffusers.caching.stats import CacheStats
from fast_diffusers.caching.taylorseer import TaylorSeer
from fast_diffusers.caching.teablockcache import TeaBlockCache
from fast_diffusers.caching.teacache import TeaCache
from fast_diffusers.caching.tgate import TGate

__all__ = [
    "BlockDance",
    "CGTaylor",
    "CacheConfig",
    "CacheStats",
    "Calibration",
    "FirstBlockTaylor",
    "PyramidAttentionBroadcast",
    "SortBlock",
    "TGate",
    "TaylorSeer",
    "TeaBlockCache",
    "TeaCache",
    "cache_stats",
    "calibrate",
    "denoising_run",
    "disable_cache",
    "enable_cache",
]
