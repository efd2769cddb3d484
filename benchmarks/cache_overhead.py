"""What an enabled cache costs that never reuses anything: `python benchmarks/cache_overhead.py [METHOD ...]`.

Denoises with a small random FLUX with a method set so that it never hits, and without it, in turns, each pair in the
other order than the one before. Prints the median of the pairs' ratios for each method, with its standard error by
bootstrap. On a CPU the process's own time is taken, which other programs disturb less.

Without --size the model is that of the test bed, distill/recipes/teacher_mnist32.yaml. `--size 8` is the worst case of
the embedded digits: 16 tokens, where Python's own time counts.
"""

import argparse
import statistics
import time
from collections.abc import Sequence

import fast_diffusers  # noqa: F401  # isort: skip  (before paddle)
import numpy as np
import paddle
from paddle import nn

from fast_diffusers.caching import (
    BlockDance,
    CacheConfig,
    CGTaylor,
    FirstBlockTaylor,
    PyramidAttentionBroadcast,
    SortBlock,
    TaylorSeer,
    TeaBlockCache,
    TeaCache,
    TGate,
    denoising_run,
    disable_cache,
    enable_cache,
)
from fast_diffusers.denoisers import denoiser_for
from fast_diffusers.models import FluxTransformer2DModel

NEVER_HITS: dict[str, CacheConfig] = {
    type(config).__name__: config
    for config in (
        TeaCache(threshold=0),
        TeaBlockCache(threshold=0),
        SortBlock(interval=1),
        FirstBlockTaylor(threshold=0),
        TaylorSeer(interval=1),
        CGTaylor(threshold=0),
        BlockDance(period=1),
        PyramidAttentionBroadcast(spatial_range=1, cross_range=1),
        TGate(gate=10**6, sp_interval=1),
    )
}
CLASSES = 10


def small_flux(blocks: Sequence[int], heads: int) -> FluxTransformer2DModel:
    """A label-conditioned FLUX with no weight zero, in evaluation mode."""
    paddle.seed(0)
    model = FluxTransformer2DModel(
        in_channels=4,
        num_layers=blocks[0],
        num_single_layers=blocks[1],
        num_attention_heads=heads,
        attention_head_dim=64,
        axes_dims_rope=(8, 28, 28),
        joint_attention_dim=CLASSES,
        pooled_projection_dim=CLASSES,
    )
    with paddle.no_grad():
        for weight in model.parameters():
            weight.set_value(weight + 0.02 * paddle.randn(weight.shape))
    model.eval()
    return model


class Loop:
    """Euler steps of a model from fixed noise; a call gives the seconds that they took."""

    def __init__(self, model: nn.Layer, batch: int, size: int, steps: int):
        self.model, self.steps = model, steps
        self.denoiser = denoiser_for(model)
        self.noise = paddle.randn([batch, 1, size, size])
        self.cond = {"prompt_embeds": paddle.randn([batch, 1, CLASSES])}
        self.cond["pooled_prompt_embeds"] = self.cond["prompt_embeds"][:, 0]
        self.clock = time.process_time if paddle.device.get_device() == "cpu" else time.perf_counter

    @paddle.no_grad()
    def __call__(self) -> float:
        started, x = self.clock(), self.noise
        with denoising_run(self.model, self.steps):
            for i in range(self.steps):
                x = x - self.denoiser(x, 1 - i / self.steps, self.cond) / self.steps
        float(x.mean())  # waits for the device
        return self.clock() - started

    def cached(self, config: CacheConfig) -> float:
        """The same with a cache; what it takes to enable it once, for any number of images, is not counted."""
        enable_cache(self.model, config)
        try:
            return self()
        finally:
            if disable_cache(self.model).compute_fraction != 1:
                raise ValueError(f"{config} reuses something")


def overhead(loop: Loop, config: CacheConfig, pairs: int) -> list[float]:
    """Time with a cache over time without it, less 1, of each pair."""

    def pair(number: int) -> float:
        if number % 2:
            return loop.cached(config) / loop() - 1
        without = loop()
        return loop.cached(config) / without - 1

    return [pair(number) for number in range(pairs)]


def standard_error(ratios: Sequence[float]) -> float:
    """Of their median, from 1000 samples with replacement."""
    draw = np.random.default_rng(0).choice(np.asarray(ratios), (1000, len(ratios)))
    return float(np.std(np.median(draw, axis=1)))


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Command line; the medians by method."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"of {', '.join(NEVER_HITS)} (all)")
    parser.add_argument("--size", type=int, default=32, help="edge of the image in pixels (%(default)s)")
    parser.add_argument("--blocks", type=int, nargs=2, default=(5, 3), help="double and single blocks (5 3)")
    parser.add_argument("--heads", type=int, default=4, help="of 64 channels (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10, help="of a run (%(default)s)")
    parser.add_argument("--pairs", type=int, default=20, help="of runs, a method (%(default)s)")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.methods) - NEVER_HITS.keys():
        parser.error(f"no method {sorted(unknown)[0]}; there are {', '.join(NEVER_HITS)}")
    loop = Loop(small_flux(arguments.blocks, arguments.heads), arguments.batch_size, arguments.size, arguments.steps)
    step = statistics.median(loop() for _ in range(3)) / arguments.steps
    print(f"{1e3 * step:.1f} ms a step without a cache; overhead, median (standard error) of {arguments.pairs} pairs:")
    medians = {}
    for name in arguments.methods or NEVER_HITS:
        ratios = overhead(loop, NEVER_HITS[name], arguments.pairs)
        medians[name] = statistics.median(ratios)
        print(f"{name:28}{100 * medians[name]:+6.2f} %  ({100 * standard_error(ratios):.2f})", flush=True)
    return medians


if __name__ == "__main__":
    main()
