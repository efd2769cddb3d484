"""What a conversion did, for people and for programs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Part:
    """What became of one component of a pipeline, of a model, or of one model's share of a LoRA file.

    `action` is "converted", "copied" or "left out". `renamed` maps the names of stored tensors to those they have now,
    more than one where a tensor was split. `left_out` names tensors and files that the result does not have.
    """

    name: str
    class_name: str
    action: str
    source_layout: str | None = None
    tensors: int = 0
    num_bytes: int = 0
    transposed: int = 0
    renamed: Mapping[str, list[str]] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """What was converted: `kind` is "pipeline", "model" or "lora"; everything in it was read back and compared."""

    kind: str
    source: str
    target: str
    layout: str
    parts: tuple[Part, ...]
    left_out: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def as_text(self) -> str:
        """A line for each part, then what was left out."""
        lines = [
            f"{self.kind} {self.source} -> {self.target} ({self.layout} layout; written files read back, all equal)"
        ]
        lines += [f"  {_line(part)}" for part in self.parts]
        lines += [f"left out: {_some(self.left_out)}"] if self.left_out else []
        return "\n".join(lines)


def _line(part: Part) -> str:
    head = f"{part.name}: {part.class_name}"
    if part.action == "left out":
        return f"{head}, left out"
    if part.action == "copied":
        return f"{head}, copied, {_size(part.num_bytes)}"
    words = [
        f"{head}, from {part.source_layout} layout: {part.tensors} tensors",
        _size(part.num_bytes),
        f"{part.transposed} transposed",
    ]
    if part.renamed:
        old, new = next(iter(part.renamed.items()))
        words.append(f"{len(part.renamed)} renamed (such as {old} to {' + '.join(new)})")
    if part.left_out:
        words.append(f"left out {_some(part.left_out)}")
    return ", ".join([*words, *part.notes])


def _size(num_bytes: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.3g} {unit}"
    return f"{num_bytes} bytes"


def _some(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
