"""Write a pipeline as static graphs, with everything that `cinn_infer.load` needs."""

from __future__ import annotations

import contextlib
import inspect
import json
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import nn
from safetensors.numpy import save_file

from cinn_infer import shapes, units
from cinn_infer.calls import Call, Structure
from cinn_infer.manifest import CHECK_FILE, FILE, GraphEntry, Manifest, _fingerprint
from cinn_infer.runtime import Graphs
from fast_diffusers import __version__, lora, target_time
from fast_diffusers.errors import UserError
from fast_diffusers.lora.layers import find_set
from fast_diffusers.models import ZImageTransformer2DModel
from fast_diffusers.models.base import PretrainedModel
from fast_diffusers.models.checkpoint_io import write_text
from fast_diffusers.pipelines import QwenImagePipeline
from fast_diffusers.pipelines.base import Pipeline
from fast_diffusers.pipelines.components import index_entry, save_component
from fast_diffusers.random import Generator

FORMATS = ("paddle", "onnx")
ONNX_MODELS = frozenset(
    {"FluxTransformer2DModel", "SanaTransformer2DModel", "SD3Transformer2DModel"}  # also that of ppdiffusers
)
"""Transformers that paddle2onnx 2.1.0 can write; CLIP and T5 end the process in it."""
TOLERANCE = 1e-4
LONG_PROMPT = "cat" + " cat" * 511
"""512 tokens, Qwen-Image's `max_sequence_length`."""
EXPORTED = {"vae": "decode"}
"""The method of a component that becomes a graph, where it is not `forward`."""


@dataclass
class Recorded:
    """One kind of call of a component's method, and what it gave."""

    component: str
    method: str
    layer: nn.Layer
    original: Any
    call: Call
    told: units.Told | None

    @property
    def names(self) -> list[str]:
        """Of the tensors."""
        return units.inputs(self.call, self.told)[0]

    @property
    def tensors(self) -> list[paddle.Tensor]:
        """As many."""
        return units.inputs(self.call, self.told)[1]

    def eager(self, tensors: Sequence[paddle.Tensor]) -> list[paddle.Tensor]:
        """What the method gives for other tensors."""
        args, kwargs = self.call.arguments(tensors)
        block = units.telling(self.told[0], tensors[-1]) if self.told else contextlib.nullcontext()
        with block, units.tracing():  # the method itself, not what stands in for it
            return Structure.of(self.original(*args, **kwargs))[1]


def export(
    pipe: Pipeline,
    directory: str | PathLike,
    format: str = "paddle",
    calls: Sequence[Mapping[str, Any]] = ({},),
    tolerance: float = TOLERANCE,
) -> Manifest:
    """Write a pipeline's transformer, text encoders and VAE decoder as static graphs.

    The pipeline makes an image (one step, eagerly) for each of `calls`; the graphs are those of what is then called.
    Batch and, where the model can be traced so, numbers of tokens are free; other sizes, and the use of guidance where
    that changes a size, are those of the calls. Running LoRA adapters are fused for the export.

    Args:
        pipe: one of this package, in float32.
        directory: a folder that is new, empty or an export, which is replaced.
        format: "paddle", what `load` opens; or "onnx", which adds the transformer of FLUX, SD3 or SANA as an ONNX file
            of up to 2 GB that has passed the onnx package's checker, for a runtime of your own. check.safetensors holds
            inputs and eager outputs to compare it with.
        calls: arguments of the pipeline's call, such as height and width; prompt and steps have defaults. The text
            encoder of Qwen-Image takes prompts up to the length of the longest one here.
        tolerance: of the self-check, see `Manifest`.

    Raises:
        UserError: something that cannot be exported, is not installed, or a graph that differs from the model.
    """
    directory = Path(directory)
    _check(pipe, directory, calls)
    _check_format(format, pipe)
    with _fused(pipe.transformer) as way:
        recorded = [each for arguments in calls for each in _record(pipe, arguments)]
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as temporary:
            folder = Path(temporary) / "export"
            graphs, checks = [], {}
            for each in _distinct(recorded):
                graph, check = _save(each, folder, len(graphs), format)
                checks |= {f"{len(graphs)}.{name}": array for name, array in check.items()}
                graphs.append(graph)
            if way is not None:
                way.save(folder)
            save_file(checks, folder / CHECK_FILE)
            manifest = _describe(pipe, graphs, tolerance)
            _save_parts(pipe, manifest, folder)
            manifest.write(folder)
            Graphs(manifest, folder).self_check()  # before anyone relies on it
            shutil.rmtree(directory, ignore_errors=True)
            folder.rename(directory)
    return manifest


