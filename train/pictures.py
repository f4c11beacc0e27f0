"""Pictures of distilled sets and of a run's course: NumPy arrays in, PNG or SVG bytes out.

Canvases are transparent and text is a middle gray, so that one file is readable on light and on dark pages. PNGs are
drawn at `DENSITY` pixels per point: shown at half their pixel size they stay sharp on dense screens. Only matplotlib's
object interface is used; pyplot's global figures would leak from one run into the next. It is imported where it
draws, or every command line would wait a second for it; without it, runs have no pictures.
"""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

DENSITY = 2
MOST = 20, 12  # classes and images of each that are drawn
_TILE = 64 * DENSITY  # the size that images are magnified to
_GAP = 3 * DENSITY
_FONT_SIZE = 13 * DENSITY  # pixels
_NAME = 22  # characters
_GRAY = "#7d858f"  # contrast 3.8 on white, 4.7 on near-black
_CORAL = (1.0, 0.38, 0.34, 0.95)  # seen on black and on white ellipses alike
_BLUE = "#3b82f6"
FRAME_MS = 125  # how long a frame of a video is shown, milliseconds
_STRETCHES = 100  # of a line; a longer one is averaged in each


def drawable(what: str) -> bool:
    """Tells whether the packages that draw are there, and if not, on stderr, what a run will not have."""
    absent = [name for name in ("matplotlib", "jinja2") if find_spec(name) is None]
    if absent:
        print(f"note: no {what}, for want of {' and '.join(absent)}: pip install gsdd_jax[full]", file=sys.stderr)
    return not absent


def grid(images: Any, labels: np.ndarray, class_names: Sequence[str]) -> bytes:
    """Draws images as one row of tiles per class, magnified by a whole number without smoothing.

    Args:
        images: ``[n, h, w, c]`` in [0,1], c of 1, 3 or 4 (with alpha), class-major; values outside are clipped, and
            pixels with a NaN are magenta. The first 12 of the first 20 classes are drawn; a note says of how many. Of
            videos ``[n, t, h, w, c]`` the PNG is an animated one.
        labels: ``[n]``; of each class as many are drawn as of all.
        class_names: One per class.

    Returns:
        PNG bytes.
    """
    rows = _rows(np.asarray(images), labels)

    def tile(image: np.ndarray) -> np.ndarray:
        drawn = np.full((*image.shape[:2], 4), 255, np.uint8)
        values = np.nan_to_num(image, nan=0.0, posinf=1.0, neginf=0.0)
        drawn[..., : max(3, image.shape[-1])] = np.rint(np.clip(values, 0, 1) * 255)
        drawn[np.isnan(image).any(-1)] = 255, 0, 255, 255
        scale = _scale(image.shape[:2])
        return drawn.repeat(scale, axis=0).repeat(scale, axis=1)

    return _sheet(rows, class_names, tile, moving=np.ndim(images) == 5)


