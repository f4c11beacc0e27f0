"""Pictures of distilled sets and of a run's course: NumPy arrays in, PNG or SVG bytes out.

Canvases are transparent and text is a middle gray, so that one file is readable on light and on dark pages. PNGs are
drawn at `DENSITY` pixels per point: shown at half their pixel size they stay sharp on dense screens. Only matplotlib's
object interface is used; pyplot's global figures would leak from one run into the next.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from PIL import Image, ImageDraw, ImageFont

DENSITY = 2
_TILE = 64 * DENSITY  # the size that images are magnified to
_GAP = 3 * DENSITY
_FONT_SIZE = 13 * DENSITY
_GRAY = (125, 133, 143)  # contrast 3.8 on white, 4.7 on near-black
_MAGENTA = (255, 0, 255, 255)
_CORAL = (1.0, 0.38, 0.34, 0.95)  # seen on black and on white ellipses alike
_LINES = ("#3b82f6", "#f08c2e", "#22a06b", "#a855f7", "#e5484d", "#0ea5b7")
_SMOOTH_FROM = 80  # points from which a running mean is drawn over the raw line
_MOST_POINTS = 1000


def grid(
    images: np.ndarray,
    class_names: Sequence[str],
    *,
    scale: int | None = None,
    max_per_class: int = 12,
    max_classes: int = 20,
) -> bytes:
    """Draws images in rows, one class per row with its name at the left.

    Args:
        images: [k, per_class, h, w, c], c of 1 (gray), 3 (RGB) or 4 (RGBA), values in [0, 1]; others are clipped, and
            pixels with a NaN are magenta.
        class_names: k names.
        scale: Pixels of the picture per image pixel, by nearest neighbor; None magnifies to about 128.
        max_per_class: Images drawn per class; a note under the grid says how many there are.
        max_classes: Classes drawn.

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
    _check_names(class_names, images.shape[0])
    note = _note(images.shape[0], images.shape[1], max_classes, max_per_class)
    shown = _to_rgba(images[:max_classes, :max_per_class])
    scale = _scale(images.shape[2:4], scale)
    return _assemble(shown.repeat(scale, axis=2).repeat(scale, axis=3), class_names[:max_classes], note)