def _check_format(format: str, pipe: Pipeline) -> None:
    if format not in FORMATS:
        raise UserError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if format == "paddle":
        return
    if (name := type(pipe.transformer).__name__) not in ONNX_MODELS:
        raise UserError(f"format='onnx' is there for {', '.join(sorted(ONNX_MODELS))}, not for {name}")
    try:
        import onnx  # noqa: F401
        import paddle2onnx  # noqa: F401
    except ImportError as error:
        raise UserError(
            "format='onnx' needs the packages onnx and paddle2onnx: pip install onnx paddle2onnx==2.1.0"
        ) from error


def _check(pipe: Any, directory: Path, calls: Sequence[Mapping[str, Any]]) -> None:
    """UserError for a pipeline, folder or calls that cannot be used."""
    if not isinstance(pipe, Pipeline):
        raise UserError(
            f"export takes a pipeline of fast_diffusers, not a {type(pipe).__name__}: "
            "for one of ppdiffusers, put its transformer and other parts into the pipeline of the same name here"
        )
    if isinstance(pipe.transformer, ZImageTransformer2DModel):
        raise UserError(
            "Z-Image cannot be exported: its transformer takes a list of prompts, each with as many tokens as it has, "
            "so that a graph would serve prompts of these lengths only. The pipelines of FLUX, SD3, SANA, Qwen-Image "
            "and of labels can; for this one there is cinn_infer.compile"
        )
    if not calls:
        raise UserError("calls must hold the arguments of at least one call; {} stands for the defaults")
    if directory.exists() and (
        not directory.is_dir() or (any(directory.iterdir()) and not (directory / FILE).is_file())
    ):
        raise UserError(f"{directory} is not an export and not empty: give another folder")
    for name, model in _models(pipe).items():
        if dtypes := {str(each.dtype) for each in model.parameters()} - {"paddle.float32"}:
            raise UserError(
                f"{name} has weights of {', '.join(sorted(dtypes))}: open the pipeline in float32, "
                "and choose the precision when you load the export"
            )
        for layer in model.sublayers(include_self=True):
            if any(isinstance(value, units.Interceptor) for value in vars(layer).values()):
                raise UserError(f"{name} is compiled or runs in a cache: undo that before the export")


def _models(pipe: Pipeline) -> dict[str, nn.Layer]:
    return {name: each for name in pipe.component_types if isinstance(each := getattr(pipe, name), nn.Layer)}


@contextlib.contextmanager
def _fused(transformer: nn.Layer) -> Iterator[target_time.TargetTime | None]:
    """Within the block, running adapters are part of the weights; gives how the model is told its target time."""
    adapters = find_set(transformer)
    running = dict(adapters.running()) if adapters else {}
    if running and adapters.fused:
        raise UserError("some LoRA adapters are fused and others are running: fuse all, or unload those that are not")
    if running:
        lora.fuse(transformer, running)
    try:
        known = target_time.attached(transformer)
        named = [name for name in (adapters.fused if adapters else ()) if name in known]
        yield known.get(named[0] if named else None)
    finally:
        if running:
            lora.unfuse(transformer)


def _record(pipe: Pipeline, arguments: Mapping[str, Any]) -> list[Recorded]:
    """What the components are called with while the pipeline makes an image."""
    recorded, hooks = [], []

    def listen(component: str, layer: nn.Layer) -> None:
        method = EXPORTED.get(component, "forward")

        def handle(original: Any, args: tuple, kwargs: dict) -> Any:
            call = Call(original, args, units.normal(kwargs))
            told = units.told_now() if component == "transformer" else None
            recorded.append(Recorded(component, method, layer, original, call, told))
            return original(*args, **kwargs)

        hooks.append(units.GraphMethod(layer, method, handle))

    for component, layer in _models(pipe).items():
        layer.eval()
        listen(component, layer)
    defaults = {"num_inference_steps": 1, "output_type": "np", "generator": Generator(0)}
    if not {"prompt", "prompt_embeds"} & set(arguments):
        defaults["prompt"] = "0" if "num_classes" in pipe.config else "a photo of a cat"
        if isinstance(pipe, QwenImagePipeline):  # the length of its text encoder's graph; shorter prompts are padded
            defaults["prompt"] = LONG_PROMPT
    if getattr(pipe, "vae", 0) is None:
        defaults["output_type"] = "latent"
    progress = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(disable=True)
    try:
        pipe(**{**defaults, **arguments})
    finally:
        pipe.set_progress_bar_config(**progress)
        for hook in reversed(hooks):
            hook.remove()
    return recorded


def _distinct(recorded: Sequence[Recorded]) -> Iterator[Recorded]:
    """Calls that need graphs of their own."""
    seen = set()
    for each in recorded:
        key = (each.component, each.call.constants, tuple(shapes.axes(each.layer, each.names, each.tensors)))
        if key not in seen:
            seen.add(key)
            yield each


