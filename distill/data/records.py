"""What a data source is: a length, an identity and records by index."""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Protocol

import numpy as np

from fast_diffusers.errors import UserError


@dataclass(frozen=True)
class Record:
    """One decoded sample: ``image`` is uint8 [H, W, C] with C = 1 or 3, ``name`` says where it came from."""

    image: np.ndarray
    prompt: str
    name: str


class BadRecord(Exception):
    """A record that cannot be used: which one, and why."""

    def __init__(self, name: str, why: str):
        super().__init__(f"{name}: {why}")
        self.name = name
        self.why = why


class Source(Protocol):
    """Random access to records. ``source[i]`` raises BadRecord when record i is unusable, each time it is asked for.

    ``identity`` is a string that changes when the records do.
    """

    @property
    def identity(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


def user_path(value: object, setting: str, *, folder: bool) -> Path:
    """``value`` as an existing folder or file, or a UserError that names the setting."""
    if not isinstance(value, str | os.PathLike):
        raise UserError(f"{setting} must be a path, not {value!r}")
    path = Path(value).expanduser()
    if not (path.is_dir() if folder else path.is_file()):
        kind = "folder" if folder else "file"
        problem = f"is not a {kind}" if path.exists() else "does not exist"
        raise UserError(f"{setting} must be a {kind}: {path} {problem}")
    return path


def one_of(value: object, choices: Iterable[str], setting: str) -> str:
    """``value`` when it is one of the choices, else a UserError that names the nearest one."""
    choices = list(choices)
    if value not in choices:
        nearest = get_close_matches(str(value), choices, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise UserError(f"unknown {setting} {value!r}: {hint}choose from {', '.join(choices)}")
    return value


def whole_number(value: object, setting: str, least: int) -> int:
    """``value`` when it is an int of at least ``least``, else a UserError that names the setting."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{setting} must be a whole number from {least} up, not {value!r}")
    return value


def files_identity(kind: str, root: Path, names: Iterable[str], *settings: str) -> str:
    """Identity of file-backed records: a hash over names below ``root``, sizes and modification times.

    Hashing the bytes would mean reading the whole data set at each start.
    """
    digest = hashlib.sha256(repr(settings).encode())
    for name in names:
        try:
            stat = (root / name).stat()
            digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        except FileNotFoundError:
            digest.update(f"{name}\0missing\n".encode())
    return f"{kind}:{digest.hexdigest()}"
