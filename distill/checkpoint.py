"""Training checkpoints that are either whole and verified or not there.

A checkpoint is a folder `step-00000500` of safetensors files, one a group of tensors, and `manifest.json`: the step,
the training state, the recipe, versions, and size and sha256 of every file and of the manifest itself. It is written to
a temporary folder, flushed to disk and renamed, so that a kill at any moment leaves the earlier ones and no half one.
Which is the latest is decided by content that verifies, never by folder names. Nothing is pickled.
"""

import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import paddle
from paddle import Tensor
from safetensors import SafetensorError
from safetensors.paddle import load_file, save_file

from fast_diffusers.errors import UserError

FORMAT = 1
MANIFEST = "manifest.json"
_TEMPORARY = ".tmp-"
_log = logging.getLogger(__name__)

Groups = Mapping[str, Mapping[str, Tensor]]


class InvalidCheckpoint(UserError):
    """A checkpoint that must not be used; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk."""

    path: Path
    step: int
    state: dict[str, Any]
    recipe: dict[str, Any]
    versions: dict[str, str]
    quality: float | None
    groups: tuple[str, ...]

    def tensors(self, group: str) -> dict[str, Tensor]:
        """The tensors of one group, exactly as saved, in host memory."""
        if group not in self.groups:
            raise UserError(f"{self.path} has no tensors of {group}; it has {', '.join(self.groups) or 'none'}")
        return load_file(str(self.path / f"{group}.safetensors"))


# ---------------------------------------------------------------------------------------------- reading
def verify(path: Path, contents: bool = True) -> Checkpoint:
    """Check a checkpoint folder against its manifest.

    Args:
        path: the folder.
        contents: also check the sha256 of every file, not only that it is there with the right size.

    Raises:
        InvalidCheckpoint: naming the first file that is missing, truncated, altered or unreadable.
    """
    manifest = _read_manifest(path)
    for name, expected in manifest["files"].items():
        try:
            size = (path / name).stat().st_size
            if size != expected["bytes"]:
                raise InvalidCheckpoint(f"{path / name} has {size} bytes, {expected['bytes']} were written")
            if contents and _sha256(path / name) != expected["sha256"]:
                raise InvalidCheckpoint(f"{path / name} was altered: its sha256 is not the one in {MANIFEST}")
        except OSError as error:
            raise InvalidCheckpoint(f"{path / name} cannot be read: {error.strerror}") from error
    fields = {key: manifest[key] for key in ("step", "state", "recipe", "versions", "quality")}
    return Checkpoint(path, **fields, groups=tuple(name.removesuffix(".safetensors") for name in manifest["files"]))


def latest_valid(folder: str | Path, on_invalid: Callable[[str], None] = _log.warning) -> Checkpoint | None:
    """The checkpoint of the highest step that verifies completely; None when the folder has no checkpoints at all.

    Args:
        folder: where `save_checkpoint` wrote.
        on_invalid: called with a message for each newer checkpoint that does not verify.

    Raises:
        UserError: there are checkpoints, but none that can be used.
    """
    problems: list[str] = []

    def report(problem: str) -> None:
        problems.append(problem)
        on_invalid(f"{problem}; trying an earlier checkpoint")

    for candidate in _candidates(Path(folder), report):
        try:
            return verify(candidate.path)
        except InvalidCheckpoint as error:
            report(str(error))
    if problems:
        raise UserError(f"no usable checkpoint in {folder}: {'; '.join(problems)}")
    return None