def _save(each: Recorded, directory: Path, index: int, format: str) -> tuple[GraphEntry, dict[str, np.ndarray]]:
    """Trace and write one graph; also the inputs and eager outputs of its self-check, of other sizes than traced."""
    axes = shapes.axes(each.layer, each.names, each.tensors)
    inputs = shapes.resized([tensor.numpy() for tensor in each.tensors], axes)
    unit = units.trace(each.layer, each.original, each.call, axes, told=each.told)
    stem = f"{each.component}/{each.method}-{index}"
    try:
        with units.tracing(), paddle.no_grad(), unit._telling:
            paddle.jit.save(unit, str(directory / stem))
            outputs = [tensor.numpy() for tensor in each.eager([paddle.to_tensor(array) for array in inputs])]
    except Exception as error:
        raise UserError(f"{each.component}.{each.method} cannot be exported: {units.explained(error)}") from error
    files = {"paddle": (f"{stem}.json", _shared(directory, f"{stem}.pdiparams"))}
    if format == "onnx" and each.component == "transformer":
        files["onnx"] = (_to_onnx(directory, files["paddle"], stem),)
    entry = GraphEntry(
        component=each.component,
        method=each.method,
        constants=each.call.constants,
        inputs=tuple(
            (name, str(array.dtype), tuple(shape)) for name, array, shape in zip(each.names, inputs, axes, strict=True)
        ),
        outputs=unit.structure.layout,
        files=files,
    )
    check = {f"input.{i}": np.ascontiguousarray(array) for i, array in enumerate(inputs)}
    return entry, check | {f"output.{i}": np.ascontiguousarray(array) for i, array in enumerate(outputs)}


def _shared(directory: Path, weights: str) -> str:
    """The weights' file, or another one of the folder that holds the same; the new one is then removed."""
    own = _fingerprint(directory / weights)
    for other in sorted((directory / weights).parent.glob("*.pdiparams")):
        if other.name != Path(weights).name and _fingerprint(other) == own:
            (directory / weights).unlink()
            return other.relative_to(directory).as_posix()
    return weights


def _to_onnx(directory: Path, files: Sequence[str], stem: str) -> str:
    import onnx
    import paddle2onnx

    target = f"{stem}.onnx"
    try:
        paddle2onnx.export(
            *(str(directory / file) for file in files), str(directory / target), opset_version=17, optimize_tool="None"
        )
        if (directory / target).is_file():
            _mend_onnx(directory / target)
            onnx.checker.check_model(str(directory / target), full_check=True)
    except (Exception, SystemExit) as error:  # paddle2onnx exits where it cannot go on
        raise UserError(f"{stem} cannot be written as ONNX: {units.explained(error)}") from error
    if not (directory / target).is_file():
        raise UserError(f"{stem} cannot be written as ONNX: paddle2onnx wrote no file, its messages say why")
    return target


def _mend_onnx(path: Path) -> None:
    """Sizes of -1 that paddle2onnx 2.1.0 gives to Expand become 1: in Paddle -1 keeps an axis, in ONNX 1 does."""
    import onnx

    model = onnx.load(path)
    shapes = {node.input[1] for node in model.graph.node if node.op_type == "Expand"}
    constants = [node for node in model.graph.node if node.op_type == "Constant" and node.output[0] in shapes]
    values = [attribute.t for node in constants for attribute in node.attribute if attribute.name == "value"]
    for value in [*values, *(each for each in model.graph.initializer if each.name in shapes)]:
        sizes = onnx.numpy_helper.to_array(value)
        value.CopyFrom(onnx.numpy_helper.from_array(np.where(sizes == -1, 1, sizes), value.name))
    onnx.save(model, path)


def _describe(pipe: Pipeline, graphs: list[GraphEntry], tolerance: float) -> Manifest:
    models = _models(pipe)
    present = [name for name in pipe.component_types if getattr(pipe, name) is not None]
    names = {
        name: type(model).__name__ if isinstance(model, PretrainedModel) else f"ppdiffusers.{type(model).__name__}"
        for name, model in models.items()
    }
    versions = {"fast_diffusers": __version__, "paddle": paddle.__version__, "python": platform.python_version()}
    for package in ("ppdiffusers", "paddle2onnx"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    settings = set(inspect.signature(type(pipe).__init__).parameters) & set(pipe.config) - set(pipe.component_types)
    return Manifest(
        pipeline=pipe._name_in("paddle"),
        settings={name: pipe.config[name] for name in sorted(settings)},
        models=names,
        parts={name: index_entry(getattr(pipe, name), "paddle") for name in present if name not in models},
        absent=[name for name in pipe.component_types if name not in present],
        versions=versions,
        tolerance=tolerance,
        graphs=graphs,
    )


def _save_parts(pipe: Pipeline, manifest: Manifest, directory: Path) -> None:
    """Configs of models, and the schedulers and tokenizers themselves."""
    for name, model in _models(pipe).items():
        (directory / name).mkdir(exist_ok=True)
        write_text(directory / name / "config.json", json.dumps(json.loads(model.to_json_string()), indent=2) + "\n")
    for name in manifest.parts:
        save_component(getattr(pipe, name), directory / name, "paddle")
