"""Skipping bad records: deterministic, counted, named, and limited."""

import json
import logging
import threading
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np

from distill.data.records import BadRecord, Record, Source
from fast_diffusers.errors import UserError

log = logging.getLogger(__name__)

OnBad = Callable[[int, BadRecord], None]
_FEW = 1000  # a bad fraction is judged as if at least this many records had been seen


class GoodRecords:
    """Records of a source where a bad one is replaced by the next good one.

    The replacement of index i is the first good index of i + 1, i + 2, … (mod n): it depends on i and the data alone,
    so a resumed run sees the same records. Safe to use from several threads.

    Args:
        max_bad_fraction: bad records over records seen (each counted once) at which reading stops.
        on_bad: called once for each bad record with its index and the error.
    """

    def __init__(self, source: Source, max_bad_fraction: float = 0.1, on_bad: OnBad | None = None):
        if not isinstance(max_bad_fraction, int | float) or not 0 <= max_bad_fraction <= 1:
            raise UserError(f"max_bad_fraction must be between 0 and 1, not {max_bad_fraction!r}")
        self._source = source
        self._max_bad_fraction = max_bad_fraction
        self._on_bad = on_bad
        self._seen = np.zeros(len(source), dtype=bool)
        self._num_seen = 0
        self._lock = threading.Lock()
        self.bad: dict[int, BadRecord] = {}

    def get(self, index: int) -> tuple[int, Record]:
        """The record at ``index`` or its replacement, with the index it really has.

        Raises:
            UserError: too many records are bad.
        """
        n = len(self._source)
        for candidate in chain(range(index, n), range(index)):
            if candidate in self.bad:
                continue
            try:
                record = self._source[candidate]
            except BadRecord as error:
                self._note(candidate, error)
            else:
                self._note(candidate, None)
                return candidate, record
        raise UserError(f"all {n} records are bad, among them {self._examples()}")

    def _note(self, index: int, error: BadRecord | None) -> None:
        with self._lock:
            if self._seen[index]:
                return
            self._seen[index] = True
            self._num_seen += 1
            if error is None:
                return
            self.bad[index] = error
            log.warning("bad record %d of %d seen: %s", len(self.bad), self._num_seen, error)
            if self._on_bad is not None:
                self._on_bad(index, error)
            judged = max(self._num_seen, min(_FEW, len(self._source)))
            if len(self.bad) > self._max_bad_fraction * judged:
                raise UserError(
                    f"{len(self.bad)} of the {self._num_seen} records seen are bad, more than the allowed fraction "
                    f"{self._max_bad_fraction:g}: {self._examples()}; repair the data or raise max_bad_fraction"
                )

    def _examples(self) -> str:
        some = list(self.bad.values())[:3]
        more = len(self.bad) - len(some)
        return "; ".join(map(str, some)) + (f"; and {more} more" if more else "")


def jsonl_log(path: str | Path) -> OnBad:
    """An ``on_bad`` callback that appends {"index", "name", "why"} to a JSON-lines file."""

    def write(index: int, error: BadRecord) -> None:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"index": index, "name": error.name, "why": error.why}, ensure_ascii=False) + "\n")

    return write
