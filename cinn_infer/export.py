"""Write a pipeline as static graphs, with everything that `cinn_infer.load` needs."""

from __future__ import annotations

import contextlib
import inspect
import json
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import nn
from ppdiffusers import DiffusionPipeline
from safetensors.numpy import save_file

from cinn_infer import engines, onnx_files, shapes, units
from cinn_infer.calls import Call, Structure
from cinn_infer.graphs import Graphs
from cinn_infer.manifest import CHECK_FILE, FILE, OUTSIDE, GraphEntry, Manifest, _fingerprint
from fast_diffusers import __version__, lora, target_time
from fast_diffusers.errors import UserError
from fast_diffusers.lora.layers import find_set
from fast_diffusers.models.base import PretrainedModel
from fast_diffusers.models.checkpoint_io import ADAPTER_NAMES, write_text
from fast_diffusers.pipelines import QwenImagePipeline, from_ppdiffusers
from fast_diffusers.pipelines.base import Pipeline
from fast_diffusers.pipelines.components import index_entry, save_component
from fast_diffusers.random import Generator

FORMATS = ("paddle", "onnx")
GRANULARITIES = ("model", "block")
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
    pipe: DiffusionPipeline,
    directory: str | PathLike,
    format: str = "paddle",
    calls: Sequence[Mapping[str, Any]] = ({},),
    tolerance: float = TOLERANCE,
    granularity: str = "model",
) -> Manifest:
    """Write a pipeline's transformer, text encoders and VAE decoder as static graphs.

    The pipeline makes an image (one step, eagerly) for each of `calls`; the graphs are those of what is then called.
    Batch and, where the model can be traced so, numbers of tokens are free; other sizes, and the use of guidance where
    that changes a size, are those of the calls. Running LoRA adapters are fused for the export.

    Args:
        pipe: one of this package, or ppdiffusers' StableDiffusion3Pipeline, in float32. What `load` makes of the latter
            is this package's; see `fast_diffusers.pipelines.from_ppdiffusers` for the defaults in which they differ.
        directory: a folder that is new, empty or an export, which is replaced.
        format: "paddle", for Paddle Inference; or "onnx", which adds ONNX files for ONNX Runtime and OpenVINO that
            have passed the onnx package's checker and, where ONNX Runtime is installed, the self-check in it. Models
            but the transformer may go without: the manifest says why, and `load` runs them in Paddle Inference.
        calls: arguments of the pipeline's call, such as height and width; prompt and steps have defaults. The text
            encoder of Qwen-Image takes prompts up to the length of the longest one here.
        tolerance: of the self-check, see `Manifest`.
        granularity: "model", the transformer is one graph; "block", each of its blocks is, and what is around them
            stays Python with weights of its own, so that caches can skip blocks: those that do not look inside.

    Raises:
        UserError: something that cannot be exported, is not installed, or a graph that differs from the model.
    """
    directory = Path(directory)
    if not isinstance(pipe, Pipeline):
        pipe = from_ppdiffusers(pipe)
    _check(pipe, directory, calls)
    _check_format(format)
    if granularity not in GRANULARITIES:
        raise UserError(f"granularity must be one of {', '.join(GRANULARITIES)}, got {granularity!r}")
    with _fused(pipe.transformer) as way:
        recorded = [each for arguments in calls for each in _record(pipe, arguments, granularity)]
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as temporary:
            folder = Path(temporary) / "export"
            graphs, checks = [], {}
            for each in _distinct(recorded):
                graph, check = _save(each, folder, len(graphs))
                checks |= {f"{len(graphs)}.{name}": array for name, array in check.items()}
                graphs.append(graph)
            if way is not None:
                way.save(folder)
            if granularity == "block":
                _save_outside(pipe.transformer, folder / "transformer")
            save_file(checks, folder / CHECK_FILE)
            if format == "onnx":
                graphs = _with_onnx(graphs, folder)
            manifest = _describe(pipe, graphs, tolerance)
            _save_parts(pipe, manifest, folder)
            manifest.write(folder)
            Graphs(manifest, folder).self_check()  # before anyone relies on it
            if format == "onnx" and "onnxruntime" in engines.installed():
                _drop_wrong(manifest, folder)
            shutil.rmtree(directory, ignore_errors=True)
            folder.rename(directory)
    return manifest


def _check_format(format: str) -> None:
    if format not in FORMATS:
        raise UserError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if format == "onnx":
        onnx_files.require()


def _check(pipe: Pipeline, directory: Path, calls: Sequence[Mapping[str, Any]]) -> None:
    """UserError for a pipeline, folder or calls that cannot be used."""
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


def _record(pipe: Pipeline, arguments: Mapping[str, Any], granularity: str) -> list[Recorded]:
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
        if component == "transformer" and granularity == "block":
            for path, block in units.named_blocks(layer).items():
                listen(f"{component}.{path}", block)
        else:
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


