"""PSNR of images fitted in few bits: bfloat16, codes trained through the rounding, and codes rounded at the end.

    python -m benchmarks.packed_psnr [--data DIR] [--images 100] [--points 22] [--steps 300 1000] [--layouts 8+7+6 ...]

The images are a fixed, seeded sample of the training split. Beside each PSNR stand the bits per Gaussian as written,
as they would be with the order kept, and with an ideal entropy coder that knows the frequencies of each number's codes
for nothing. What suffers is measured by rounding one kind of number at a time, after a fit in float32.
"""

from __future__ import annotations

import argparse
import dataclasses
import lzma
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import record
from benchmarks.fit_psnr import SEED, sample
from gsdd_jax import codecs, fitting, packed_codes
from gsdd_jax.codecs import Codec, GaussianSpec, PackedGaussianSpec, packed
from train.errors import exit_cleanly

DATA = record.ROOT.parent / "shared" / "data" / "cifar10_jpeg" / "1.0.0"
# Bits of each coordinate, number of the shape and color channel. With the order dropped, 8, 7, 6 costs what 8, 6, 6
# does with the order kept, for images of 22 Gaussians.
LAYOUTS = ("8+6+6", "7+6+5", "8+7+6")
# The ways to train through the rounding.
TRAINED = {
    "trained from the start, ranges learned": {"draft": 0.0, "ranges": "learned"},
    "trained from half, ranges learned": {"draft": 0.5, "ranges": "learned"},
    "trained from half, ranges fitted": {"draft": 0.5, "ranges": "fitted"},
}
# Rounded alone to so many bits; what is not has 16.
ALONE = (3, 4, 5, 6, 7, 8, 9)
FINE = 16


def codec_of(spec: codecs.CodecSpec, images: jax.Array) -> Codec:
    """Returns a codec of a spec whose set is exactly these images."""
    return codecs.make(spec, image_shape=images.shape[1:], num_classes=1)


def fitted(codec: Codec, images: jax.Array, steps: int) -> tuple[Any, float]:
    """Fits the images; returns the parameters and the seconds it took to run, without compilation."""
    begin = jax.jit(lambda key, x: fitting.init_fit(key, x, codec=codec, steps=steps))
    state = jax.block_until_ready(begin(jax.random.key(SEED), images))
    advance = jax.jit(lambda s, x: fitting.fit_steps(s, x, codec=codec, steps=steps, count=steps))
    advance = advance.lower(state, images).compile()
    began = time.perf_counter()
    state, _ = jax.block_until_ready(advance(state, images))
    return state.params, time.perf_counter() - began


def quality(codec: Codec, params: Any, images: jax.Array) -> dict[str, float]:
    """Returns the PSNR of the images as they come back from disk."""
    psnr = np.asarray(
        fitting.psnr(jax.jit(lambda p: codec.decode(codec.dequantize(codec.quantize(p))))(params), images)
    )
    return {"psnr": float(psnr.mean()), "psnr_std": float(psnr.std(ddof=1))}


def bits_per_gaussian(codec: Codec, params: Any) -> dict[str, float]:
    """Returns the bits per Gaussian of a packed set: as written, and as other codings would write it."""
    spec, stored = codec.spec, jax.device_get(codec.quantize(params))
    points, channels = codec.num_images * spec.num_points, codec.image_shape[-1]
    arrays = codec.pack(stored)
    kept = dataclasses.replace(spec, order="kept")
    sorted_ = dataclasses.replace(spec, order="sorted")
    position = packed_codes.image_bits(sorted_, channels, 2) - spec.num_points * (
        3 * spec.bits_cholesky + channels * spec.bits_color
    )
    numbers = np.concatenate([stored["cholesky"], stored["color"]], axis=-1).reshape(points, -1)
    # One byte per code and one number after the other, which general-purpose compressors like better than bits.
    plain = np.concatenate([stored["mean"].reshape(points, 2), numbers], axis=-1).T.astype(np.uint8).tobytes()
    return {
        "written": 8 * arrays[packed.BITS].size / points,
        "kept": packed_codes.image_bits(kept, channels, 2) / spec.num_points,
        "entropy": position / spec.num_points + sum(entropy(column) for column in numbers.T),
        "zlib": 8 * min(len(zlib.compress(x, 9)) for x in (plain, arrays[packed.BITS].tobytes())) / points,
        "lzma": 8 * min(len(lzma.compress(x, preset=9)) for x in (plain, arrays[packed.BITS].tobytes())) / points,
    }


def entropy(codes: np.ndarray) -> float:
    """Returns the bits per code of an ideal coder that knows how often each occurs."""
    share = np.bincount(codes) / codes.size
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum())


