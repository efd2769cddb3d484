"""manifest.json of an export: what is in the folder, and whether it is still what was written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fast_diffusers.errors import UserError

FILE = "manifest.json"
CHECK_FILE = "check.safetensors"
OUTSIDE = "outside.safetensors"
"""In the folder of a transformer whose blocks are graphs: the weights that are not in these."""
VERSION = 1


@dataclass(frozen=True)
class GraphEntry:
    """One exported graph.

    Attributes:
        component, method: what it stands in for; a block of a component is "component.path".
        constants: the arguments beside the tensors, see `cinn_infer.calls.Call`.
        inputs: (name, dtype, axes) of every tensor; an axis is a size or the name of a free one.
        outputs: layout of the result, see `cinn_infer.calls.Structure`.
        files: of each format, relative to the folder; the first is the graph.
        lacking: why there are none of a format that was asked for.
    """

    component: str
    method: str
    constants: str
    inputs: tuple[tuple[str, str, tuple[str | int, ...]], ...]
    outputs: Any
    files: Mapping[str, tuple[str, ...]]
    lacking: Mapping[str, str] = field(default_factory=dict)

    @property
    def model(self) -> str:
        """The component that it is of, or is."""
        return self.component.partition(".")[0]

    @property
    def names(self) -> list[str]:
        """Of the inputs."""
        return [name for name, _, _ in self.inputs]

    @property
    def graph_names(self) -> list[str]:
        """Of the inputs, as the files call them."""
        return [name.replace(".", "_") for name in self.names]

    @property
    def axes(self) -> list[tuple[str | int, ...]]:
        """Of the inputs."""
        return [tuple(axes) for _, _, axes in self.inputs]

    @property
    def title(self) -> str:
        """What messages call it."""
        return f"{self.component}.{self.method}"


@dataclass
class Manifest:
    """All that an export says of itself.

    Attributes:
        pipeline: name of the pipeline's class.
        settings: its settings, such as `num_classes`.
        models: class name of every model by component; "ppdiffusers." before it for one of that library.
        parts: [library, class] of schedulers and tokenizers, as in a model_index.json.
        absent: components that the pipeline is without.
        versions: of what made the files.
        tolerance: how far a runtime may be from eager outputs in fp32, relative to the largest of them (at least 1).
        files: size and sha256 of every other file.
    """

    pipeline: str
    settings: dict[str, Any]
    models: dict[str, str]
    parts: dict[str, list[str]]
    absent: list[str]
    versions: dict[str, str]
    tolerance: float
    graphs: list[GraphEntry]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    version: int = VERSION

    def write(self, folder: Path) -> None:
        """Note all files of the folder, then write manifest.json, last: a folder that has one is complete."""
        paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != FILE)
        self.files = {path.relative_to(folder).as_posix(): _fingerprint(path) for path in paths}
        (folder / FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read manifest.json.

        Raises:
            UserError: there is none, or it is not one of this version.
        """
        path = folder / FILE
        if not path.is_file():
            raise UserError(
                f"{folder} is not an exported pipeline: it has no {FILE}; cinn_infer.export writes such folders"
            )
        try:
            content = json.loads(path.read_bytes())
            if content.get("version") != VERSION:
                raise UserError(
                    f"{path} is of version {content.get('version')}, this package reads {VERSION}: export again"
                )
            return cls(**content | {"graphs": [_graph(graph) for graph in content["graphs"]]})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path} is damaged ({type(error).__name__}: {error}): export again") from error

    def verify(self, folder: Path) -> None:
        """UserError for the first file that is missing, or not what was written."""
        for name, noted in self.files.items():
            path = folder / name
            if not path.is_file():
                raise UserError(f"{folder} is incomplete: {name} is missing; copy it again or export again")
            if (size := path.stat().st_size) != noted["bytes"]:
                raise UserError(
                    f"{path} has {size} bytes, its manifest says {noted['bytes']}: it is cut off or altered"
                )
            if _fingerprint(path) != noted:
                raise UserError(f"{path} is not the file that was exported: its checksum differs from the manifest's")


def _graph(content: Mapping[str, Any]) -> GraphEntry:
    inputs = tuple((name, dtype, tuple(axes)) for name, dtype, axes in content["inputs"])
    return GraphEntry(**{**content, "inputs": inputs})


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
