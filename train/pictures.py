"""Pictures of distilled sets and of a run's course: NumPy arrays in, PNG or SVG bytes out.

Canvases are transparent and text is a middle gray, so that one file is readable on light and on dark pages. PNGs are
drawn at `DENSITY` pixels per point: shown at half their pixel size they stay sharp on dense screens. Only matplotlib's
object interface is used; pyplot's global figures would leak from one run into the next. It is imported where it
draws, or every command line would wait a second for it.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

DENSITY = 2
MOST = 20, 12  # classes and images of each that are drawn
_TILE = 64 * DENSITY  # the size that images are magnified to
_GAP = 3 * DENSITY
_FONT_SIZE = 13 * DENSITY
_NAME = 22  # characters
_GRAY = (125, 133, 143)  # contrast 3.8 on white, 4.7 on near-black
_MAGENTA = (255, 0, 255, 255)
_CORAL = (1.0, 0.38, 0.34, 0.95)  # seen on black and on white ellipses alike
_BLUE = "#3b82f6"
_STRETCHES = 100  # of a line; a longer one is averaged in each


def grid(images: np.ndarray, class_names: Sequence[str]) -> bytes:
    """Draws images in rows, one class per row with its name at the left, each magnified to about 128 pixels.

    Args:
        images: [k, per_class, h, w, c], c of 1 (gray), 3 (RGB) or 4 (RGBA), values in [0, 1]; others are clipped, and
            pixels with a NaN are magenta. The first 12 of the first 20 classes are drawn; a note says of how many.
        class_names: k names.

    Returns:
        PNG bytes.

    Raises:
        ValueError: The shape of `images` is another one, or the number of names is not k.
    """
    images = np.asarray(images)
    if images.ndim != 5 or images.shape[-1] not in (1, 3, 4) or not images.size:
        raise ValueError(
            f"images has shape {images.shape}: expected [k, per_class, h, w, c], none empty, c of 1, 3 or 4"
        )
    shown, scale = images[: MOST[0], : MOST[1]], _scale(images.shape[2:4])
    tiles = np.full((*shown.shape[:-1], 4), 255, np.uint8)
    values = np.nan_to_num(shown, nan=0.0, posinf=1.0, neginf=0.0)
    tiles[..., : max(3, images.shape[-1])] = np.rint(np.clip(values, 0, 1) * 255)
    tiles[np.isnan(shown).any(-1)] = _MAGENTA
    return _sheet(tiles.repeat(scale, axis=2).repeat(scale, axis=3), class_names, images.shape[:2])


def ellipse_grid(
    mean: np.ndarray,
    cholesky: np.ndarray,
    color: np.ndarray,
    opacity: np.ndarray,
    class_names: Sequence[str],
    *,
    size: tuple[int, int],
) -> bytes:
    """Draws the Gaussians of the images that `grid` shows, in the same layout, as in Figure 9 of the GSDD paper.

    Each Gaussian is its 1-sigma ellipse (Sigma = L L^T), filled with color times opacity, the strongest of an image
    being full; biggest first. One that takes light away is a dashed red outline. Non-finite ones are left out, and
    their tile gets a magenta frame.

    Args:
        mean: [k, per_class, m, 2], (x, y) in [-1, 1].
        cholesky: [k, per_class, m, 3], (l11, l21, l22) in native pixels, the shift by 0.5 already added.
        color: [k, per_class, m, c], c of 1, 3 or 4 (the fourth is not shown).
        opacity: [k, per_class, m].
        class_names: k names.
        size: Native (h, w).

    Returns:
        PNG bytes.

    Raises:
        ValueError: The shapes do not fit each other, or the number of names is not k.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import PolyCollection
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    gaussians = np.concatenate([mean, cholesky, color, np.asarray(opacity)[..., None]], -1, dtype=np.float64)
    there, scale = gaussians.shape[:2], _scale(size)
    (k, n), (height, width) = np.minimum(there, MOST), scale * np.array(size)
    figure = Figure(figsize=(n * width / 64, k * height / 64), dpi=64)  # a power of two divides without rounding
    canvas, axes = FigureCanvasAgg(figure), figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, n * width), ylim=(k * height, 0))
    axes.axis("off")
    angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    circle = np.cos(angle), np.sin(angle)
    for at in np.ndindex(k, n):
        left, top = at[1] * width, at[0] * height
        frame = axes.add_patch(Rectangle((left, top), width, height, fc="black", ec="none", antialiased=False))
        g = gaussians[at][np.isfinite(gaussians[at]).all(-1)]
        g = g[np.argsort(-np.abs(g[:, 2] * g[:, 4]), kind="stable")]
        x, y, l11, l21, l22 = g[:, :5].T[..., None]
        outline = np.stack([(x + 1) * width / 2, (y + 1) * height / 2], -1) + scale * np.stack(
            [l11 * circle[0], l21 * circle[0] + l22 * circle[1]], -1
        )
        fill, edge, dashed = _paint(g[:, 5:-1] * g[:, -1:])
        shapes = PolyCollection(
            # Agg works in fixed-point numbers: coordinates far outside the picture overflow.
            list(np.clip(outline, -20 * _TILE, 20 * _TILE) + (left, top)),
            facecolors=fill,
            edgecolors=edge,
            linewidths=0.86 * DENSITY,
            linestyles=[(0, (2.5, 1.5)) if each else "solid" for each in dashed] or "solid",
        )
        axes.add_collection(shapes, autolim=False)
        shapes.set_clip_path(frame)  # after adding, which would clip to the axes only
        if len(g) < len(gaussians[at]):
            inner = (left + DENSITY, top + DENSITY), width - 2 * DENSITY, height - 2 * DENSITY
            axes.add_patch(Rectangle(*inner, fc="none", ec="magenta", lw=2.5 * DENSITY))
    canvas.draw()
    tiles = np.asarray(canvas.buffer_rgba()).reshape(k, height, n, width, 4).swapaxes(1, 2)
    return _sheet(tiles, class_names, there)


