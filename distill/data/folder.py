"""A folder of images, with captions beside them."""

import json
from functools import cached_property
from pathlib import Path

from distill.data.decode import decode_image, read_bytes
from distill.data.records import BadRecord, Record, files_identity, one_of, user_path
from fast_diffusers.errors import UserError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
METADATA = "metadata.jsonl"


class FolderSource:
    """Images below ``root``; ``captions`` maps a relative path to its caption, or is None: read the .txt file."""

    def __init__(self, root: Path, names: list[str], captions: dict[str, str] | None):
        self._root = root
        self._names = names
        self._captions = captions

    @cached_property
    def identity(self) -> str:
        """Hash over names, sizes and times of the images and caption files, and over the captions held in memory."""
        if self._captions is not None:
            return files_identity("image_folder", self._root, self._names, *self._captions.values())
        texts = [str(Path(name).with_suffix(".txt")) for name in self._names]
        return files_identity("image_folder", self._root, self._names + texts)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Record:
        name = self._names[index]
        path = self._root / name
        image = decode_image(read_bytes(path, name), name)
        return Record(image, self._caption(path, name), name)

    def _caption(self, path: Path, name: str) -> str:
        if self._captions is not None:
            return self._captions[name]
        text = path.with_suffix(".txt")
        if not text.is_file():
            raise BadRecord(name, f"no caption file {text.name} beside it")
        try:
            return text.read_text(encoding="utf-8").strip()
        except UnicodeDecodeError:
            raise BadRecord(name, f"caption file {text.name} is not UTF-8 text") from None


def image_folder(dir: str | Path, captions: str = "txt") -> FolderSource:
    """All images below a folder, in the order of their paths.

    Args:
        dir: searched recursively; hidden files and folders are left out.
        captions: "txt": a text file of the same name beside each image; "jsonl": `metadata.jsonl` in ``dir``, one
            object a line with "file_name" (relative to ``dir``) and "text", which also says what the images are;
            "folder": the name of the folder that holds the image.

    Raises:
        UserError: no such folder, no images in it, or a metadata file that does not parse.
    """
    one_of(captions, ("txt", "jsonl", "folder"), "captions")
    root = user_path(dir, "image_folder dir", folder=True).resolve()
    if captions == "jsonl":
        table = _read_metadata(root / METADATA)
        return FolderSource(root, list(table), table)
    files = [path for path in root.rglob("*") if path.is_file()]
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(root).parts)]
    images = sorted(path.relative_to(root).as_posix() for path in files if path.suffix.lower() in EXTENSIONS)
    if not images:
        found = f"{len(files)} other files, such as {min(files).name}" if files else "it is empty"
        raise UserError(f"no images in {root} ({found}); images end in {', '.join(EXTENSIONS)}")
    return FolderSource(root, images, {n: (root / n).parent.name for n in images} if captions == "folder" else None)


def _read_metadata(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise UserError(f'captions "jsonl" needs {path}: one object a line with "file_name" and "text"')
    table = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, text = entry["file_name"], entry["text"]
        except (ValueError, TypeError, KeyError):
            raise UserError(f'{path}, line {number}: expected an object with "file_name" and "text"') from None
        if not isinstance(name, str) or not isinstance(text, str):
            raise UserError(f'{path}, line {number}: "file_name" and "text" must be strings')
        table[name] = text
    if not table:
        raise UserError(f"{path} lists no images")
    return table
