"""Sparse Gaussian images in a third of the bits: integer codes on dataset-wide grids, trained through the rounding.

Eight numbers per Gaussian, since opacity folds into color, on uniform grids whose ranges the whole set shares; the
order of an image's Gaussians, which no image depends on, is not stored. The file holds exactly these bits; with
``bits_gaussian``, codes of any size as an entropy coder writes them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge, Gt, Le, Lt
from typing_extensions import Doc

from gsdd_jax import growth, packed_codes, rans, spacetime, starts, storage
from gsdd_jax.codecs.base import MOST, Codec, Draft, Layout, Shape, Spec
from gsdd_jax.codecs.gaussian import boundary_loss, clip_positions, fit_rates, leafwise_adam
from gsdd_jax.errors import InputError
from gsdd_jax.gaussians import Gaussians
from gsdd_jax.later import optax
from gsdd_jax.render import render
from gsdd_jax.spacetime import Gaussians3D, render_video
from kernels import DEFAULT_CUTOFF

# A step is at least this share of the larger of 1 and |low|, so that a range of zero width has a grid and codes come
# back from float32 values.
FINEST_STEP = 2.0**-16
# Share of the numbers that fitted ranges clip at each end, for finer steps. 100 CIFAR-10 images of 22 Gaussians, fitted
# 1000 steps, rounded at the end to 8, 6, 6 bits: 24.90, 25.14, 25.17 and 24.97 dB with 0, 0.001, 0.003 and 0.01.
CLIPPED_SHARE = 0.003
# bfloat16 rounds by at most half of it, relatively: what is stretched by it before still covers the range after.
BFLOAT16_ULP = 2.0**-7
# Steps are bfloat16 numbers, so that they are made larger by at least one of their 128 per octave.
LEAST_OCTAVES = 2.0**-7
# Arrays of the file.
BITS, LOW, STEP = "codes", "low", "step"
# Finding a sorted image of so many from its number takes seconds, of a quarter as many a tenth of one.
SORTED_POINTS = 1 << 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedGaussianSpec(Spec):
    """Settings of the packed Gaussian codec."""

    name: Annotated[Literal["packed_gaussian"], Doc("the parameterization")] = "packed_gaussian"
    images_per_class: Annotated[int, Ge(0), Doc("Gaussian images per class; 0 = as many as the budget holds")] = 0
    num_points: Annotated[
        int, Ge(0), Doc("Gaussians per image; 0 = as many as the budget holds in each of so many images")
    ] = 0
    bits_mean: Annotated[int, Ge(2), Le(16), Doc("bits of each coordinate of a position")] = 8
    bits_cholesky: Annotated[int, Ge(2), Le(16), Doc("bits of each of the three numbers of a shape")] = 6
    bits_color: Annotated[int, Ge(2), Le(16), Doc("bits of each color channel, or of luma")] = 6
    bits_chroma: Annotated[
        int,
        Ge(0),
        Le(16),
        Doc("bits of each of two color differences, which stand with luma for red, green and blue; 0 = these as such"),
    ] = 0
    bits_gaussian: Annotated[
        float,
        Ge(0),
        Doc(
            "bits of a whole Gaussian, on average over the set, by entropy coding: the grids of shapes and colors are "
            "as fine as they allow, in the proportions of the bits above; 0 = codes of these widths"
        ),
    ] = 0.0
    ranges: Annotated[
        Literal["learned", "fitted"],
        Doc(
            "ranges of shapes and colors over the whole set: trained (LSQ), or set after each step to what nearly all "
            "numbers need; entropy-coded ones are set after each step"
        ),
    ] = "learned"
    order: Annotated[
        Literal["sorted", "kept"],
        Doc("sorted: an image's Gaussians are stored as a set, which saves log2(m!) bits; kept: as a list"),
    ] = "sorted"
    supersample: Annotated[int, Ge(1), Le(64), Doc("samples per pixel and axis (paper, section 3.2: 2)")] = 2
    cutoff: Annotated[float, Ge(0), Lt(1), Doc("contributions with exp(-q/2) below it are zero")] = DEFAULT_CUTOFF
    boundary: Annotated[float, Ge(0), Doc("weight of the boundary loss (paper, Eq. 10 and section 4.1: 0.1)")] = 0.1
    start: Annotated[
        Literal["growth", "clusters", "gradient", "uniform"],
        Doc(
            "starting point of the fit: one Gaussian after another where the error is largest, over the first half of "
            "its steps; color clusters of the image; points on its edges; or the authors' uniform draw"
        ),
    ] = "growth"
    lr: Annotated[
        float,
        Gt(0),
        Doc("learning rate of Adam in distillation, for every leaf (paper, section 4.1: 1e-3; ours on CIFAR-10: 3e-3)"),
    ] = 3e-3
    lr_mean: Annotated[float, Ge(0), Doc("factor of lr for the positions")] = 1.0
    lr_cholesky: Annotated[float, Ge(0), Doc("factor of lr for the shapes")] = 1.0
    lr_color: Annotated[float, Ge(0), Doc("factor of lr for the colors")] = 1.0
    draft: Annotated[
        float, Ge(0), Le(1), Doc("share of the steps of the fit that are taken before anything is rounded")
    ] = 0.5
    lr_ranges: Annotated[float, Ge(0), Doc("learned ranges: factor of the rate of what they bound, for both ends")] = (
        0.5
    )
    # Of a position, (x, y) or (x, y, t); a shape has as many numbers as a triangle of so many rows.
    COORDINATES: ClassVar[int] = 2
    NOISE = ("uniform",)
    TRAINING = (*Spec.TRAINING, "boundary")
    FORMER = Spec.FORMER | {"images_per_class": "gpc"}

    def resolved(self, image_shape: Shape) -> Any:
        if self.bits_chroma and image_shape[-1] != 3:
            raise InputError(
                f"codec.bits_chroma: expected 0 for images of {image_shape[-1]} channels, found {self.bits_chroma}"
            )
        return self

    def sizes(self, image_shape: Shape) -> dict[str, Sequence[int]]:
        most = SORTED_POINTS if self.order == "sorted" else MOST
        return {"num_points": range(1, most + 1), "images_per_class": range(1, MOST)}

    @property
    def shapes(self) -> int:
        """Numbers of a shape."""
        return self.COORDINATES * (self.COORDINATES + 1) // 2

    def color_bits(self, channels: int) -> tuple[int, ...]:
        """Returns the bits of each number of a color."""
        luma = 1 if self.bits_chroma else channels
        return (self.bits_color,) * luma + (self.bits_chroma,) * (channels - luma)

    def layout(self, image_shape: Shape, num_classes: int) -> Layout:
        n, channels = num_classes * self.images_per_class, image_shape[-1]
        ranges = jax.ShapeDtypeStruct((self.shapes + channels,), jnp.bfloat16)
        size = packed_codes.set_bytes(self, n, channels, self.COORDINATES)
        return {BITS: jax.ShapeDtypeStruct((size,), np.uint8), LOW: ranges, STEP: ranges}

    def numbers(self, image_shape: Shape, num_classes: int) -> tuple[int, str]:
        each = self.COORDINATES + self.shapes + image_shape[-1]
        count = num_classes * self.images_per_class * self.num_points * each
        if self.bits_gaussian:
            return count, f"entropy-coded, {self.bits_gaussian:g} bits per Gaussian"
        chroma = f" ({self.bits_chroma} of a color difference)" if self.bits_chroma else ""
        return count, f"codes of {self.bits_mean}, {self.bits_cholesky} and {self.bits_color} bits{chroma}"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedGaussians:
    """Float32 masters of ``n`` images with ``m`` Gaussians each, and the grids that they are rounded to.

    Those of videos are as in `gsdd_jax.spacetime.Gaussians3D`, and have six numbers in place of three.

    Attributes:
        mean: ``[n, m, 2]`` as in `gsdd_jax.Gaussians`; its grid is fixed, the centers of 2^bits equal cells of
            [-1, 1].
        cholesky: ``[n, m, 3]`` as in `gsdd_jax.Gaussians`.
        color: ``[n, m, c]`` opacity times color; with ``bits_chroma``, its luma and color differences, see `to_ycocg`.
        low: ``[3 + c]`` lowest grid value of each number of ``cholesky`` and ``color``, for all images.
        step: ``[3 + c]`` distance of grid values.
        size: Native (height, width) in pixels; static.
    """

    mean: jax.Array
    cholesky: jax.Array
    color: jax.Array
    low: jax.Array
    step: jax.Array
    size: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def __getitem__(self, index) -> PackedGaussians:
        """Selects images, as ``array[index]`` does; the grids stay."""
        chosen = {name: getattr(self, name)[index] for name in ("mean", "cholesky", "color")}
        return dataclasses.replace(self, **chosen)


def make(spec: PackedGaussianSpec, image_shape: Shape, num_classes: int) -> Codec:
    """Builds the codec of images or, with one more side, of videos; see `gsdd_jax.codecs.make`."""
    *_, c = image_shape
    size = image_shape[:-1]
    draw_all: Any = functools.partial(
        render if len(size) == 2 else render_video, supersample=spec.supersample, cutoff=spec.cutoff
    )
    n, m = num_classes * spec.images_per_class, spec.num_points
    written = spec.layout(image_shape, num_classes)
    packed_codes.check_rate(spec, n, c, spec.COORDINATES)
    learned = spec.ranges == "learned" and not spec.bits_gaussian

    def decode(params: PackedGaussians, index=None, *, size=None, key=None) -> jax.Array:
        del key
        chosen = params if index is None else params[index]
        return draw_all(quantized(chosen, spec), size)

    def dequantize(tree: dict[str, jax.Array]) -> PackedGaussians:
        codes = {name: jnp.asarray(leaf, jnp.float32) for name, leaf in tree.items()}
        ends = {name: codes.pop(name) for name in (LOW, STEP)}
        grids = _grids(**ends, spec=spec)
        values = {name: grids[name][0] + code * grids[name][1] for name, code in codes.items()}
        return PackedGaussians(**values, **ends, size=size)

    def pack(tree: dict[str, Any]) -> dict[str, np.ndarray]:
        arrays = {name: np.asarray(leaf) for name, leaf in tree.items()}
        numbers = np.concatenate([arrays.pop("cholesky"), arrays.pop("color")], axis=-1)
        return {BITS: packed_codes.write(arrays.pop("mean"), numbers, spec), **arrays}

    def unpack(arrays: dict[str, Any]) -> dict[str, np.ndarray]:
        mean, numbers = packed_codes.read(arrays[BITS], spec, n, c, spec.COORDINATES)
        cholesky, color = np.split(numbers, [spec.shapes], axis=-1)
        ends = {name: arrays[name] for name in (LOW, STEP)}
        return {"mean": mean.astype(np.uint16), "cholesky": cholesky, "color": color, **ends}

    def clipped(params: PackedGaussians) -> PackedGaussians:
        return clip_positions(dataclasses.replace(params, cholesky=canonical(params.cholesky)))

    def project(params: PackedGaussians) -> PackedGaussians:
        return clipped(params) if learned else fit_ranges(clipped(params), spec)

    # All Gaussians are there when rounding begins.
    until = min(growth.UNTIL, spec.draft) if spec.start == "growth" else 0.0

    def draw_first(params: PackedGaussians, count: jax.Array, rounding: bool | jax.Array = False) -> jax.Array:
        drawn = (jnp.arange(m) < count).astype(params.color.dtype)
        first = dataclasses.replace(params, color=params.color * drawn[:, None])
        return draw_all(quantized(first, spec, rounding=rounding))

    def draw_draft(params: PackedGaussians, done: jax.Array) -> jax.Array:
        return draw_first(params, growth.number(done, m, until), done >= spec.draft)

    def grow(params: PackedGaussians, images: jax.Array, done: jax.Array, before: jax.Array) -> PackedGaussians:
        encode = to_ycocg if spec.bits_chroma else lambda color: color
        return growth.grow(params, images, done, before, draw=draw_first, until=until, encode=encode)

    def project_draft(params: PackedGaussians, done: jax.Array) -> PackedGaussians:
        # The grids follow the numbers until they are used.
        return jax.lax.cond(done < spec.draft, lambda p: fit_ranges(clipped(p), spec), project, params)

    def adam(rates: dict[str, Any], schedule: optax.Schedule | None = None) -> optax.GradientTransformation:
        ends = (
            spec.lr_ranges
            * learned
            * np.repeat([rates["cholesky"], rates["color"]], [spec.shapes, c]).astype(np.float32)
        )
        # The upper end moves by as many changes of the step as there are steps.
        steps = 2.0 ** np.asarray([*[spec.bits_cholesky] * spec.shapes, *spec.color_bits(c)], np.float32) - 1
        every: dict[str, float | np.ndarray] = {**rates, LOW: ends, STEP: ends / steps}
        return leafwise_adam(every, schedule)

    def fitter(steps: int) -> optax.GradientTransformation:
        rates = fit_rates(size, m)
        del rates["opacity"]
        return adam(rates, optax.cosine_decay_schedule(1.0, steps, alpha=0.02))

    def optimizer() -> optax.GradientTransformation:
        factors = {"mean": spec.lr_mean, "cholesky": spec.lr_cholesky, "color": spec.lr_color}
        return adam({name: spec.lr * factor for name, factor in factors.items()})

    return Codec(
        name=spec.name,
        spec=spec,
        image_shape=image_shape,
        num_classes=num_classes,
        images_per_class=spec.images_per_class,
        init=lambda key, images: from_gaussians(
            starts.START[spec.start](key, jnp.asarray(images, jnp.float32), m), spec
        ),
        decode=decode,
        quantize=lambda params: codes(params, spec),
        dequantize=dequantize,
        nbytes=lambda params: storage.nbytes(written),
        regularize=lambda params: spec.boundary * boundary_loss(params),
        project=project,
        optimizer=optimizer,
        fitter=fitter,
        layout=lambda: written,
        pack=pack,
        unpack=unpack,
        gaussians=lambda params: quantized(params, spec) if len(size) == 2 else None,
        draft=Draft(draw_draft, project_draft, grow) if until else Draft(draw_draft, project_draft),
    )


def from_gaussians(g: Gaussians | Gaussians3D, spec: PackedGaussianSpec) -> PackedGaussians:
    """Folds opacity into color and lays grids over the numbers of the set; nothing is rounded yet.

    Gaussians that were fitted otherwise are packed as they are by it: the comparison for training through the
    rounding.
    """
    color = g.color * g.opacity[..., None]
    color = to_ycocg(color) if spec.bits_chroma else color
    none = jnp.zeros(spec.shapes + color.shape[-1], jnp.float32)
    params = PackedGaussians(g.mean, canonical(g.cholesky), color, low=none, step=none, size=g.size)
    return fit_ranges(clip_positions(params), spec)


def canonical(cholesky: jax.Array) -> jax.Array:
    """Makes the diagonal of L non-negative, by signs that cancel in L L^T; whatever is so already keeps its bits.

    L is ``cholesky + CHOLESKY_SHIFT``, whose diagonal 1/2 reflects x to -x - 1; ``SPACETIME_SHIFT`` has it, too.
    """
    l11, l21, l22, *moving = (cholesky[..., i] for i in range(cholesky.shape[-1]))
    column = l11 < -0.5
    signed = [jnp.where(column, -l11 - 1, l11), jnp.where(column, -l21, l21), jnp.where(l22 < -0.5, -l22 - 1, l22)]
    if moving:
        u_x, u_y, l_t = moving
        column = l_t < -0.5
        signed += [jnp.where(column, -u_x, u_x), jnp.where(column, -u_y, u_y), jnp.where(column, -l_t - 1, l_t)]
    return jnp.stack(signed, axis=-1)


def to_ycocg(rgb: jax.Array) -> jax.Array:
    """Returns luma (R + 2 G + B) / 4 and the color differences R - B and G - (R + B) / 2 (Malvar & Sullivan 2003).

    Red, green and blue of an image's Gaussians are nearly the same number; these are nearly independent, and two of
    them small. Arrays are ``[..., 3]``.
    """
    r, g, b = (rgb[..., i] for i in range(3))
    return jnp.stack([(r + 2 * g + b) / 4, r - b, g - (r + b) / 2], axis=-1)


def from_ycocg(ycocg: jax.Array) -> jax.Array:
    """Returns red, green and blue: the inverse of `to_ycocg`."""
    y, co, cg = (ycocg[..., i] for i in range(3))
    rest = y - cg / 2
    return jnp.stack([rest + co / 2, rest + cg, rest - co / 2], axis=-1)


def fit_ranges(params: PackedGaussians, spec: PackedGaussianSpec) -> PackedGaussians:
    """Lays the grids of shapes and colors over all but ``CLIPPED_SHARE`` of the set's numbers at either end.

    What is not finite has no say. Of entropy-coded numbers all steps are made larger or smaller alike, until what the
    coder writes is as long as it may be.
    """
    lows, steps = [], []
    for leaf, bits in (
        (params.cholesky, (spec.bits_cholesky,) * spec.shapes),
        (params.color, spec.color_bits(params.color.shape[-1])),
    ):
        finite = jnp.where(jnp.isfinite(leaf), leaf, jnp.nan).reshape(-1, leaf.shape[-1])
        ends = jnp.nanquantile(finite, jnp.array([CLIPPED_SHARE, 1 - CLIPPED_SHARE], jnp.float32), axis=0)
        low, high = jnp.nan_to_num(ends)
        low = storage.as_bfloat16(low - BFLOAT16_ULP * jnp.abs(low))
        lows.append(low)
        per_step = ((1 + BFLOAT16_ULP) / (2.0 ** np.asarray(bits) - 1)).astype(np.float32)
        steps.append(storage.as_bfloat16((high - low) * per_step))
    if spec.bits_gaussian and not spec.bits_chroma:
        # Differences of colors are small where their steps are the same.
        steps[1] = jnp.full_like(steps[1], steps[1].max())
    fitted = dataclasses.replace(params, low=jnp.concatenate(lows), step=jnp.concatenate(steps))
    return _fit_rate(fitted, params.step, spec) if spec.bits_gaussian else fitted


def _fit_rate(params: PackedGaussians, before: jax.Array, spec: PackedGaussianSpec) -> PackedGaussians:
    """Scales steps that are in proportion, from about those before, to the least that ``bits_gaussian`` allow."""
    (n, m, c), d = params.color.shape, spec.COORDINATES
    numbers = n * m * (spec.shapes + c)
    room = 8 * (packed_codes.set_bytes(spec, n, c, d) - -(-n * packed_codes.position_bits(spec, d) // 8))
    widths = np.asarray([*[spec.bits_cholesky] * spec.shapes, *spec.color_bits(c)], np.float32)
    middle = params.low + params.step * (2.0**widths - 1) / 2
    # Half of the codes are left for the numbers beyond the range.
    finest = widths.max() - (packed_codes.CODED_BITS - 1)

    def scaled(octaves: jax.Array) -> PackedGaussians:
        step = storage.as_bfloat16(params.step * 2.0**octaves)
        low = storage.as_bfloat16(middle - step * 2 ** (packed_codes.CODED_BITS - 1))
        return dataclasses.replace(params, low=low, step=step)

    def excess(octaves: jax.Array) -> jax.Array:
        """Octaves by which all steps are too small, nearly: each saves a bit of each number."""
        found = codes(scaled(octaves), spec)
        kinds = packed_codes.kinds(jnp.concatenate([found["cholesky"], found["color"]], axis=-1), spec, spec.shapes)
        none = jnp.zeros(2 * rans.LARGEST + 1, jnp.int32)
        counts = jnp.stack([none.at[kind + rans.LARGEST].add(1) for kind in kinds])
        return (rans.most_bits(counts, numbers, jnp) - room) / numbers

    def evaluated(octaves: jax.Array) -> tuple[jax.Array, jax.Array]:
        return excess(octaves), octaves

    there = (before > 0) & (params.step > 0)
    first = jnp.mean(jnp.log2(jnp.where(there, before / params.step, 1)), where=there)
    first = jnp.where(there.any(), first, 0.0)
    _, found = jax.lax.while_loop(
        lambda state: state[0] > 0,
        lambda state: evaluated(state[1] + jnp.maximum(state[0], LEAST_OCTAVES)),
        evaluated(jnp.maximum(first + excess(first), finest)),
    )
    return scaled(found)


def quantized(params: PackedGaussians, spec: PackedGaussianSpec, *, rounding: bool | jax.Array = True) -> Any:
    """Returns the Gaussians as they come back from disk, in the order in which they come back.

    Sums of floats depend on the order, so the images that are trained are drawn in the order of the file, too.
    Differentiable with respect to every leaf: straight through for the masters, LSQ for the grids, but for those of
    entropy-coded numbers. Without ``rounding`` the masters are taken as they are.
    """
    low, step = params.low, params.step
    if spec.bits_gaussian:
        low, step = jax.lax.stop_gradient((low, step))
    leaves = {
        name: jnp.where(rounding, storage.on_grid(getattr(params, name), low, step, bits), getattr(params, name))
        for name, (low, step, bits) in _grids(low, step, spec).items()
    }
    leaves = _in_order(params, leaves, spec)
    if spec.bits_chroma:
        leaves["color"] = from_ycocg(leaves["color"])
    opacity = jnp.ones(params.mean.shape[:-1], jnp.float32)
    return spacetime.kind(params.size)(**leaves, opacity=opacity, size=params.size)


def codes(params: PackedGaussians, spec: PackedGaussianSpec) -> dict[str, jax.Array]:
    """Returns the codes, uint16, in the order of the file, and the grids, bfloat16. A NaN gets code 0."""
    grids = _grids(params.low, params.step, spec)
    codes = {
        name: jnp.nan_to_num(storage.grid_codes(getattr(params, name), low, step, bits)).astype(jnp.uint16)
        for name, (low, step, bits) in grids.items()
    }
    low, step = (jnp.concatenate(ends) for ends in zip(grids["cholesky"][:2], grids["color"][:2], strict=True))
    return _in_order(params, codes, spec) | storage.cast({LOW: low, STEP: step}, "bfloat16")


def _grids(
    low: jax.Array, step: jax.Array, spec: PackedGaussianSpec
) -> dict[str, tuple[jax.Array, jax.Array, storage.Bits]]:
    """Returns (low, step, bits) of each leaf, at the precision in which they are stored."""
    low = storage.as_bfloat16(low)
    finest = FINEST_STEP * jnp.maximum(1, jnp.abs(jax.lax.stop_gradient(low)))
    step = storage.as_bfloat16(jnp.maximum(step, finest))
    cholesky: storage.Bits = spec.bits_cholesky
    color: storage.Bits = spec.color_bits(len(low) - spec.shapes)
    if spec.bits_gaussian:
        cholesky = color = packed_codes.CODED_BITS
    cell, d, k = 2.0 ** (1 - spec.bits_mean), spec.COORDINATES, spec.shapes
    return {
        "mean": (jnp.full(d, 0.5 * cell - 1, jnp.float32), jnp.full(d, cell, jnp.float32), spec.bits_mean),
        "cholesky": (low[:k], step[:k], cholesky),
        "color": (low[k:], step[k:], color),
    }


def _in_order(params: PackedGaussians, leaves: dict[str, jax.Array], spec: PackedGaussianSpec) -> dict[str, jax.Array]:
    """Brings the Gaussians of each image into the order of the file: by their cells, if at all."""
    if spec.order == "kept":
        return leaves
    low, step, bits = _grids(params.low, params.step, spec)["mean"]
    cells = jnp.nan_to_num(storage.grid_codes(jax.lax.stop_gradient(params.mean), low, step, bits)).astype(jnp.uint32)
    # Stable, so that Gaussians of one cell stay in the order in which they were stored.
    order = jnp.argsort(packed_codes.cells(cells, spec.bits_mean), axis=-1, stable=True)
    return {name: jnp.take_along_axis(leaf, order[..., None], axis=1) for name, leaf in leaves.items()}
