"""Batches of images, ready for a network, from any source."""

from typing import Any

import numpy as np

from distill.data.bad_records import GoodRecords, OnBad
from distill.data.memory import ArraySource
from distill.data.records import Source, whole_number
from distill.data.transforms import fit_image, normalise
from fast_diffusers.errors import UserError


class ImageBatches:
    """Reads chosen records of a source as one batch; bad records are replaced (see GoodRecords).

    Sources in memory are resized once, here; others decode at each read.

    Args:
        height, width: size in pixels that every image is resized and cropped to.
        channels: 1 (gray) or 3 (RGB).
    """

    def __init__(
        self,
        source: Source,
        height: int,
        width: int,
        channels: int = 3,
        *,
        max_bad_fraction: float = 0.1,
        on_bad: OnBad | None = None,
    ):
        whole_number(height, "image height", 1)
        whole_number(width, "image width", 1)
        if channels not in (1, 3):
            raise UserError(f"image channels must be 1 or 3, not {channels!r}")
        self.source = source
        self._shape = height, width, channels
        self._records = GoodRecords(source, max_bad_fraction, on_bad)
        self._pixels = None
        if isinstance(source, ArraySource):
            self._pixels = np.stack([fit_image(image, *self._shape) for image in source.images])

    @property
    def identity(self) -> str:
        """Changes when the source or the size does."""
        return "{} {}x{}x{}".format(self.source.identity, *self._shape)

    @property
    def bad_count(self) -> int:
        """How many different bad records have been met."""
        return len(self._records.bad)

    def __len__(self) -> int:
        return len(self.source)

    def fetch(self, indices: np.ndarray) -> dict[str, Any]:
        """The records at ``indices`` as {"images": float32 [B, C, H, W] in [-1, 1], "prompts": list of B strings,
        "indices": int64 [B], the indices really read}."""
        if self._pixels is not None:
            prompts = [str(label) for label in self.source.labels[indices]]
            return {"images": normalise(self._pixels[indices]), "prompts": prompts, "indices": indices}
        read, records = zip(*(self._records.get(int(index)) for index in indices), strict=True)
        pixels = np.stack([fit_image(record.image, *self._shape) for record in records])
        return {
            "images": normalise(pixels),
            "prompts": [record.prompt for record in records],
            "indices": np.array(read, dtype=np.int64),
        }
