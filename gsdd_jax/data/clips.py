"""Clips in folders by class: files of videos, read through PyAV, animated GIF and WebP, or folders of frames."""

import dataclasses
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from gsdd_jax.data.decode import Converter, Unreadable, attempt, extensions, is_gray, large, opened, refused
from gsdd_jax.data.folder import Kind, open_folder
from gsdd_jax.data.source import Source
from gsdd_jax.errors import needing

# What PyAV is needed for, and what Pillow reads.
VIDEOS = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"})
ANIMATIONS = frozenset({".gif", ".webp"})

_Frame = TypeVar("_Frame")


class Taken(NamedTuple):
    """Which frames of a clip are taken.

    Attributes:
        frames: How many; 0 = all that `step` leaves.
        step: Distance between them; the first one is always taken.
    """

    frames: int
    step: int

    def of(self, frames: Sequence[_Frame]) -> Sequence[_Frame]:
        """Returns those of a long enough clip."""
        return frames[:: self.step][: self.frames or None]

    def refused(self, found: int) -> str:
        """Says that a clip of so many frames is too short, or nothing."""
        needed = (self.frames - 1) * self.step + 1 if self.frames else 1
        if found >= needed:
            return ""
        which = f"data.frames {self.frames} at data.frame_step {self.step} " if self.frames else ""
        return f"{found} frames, {which}needs {needed}" if which else "no frames"


def open_clips(path: str | Path, *, frames: int = 0, frame_step: int = 1, **options: Any) -> Source:
    """Opens a folder of clips; decodes nothing yet.

    A clip is a file of a video in a class folder or below, an animated GIF or WebP in a class folder, or a folder below
    a class folder that holds images: its frames, in the order of their names, numbers in them read as numbers. A frame
    is converted like an image. Clips are of as many frames as `frames` says, or all have equally many.

    Args:
        path: The root.
        frames: Frames taken from each clip, from its first one on; 0 = all.
        frame_step: Distance between frames that are taken; UCF101 of 8 frames at 3 are frames 1, 4, ..., 22.
        **options: As of `gsdd_jax.data.folder.open_folder`.

    Raises:
        ImportError: There is a video, but no PyAV.
        FileNotFoundError: As of `open_folder`.
        ValueError: As of `open_folder`.
    """
    expected = f"clips: files such as *.mp4 ({', '.join(sorted(VIDEOS | ANIMATIONS))}) or folders of frames"
    read = partial(_read, Taken(frames, frame_step))
    # A clip is work enough for a thread.
    kind = Kind("clips", expected, VIDEOS | ANIMATIONS, _record, _is_gray, read, block=1)
    return open_folder(path, kind=kind, **options)


def _record(file: Path, folder: Path) -> Path | None:
    form = file.suffix.lower()
    if form in VIDEOS:
        with needing(f"data.source 'clips' needs PyAV for {file}", extra="video"):
            import av  # noqa: F401
        return file
    if file.parent == folder:
        return file if form in ANIMATIONS else None
    return file.parent if form in extensions() else None


def _frame_files(folder: Path) -> list[Path]:
    readable = extensions()
    files = [file for file in folder.iterdir() if file.suffix.lower() in readable and not file.name.startswith(".")]
    return sorted(files, key=lambda file: (_numbered(file.name), file.name))


def _numbered(name: str) -> list[tuple[int, str]]:
    """A key by which "frame2" comes before "frame10"."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", name)]


def _is_gray(clip: Path) -> bool:
    """Whether a clip has one channel, by the headers of its frames or of its stream."""
    if clip.is_dir():
        return all(map(is_gray, _frame_files(clip)))
    if clip.suffix.lower() in ANIMATIONS:
        return is_gray(clip)
    import av

    try:
        with av.open(str(clip)) as container:
            return str(container.streams.video[0].codec_context.pix_fmt).startswith("gray")
    except Exception:
        # `_read` says what is wrong.
        return True


def _read(taken: Taken, clip: Path, convert: Converter) -> np.ndarray | Unreadable:
    # That a clip has transparent pixels is noted once.
    own = dataclasses.replace(convert, composited=[])
    of_file = _read_animation if clip.suffix.lower() in ANIMATIONS else _read_video
    read = _read_folder if clip.is_dir() else of_file
    found = attempt(lambda: read(taken, clip, own))
    if own.composited and not isinstance(found, Unreadable):
        convert.composited.append(all(own.composited))
    return found


def _read_folder(taken: Taken, clip: Path, convert: Converter) -> np.ndarray | Unreadable:
    files = _frame_files(clip)
    refusal = taken.refused(len(files))
    if refusal:
        return Unreadable(refusal)
    frames: list[np.ndarray] = []
    for file in taken.of(files):
        frame = convert.read(file)
        if isinstance(frame, Unreadable):
            return Unreadable(f"{file.name}: {frame.reason}")
        if frames and frame.shape != frames[0].shape:
            return Unreadable(f"{file.name} is {_size(frame)}, {files[0].name} is {_size(frames[0])}")
        frames.append(frame)
    return np.stack(frames)


def _read_animation(taken: Taken, clip: Path, convert: Converter) -> np.ndarray | Unreadable:
    with opened(clip) as image:
        refusal = refused(image, convert.max_pixels) or taken.refused(getattr(image, "n_frames", 1))
        if refusal:
            return Unreadable(refusal)
        frames = []
        for number in taken.of(range(getattr(image, "n_frames", 1))):
            image.seek(number)
            frames.append(convert(image.copy()))
        return np.stack(frames)


def _read_video(taken: Taken, clip: Path, convert: Converter) -> np.ndarray | Unreadable:
    import av

    try:
        with av.open(str(clip)) as container:
            if not container.streams.video:
                return Unreadable("no video in it")
            stream = container.streams.video[0]
            refusal = large(stream.width, stream.height, max_pixels=convert.max_pixels)
            if refusal:
                return Unreadable(refusal)
            # Clips are decoded beside each other.
            stream.codec_context.thread_count = 1
            found, frames = 0, []
            for frame in container.decode(stream):
                if found % taken.step == 0:
                    if frame.is_corrupt:
                        return Unreadable(f"frame {found + 1} is damaged")
                    frames.append(convert(_upright(frame)))
                found += 1
                if len(frames) == taken.frames:
                    break
    except av.FFmpegError as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        return Unreadable(str(error.strerror))
    refusal = taken.refused(found)
    return Unreadable(refusal) if refusal else np.stack(frames)


def _upright(frame: Any) -> Image.Image:
    image: Image.Image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[0]}x{pixels.shape[1]}"