def _save(each: Recorded, directory: Path, index: int) -> tuple[GraphEntry, dict[str, np.ndarray]]:
    """Trace and write one graph; also the inputs and eager outputs of its self-check, of other sizes than traced."""
    axes = shapes.axes(each.layer, each.names, each.tensors)
    inputs = shapes.resized([tensor.numpy() for tensor in each.tensors], axes)
    with _four_axes(each.layer):
        unit = units.trace(each.layer, each.original, each.call, axes, told=each.told)
    stem = f"{each.component.replace('.', '/', 1)}/{each.method}-{index}"
    try:
        with units.tracing(), paddle.no_grad(), unit._telling:
            paddle.jit.save(unit, str(directory / stem))
            outputs = [tensor.numpy() for tensor in each.eager([paddle.to_tensor(array) for array in inputs])]
    except Exception as error:
        raise UserError(f"{each.component}.{each.method} cannot be exported: {units.explained(error)}") from error
    files = {"paddle": (f"{stem}.json", _shared(directory, f"{stem}.pdiparams"))}
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


def _save_outside(transformer: nn.Layer, folder: Path) -> None:
    """The weights of a transformer that are not in its blocks."""
    blocks = tuple(f"{path}." for path in units.named_blocks(transformer))
    weights = {
        name: weight.numpy()
        for name, weight in transformer.state_dict().items()
        if not name.startswith(blocks) and not ADAPTER_NAMES.search(name)
    }
    save_file(weights, folder / OUTSIDE)


@contextlib.contextmanager
def _four_axes(layer: nn.Layer) -> Iterator[None]:
    """Within the block, group norms of [B, C, N], as in VAEs, run on [B, C, N, 1], which paddle2onnx needs."""

    def run(original: Any, args: tuple, kwargs: dict) -> paddle.Tensor:
        x = args[0]
        return original(x.unsqueeze(-1)).squeeze(-1) if x.ndim == 3 else original(x)

    norms = [each for each in layer.sublayers() if isinstance(each, nn.GroupNorm)]
    hooks = [units.Interceptor(norm, "forward", run) for norm in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _shared(directory: Path, weights: str) -> str:
    """The weights' file, or another one of the folder that holds the same; the new one is then removed."""
    own = _fingerprint(directory / weights)
    for other in sorted((directory / weights).parent.glob("*.pdiparams")):
        if other.name != Path(weights).name and _fingerprint(other) == own:
            (directory / weights).unlink()
            return other.relative_to(directory).as_posix()
    return weights


def _with_onnx(graphs: Sequence[GraphEntry], directory: Path) -> list[GraphEntry]:
    """The entries with their ONNX files, or with the reason why they have none. UserError for a transformer without."""
    jobs = {}
    for graph in graphs:
        paths = [directory / name for name in graph.files["paddle"]]
        jobs[id(graph)] = onnx_files.Job(*paths, paths[0].with_suffix(".onnx"))
    failed = onnx_files.write(list(jobs.values()))

    def entry(graph: GraphEntry) -> GraphEntry:
        target = jobs[id(graph)].target
        if reason := failed.get(target):
            if graph.model == "transformer":
                raise UserError(f"{graph.title} cannot be written as ONNX: {reason}")
            return replace(graph, lacking={"onnx": reason})
        return replace(graph, files={**graph.files, "onnx": (target.relative_to(directory).as_posix(),)})

    return [entry(graph) for graph in graphs]


def _drop_wrong(manifest: Manifest, directory: Path) -> None:
    """Run ONNX files in ONNX Runtime; those with wrong outputs are removed. UserError for one of a transformer."""
    graphs, kept = Graphs(manifest, directory, "onnxruntime"), []
    for case in graphs.cases():
        graph = case[0]
        try:
            graphs.check(*case)
        except UserError as error:
            if graph.model == "transformer":
                raise
            for name in graph.files.pop("onnx"):
                (directory / name).unlink()
            graph = replace(graph, lacking={"onnx": str(error)})
        kept.append(graph)
    if kept != manifest.graphs:
        manifest.graphs = kept
        manifest.write(directory)


def _describe(pipe: Pipeline, graphs: list[GraphEntry], tolerance: float) -> Manifest:
    models = _models(pipe)
    present = [name for name in pipe.component_types if getattr(pipe, name) is not None]
    names = {
        name: type(model).__name__ if isinstance(model, PretrainedModel) else f"ppdiffusers.{type(model).__name__}"
        for name, model in models.items()
    }
    versions = {"fast_diffusers": __version__, "paddle": paddle.__version__, "python": platform.python_version()}
    for package in ("ppdiffusers", "onnx", "paddle2onnx"):
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
