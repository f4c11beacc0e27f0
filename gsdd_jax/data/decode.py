"""From an image file to uint8 pixels: what is converted, and what is refused because it would be wrong."""

import math
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageOps

Resize = Literal["crop", "squash"]
# Pillow's own limit.
MAX_PIXELS = 178_956_970

# Modes that hold at most 8 bits per channel; "I;16", "I" and "F" would be clipped silently by a conversion.
_EIGHT_BIT = frozenset({"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"})
_GRAY = frozenset({"1", "L", "LA", "La"})
# Raw modes of 16 bits per channel, which Pillow reduces to 8 on reading.
_SIXTEEN_BIT = re.compile(";16[BLN]$")
# Their further frames are thumbnails and gain maps, or layers of the first.
_ONE_PICTURE = frozenset({"MPO", "PSD"})
# They need another program, or are no still images, or Pillow only knows their names.
_NOT_READ = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})
_OPENING = threading.Lock()


class Unreadable(NamedTuple):
    """Stands for the pixels of an image that cannot be read, or only wrongly; `reason` does not name it."""

    reason: str


def extensions() -> frozenset[str]:
    """Returns the extensions, in lower case, of what Pillow reads as a still image."""
    known = Image.registered_extensions()
    return frozenset(name for name, form in known.items() if form in Image.OPEN and form not in _NOT_READ)


def attempt(decode: Callable[[], np.ndarray | Unreadable]) -> np.ndarray | Unreadable:
    """Calls what decodes a file, and says why if it cannot.

    Raises:
        OSError: The system cannot read the file; that is no fault of what is in it.
    """
    try:
        return decode()
    except Image.UnidentifiedImageError:
        return Unreadable("no image that Pillow knows")
    except FileNotFoundError:
        return Unreadable("a link to a file that is not there")
    except (MemoryError, ImportError):
        raise
    except Exception as error:
        # Pillow reports damage by whatever it leads to, from SyntaxError to struct.error; but an errno is the system's.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        return Unreadable(" ".join(str(error).split())[:200] or type(error).__name__)


def is_gray(file: str | Path) -> bool:
    """Whether a file stores one channel (with or without alpha), by its header; true of what cannot be read."""
    try:
        with opened(file) as image:
            return image.mode in _GRAY
    except Exception:
        # `Converter.read` says what is wrong.
        return True


@dataclass(frozen=True)
class Converter:
    """Turns images into uint8 [h, w, c], in any number of threads.

    Transparent pixels are composited on the background before anything is resized. EXIF orientation is applied. Of
    colors outside sRGB, CMYK and YCbCr are converted by Pillow, LAB by LittleCMS; embedded profiles are ignored.

    Attributes:
        resolution: 0 = keep the size; otherwise the side of the square result in pixels.
        resize: "crop" = short side to `resolution`, then center crop; "squash" = both sides to `resolution`. Both use
            PIL's antialiased Lanczos filter.
        channels: 1 (luma, ITU-R 601) or 3 (RGB; gray is replicated).
        background: A color as Pillow names it.
        max_pixels: Of an image as it is stored.
        composited: For each image with transparent pixels, whether a single color was left of it; filled by use.
    """

    resolution: int
    resize: Resize
    channels: int
    background: str = "white"
    max_pixels: int = MAX_PIXELS
    composited: list[bool] = field(default_factory=list)

    def read(self, file: str | Path | BinaryIO) -> np.ndarray | Unreadable:
        """Decodes a file.

        Raises:
            OSError: The system cannot read it; that is no fault of the image.
        """

        def decode() -> np.ndarray | Unreadable:
            with opened(file) as image:
                refusal = refused(image, self.max_pixels) or _several(image)
                if refusal:
                    return Unreadable(refusal)
                image.load()
                # What fails here is the metadata, which then say nothing of an orientation.
                with suppress(Exception):
                    ImageOps.exif_transpose(image, in_place=True)
                return self(image)

        return attempt(decode)

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Converts a decoded image of at most 8 bits per channel."""
        mode = {1: "L", 3: "RGB"}[self.channels]
        image = self._opaque(image)
        if image.mode == "LAB":
            lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
            image = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB") or image
        if image.mode != mode:
            image = image.convert(mode)
        side = self.resolution
        if side and image.size != (side, side):
            image = _squash(image, side) if self.resize == "squash" else _short_side_and_crop(image, side)
        pixels = np.asarray(image)
        return pixels[..., None] if self.channels == 1 else pixels

    def array(self, pixels: np.ndarray) -> np.ndarray:
        """Converts uint8 [h, w, c] or [t, h, w, c], c being 1 or 3; frames and slices stay as many."""
        side = self.resolution
        if pixels.shape[-1] == self.channels and (not side or pixels.shape[-3:-1] == (side, side)):
            return pixels
        if pixels.ndim == 4:
            return np.stack([self.array(frame) for frame in pixels])
        return self(Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels))

    def _opaque(self, image: Image.Image) -> Image.Image:
        if not image.has_transparency_data:
            return image
        rgba = image.convert("RGBA")
        if rgba.getchannel("A").getextrema() == (255, 255):
            image.info.pop("transparency", None)
            return image
        flat = Image.alpha_composite(Image.new("RGBA", rgba.size, self.background), rgba).convert("RGB")
        self.composited.append(all(low == high for low, high in flat.getextrema()))  # type: ignore[misc]
        return flat


def opened(file: str | Path | BinaryIO) -> Image.Image:
    """Opens an image of any size; reads its header only."""
    # Pillow's limit is a variable of the whole process, and warns at half of it; ours is looked at right after this,
    # when only the header is read.
    with _OPENING:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(file)
        finally:
            Image.MAX_IMAGE_PIXELS = before


def refused(image: Image.Image, max_pixels: int) -> str:
    """Says why an image is not decoded, or nothing."""
    if _deep(image):
        return f"image mode {image.mode!r} of more than 8 bits per channel, to be converted first"
    return large(*image.size, max_pixels=max_pixels)


def large(*size: int, max_pixels: int) -> str:
    """Says that an image, a frame or a volume has too many pixels, or nothing."""
    found = math.prod(size)
    if found <= max_pixels:
        return ""
    return f"{'x'.join(map(str, size))} = {found} pixels, data.max_pixels allows {max_pixels}"


def _several(image: Image.Image) -> str:
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format not in _ONE_PICTURE:
        return f"{frames} frames or pages, expected 1"
    return ""


def _deep(image: Image.Image) -> bool:
    if image.mode not in _EIGHT_BIT:
        return True
    for tile in getattr(image, "tile", ()):
        for setting in tile[3] if isinstance(tile[3], tuple) else (tile[3],):
            if isinstance(setting, str) and _SIXTEEN_BIT.search(setting):
                return True
            if image.format == "PPM" and isinstance(setting, int) and setting > 255:
                return True
    return False


def _squash(image: Image.Image, side: int) -> Image.Image:
    return image.resize((side, side), Image.Resampling.LANCZOS)


def _short_side_and_crop(image: Image.Image, side: int) -> Image.Image:
    width, height = image.size
    scale = side / min(width, height)
    width, height = max(side, round(width * scale)), max(side, round(height * scale))
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))
