"""Image bytes to pixels."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from distill.data.records import BadRecord

_DECODE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


def read_bytes(path: Path, name: str) -> bytes:
    """The bytes of a file. What is wrong with the file is a BadRecord; a failing disk stays an OSError.

    The difference matters: a record must be bad always or never, otherwise a resumed run sees other data.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise BadRecord(name, "the file does not exist") from None
    except (PermissionError, IsADirectoryError) as error:
        raise BadRecord(name, f"the file cannot be read ({error.strerror})") from None


def decode_image(data: bytes, name: str) -> np.ndarray:
    """Decode with Pillow to uint8 [H, W, 1] (grayscale files) or [H, W, 3] (all others).

    EXIF rotation is applied, transparency is put on white, 16-bit grayscale keeps its high byte.

    Raises:
        BadRecord: the bytes are no image that Pillow can read, or are cut off.
    """
    try:
        with Image.open(io.BytesIO(data)) as file:
            image = ImageOps.exif_transpose(file)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            if image.mode.startswith("I;16"):
                return (np.asarray(image) >> 8).astype(np.uint8)[..., None]
            if image.mode in ("I", "F"):
                raise BadRecord(name, f"{image.mode} pixels (32 bits) have no fixed range; save it with 8 or 16 bits")
            gray = image.mode in ("1", "L")
            pixels = np.asarray(image.convert("L" if gray else "RGB"))
    except Image.UnidentifiedImageError:
        raise BadRecord(name, "not an image") from None
    except _DECODE_ERRORS as error:
        raise BadRecord(name, f"broken image ({error})") from None
    return pixels[..., None] if gray else pixels
