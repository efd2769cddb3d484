"""Parquet files with a text and an image column."""

from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from distill.data.decode import decode_image
from distill.data.records import BadRecord, Record, files_identity, one_of, user_path
from fast_diffusers.errors import UserError


class _Group(NamedTuple):
    path: Path
    metadata: pq.FileMetaData
    number: int


class ParquetSource:
    """Rows by index. One row group is read at a time and the last two are kept, so that a sequential pass reads each
    group once; for shuffled training on large files, build a LatentCache or write small row groups."""

    def __init__(self, paths: list[Path], text: str, image: str):
        self._paths = paths
        self._columns = text, image
        self._groups = [group for path in paths for group in _row_groups(path, self._columns)]
        self._stops = list(accumulate(group.metadata.row_group(group.number).num_rows for group in self._groups))
        if not self._stops or not self._stops[-1]:
            raise UserError(f"no rows in {', '.join(map(str, paths))}")
        self._table = lru_cache(maxsize=2)(self._read_group)

    @cached_property
    def identity(self) -> str:
        """Hash over names, sizes and times of the files, and the column names."""
        return files_identity("parquet", Path(), map(str, self._paths), *self._columns)

    def __len__(self) -> int:
        return self._stops[-1]

    def __getitem__(self, index: int) -> Record:
        position = bisect_right(self._stops, index)
        group = self._groups[position]
        row = index - (self._stops[position - 1] if position else 0)
        name = f"{group.path.name}[group {group.number}, row {row}]"
        try:
            table = self._table(position)
        except (pa.ArrowException, OSError) as error:
            raise BadRecord(name, f"the row group cannot be read ({error})") from None
        text, image = (table[column][row].as_py() for column in self._columns)
        if isinstance(image, dict):  # datasets' Image feature: {"bytes", "path"}
            image = image.get("bytes")
        if not isinstance(text, str) or not isinstance(image, bytes):
            raise BadRecord(
                name, f"{self._columns[0 if not isinstance(text, str) else 1]!r} is empty or of a wrong type"
            )
        return Record(decode_image(image, name), text, name)

    def _read_group(self, position: int) -> pa.Table:
        group = self._groups[position]
        with pq.ParquetFile(group.path, metadata=group.metadata) as file:
            return file.read_row_group(group.number, columns=list(self._columns))


def parquet(paths: str | Path | Sequence[str | Path], text: str = "text", image: str = "image_bytes") -> ParquetSource:
    """Rows of parquet files: ``text`` names the string column, ``image`` the column of encoded image bytes.

    Args:
        paths: a file, a folder (every .parquet below it, sorted), or several of either.

    Raises:
        UserError: a file is missing or damaged, has no such column, or there are no rows.
    """
    entries = [paths] if isinstance(paths, str | Path) or not isinstance(paths, Sequence) else paths
    files = [file for entry in entries for file in _files(entry)]
    if not files:
        raise UserError("parquet paths is an empty list")
    return ParquetSource(files, text, image)


def _files(entry: object) -> list[Path]:
    if isinstance(entry, str | Path) and Path(entry).expanduser().is_dir():
        folder = Path(entry).expanduser()
        found = sorted(folder.rglob("*.parquet"))
        if not found:
            raise UserError(f"no .parquet files in {folder}")
        return found
    return [user_path(entry, "parquet paths", folder=False)]


def _row_groups(path: Path, columns: tuple[str, str]) -> list[_Group]:
    try:
        metadata = pq.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a whole parquet file ({error})") from None
    for column in columns:
        one_of(column, metadata.schema.to_arrow_schema().names, f"column of {path}")
    return [_Group(path, metadata, number) for number in range(metadata.num_row_groups)]
