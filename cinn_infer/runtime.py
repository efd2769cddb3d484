"""Open an exported pipeline: the class and call of the original, with graphs in place of its models."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import paddle
from paddle import nn
from safetensors.numpy import load_file

import fast_diffusers.pipelines  # noqa: F401  (defines the classes)
from cinn_infer import choice, engines, shapes, units
from cinn_infer.calls import Call, Structure
from cinn_infer.graphs import Graphs, require
from cinn_infer.manifest import FILE, OUTSIDE, GraphEntry, Manifest
from fast_diffusers import target_time
from fast_diffusers.errors import UserError
from fast_diffusers.models.checkpoint_io import read_json
from fast_diffusers.pipelines.base import Pipeline
from fast_diffusers.pipelines.components import CLASSES, load_component

REFUSED = (
    "load_lora_weights",
    "set_adapters",
    "fuse_lora",
    "unfuse_lora",
    "unload_lora_weights",
    "save_pretrained",
    "to",
)
"""Methods of pipelines that need the weights."""


def load(
    directory: str | PathLike,
    runtime: str = "auto",
    precision: str = "fp32",
    threads: int | None = None,
    cinn: bool = False,
) -> Pipeline:
    """Open what `cinn_infer.export` wrote, after checking its files and its outputs.

    Args:
        directory: the folder.
        runtime: "paddle", Paddle Inference; "onnxruntime" or "openvino", if the export has ONNX files; or "auto", the
            one that runs the transformer fastest, see `choice.choose`. Models without an ONNX file run in Paddle
            Inference beside the others.
        precision: of the transformer; other models run in fp32. "fp32"; "bf16" in OpenVINO, or in Paddle Inference for
            FLUX, SD3 and SANA; "int8" weights in OpenVINO.
        threads: CPU threads; None is what Paddle uses.
        cinn: let Paddle's compiler run the graphs of runtime="paddle" on a GPU.

    Returns:
        A pipeline of the exported one's class, with its call. `pipe.graphs` holds what runs, and the time it took.

    Raises:
        UserError: missing, altered or unreadable files, a runtime that is not installed or that the export has no files
            for, a precision that cannot run here, or outputs that are wrong.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory} is not a folder: give one that cinn_infer.export wrote")
    if precision not in engines.PRECISIONS:
        raise UserError(f"precision must be one of {', '.join(engines.PRECISIONS)}, got {precision!r}")
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise UserError(f"threads must be a positive integer, got {threads!r}")
    if cinn:
        engines.require_cinn(runtime)
    manifest = Manifest.read(directory)
    manifest.verify(directory)
    if runtime == "auto":
        graphs = choice.choose(manifest, directory, precision, threads)
    else:
        require(manifest, directory, runtime, precision)
        graphs = Graphs(manifest, directory, runtime, precision, threads, cinn)
        graphs.self_check()
    return _pipeline(manifest, directory, graphs)


def _pipeline(manifest: Manifest, directory: Path, graphs: Graphs) -> Pipeline:
    """The pipeline, its models without weights."""
    components: dict[str, Any] = dict.fromkeys(manifest.absent)
    for name, entry in manifest.parts.items():
        components[name] = load_component(directory, name, entry, None)
    for name, class_name in manifest.models.items():
        components[name] = _shell(class_name, directory / name)
    cls = Pipeline._class_named(manifest.pipeline, directory)
    pipe = cls(**components, **manifest.settings)
    if way := target_time.TargetTime.load(directory, pipe.transformer):
        target_time.attach(pipe.transformer, way)
    for name in manifest.models:
        model = getattr(pipe, name)
        outside = directory / name / OUTSIDE
        if outside.is_file():
            _load_outside(model, outside)
            for path, block in units.named_blocks(model).items():
                _stand_in(f"{name}.{path}", block, graphs)
        else:
            _stand_in(name, model, graphs)
    for name in REFUSED:
        if hasattr(pipe, name):
            object.__setattr__(pipe, name, partial(_refuse, name))
    object.__setattr__(pipe, "graphs", graphs)
    return pipe