def rows(images: jax.Array, points: int, steps: int, layouts: Sequence[tuple[int, int, int]]) -> list[dict[str, Any]]:
    """Fits the images in every way with so many steps."""
    found = []

    def add(method: str, layout: tuple[int, ...] | None, codec: Codec, params: Any, seconds: float) -> None:
        row: dict[str, Any] = {"method": method, "points": points, "steps": steps, "layout": layout}
        row |= quality(codec, params, images) | {"seconds": seconds}
        if layout:
            row["bits"] = bits_per_gaussian(codec, params)
        else:
            row["bits"] = {"written": 8 * codec.nbytes(params) / (len(images) * points)}
        found.append(row)
        print(f"{steps} steps, {method} {layout or ''}: {row['psnr']:.2f} dB, {seconds:.0f} s", file=sys.stderr)

    bfloat16 = codec_of(GaussianSpec(images_per_class=len(images), num_points=points), images)
    add("bfloat16", None, bfloat16, *fitted(bfloat16, images, steps))
    exact = codec_of(GaussianSpec(images_per_class=len(images), num_points=points, dtype="float32"), images)
    params, seconds = fitted(exact, images, steps)
    add("float32", None, exact, params, seconds)
    for layout in layouts:
        spec = layout_spec(layout, images, points)
        add("rounded at the end", layout, codec_of(spec, images), packed.from_gaussians(params, spec), seconds)
        for method, how in TRAINED.items():
            codec = codec_of(dataclasses.replace(spec, **how), images)  # type: ignore[arg-type]
            add(method, layout, codec, *fitted(codec, images, steps))
    for place, name in enumerate(("position", "shape", "color")):
        for bits in ALONE:
            widths = [FINE] * 3
            widths[place] = bits
            spec = layout_spec((widths[0], widths[1], widths[2]), images, points)
            codec = codec_of(spec, images)
            quantized = packed.from_gaussians(params, spec)
            row = {"method": f"only {name} rounded", "points": points, "steps": steps, "layout": widths}
            found.append(row | quality(codec, quantized, images) | {"seconds": seconds})
    return found


def coded_rows(images: jax.Array, steps: int, coded: Sequence[tuple[int, int, float]]) -> list[dict[str, Any]]:
    """Fits the images with so many Gaussians, and bits of a coordinate and of a Gaussian, entropy-coded unless 0."""
    found = []
    for points, mean, gaussian in coded:
        spec = dataclasses.replace(layout_spec((mean, 7, 6), images, points), bits_gaussian=gaussian)
        codec = codec_of(spec, images)
        params, seconds = fitted(codec, images, steps)
        row = {"points": points, "bits_mean": mean, "bits_gaussian": gaussian, "steps": steps, "seconds": seconds}
        row |= quality(codec, params, images) | {"bytes": codec.nbytes(params) / len(images)}
        found.append(row)
        print(f"{points} x {gaussian:g} bits: {row['psnr']:.2f} dB, {row['bytes']:.1f} bytes", file=sys.stderr)
    return found


def coded_of(text: str) -> tuple[int, int, float]:
    """Reads ``17:7:38.9``."""
    try:
        points, mean, gaussian = text.split(":")
        return int(points), int(mean), float(gaussian)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected three numbers such as 17:7:38.9, found {text!r}") from None


def layout_spec(layout: tuple[int, int, int], images: jax.Array, points: int) -> PackedGaussianSpec:
    """Returns the packed codec of these images with so many bits of position, shape and color."""
    mean, cholesky, color = layout
    return PackedGaussianSpec(
        images_per_class=len(images), num_points=points, bits_mean=mean, bits_cholesky=cholesky, bits_color=color
    )


def layout_of(text: str) -> tuple[int, int, int]:
    """Reads ``8+7+6``."""
    parts = text.split("+")
    if len(parts) != 3 or not all(part.isdecimal() and 2 <= int(part) <= 16 for part in parts):
        raise argparse.ArgumentTypeError(f"expected three numbers from 2 to 16 such as 8+7+6, found {text!r}")
    return int(parts[0]), int(parts[1]), int(parts[2])


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=DATA, help="prepared TFDS directory")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--points", type=int, default=22)
    parser.add_argument("--steps", type=int, nargs="+", default=[300, 1000])
    parser.add_argument(
        "--layouts", nargs="+", type=layout_of, default=[layout_of(text) for text in LAYOUTS], metavar="P+L+C"
    )
    parser.add_argument(
        "--coded",
        nargs="+",
        type=coded_of,
        metavar="POINTS:P:BITS",
        help="instead: Gaussians per image, bits of a coordinate, and bits of a Gaussian; 0 = codes of fixed width",
    )
    parser.add_argument("--out", type=Path, default=record.RESULTS / "packed_psnr.json")
    args = parser.parse_args()
    images, name = sample(args.data, args.images)
    results = [
        row
        for steps in args.steps
        for row in (
            coded_rows(images, steps, args.coded) if args.coded else rows(images, args.points, steps, args.layouts)
        )
    ]
    record.write(args.out, results, seed=SEED, n=args.images, data=name, size=list(images.shape[1:]))


if __name__ == "__main__":
    exit_cleanly()(main)()