def curve(x: Sequence[float], y: Sequence[float], *, log: bool = False) -> bytes:
    """Draws a line; a long one as the mean of each stretch, in a band from its lowest to its highest value.

    Args:
        x: Steps.
        y: Values, as many. Non-finite ones, and those <= 0 on a log scale, break the line.
        log: Logarithmic y.

    Returns:
        SVG bytes; the same input gives the same bytes.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    gray = "#{:02x}{:02x}{:02x}".format(*_GRAY)
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
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=7))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("step", color=gray)
    axes.margins(x=0.01)
    axes.grid(axis="y", color=gray, alpha=0.25, lw=0.6)
    axes.tick_params(which="both", length=0, labelcolor=gray, labelsize=9)
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.spines["bottom"].set(color=gray, alpha=0.6)
    axes.patch.set_visible(False)
    figure.patch.set_visible(False)
    out = io.BytesIO()
    # Without a salt the ids in an SVG are random, and no two reports of one run would be equal.
    with matplotlib.rc_context({"svg.hashsalt": "gsdd"}):
        FigureCanvasSVG(figure).print_figure(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def _scale(size: Sequence[int]) -> int:
    return max(1, round(_TILE / max(size)))


def _sheet(tiles: np.ndarray, class_names: Sequence[str], there: Sequence[int]) -> bytes:
    """Puts tiles [k, n, height, width, 4], of as many classes and images as are there, into rows with their names."""
    import matplotlib  # for its font

    (classes, images), (k, n, height, width, _) = there, tiles.shape
    if len(class_names) != classes:
        raise ValueError(f"class_names has {len(class_names)} names for {classes} classes")
    cut = [f"{n} of {images} images per class"] * (n < images) + [f"{k} of {classes} classes"] * (k < classes)
    note = "Shown: the first " + ", the first ".join(cut) if cut else ""
    names = [" ".join(name.split()) for name in class_names[:k]]
    names = [name if len(name) <= _NAME else name[: _NAME - 1].rstrip() + "…" for name in names]
    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", _FONT_SIZE)
    left = math.ceil(max(map(font.getlength, names))) + 5 * _GAP
    right = max(left + n * (width + _GAP) - _GAP, left + math.ceil(font.getlength(note)) if note else 0)
    below = (_FONT_SIZE * 2 + _GAP) if note else 0
    # Transparent, but already gray: the soft edges of the letters would blend towards black otherwise.
    canvas = Image.new("RGBA", (right, k * (height + _GAP) - _GAP + below), (*_GRAY, 0))
    write = functools.partial(ImageDraw.Draw(canvas).text, fill=(*_GRAY, 255), font=font)
    for row, column in np.ndindex(k, n):
        at = left + column * (width + _GAP), row * (height + _GAP)
        canvas.paste(Image.fromarray(tiles[row, column]), at)
        if not column:
            write((left - 4 * _GAP, at[1] + height / 2), names[row], anchor="rm")
    write((left, canvas.height - _GAP), note, anchor="ls")
    out = io.BytesIO()
    canvas.save(out, format="PNG", optimize=True)
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
