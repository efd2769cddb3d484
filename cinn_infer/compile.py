"""Compile a pipeline's transformer, or any model, in place."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import paddle
from paddle import nn

from cinn_infer import backends, fingerprint, program_cache, shapes, units
from cinn_infer.calls import Call
from cinn_infer.program_cache import ProgramCache
from cinn_infer.programs import Program, UnstorableError
from fast_diffusers.errors import UserError
from fast_diffusers.lora.layers import LoRALinear

GRANULARITIES = ("model", "loop", "block")

LOOPS = ("run_double_blocks", "run_single_blocks", "run_blocks")
"""Methods of transformers that are loops over blocks."""


@dataclass
class Graph:
    """A traced method with what it cost: seconds of tracing (or of reading the program from disk, where an earlier
    process had traced it) and of its first run, which prepares the execution."""

    program: Program
    axes: Sequence[shapes.Axes]
    trace_seconds: float
    is_restored: bool
    first_run_seconds: float = 0.0
    runs: int = 0


class CompiledModel:
    """A model whose methods run as static graphs, and the record of that. Calling it calls what was compiled.

    Attributes:
        target: the pipeline or model; it runs compiled by itself, until `restore`.
        backend_used: "cinn", "pir" or "eager".
        fallbacks: what could not be done as asked, in words; for example axes that had to be fixed.
        recompilations: graphs made because a method was called with other sizes, constants or adapters than at its
            first call; those that were asked for as buckets do not count.
        cache: programs on disk, with `hits`, `misses` and why some could not be kept (`skipped`).
    """

    def __init__(self, target: Any, model: nn.Layer, backend: str, granularity: str, cache: ProgramCache):
        self.target, self.model, self.backend_used, self.granularity = target, model, backend, granularity
        self.fallbacks: list[str] = []
        self.recompilations = 0
        self.cache = cache
        self._methods = (
            [] if backend == "eager" else [CompiledMethod(self, *each) for each in _places(model, granularity)]
        )

    @property
    def graphs(self) -> list[Graph]:
        """All graphs so far; methods are traced when they are first called."""
        return [graph for method in self._methods for graph in method.graphs.values()]

    @property
    def graph_count(self) -> int:
        """Number of graphs so far."""
        return len(self.graphs)

    @property
    def compile_seconds(self) -> float:
        """Time spent on tracing and on first runs so far."""
        return sum(graph.trace_seconds + graph.first_run_seconds for graph in self.graphs)

    def report(self) -> dict[str, Any]:
        """What ran how, for JSON."""
        return {
            "backend_used": self.backend_used,
            "granularity": self.granularity,
            "graph_count": self.graph_count,
            "compile_seconds": self.compile_seconds,
            "recompilations": self.recompilations,
            "fallbacks": list(self.fallbacks),
            "cache": {
                "directory": str(self.cache.directory) if self.cache.directory else None,
                "hits": self.cache.hits,
                "misses": self.cache.misses,
                "skipped": list(self.cache.skipped),
            },
        }

    def restore(self) -> None:
        """Let the model run eagerly again."""
        for method in self._methods:
            method.hook.remove()
        self._methods = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the pipeline or model returns."""
        return self.target(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "target":  # not there yet, while a copy is made
            raise AttributeError(name)
        return getattr(self.target, name)


class CompiledMethod:
    """Graphs of one method of one layer, by the kind of call."""

    def __init__(self, owner: CompiledModel, layer: nn.Layer, method: str):
        self.owner, self.layer = owner, layer
        self.graphs: dict[Any, Graph] = {}
        self._is_whole = layer is owner.model and method == "forward"
        self._inner = [sublayer for sublayer in layer.sublayers() if sublayer is not layer]
        self._fixed = False  # free axes did not trace
        self.hook = units.GraphMethod(layer, method, self._run)

    @paddle.no_grad()
    def _run(self, original: Callable, args: tuple, kwargs: dict) -> Any:
        call = Call(original, args, units.normal(kwargs))
        told = units.told_now() if self._is_whole else None
        adapters = self._adapters()
        graph = self._graph(original, call, told, adapters)
        tensors = units.inputs(call, told)[1]
        started = time.perf_counter()
        with backends.flags(self.owner.backend_used, self.owner.cache.directory):
            result = graph.program(tensors)
        if graph.runs == 0:
            graph.first_run_seconds = time.perf_counter() - started
        graph.runs += 1
        return graph.program.structure.fill(result)

    def _graph(self, original: Callable, call: Call, told: Any, adapters: tuple) -> Graph:
        """The graph for a call, traced if there is none yet."""
        names, tensors = units.inputs(call, told)
        dtypes = tuple(str(tensor.dtype) for tensor in tensors)
        for free in (True, False) if not self._fixed else (False,):
            axes = shapes.axes(self.layer, names, tensors) if free else [tuple(each.shape) for each in tensors]
            key = (call.constants, tuple(axes), dtypes, adapters, id(told[0]) if told else None)
            if key in self.graphs:
                return self.graphs[key]
            try:
                graph = self._traced(original, call, told, axes)
            except units.TraceError as error:
                if not free or axes == [tuple(each.shape) for each in tensors]:
                    raise
                self._fixed = True
                self.owner.fallbacks.append(f"{type(self.layer).__name__}: sizes are fixed, as {error}")
                continue
            self.owner.recompilations += bool(self.graphs)
            self.graphs[key] = graph
            return graph
        raise AssertionError("unreachable")

    def _traced(self, original: Callable, call: Call, told: Any, axes: Sequence[shapes.Axes]) -> Graph:
        """The program from disk, or else traced now and kept there."""
        started = time.perf_counter()
        backend, cache = self.owner.backend_used, self.owner.cache
        with backends.flags(backend, cache.directory):
            key = self._disk_key(original, call, told, axes)
            program = self._restored(key)
            is_restored = program is not None
            if program is None:
                unit = units.trace(self.layer, original, call, axes, backends.translator_backend(backend), told)
                if backend == "cinn" and not backends.uses_cinn(unit.forward):
                    raise UserError(
                        "Paddle traced the model but ran without CINN, which it dropped: ask for backend='pir'"
                    )
                program = Program.of(unit)
                self._keep(key, program)
        return Graph(program, axes, time.perf_counter() - started, is_restored)

    def _disk_key(self, original: Callable, call: Call, told: Any, axes: Sequence[shapes.Axes]) -> str | None:
        """What names the program on disk; None if it is not kept there."""
        cache = self.owner.cache
        if cache.directory is None:
            return None
        names, tensors = units.inputs(call, told)
        adapters = [(name, scale) for name, scale, _ in self._adapters()]
        facts = [original.__name__, call.constants, names, axes, [str(each.dtype) for each in tensors], adapters]
        try:
            return fingerprint.fingerprint(self.layer, [*facts, told is not None, self.owner.backend_used])
        except fingerprint.UnknownError as error:
            cache.skip(str(error))
            return None

    def _restored(self, key: str | None) -> Program | None:
        """The program on disk with this layer's parameters; None, and a miss, if there is none that can be used."""
        cache = self.owner.cache
        if key is None:
            return None
        stored = cache.get(key)
        if stored is not None:
            try:
                program = Program.restored(stored, self.layer, backends.translator_backend(self.owner.backend_used))
                cache.found(key)
                return program
            except (KeyError, ValueError, RuntimeError):
                pass  # written by something else; it is replaced
        cache.misses += 1
        return None

    def _keep(self, key: str | None, program: Program) -> None:
        if key is not None:
            try:
                self.owner.cache.put(key, program.stored(self.layer))
            except UnstorableError as error:
                self.owner.cache.skip(str(error))

    def _adapters(self) -> tuple:
        """What tells graphs of different LoRA adapters apart. UserError if a cache acts inside this graph."""
        running: tuple = ()
        for layer in self._inner:
            if "forward" in vars(layer):
                remedy = (
                    "take another caching method, as this one skips parts of blocks, or backend='eager'"
                    if self.owner.granularity == "block"
                    else "call disable_cache, compile with granularity='block', then enable_cache again"
                )
                raise UserError(
                    f"a cache acts inside {type(self.layer).__name__}, which runs as one graph, so that it would do "
                    f"nothing: {remedy}"
                )
            if not running and isinstance(layer, LoRALinear):
                running = tuple(
                    (name, scale, id(layer.lora_A[name].weight) if name in layer.alphas else 0)
                    for name, scale in layer.adapter_set.running().items()
                )
        return running


def compile(
    pipe_or_model: Any,
    backend: str = "auto",
    granularity: str = "model",
    buckets: Sequence[Mapping[str, Any]] = (),
    cache: str | PathLike | bool = True,
) -> CompiledModel:
    """Let a pipeline's transformer, or a model, run as static graphs from its next call on, for inference.

    Arguments, results and LoRA adapters stay as they are, schedulers and guidance stay in Python. A graph is traced
    when a method is first called, and again for calls of other sizes (where the model's axes are not free), constants
    or adapters. What was traced is kept on disk and read from there by later processes; see `fingerprint` for when.

    Args:
        pipe_or_model: a pipeline with a `transformer`, of this package or of ppdiffusers, or an nn.Layer.
        backend: "cinn", Paddle's compiler; "pir", static graphs without it; "eager", nothing; "auto", CINN where it
            can run and static graphs elsewhere. `backend_used` of the result says which it is.
        granularity: "model", all of the transformer is one graph; "loop", its loops over blocks are; "block", every
            block is one, which lets caches act between them.
        buckets: arguments of calls that are made now, so that later ones of these sizes wait for no compiler: those
            that differ in an axis that is not free, such as height and width. A pipeline makes one step without
            decoding unless they say otherwise. Other calls are compiled when they come, and counted in
            `recompilations`.
        cache: a folder for traced programs; True, the folder that FAST_DIFFUSERS_CACHE names (none if that is "off"),
            or else the user's cache folder; False, none.

    Raises:
        UserError: an unknown argument, CINN where it cannot run, a model that is compiled already or runs in a cache;
            at a call, a model that does not trace.
    """
    used = backends.choose(backend)
    if granularity not in GRANULARITIES:
        raise UserError(f"granularity must be one of {', '.join(GRANULARITIES)}, got {granularity!r}")
    model = pipe_or_model if isinstance(pipe_or_model, nn.Layer) else getattr(pipe_or_model, "transformer", None)
    if not isinstance(model, nn.Layer):
        raise UserError(
            f"compile takes a pipeline with a transformer, or a model, not a {type(pipe_or_model).__name__}"
        )
    for layer in model.sublayers(include_self=True):
        for value in vars(layer).values():
            if isinstance(value, units.GraphMethod):
                raise UserError(f"this {type(model).__name__} is compiled already: call restore() of what compile gave")
            if isinstance(value, units.Interceptor):
                raise UserError(
                    f"this {type(model).__name__} runs in a cache: call disable_cache, compile with "
                    "granularity='block', then enable_cache again"
                )
    model.eval()
    directory = program_cache.folder() if cache is True else cache or None
    compiled = CompiledModel(pipe_or_model, model, used, granularity, ProgramCache(directory))
    try:
        for bucket in buckets:
            _fill(pipe_or_model, bucket)
    except BaseException:
        compiled.restore()
        raise
    compiled.recompilations = 0
    return compiled


def _fill(pipe_or_model: Any, bucket: Mapping[str, Any]) -> None:
    """Make the call of a bucket, as short as it can be."""
    if isinstance(pipe_or_model, nn.Layer):
        with paddle.no_grad():
            pipe_or_model(**bucket)
        return
    defaults: dict[str, Any] = {"num_inference_steps": 1, "output_type": "latent"}
    if not {"prompt", "prompt_embeds"} & set(bucket):
        defaults["prompt"] = "0" if "num_classes" in pipe_or_model.config else "a photo of a cat"
    pipe_or_model(**defaults | bucket)


def _places(model: nn.Layer, granularity: str) -> Iterator[tuple[nn.Layer, str]]:
    """The (layer, method) that become graphs. UserError for a model without loops or blocks."""
    if granularity == "model":
        yield model, "forward"
        return
    if granularity == "block":
        yield from ((block, "forward") for block in units.named_blocks(model).values())
        return
    found = [(model, name) for name in LOOPS if hasattr(model, name)]
    if not found:
        raise UserError(f"{type(model).__name__} has no loop over blocks of its own: take granularity='model'")
    yield from found