def ellipse_grid(
    gaussians: Sequence[Any], labels: np.ndarray, class_names: Sequence[str], size: Sequence[int]
) -> bytes:
    """Draws the Gaussians of the images that `grid` shows, in the same layout, as in Figure 9 of the GSDD paper.

    Each Gaussian is its 1-sigma ellipse (Sigma = L L^T), filled with color times opacity, the strongest of an image
    being full; biggest first. One that takes light away is a dashed red outline. Non-finite ones are left out, and
    their tile gets a magenta frame.

    Args:
        gaussians: Mean ``[n, m, 2]``, (x, y) in [-1, 1]; factor L ``[n, m, 3]``, (l11, l21, l22) in native pixels;
            color ``[n, m, c]``, c of 1, 3 or 4 (the fourth is not shown); opacity ``[n, m]``.
        labels: ``[n]``, as in `grid`.
        class_names: One per class.
        size: Native (h, w).

    Returns:
        PNG bytes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import PolyCollection
    from matplotlib.figure import Figure

    mean, cholesky, color, opacity = (np.asarray(array, np.float64) for array in gaussians)
    scale = _scale(size)
    height, width = scale * size[0], scale * size[1]
    # A power of two divides without rounding.
    figure = Figure(figsize=(width / 64, height / 64), dpi=64, facecolor="black")
    canvas, axes = FigureCanvasAgg(figure), figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    circle = np.cos(angle), np.sin(angle)

    def tile(every: np.ndarray) -> np.ndarray:
        g = every[np.isfinite(every).all(-1)]
        g = g[np.argsort(-np.abs(g[:, 2] * g[:, 4]), kind="stable")]
        x, y, l11, l21, l22 = g[:, :5].T[..., None]
        outline = np.stack([(x + 1) * width / 2, (y + 1) * height / 2], -1) + scale * np.stack(
            [l11 * circle[0], l21 * circle[0] + l22 * circle[1]], -1
        )
        fill, edge, dashed = _paint(g[:, 5:-1] * g[:, -1:])
        shapes = PolyCollection(
            # Agg works in fixed-point numbers: coordinates far outside the picture overflow.
            list(np.clip(outline, -20 * _TILE, 20 * _TILE)),
            facecolors=fill,
            edgecolors=edge,
            linewidths=0.86 * DENSITY,
            linestyles=[(0, (2.5, 1.5)) if each else "solid" for each in dashed] or "solid",
        )
        axes.add_collection(shapes, autolim=False)
        canvas.draw()
        shapes.remove()
        drawn = np.array(canvas.buffer_rgba())
        if len(g) < len(every):
            inner = drawn[2 * DENSITY : -2 * DENSITY, 2 * DENSITY : -2 * DENSITY].copy()
            drawn[:] = 255, 0, 255, 255
            drawn[2 * DENSITY : -2 * DENSITY, 2 * DENSITY : -2 * DENSITY] = inner
        return drawn

    return _sheet(_rows(np.concatenate([mean, cholesky, color, opacity[..., None]], -1), labels), class_names, tile)


def curve(x: Sequence[float], y: Sequence[float], *, log: bool = False) -> bytes:
    """Draws a line as SVG; a long one as the mean of each stretch, in a band from its lowest to its highest value.

    Non-finite values, and those <= 0 on a log scale, break the line. The same input gives the same bytes.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    figure = Figure(figsize=(5.2, 2.7))
    # Room for seven digits and a sign. To fit margins to the labels would take as long again as to draw.
    figure.subplots_adjust(left=0.15, right=0.96, bottom=0.19, top=0.92)
    axes = figure.add_subplot()
    stretch = -(-len(y) // _STRETCHES)
    values = np.full((-(-len(y) // stretch), stretch), np.nan)
    values.ravel()[: len(y)] = y
    values[~np.isfinite(values) | ((values <= 0) & log)] = np.nan
    masked, steps = np.ma.masked_invalid(values), x[::stretch]
    if stretch > 1:
        axes.fill_between(steps, masked.min(1), masked.max(1), color=_BLUE, alpha=0.25, lw=0)
    axes.plot(steps, masked.mean(1), color=_BLUE, lw=1.8, marker="o" if masked.count() == 1 else None)
    if log:
        axes.set_yscale("log")
        axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5), numticks=7), minor_locator=NullLocator())
        axes.yaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("step", color=_GRAY)
    axes.margins(x=0.01)
    axes.grid(axis="y", color=_GRAY, alpha=0.25, lw=0.6)
    axes.tick_params(which="both", length=0, labelcolor=_GRAY, labelsize=9)
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.spines["bottom"].set(color=_GRAY, alpha=0.6)
    out = io.BytesIO()
    # Without a salt the ids in an SVG are random, and no two reports of one run would be equal.
    with matplotlib.rc_context({"svg.hashsalt": "gsdd"}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return out.getvalue()


def animated(others: Sequence[Image.Image]) -> dict[str, Any]:
    """Returns what Pillow is told to save an image with others as the frames of a file; nothing without others."""
    return {"save_all": True, "append_images": others, "duration": FRAME_MS, "loop": 0} if others else {}


def _rows(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns as many of each class as all classes have, ``[k, per class, ...]``."""
    count = int(np.bincount(labels).min())
    return np.stack([values[labels == label][:count] for label in range(labels[-1] + 1)])


def _scale(size: Sequence[int]) -> int:
    return max(1, round(_TILE / max(size)))


def _sheet(
    rows: np.ndarray, class_names: Sequence[str], tile: Callable[[np.ndarray], np.ndarray], *, moving: bool = False
) -> bytes:
    """Returns a PNG of what `tile` draws of each image of ``[k, per class, ...]``, beside the names of the classes.

    With ``moving``, what is drawn are frames, ``[k, per class, t, ...]``.
    """
    import matplotlib

    font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", _FONT_SIZE)
    classes, images = rows.shape[:2]
    drawn = rows[: MOST[0], : MOST[1]]
    tiles = [
        [[Image.fromarray(tile(frame)) for frame in (image if moving else image[None])] for image in row]
        for row in drawn
    ]
    k, n, (width, height) = len(tiles), len(tiles[0]), tiles[0][0][0].size
    cut = [f"{n} of {images} images per class"] * (n < images) + [f"{k} of {classes} classes"] * (k < classes)
    note = "Shown: the first " + ", the first ".join(cut) if cut else ""
    names = [" ".join(name.split()) for name in class_names[:k]]
    names = [name if len(name) <= _NAME else f"{name[: _NAME - 1].rstrip()}…" for name in names]
    left = math.ceil(max(map(font.getlength, names))) + 5 * _GAP
    right, bottom = left + n * (width + _GAP) - _GAP, k * (height + _GAP) - _GAP
    size = max(right, left + math.ceil(font.getlength(note))), bottom + (2 * _FONT_SIZE if note else 0)
    empty = Image.new("RGBA", size, (*ImageColor.getrgb(_GRAY), 0))
    draw = ImageDraw.Draw(empty)
    draw.text((left, size[1]), note, _GRAY, font, anchor="ld")
    for row, name in enumerate(names):
        draw.text((left - 4 * _GAP, row * (height + _GAP) + height / 2), name, _GRAY, font, anchor="rm")

    def at(frame: int) -> Image.Image:
        sheet = empty.copy()
        for row, of_class in enumerate(tiles):
            for column, image in enumerate(of_class):
                sheet.paste(image[frame], (left + column * (width + _GAP), row * (height + _GAP)))
        return sheet

    first, *others = map(at, range(len(tiles[0][0])))
    out = io.BytesIO()
    first.save(out, "png", optimize=True, **animated(others))
    return out.getvalue()


def _paint(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Premultiplied colors [m, c] to fill [m, 4], edge [m, 4] and whether the outline is dashed [m]."""
    weight = weight[:, :3] if weight.shape[-1] >= 3 else weight.repeat(3, -1)
    dashed = weight.sum(-1) < 0
    shown = np.clip(np.where(dashed[:, None], -weight, weight), 0, None)
    strength = shown.max(-1, initial=0.0, keepdims=True)
    strongest = max(strength.max(initial=0.0), np.finfo(np.float64).tiny)
    # The root, of the strength and not of each channel, lifts weak Gaussians from black and keeps their hue.
    shown = np.sqrt(strength / strongest) * np.divide(shown, strength, out=np.zeros_like(shown), where=strength > 0)
    fill = np.concatenate([shown, np.where(dashed, 0.0, 1.0)[:, None]], -1)
    edge = np.concatenate([0.6 * shown + 0.4, np.full((len(shown), 1), 0.6)], -1)
    edge[dashed] = _CORAL
    return fill, edge, dashed