def ellipse_grid(
    mean: np.ndarray,
    cholesky: np.ndarray,
    color: np.ndarray,
    opacity: np.ndarray,
    class_names: Sequence[str],
    *,
    size: tuple[int, int],
    scale: int | None = None,
    max_per_class: int = 12,
    max_classes: int = 20,
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
        scale: Pixels of the picture per native pixel; None magnifies to about 128.
        max_per_class: Images drawn per class.
        max_classes: Classes drawn.

    Returns:
        PNG bytes.

    Raises:
        ValueError: The shapes do not fit each other, or the number of names is not k.
    """
    mean, cholesky, color, opacity = (np.asarray(a, np.float64) for a in (mean, cholesky, color, opacity))
    lead = opacity.shape
    fits = mean.shape == (*lead, 2) and cholesky.shape == (*lead, 3) and color.shape[:-1] == lead
    if len(lead) != 3 or not fits or color.shape[-1] not in (1, 3, 4):
        raise ValueError(
            f"mean {mean.shape}, cholesky {cholesky.shape}, color {color.shape}, opacity {opacity.shape}: expected "
            "[k, per_class, m, 2], [..., 3], [..., c] with c of 1, 3 or 4, and [k, per_class, m]"
        )
    _check_names(class_names, lead[0])
    note = _note(lead[0], lead[1], max_classes, max_per_class)
    part = slice(max_classes), slice(max_per_class)
    tiles = _draw_ellipses(mean[part], cholesky[part], color[part], opacity[part], size, _scale(size, scale))
    return _assemble(tiles, class_names[:max_classes], note)


def ellipses(
    mean: np.ndarray,
    cholesky: np.ndarray,
    color: np.ndarray,
    opacity: np.ndarray,
    *,
    size: tuple[int, int],
    scale: int | None = None,
) -> bytes:
    """Draws the Gaussians of one image as `ellipse_grid` does.

    Args:
        mean: [m, 2].
        cholesky: [m, 3].
        color: [m, c].
        opacity: [m].
        size: Native (h, w).
        scale: Pixels of the picture per native pixel; None magnifies to about 128.

    Returns:
        PNG bytes of exactly `scale` times the size.
    """
    mean, cholesky, color, opacity = (np.asarray(a, np.float64)[None, None] for a in (mean, cholesky, color, opacity))
    tiles = _draw_ellipses(mean, cholesky, color, opacity, size, _scale(size, scale))
    return _png(Image.fromarray(tiles[0, 0]))


def curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    xlabel: str,
    ylabel: str,
    log: bool = False,
    kind: Literal["svg", "png"] = "svg",
) -> bytes:
    """Draws lines; noisy long ones as a faint line under their running mean.

    Args:
        series: Name -> (x, y), of equal length. Non-finite y, and y <= 0 on a log scale, break the line.
        xlabel: What x is.
        ylabel: What y is.
        log: Logarithmic y.
        kind: "svg" or "png".

    Returns:
        SVG or PNG bytes; the same input gives the same bytes.

    Raises:
        ValueError: x and y of a series differ in length, or `kind` is another one.
    """
    if kind not in ("svg", "png"):
        raise ValueError(f"kind is {kind!r}: allowed are 'svg' and 'png'")
    gray = "#{:02x}{:02x}{:02x}".format(*_GRAY)
    figure = Figure(figsize=(5.2, 2.7))
    # Room for seven digits and a sign. To fit margins to the labels would take as long again as to draw.
    figure.subplots_adjust(left=0.19 if ylabel else 0.15, right=0.96, bottom=0.19 if xlabel else 0.12, top=0.92)
    axes = figure.add_subplot()
    for index, (name, (x, y)) in enumerate(series.items()):
        if len(x) != len(y):
            raise ValueError(f"series {name!r} has {len(x)} x and {len(y)} y: they must be equally many")
        xs, ys = np.asarray(x, np.float64), np.array(y, np.float64)
        ys[~np.isfinite(ys) | (ys <= 0 if log else False)] = np.nan
        color = _LINES[index % len(_LINES)]
        smooth = _running_mean(ys, max(5, len(ys) // 25), log=log) if _is_noisy(ys, log=log) else None
        faint = {"lw": 0.8, "alpha": 0.35} if smooth is not None else {"lw": 1.8, "label": name}
        axes.plot(*_thinned(xs, ys), color=color, marker="o" if np.isfinite(ys).sum() == 1 else None, **faint)
        if smooth is not None:
            axes.plot(*_thinned(xs, smooth), color=color, lw=1.8, label=name)
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=7))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel(xlabel, color=gray)
    axes.set_ylabel(ylabel, color=gray)
    axes.margins(x=0.01)
    axes.grid(axis="y", color=gray, alpha=0.25, lw=0.6)
    axes.tick_params(which="both", length=0, labelcolor=gray, labelsize=9)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set(color=gray, alpha=0.6)
    axes.patch.set_visible(False)
    figure.patch.set_visible(False)
    if len(series) > 1:
        axes.legend(frameon=False, labelcolor=gray, fontsize=9)
    out = io.BytesIO()
    if kind == "png":
        FigureCanvasAgg(figure).print_figure(out, format="png", dpi=72 * DENSITY, metadata={"Software": None})
    else:
        # Without a salt the ids in an SVG are random, and no two reports of one run would be equal.
        with matplotlib.rc_context({"svg.hashsalt": "gsdd"}):
            FigureCanvasSVG(figure).print_figure(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def _check_names(class_names: Sequence[str], k: int) -> None:
    if len(class_names) != k:
        raise ValueError(f"class_names has {len(class_names)} names for {k} classes")


def _scale(size: Sequence[int], scale: int | None) -> int:
    if scale is None:
        return max(1, round(_TILE / max(size)))
    if scale < 1:
        raise ValueError(f"scale is {scale}: at least 1 is needed")
    return scale


def _note(k: int, per_class: int, max_classes: int, max_per_class: int) -> str:
    parts = [f"{max_per_class} of {per_class} images per class"] if per_class > max_per_class else []
    parts += [f"{max_classes} of {k} classes"] if k > max_classes else []
    return "Shown: the first " + ", the first ".join(parts) if parts else ""


def _to_rgba(images: np.ndarray) -> np.ndarray:
    """[..., h, w, c] floats to [..., h, w, 4] bytes."""
    broken = np.isnan(images).any(-1)
    values = np.rint(np.clip(np.nan_to_num(images, nan=0.0, posinf=1.0, neginf=0.0), 0, 1) * 255).astype(np.uint8)
    rgba = np.full((*images.shape[:-1], 4), 255, np.uint8)
    rgba[..., : 4 if images.shape[-1] == 4 else 3] = values
    rgba[broken] = _MAGENTA
    return rgba


def _assemble(tiles: np.ndarray, class_names: Sequence[str], note: str) -> bytes:
    """Puts tiles [k, n, height, width, 4] into rows with their names."""
    k, n, height, width, _ = tiles.shape
    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", _FONT_SIZE)
    names = [_shorten(" ".join(name.split()), font) for name in class_names]
    left = math.ceil(max(font.getlength(name) for name in names)) + 5 * _GAP
    below = (_FONT_SIZE * 2 + _GAP) if note else 0
    note_width = left + math.ceil(font.getlength(note)) if note else 0
    shape = max(left + n * (width + _GAP) - _GAP, note_width), k * (height + _GAP) - _GAP + below
    # Transparent, but already gray: the soft edges of the letters would blend towards black otherwise.
    canvas = Image.new("RGBA", shape, (*_GRAY, 0))
    draw = ImageDraw.Draw(canvas)
    for row in range(k):
        y = row * (height + _GAP)
        draw.text((left - 4 * _GAP, y + height / 2), names[row], fill=(*_GRAY, 255), font=font, anchor="rm")
        for column in range(n):
            canvas.paste(Image.fromarray(tiles[row, column]), (left + column * (width + _GAP), y))
    if note:
        draw.text((left, shape[1] - _GAP), note, fill=(*_GRAY, 255), font=font, anchor="ls")
    return _png(canvas)


def _shorten(name: str, font: ImageFont.FreeTypeFont) -> str:
    widest = 150 * DENSITY
    if font.getlength(name) <= widest:
        return name
    while name and font.getlength(name + "…") > widest:
        name = name[:-1]
    return name.rstrip() + "…"


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, format="PNG", optimize=True)
    return out.getvalue()


def _draw_ellipses(
    mean: np.ndarray, cholesky: np.ndarray, color: np.ndarray, opacity: np.ndarray, size: tuple[int, int], scale: int
) -> np.ndarray:
    """Gaussians [k, n, m, ...] to tiles [k, n, h * scale, w * scale, 4]."""
    (k, n, _), (h, w) = opacity.shape, size
    height, width = h * scale, w * scale
    figure = Figure(figsize=(n * width / 100, k * height / 100), dpi=100)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, n * width), ylim=(k * height, 0))
    axes.axis("off")
    angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    circle = np.stack([np.cos(angle), np.sin(angle)], -1)
    for row in range(k):
        for column in range(n):
            at = row, column
            frame = Rectangle((column * width, row * height), width, height, fc="black", ec="none", antialiased=False)
            axes.add_patch(frame)
            finite = np.isfinite(np.concatenate([mean[at], cholesky[at], color[at], opacity[at][:, None]], -1)).all(-1)
            l11, l21, l22 = cholesky[at][finite].T
            order = np.argsort(-np.abs(l11 * l22), kind="stable")
            zero = np.zeros_like(l11)
            factor = np.stack([np.stack([l11, zero], -1), np.stack([l21, l22], -1)], -2)[order]
            center = 0.5 * np.array([w, h]) * (mean[at][finite][order] + 1)
            outline = center[:, None] + circle @ factor.swapaxes(-1, -2)
            # Agg works in fixed-point numbers: coordinates far outside the picture overflow.
            points = np.clip(outline * scale, -20 * _TILE, 20 * _TILE) + (column * width, row * height)
            fill, edge, dashed = _paint((color[at] * opacity[at][:, None])[finite][order])
            shapes = PolyCollection(
                list(points),
                facecolors=fill,
                edgecolors=edge,
                linewidths=0.55 * DENSITY,
                linestyles=[(0, (2.5, 1.5)) if d else "solid" for d in dashed] or "solid",
            )
            axes.add_collection(shapes, autolim=False)
            shapes.set_clip_path(frame)  # after adding, which would clip to the axes only
            if not finite.all():
                inset = 1.5 * DENSITY
                corner = column * width + inset, row * height + inset
                mark = Rectangle(
                    corner, width - 2 * inset, height - 2 * inset, fc="none", ec="magenta", lw=1.5 * DENSITY
                )
                axes.add_patch(mark)
    canvas.draw()
    picture = np.asarray(canvas.buffer_rgba())
    return picture.reshape(k, height, n, width, 4).swapaxes(1, 2)


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


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `_MOST_POINTS` points, lowest and highest of each stretch, so that no spike is lost."""
    if len(x) <= _MOST_POINTS:
        return x, y
    keep = []
    for part in np.array_split(np.arange(len(x)), _MOST_POINTS // 2):
        values = y[part]
        keep += [part[0]] if np.isnan(values).all() else [part[np.nanargmin(values)], part[np.nanargmax(values)]]
    chosen = np.unique(keep)
    return x[chosen], y[chosen]


def _is_noisy(y: np.ndarray, *, log: bool) -> bool:
    """A long line that goes up and down more than three times the whole way it covers."""
    values = np.log(y[~np.isnan(y)]) if log else y[~np.isnan(y)]
    return len(values) >= _SMOOTH_FROM and np.abs(np.diff(values)).sum() > 3 * np.ptp(values)


def _running_mean(y: np.ndarray, window: int, *, log: bool) -> np.ndarray:
    """Mean over a centered window (geometric on a log scale), shorter at the ends; gaps stay gaps."""
    values = np.log(y) if log else y
    known = ~np.isnan(values)
    sums = np.convolve(np.where(known, values, 0.0), np.ones(window), "same")
    counts = np.convolve(known, np.ones(window), "same")
    mean = np.where(known, sums / np.maximum(counts, 1), np.nan)
    return np.exp(mean) if log else mean
