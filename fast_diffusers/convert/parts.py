"""What the conversions of models, pipelines and LoRA share."""

from __future__ import annotations

import filecmp
import os
import shutil
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from fast_diffusers.models.checkpoint_io import StoredTensor


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A new folder beside the target, to be renamed or emptied inside the block; it is gone afterwards."""
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = target.with_name(f".{target.name}.{os.getpid()}.partial")
    stage.mkdir()
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def copy_file(source: str | Path, target: str | Path) -> None:
    """Copy a file's content and compare it; OSError if it differs."""
    shutil.copyfile(source, target)
    if not filecmp.cmp(source, target, shallow=False):
        raise OSError(f"{source} was not copied as it should (a full or faulty disk?)")


def origins_of(stored: Mapping[str, StoredTensor], used: Mapping[str, StoredTensor]) -> dict[str, list[str]]:
    """For each stored tensor that is used, as a whole or in parts, the names of what it became."""
    starts = sorted((str(tensor.file), tensor.offset, name) for name, tensor in stored.items())
    positions = [start[:2] for start in starts]
    origins = defaultdict(list)
    for name, tensor in used.items():
        origins[starts[bisect_right(positions, (str(tensor.file), tensor.offset)) - 1][2]].append(name)
    return dict(origins)


def renamed(origins: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Those of the origins that have another name now, or several."""
    return {old: new for old, new in sorted(origins.items()) if new != [old]}
