"""Methods of models as graphs: what they are called with, traced once for each kind of call."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import paddle
import paddle.nn.functional as F
from paddle import nn

from cinn_infer import shapes
from cinn_infer.calls import Call, Structure
from fast_diffusers import target_time
from fast_diffusers.caching.intercept import Interceptor
from fast_diffusers.errors import UserError
from fast_diffusers.models.z_image import LENGTH_MULTIPLE

BLOCKS = ("transformer_blocks", "single_transformer_blocks", "noise_refiner", "context_refiner", "layers")
"""Names of the lists of blocks that transformers have."""

_tracing = threading.local()


Told = tuple[target_time.AuxiliaryTimeEmbedding, paddle.Tensor]
"""What tells a model its target time, and what it adds to the model's embedded time [B, channels]."""


class TraceError(UserError):
    """A method that does not trace into a static graph."""


class Unit(nn.Layer):
    """One method of a layer, for the arguments of one call, from a list of tensors to a list of tensors.

    Args:
        layer: whose parameters the graph uses, as they are at each run.
        method: bound to it.
        call: gives the constants, and where the tensors go.
        embedding: what tells the layer its target time, if anything does; what it adds is then the last tensor.
    """

    def __init__(
        self, layer: nn.Layer, method: Callable, call: Call, embedding: target_time.AuxiliaryTimeEmbedding | None = None
    ):
        super().__init__()
        self.layer, self.embedding = layer, embedding
        self._method, self._call = method, call
        self._telling = contextlib.ExitStack()
        self._given: list[paddle.Tensor] = []
        self.structure: Structure | None = None

    def forward(self, tensors):
        """Tensors in the order of the call's to those of its result."""
        args, kwargs = self._arguments(tensors)
        result = self._method(*args, **kwargs)
        return self._tensors(result)

    @paddle.jit.not_to_static
    def _arguments(self, tensors):
        self._given = list(tensors)  # a graph cannot return these themselves
        if self.embedding is not None:
            self._telling.enter_context(telling(self.embedding, tensors[-1]))
        return self._call.arguments(tensors)

    @paddle.jit.not_to_static
    def _tensors(self, result):
        self._telling.close()
        self.structure, tensors = Structure.of(result)
        return [paddle.assign(each) if any(each.is_same(x) for x in self._given) else each for each in tensors]


def trace(
    layer: nn.Layer,
    method: Callable,
    call: Call,
    axes: Sequence[shapes.Axes],
    backend: str | None = None,
    told: Told | None = None,
) -> Unit:
    """A unit whose forward is a traced static function.

    Args:
        backend: as in `paddle.jit.to_static`.
        told: see `told_now`; the tensor is a further input.

    Raises:
        TraceError: something in the method cannot be traced; the message names the line.
    """
    unit = Unit(layer, method, call, told[0] if told else None)
    unit.eval()
    names, tensors = inputs(call, told)
    dtypes = [str(tensor.dtype).removeprefix("paddle.") for tensor in tensors]
    specs = shapes.specs(names, dtypes, axes)

    try:
        with tracing(), paddle.no_grad(), unit._telling:
            paddle.jit.to_static(unit, input_spec=[specs], full_graph=True, backend=backend)
            unit.forward.concrete_program  # noqa: B018  traces now rather than at the first run
    except Exception as error:
        name = f"{type(layer).__name__}.{getattr(method, '__name__', 'forward')}"
        raise TraceError(f"{name} does not trace into a static graph: {explained(error)}") from error
    return unit


def told_now() -> Told | None:
    """What the model that is being called is told of its target time; None if nothing tells it."""
    told = target_time.told_now()
    return None if told is None else (told[0], told[0](*told[1:]))


def inputs(call: Call, told: Told | None) -> tuple[list[str], list[paddle.Tensor]]:
    """Names and tensors of what a graph takes: the call's, and last what the model is told of its target time."""
    if told is None:
        return [*call.names], [*call.tensors]
    return [*call.names, "told"], [*call.tensors, told[1]]


