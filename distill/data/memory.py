"""Small data sets held in memory: scikit-learn's digits and MNIST."""

import gzip
import hashlib
import zlib
from functools import cached_property
from pathlib import Path

import numpy as np

from distill.data.records import Record, one_of
from fast_diffusers.errors import UserError

SPLITS = ("train", "test", "all")
_MNIST_FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}


class ArraySource:
    """Records in memory: ``images`` uint8 [N, H, W, C] and ``labels`` int [N]; the prompt is the label as a string."""

    def __init__(self, name: str, images: np.ndarray, labels: np.ndarray):
        self.name = name
        self.images = images
        self.labels = labels

    @cached_property
    def identity(self) -> str:
        """Name, and a hash of the content."""
        digest = hashlib.sha256(repr((self.images.shape, self.labels.tolist())).encode())
        digest.update(np.ascontiguousarray(self.images))
        return f"{self.name}:{digest.hexdigest()}"

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Record:
        return Record(self.images[index], str(self.labels[index]), f"{self.name}[{index}]")


def digits(split: str = "train") -> ArraySource:
    """The 1,797 handwritten digits that scikit-learn ships, 8 × 8 × 1, gray levels 0..16 stretched to 0..255.

    Every fifth digit of each class is in the test split (stratified 80/20, the same on every machine).
    """
    one_of(split, SPLITS, "digits split")
    from sklearn.datasets import load_digits  # a second of imports that other sources need not pay

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int64)
    occurrence = np.zeros(len(labels), dtype=np.int64)
    for label in range(10):
        occurrence[labels == label] = np.arange((labels == label).sum())
    keep = np.ones(len(labels), dtype=bool) if split == "all" else (occurrence % 5 == 4) == (split == "test")
    return ArraySource(f"digits-{split}", images[keep], labels[keep])


def mnist(
    folder: str | Path | None = None, split: str = "train", size: int | None = None, download: bool = False
) -> ArraySource:
    """MNIST from its idx .gz files, 28 × 28 × 1.

    Args:
        folder: where the files are; None goes with ``download``.
        split: "train" (60,000), "test" (10,000) or "all".
        size: pad with black to size × size (32 is usual); None keeps 28.
        download: fetch missing files through paddle.vision into its own cache folder.

    Raises:
        UserError: a file is missing, damaged or not MNIST.
    """
    one_of(split, SPLITS, "mnist split")
    if folder is not None and not isinstance(folder, str | Path):
        raise UserError(f"mnist folder must be a path, not {folder!r}")
    if size is not None and (not isinstance(size, int) or size < 28 or size % 2):
        raise UserError(f"mnist size must be an even number of pixels from 28 up, not {size!r}")
    parts = [_mnist_part(folder, part, download) for part in (("train", "test") if split == "all" else (split,))]
    images = np.concatenate([part[0] for part in parts])[..., None]
    margin = ((size or 28) - 28) // 2
    images = np.pad(images, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
    return ArraySource(f"mnist-{split}", images, np.concatenate([part[1] for part in parts]))


def _mnist_part(folder: str | Path | None, split: str, download: bool) -> tuple[np.ndarray, np.ndarray]:
    paths = [Path(folder).expanduser() / name for name in _MNIST_FILES[split]] if folder is not None else []
    missing = [path.name for path in paths if not path.is_file()]
    if missing or not paths:
        if not download:
            problem = f"{', '.join(missing)} not found in {folder}" if missing else "no folder is given"
            raise UserError(
                f"mnist: {problem}; name the folder that holds the four idx .gz files, or set download=true"
            )
        paths = _download_mnist(split)
    images, labels = read_idx(paths[0], ndim=3), read_idx(paths[1], ndim=1)
    if len(images) != len(labels):
        raise UserError(f"mnist: {paths[0]} has {len(images)} images but {paths[1]} has {len(labels)} labels")
    if images.shape[1:] != (28, 28):
        raise UserError(f"mnist: {paths[0]} has images of {images.shape[1]}x{images.shape[2]} pixels, expected 28x28")
    return images, labels.astype(np.int64)


def _download_mnist(split: str) -> list[Path]:
    from paddle.vision.datasets import MNIST

    try:
        dataset = MNIST(mode=split, download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"mnist: the download failed ({error}); put the four idx .gz files into a folder") from error
    return [Path(dataset.image_path), Path(dataset.label_path)]


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """Read a gzipped idx file of unsigned bytes with ``ndim`` dimensions.

    Format: bytes 0, 0, 8 (uint8), ndim; then ndim big-endian 32-bit sizes; then the data.
    """
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not a whole gzip file ({error}); fetch it again") from None
    header = 4 + 4 * ndim
    if len(data) < header or data[:4] != bytes((0, 0, 8, ndim)):
        raise UserError(f"{path} is not an idx file of bytes with {ndim} dimensions (magic number {data[:4].hex()})")
    shape = tuple(int(size) for size in np.frombuffer(data, dtype=">u4", count=ndim, offset=4))
    expected = header + int(np.prod(shape))
    if len(data) != expected:
        raise UserError(f"{path} holds {len(data)} bytes, its header says {expected}; fetch it again")
    return np.frombuffer(data, dtype=np.uint8, offset=header).reshape(shape)