def _shell(class_name: str, folder: Path) -> nn.Layer:
    """A model with its configuration and without memory for weights, for all that a pipeline reads of it."""
    if class_name == "ppdiffusers.SD3Transformer2DModel":
        from ppdiffusers.models.transformer_sd3 import SD3Transformer2DModel as cls
    elif class_name in CLASSES:
        cls = getattr(__import__(CLASSES[class_name][0], fromlist=[class_name]), CLASSES[class_name][1])
    else:
        raise UserError(f"{folder.parent / FILE} names a model of class {class_name}, which this package does not know")
    with paddle.LazyGuard():
        model = cls.from_config(read_json(folder / "config.json"))
    model.eval()
    return model


def _load_outside(model: nn.Layer, path: Path) -> None:
    """Give a model its weights beside those of its blocks."""
    targets = model.state_dict()
    with paddle.no_grad():
        for name, weight in load_file(path).items():
            targets[name].set_value(weight)


def _stand_in(component: str, model: nn.Layer, graphs: Graphs) -> None:
    """Put the graphs of a component, or block, in place of its methods, and errors in place of those without one."""
    own = [graph for graph in graphs.manifest.graphs if graph.component == component]
    layers = [layer for layer in model.sublayers() if layer is not model]
    methods = {graph.method for graph in own}
    for method in methods:
        handler = partial(_run, [graph for graph in own if graph.method == method], graphs, layers)
        units.GraphMethod(model, method, handler)
    for method in {"forward", "encode", "decode"} - methods:
        if hasattr(model, method):
            units.GraphMethod(model, method, partial(_absent, f"{component}.{method}"))


def _run(
    entries: Sequence[GraphEntry], graphs: Graphs, layers: Sequence[nn.Layer], original: Any, args: Any, kwargs: Any
):
    """One call of a model's method, by the graph that fits it."""
    if any("forward" in layer.__dict__ for layer in layers):
        raise UserError(
            f"a cache has no effect inside {entries[0].title}, which is one graph: call disable_cache, or export with "
            "granularity='block'"
        )
    call = Call(original, args, units.normal(kwargs))
    told = units.told_now() if entries[0].component == "transformer" else None
    names, tensors = units.inputs(call, told)
    arrays = [tensor.numpy() for tensor in tensors]
    reasons = []
    for graph in entries:
        if graph.constants != call.constants or graph.names != names:
            reasons.append(f"it was exported for the arguments {_shown(graph.constants)}")
            continue
        fitted, length = _fit_text(graph, names, arrays)
        reason = shapes.misfit(names, graph.axes, [array.shape for array in fitted])
        if reason is None:
            fitted = [
                array.astype(dtype, copy=False) for array, (_, dtype, _) in zip(fitted, graph.inputs, strict=True)
            ]
            outputs = graphs.run(graph, fitted)
            if length is not None:
                outputs = [each[:, :length] if each.ndim > 1 else each for each in outputs]
            return Structure(graph.outputs).fill([paddle.to_tensor(each) for each in outputs])
        reasons.append(reason)
    raise UserError(
        f"{entries[0].title} is outside what was exported: {'; '.join(dict.fromkeys(reasons))}. "
        "Export with calls=[...] for every size that is needed"
    )


def _fit_text(
    graph: GraphEntry, names: Sequence[str], arrays: Sequence[np.ndarray]
) -> tuple[list[np.ndarray], int | None]:
    """Masked token ids [B, T], padded on the right, at the length of the graph; and T where that is longer.

    Causal models give the same for what is before the padding.
    """
    arrays = list(arrays)
    if "input_ids" not in names or "attention_mask" not in names:
        return arrays, None
    length, wanted = arrays[names.index("input_ids")].shape[1], graph.axes[names.index("input_ids")][1]
    if length >= wanted:
        return arrays, None
    for name in ("input_ids", "attention_mask"):
        position = names.index(name)
        arrays[position] = np.pad(arrays[position], [(0, 0), (0, wanted - length)])
    return arrays, length


def _absent(title: str, *_: Any) -> NoReturn:
    raise UserError(f"{title} is not part of this export, so that what needs it (such as image=) cannot run here")


def _refuse(name: str, *_: Any, **__: Any) -> NoReturn:
    raise UserError(f"an exported pipeline has no weights, which {name} needs: do this before the export")


def _shown(constants: str) -> str:
    return constants if len(constants) < 300 else constants[:297] + "..."
