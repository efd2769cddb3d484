"""Traced programs on disk, so that a later process need not trace the same model again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import asdict
from os import PathLike
from pathlib import Path

from cinn_infer.programs import Stored

VARIABLE = "FAST_DIFFUSERS_CACHE"
"""Environment variable: the folder of this package's caches, or "off"."""
LIMIT = 256 * 2**20
"""Bytes of all programs; what was used least recently goes first. FLUX's own transformer takes about 3 MB."""


def folder() -> Path | None:
    """Where programs are kept by default: in the user's cache folder; None if that is switched off."""
    chosen = os.environ.get(VARIABLE)
    if chosen == "off":
        return None
    if chosen:
        return Path(chosen) / "programs"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fast_diffusers" / "programs"


class ProgramCache:
    """Programs in a folder, one file each; None as folder keeps nothing.

    A file that is damaged, of another key, or not readable counts as absent and is written anew. A folder that cannot
    be written to leaves the cache empty: compiling never fails for it.

    Attributes:
        hits, misses: of `get`.
        skipped: why programs could not be kept, in words.
    """

    def __init__(self, directory: str | PathLike | None):
        self.directory = None if directory is None else Path(directory).expanduser()
        self.hits, self.misses = 0, 0
        self.skipped: list[str] = []

    def get(self, key: str) -> Stored | None:
        """What was put under the key. Call `found` once it runs."""
        if self.directory is None:
            return None
        try:
            content = json.loads(self._path(key).read_bytes())
            if content["key"] != key or content["sha256"] != _digest(content["program"]):
                return None
            return Stored(**content["program"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def found(self, key: str) -> None:
        """Count a hit, and mark it as used."""
        self.hits += 1
        with contextlib.suppress(OSError):
            os.utime(self._path(key))

    def put(self, key: str, program: Stored) -> None:
        """Keep a program; readers see the whole file or none."""
        if self.directory is None:
            return
        content = asdict(program)
        temporary = self._path(key).with_suffix(f".{os.getpid()}.partial")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps({"key": key, "sha256": _digest(content), "program": content}))
            temporary.replace(self._path(key))
            self._shrink()
        except OSError as error:
            self.skip(f"{self.directory} cannot be written to: {error}")

    def skip(self, reason: str) -> None:
        """Note, once, why something is not kept."""
        if reason not in self.skipped:
            self.skipped.append(reason)

    def _path(self, key: str) -> Path:
        return self.directory / f"{key}.json"

    def _shrink(self) -> None:
        entries = sorted(((file.stat(), file) for file in self.directory.iterdir()), key=lambda each: -each[0].st_mtime)
        total = 0
        for status, file in entries:
            total += status.st_size
            if total > LIMIT:
                file.unlink(missing_ok=True)


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
