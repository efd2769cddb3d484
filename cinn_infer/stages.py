"""Where the time of a pipeline's call goes: text encoders, transformer, VAE, and the rest."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import paddle
from paddle import nn

from fast_diffusers.caching.intercept import Interceptor

METHODS: Mapping[str, str] = {"vae": "decode"}
"""What of a component is timed, where it is not `forward`."""


class Stages:
    """Clocks on the models of a pipeline, whatever runs them; put them on after compilation.

    Attributes:
        seconds: in each component so far, by its name.
    """

    def __init__(self, pipe: Any):
        self.seconds: defaultdict[str, float] = defaultdict(float)
        models = {name: getattr(pipe, name, None) for name in pipe.component_types}
        self._clocks = [
            Interceptor(model, METHODS.get(name, "forward"), self._timed(name))
            for name, model in models.items()
            if isinstance(model, nn.Layer)
        ]

    def _timed(self, name: str):
        def handle(original: Any, args: tuple, kwargs: dict) -> Any:
            synchronize()
            started = time.perf_counter()
            result = original(*args, **kwargs)
            synchronize()
            self.seconds[name] += time.perf_counter() - started
            return result

        return handle

    def remove(self) -> None:
        """Take the clocks off."""
        for clock in self._clocks:
            clock.remove()


def synchronize() -> None:
    """Wait for what was queued on a device; on CPU nothing is."""
    if not paddle.get_device().startswith("cpu"):
        paddle.device.synchronize()


def with_rest(seconds: Mapping[str, float], total: float) -> dict[str, float]:
    """Stages and, last, "rest": what the others leave of the total."""
    return {**seconds, "rest": max(0.0, total - sum(seconds.values()))}