def named_blocks(model: nn.Layer) -> dict[str, nn.Layer]:
    """The blocks of a transformer by their paths, such as "transformer_blocks.0". UserError if it has none."""
    found = {f"{name}.{i}": block for name in BLOCKS for i, block in enumerate(getattr(model, name, ()))}
    if not found:
        raise UserError(f"{type(model).__name__} has no list of blocks: take granularity='model'")
    return found


@contextlib.contextmanager
def telling(embedding: target_time.AuxiliaryTimeEmbedding, added: paddle.Tensor) -> Iterator[None]:
    """Within the block, the embedding adds `added`, which is computed outside of the graph."""
    hook = Interceptor(embedding, "forward", lambda original, args, kwargs: args[0])
    try:
        with embedding.told(added, added):
            yield
    finally:
        hook.remove()


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """Within the block, methods that graphs stand in for run as they are: they are part of another graph."""
    before = getattr(_tracing, "on", False)
    _tracing.on = True
    try:
        yield
    finally:
        _tracing.on = before


def is_tracing() -> bool:
    """Whether this thread is inside `tracing`."""
    return getattr(_tracing, "on", False)


class GraphMethod(Interceptor):
    """What a layer's method is replaced by while graphs stand in for it; `remove` puts the method back."""

    def __init__(self, owner: nn.Layer, method: str, handler: Callable[[Callable, tuple, dict], Any]):
        def run(original: Callable, args: tuple, kwargs: dict) -> Any:
            if is_tracing():
                return original(*args, **kwargs)
            return _as_lists(handler(original, args, kwargs), kwargs)

        super().__init__(owner, method, run)

    def __deepcopy__(self, memo: dict) -> Any:
        raise UserError("a compiled model cannot be copied: call its restore() first")


def normal(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call with the same meaning and fewer different values.

    Qwen-Image is told the grid of every sample although all are the same: one of them leaves the batch free. Z-Image
    takes a list of captions [T, D]: one tensor of them with their lengths leaves the batch and the lengths free.
    """
    grids = kwargs.get("img_shapes")
    if isinstance(grids, list) and grids and all(grid == grids[0] for grid in grids):
        return {**kwargs, "img_shapes": grids[:1]}
    captions = kwargs.get("cap_feats")
    if isinstance(captions, list) and isinstance(kwargs.get("x"), paddle.Tensor):
        lengths = [len(caption) for caption in captions]
        longest = -(-max(lengths) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        rows = [F.pad(each, [0, longest - len(each), 0, 0]) for each in captions]
        return {**kwargs, "cap_feats": paddle.stack(rows), "cap_lengths": paddle.to_tensor(lengths, dtype="int64")}
    return kwargs


def _as_lists(result: Any, kwargs: dict[str, Any]) -> Any:
    """The result of a call that `normal` may have changed, in the form that the method gives by itself."""
    if not isinstance(kwargs.get("cap_feats"), list) or not isinstance(result[0], paddle.Tensor):
        return result
    samples = result[0].unbind(0)
    return result._replace(sample=samples) if hasattr(result, "_replace") else (samples,)


def explained(error: Exception) -> str:
    """Kind, message and the last line of a user's or this project's source in what Paddle raised."""
    text = [line.strip() for line in str(error).splitlines() if line.strip()]
    places = [line for line in text if line.startswith("File ") and "/paddle/" not in line]
    frame, place = error.__traceback__, None
    while frame is not None:
        path = frame.tb_frame.f_code.co_filename
        if "/paddle/" not in path and "cinn_infer/units.py" not in path and "cinn_infer\\units.py" not in path:
            place = f'File "{path}", line {frame.tb_lineno}'
        frame = frame.tb_next
    where = places[-1] if places else place
    message = next((line for line in reversed(text) if re.match(r"\w*Error: ", line)), text[-1] if text else "")
    kind = f"{type(error).__name__}: "
    return (message if message.startswith(kind) else kind + message) + (f" ({where})" if where else "")
