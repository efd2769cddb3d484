"""The one mechanism under all caching methods.

The forwards of a transformer, of its blocks or of their sublayers, and a pipeline's progress bar are replaced on the
objects themselves, and put back by `disable_cache`. Every forward asks `Runs` which run, step and guidance branch it
belongs to; the state of that branch then answers for each block or sublayer, by computing it or from what it kept.

A pipeline's progress bar is entered when its denoising loop starts, knows the number of steps, and is left however the
loop ends. That makes it the place where a run starts, fresh, and where all that it kept is freed. For samplers and
loops of one's own there is `denoising_run`.

A block may be any object in the lists that its family names, with a `forward` that takes the arguments of the
family's blocks by name: an exported piece of a model in a block's place is skipped as the block would be. Methods that
look into blocks (`BlockCall.modulated`, sublayers) need the layers themselves; `FirstBlockTaylor`, `CGTaylor`,
`SortBlock` and `BlockDance` do not.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import paddle
from paddle import nn
from paddle.incubate.jit import is_inference_mode
from paddle.jit.dy2static.program_translator import StaticFunction

from fast_diffusers.caching.families import Block, Site, Structure
from fast_diffusers.caching.intercept import Interceptor
from fast_diffusers.caching.method import BlockCall, BranchState, CacheConfig, ForwardCall, SiteCall
from fast_diffusers.caching.runs import Runs
from fast_diffusers.caching.stats import CacheStats, Counters
from fast_diffusers.errors import UserError

logger = logging.getLogger(__name__)

_ATTRIBUTE = "_fast_diffusers_cache"


class Cache:
    """A method at work in one transformer, and in the pipeline that it was enabled for, if any."""

    def __init__(self, transformer: nn.Layer, config: CacheConfig, pipeline: Any = None):
        self.config, self.transformer, self.pipeline = config, transformer, pipeline
        self.structure = Structure.of(transformer)
        _check_reach(config, self.structure)
        config.check(self.structure)
        self.runs = Runs(self.structure, lambda: config.state(config, self.structure))
        self._state: BranchState | None = None  # of the forward that is going on
        self._warned = False
        parts = list(self._parts())
        self.counters = Counters({name: _size(layer) for name, layer, *_ in parts}, max(1, _size(transformer)))
        self._forward_names = _argument_names(transformer, "forward")
        self._interceptors = [Interceptor(transformer, "forward", self._forward), *self._readers()]
        for _, layer, method, handler in parts:
            self._interceptors.append(Interceptor(layer, method, handler))
        if pipeline is not None:
            self._interceptors.append(Interceptor(pipeline, "progress_bar", self._progress_bar))

    def remove(self) -> None:
        """Put everything back. UserError if something else has been put over it since."""
        if not all(interceptor.is_outermost for interceptor in self._interceptors):
            raise UserError("something else has replaced a forward since enable_cache: undo that first")
        for interceptor in self._interceptors:
            interceptor.remove()
        self.runs.end()

    def stats(self) -> CacheStats:
        """What it did so far."""
        return self.counters.snapshot(type(self.config).__name__, self.runs.started)

    # ---- what is replaced --------------------------------------------------------------------------------------------

    def _parts(self) -> Iterator[tuple[str, nn.Layer, str, Callable]]:
        """(name, layer, method, what to put in its place) of all that the method decides on."""
        blocks = self.structure.blocks
        sites = [(block, site) for block in blocks for site in self.config.sites(block)]
        for block, site in sites:
            layer = getattr(block.layer, site.path)
            yield f"{block.name}.{site.path}", layer, site.method, self._site_handler(block, site)
        if not sites:
            for block in blocks:
                yield block.name, block.layer, "forward", self._block_handler(block, len(blocks))

    def _readers(self) -> Iterator[Interceptor]:
        """What tells the state what the blocks attend to, except inside of a block that is compiled."""
        for block in self.structure.blocks if self.config.reads else ():
            attention = block.sites(block.kind.attention)
            if attention and "forward" not in vars(block.layer):
                handler = self._read_handler(block, attention[0])
                yield Interceptor(getattr(block.layer, attention[0].path), "forward", handler)

    def _read_handler(self, block: Block, site: Site) -> Callable:
        def handle(original: Callable, args: tuple, kwargs: dict) -> Any:
            if self._state is not None:
                self._state.read(block, SiteCall(block, site, original, args, kwargs).first_input)
            return original(*args, **kwargs)

        return handle

    def _block_handler(self, block: Block, count: int) -> Callable:
        names = _argument_names(block.layer, "forward")

        def handle(original: Callable, args: tuple, kwargs: dict) -> Any:
            if self._state is None:  # not inside the transformer's forward
                return original(*args, **kwargs)
            call = BlockCall(block, count, original, dict(zip(names, args, strict=False)) | kwargs)
            result = block.kind.pack(self._state.block(call))
            self.counters.count(block.name, call.computed)
            return result

        return handle

    def _site_handler(self, block: Block, site: Site) -> Callable:
        name = f"{block.name}.{site.path}"

        def handle(original: Callable, args: tuple, kwargs: dict) -> Any:
            if self._state is None:
                return original(*args, **kwargs)
            call = SiteCall(block, site, original, args, kwargs)
            result = self._state.site(call)
            self.counters.count(name, call.computed)
            return result

        return handle

    def _forward(self, original: Callable, args: tuple, kwargs: dict) -> Any:
        self._warn_of_training()
        given = dict(zip(self._forward_names, args, strict=False)) | kwargs
        runs = self.runs.started
        state, step = self.runs.locate(given)
        if self.runs.started != runs:
            self.counters.records.clear()
        call = ForwardCall(self.structure, original, given)
        self.counters.begin()
        self._state = state
        try:
            state.begin(step)
            result = state.forward(call)
        except BaseException:
            self.runs.abandon()
            raise
        finally:
            self._state = None
        self.counters.end(step.index, step.branch, step.noise_level, call.share)
        return result

    def _progress_bar(self, original: Callable, args: tuple, kwargs: dict) -> Any:
        return _RunBar(original(*args, **kwargs), self)

    def begin_run(self, total: int | None) -> None:
        """A denoising loop starts."""
        self.runs.start(total)
        self.counters.records.clear()

    def _warn_of_training(self) -> None:
        if paddle.is_grad_enabled() and self.transformer.training and not self._warned:
            self._warned = True
            logger.warning(
                "%s is in training mode with a cache enabled: gradients do not flow through what is reused",
                type(self.transformer).__name__,
            )


class _RunBar:
    """A progress bar, used as a context manager or as an iterator, that tells a cache of the run around it."""

    def __init__(self, bar: Any, cache: Cache):
        self._bar, self._cache = bar, cache

    def __enter__(self) -> Any:
        self._cache.begin_run(getattr(self._bar, "total", None))
        return self._bar.__enter__()

    def __exit__(self, *exception: Any) -> Any:
        self._cache.runs.end()
        return self._bar.__exit__(*exception)

    def __iter__(self) -> Iterator:
        self._cache.begin_run(getattr(self._bar, "total", None))
        try:
            yield from self._bar
        finally:
            self._cache.runs.end()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bar, name)


# ------------------------------------------------------------------------------------------------ what users call
def enable_cache(pipe_or_transformer: Any, config: CacheConfig) -> None:
    """Let a transformer reuse what it computed at earlier steps, as `config` says, until `disable_cache`.

    Args:
        pipe_or_transformer: a pipeline of this package or of ppdiffusers, a denoiser, or a transformer. With a pipeline
            each call starts fresh, and frees what it kept, whatever happened before and however it ends. Otherwise put
            `denoising_run` around each run; without that its start is guessed (see `runs.Runs`), its end is not known,
            so that no step is treated as the last, and what it kept stays until the next run.
        config: `TeaCache(...)`, `FirstBlockTaylor(...)`, ...

    Raises:
        UserError: a cache is enabled already, the model is of no known family or compiled, or the method cannot work
            with it.
    """
    if not isinstance(config, CacheConfig):
        raise UserError(f"config must be a caching method such as TeaCache(threshold=0.25), got {config!r:.80}")
    transformer, pipeline = _split(pipe_or_transformer)
    owners = [owner for owner in (transformer, pipeline) if owner is not None]
    for owner in owners:
        if enabled := _cache_of(owner):
            raise UserError(
                f"{type(enabled.config).__name__} is enabled on this {type(owner).__name__} already: "
                "call disable_cache first"
            )
    if isinstance(transformer.forward, StaticFunction) or is_inference_mode(transformer):
        raise UserError("this transformer is compiled: enable a cache on the eager model instead")
    cache = Cache(transformer, config, pipeline)
    for owner in owners:
        vars(owner)[_ATTRIBUTE] = cache


def disable_cache(pipe_or_transformer: Any) -> CacheStats:
    """Put everything back as it was before `enable_cache`; returns what the cache did.

    Raises:
        UserError: no cache is enabled.
    """
    cache = _require(pipe_or_transformer)
    cache.remove()
    for owner in (cache.transformer, cache.pipeline):
        if owner is not None:
            vars(owner).pop(_ATTRIBUTE)
    return cache.stats()


def cache_stats(pipe_or_transformer: Any) -> CacheStats:
    """What was computed, what reused and where, since the cache was enabled. UserError if none is."""
    return _require(pipe_or_transformer).stats()


@contextmanager
def denoising_run(transformer: Any, steps: int | None = None) -> Iterator[None]:
    """The block is one denoising run of a transformer or denoiser, for loops outside of pipelines.

    Its cache, if it has one, starts fresh, and what it kept is freed at the end. Every change of time is a step;
    further forwards at one time are other guidance branches.

    Args:
        transformer: what the cache was enabled on.
        steps: how many times will be visited; methods that force the last step need it.
    """
    cache = _find(transformer)
    if cache is None:
        yield
        return
    cache.begin_run(steps)
    try:
        yield
    finally:
        cache.runs.end()


def _split(pipe_or_transformer: Any) -> tuple[nn.Layer, Any]:
    """(transformer, pipeline or None)."""
    transformer = getattr(pipe_or_transformer, "transformer", pipe_or_transformer)
    if not isinstance(transformer, nn.Layer):
        raise UserError(f"expected a pipeline or a transformer, got {type(pipe_or_transformer).__name__}")
    return transformer, pipe_or_transformer if hasattr(pipe_or_transformer, "progress_bar") else None


def _cache_of(owner: Any) -> Cache | None:
    return vars(owner).get(_ATTRIBUTE)


def _find(pipe_or_transformer: Any) -> Cache | None:
    # A pipeline remembers its cache, as its transformer may have been exchanged since.
    for owner in (pipe_or_transformer, getattr(pipe_or_transformer, "transformer", None)):
        if owner is not None and hasattr(owner, "__dict__") and (cache := _cache_of(owner)):
            return cache
    return None


def _require(pipe_or_transformer: Any) -> Cache:
    if cache := _find(pipe_or_transformer):
        return cache
    raise UserError(f"no cache is enabled on this {type(pipe_or_transformer).__name__}: call enable_cache first")


def _check_reach(config: CacheConfig, structure: Structure) -> None:
    """UserError for a method that looks into blocks of which there is only a graph: such have no weights."""
    weights = (weight for block in structure.blocks for weight in block.layer.parameters())
    if config.looks_inside and not all(weight._is_initialized() for weight in weights):
        raise UserError(
            f"{type(config).__name__} looks into blocks, and those of this {type(structure.transformer).__name__} are "
            "exported graphs: take FirstBlockTaylor, CGTaylor, SortBlock or BlockDance"
        )


def _argument_names(layer: nn.Layer, method: str) -> list[str]:
    return [name for name in inspect.signature(getattr(type(layer), method)).parameters if name != "self"]


def _size(layer: nn.Layer) -> int:
    return int(sum(np.prod(weight.shape) for weight in layer.parameters()))
