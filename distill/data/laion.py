"""LAION records in one-record text files, named by a list file."""

import ast
import base64
import binascii
import json
from functools import cached_property
from pathlib import Path

from distill.data.decode import decode_image, read_bytes
from distill.data.records import BadRecord, Record, files_identity, user_path
from fast_diffusers.errors import UserError

CAPTION_FIELD, IMAGE_FIELD = 2, 5  # counted from 0


class LaionSource:
    """One record a file: the tab-separated fields of its first line hold a caption dict and a base64 image."""

    def __init__(self, folder: Path, names: list[str], caption_key: str):
        self._folder = folder
        self._names = names
        self._caption_key = caption_key

    @cached_property
    def identity(self) -> str:
        """Hash over names, sizes and times of the record files."""
        return files_identity("laion_list", self._folder, self._names, self._caption_key)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Record:
        name = self._names[index]
        fields = read_bytes(self._folder / name, name).split(b"\n", 1)[0].split(b"\t")
        if len(fields) <= IMAGE_FIELD:
            raise BadRecord(name, f"{len(fields)} tab-separated fields in the first line, needs {IMAGE_FIELD + 1}")
        caption = parse_mapping(fields[CAPTION_FIELD], name).get(self._caption_key)
        if not isinstance(caption, str):
            raise BadRecord(name, f"no caption {self._caption_key!r}")
        try:
            data = base64.b64decode(fields[IMAGE_FIELD].strip(), validate=True)
        except binascii.Error as error:
            raise BadRecord(name, f"the image is not base64 ({error})") from None
        return Record(decode_image(data, name), caption, name)


def laion_list(
    list_file: str | Path, folder: str | Path | None = None, caption_key: str = "blip_caption_en"
) -> LaionSource:
    """Records named by a list file, one file name a line, relative to ``folder`` (default: that of the list file).

    In each file the first line counts; of its tab-separated fields, the third is a dict (JSON or a Python literal)
    with the caption under ``caption_key`` and the sixth a base64 image.

    Raises:
        UserError: the list or the folder does not exist, or the list is empty.
    """
    path = user_path(list_file, "laion_list list_file", folder=False)
    base = path.parent if folder is None else user_path(folder, "laion_list folder", folder=True)
    if not isinstance(caption_key, str):
        raise UserError(f"laion_list caption_key must be a string, not {caption_key!r}")
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file; it should hold one file name a line") from None
    if not names:
        raise UserError(f"{path} is empty; it should hold one file name a line")
    return LaionSource(base, names, caption_key)


def parse_mapping(data: bytes, name: str) -> dict:
    """Parse a dict written as JSON or as a Python literal; nothing is ever executed."""
    try:
        text = data.decode("utf-8")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise BadRecord(name, "the caption field is neither JSON nor a Python dict") from None
    if not isinstance(value, dict):
        raise BadRecord(name, f"the caption field is a {type(value).__name__}, not a dict")
    return value