def _candidates(folder: Path, on_invalid: Callable[[str], None] = lambda problem: None) -> list[Checkpoint]:
    """Checkpoints whose manifest verifies and whose files have the right sizes, newest first."""
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        hidden = path.name.startswith(".")
        if path.name.startswith("step-") or ((path / MANIFEST).is_file() and not hidden):
            try:
                found.append(verify(path, contents=False))
            except InvalidCheckpoint as error:
                on_invalid(str(error))
    return sorted(found, key=lambda checkpoint: (checkpoint.step, checkpoint.path.name), reverse=True)


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
        if manifest.pop("sha256") != _digest(manifest):
            raise InvalidCheckpoint(f"{file} was altered: its content is not what was written")
    except InvalidCheckpoint:
        raise
    except OSError as error:
        raise InvalidCheckpoint(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidCheckpoint(f"{file} is damaged: it is not a checkpoint manifest") from error
    if manifest.get("format") != FORMAT:
        raise InvalidCheckpoint(f"{file} has format {manifest.get('format')}; this version reads format {FORMAT}")
    return manifest


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _json_copy(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON makes of it: detached from the caller's objects, and known to be writable."""
    try:
        return json.loads(json.dumps(mapping, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise UserError(f"the checkpoint's state cannot be written as JSON: {error}") from error


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------- writing
def save_checkpoint(
    folder: str | Path,
    step: int,
    tensors: Groups,
    state: Mapping[str, Any],
    *,
    recipe: Mapping[str, Any] | None = None,
    quality: float | None = None,
) -> Path:
    """Write one checkpoint and return its folder once it is safely on disk.

    Args:
        folder: parent of all checkpoints of the run.
        step: training steps done.
        tensors: group ("student", "student_optimizer", ...) -> name -> tensor of any dtype; one file a group.
        state: JSON-able counters and scalars.
        recipe: the resolved recipe, JSON-able.
        quality: measured sample quality, lower is better (a Fréchet distance, say; never a training loss), or None.

    Raises:
        UserError: `state` or `recipe` is not JSON-able or has a non-finite number, or the disk refuses.
    """
    manifest = {"format": FORMAT, "step": step, "versions": _versions()}
    manifest |= _json_copy({"state": state, "recipe": recipe or {}, "quality": quality})
    folder = Path(folder)
    temporary = folder / f"{_TEMPORARY}step-{step:08d}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        manifest["files"] = {f"{name}.safetensors": _write(temporary, name, group) for name, group in tensors.items()}
        text = json.dumps({**manifest, "sha256": _digest(manifest)}, indent=1)
        (temporary / MANIFEST).write_text(text, encoding="utf-8")
        _sync(temporary / MANIFEST)
        _sync(temporary)
        path = _free_name(folder, f"step-{step:08d}")
        temporary.rename(path)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"checkpoint of step {step} could not be written to {folder}: {error}") from error
    return path


def _write(folder: Path, group: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    file = folder / f"{group}.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(file))
    _sync(file)
    return {"bytes": file.stat().st_size, "sha256": _sha256(file)}


def _sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free_name(folder: Path, name: str) -> Path:
    """A step saved again (after its checkpoint was damaged) gets a new folder: what is on disk is never replaced."""
    path, count = folder / name, 1
    while path.exists():
        count += 1
        path = folder / f"{name}-{count}"
    return path


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "paddle": paddle.__version__,
        "ppdiffusers": importlib.metadata.version("ppdiffusers"),
    }


def prune(folder: str | Path, keep_last: int, keep_best: int = 0) -> None:
    """Delete all but the newest `keep_last` (at least one) checkpoints and the `keep_best` of lowest `quality`.

    Damaged ones count for nothing and are left for the user to see. The newest is verified in full before anything is
    deleted, so that the only usable checkpoint never goes.
    """
    newest_first = _candidates(Path(folder))
    while newest_first:
        try:
            verify(newest_first[0].path)
            break
        except InvalidCheckpoint:
            newest_first.pop(0)
    measured = [checkpoint for checkpoint in newest_first if checkpoint.quality is not None]
    best = sorted(measured, key=lambda checkpoint: checkpoint.quality)[:keep_best]
    for checkpoint in newest_first[max(1, keep_last) :]:
        if checkpoint not in best:
            doomed = checkpoint.path.with_name(_TEMPORARY + checkpoint.path.name)
            checkpoint.path.rename(doomed)  # so that a kill here leaves no half checkpoint
            shutil.rmtree(doomed, ignore_errors=True)


class CheckpointWriter:
    """Writes and prunes checkpoints in a thread while training goes on. One per run folder; use as a context manager.

    `save` copies the tensors to host memory before it returns, so training may change them at once. Only one save is
    under way: a second one waits for it, so none is lost and at most one copy is held. What went wrong in the thread is
    raised by the next `save` or `close`.

    Args:
        folder: parent of all checkpoints of the run; left-overs of killed writers in it are removed.
        keep_last, keep_best: see `prune`.
    """

    def __init__(self, folder: str | Path, keep_last: int = 2, keep_best: int = 0) -> None:
        self.folder = Path(folder)
        self.keep_last = keep_last
        self.keep_best = keep_best
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        for stale in self.folder.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(stale, ignore_errors=True)

    def save(
        self,
        step: int,
        tensors: Groups,
        state: Mapping[str, Any],
        *,
        recipe: Mapping[str, Any] | None = None,
        quality: float | None = None,
    ) -> None:
        """Start writing a checkpoint; arguments and errors as `save_checkpoint`."""
        self.wait()
        tensors = {group: {name: _host_copy(each) for name, each in named.items()} for group, named in tensors.items()}
        plain = _json_copy({"state": state, "recipe": recipe, "quality": quality})
        self._pending = self._thread.submit(self._write, step, tensors, plain)

    def _write(self, step: int, tensors: Groups, plain: Mapping[str, Any]) -> None:
        save_checkpoint(self.folder, step, tensors, **plain)
        prune(self.folder, self.keep_last, self.keep_best)

    def wait(self) -> None:
        """Return when everything saved is on disk; raise what went wrong with it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """`wait`, and end the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _host_copy(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.clone() if tensor.place.is_cpu_place() else tensor.cpu()
