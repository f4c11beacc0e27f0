"""How well codecs hold videos at equal bytes, and how fast they decode them.

    python -m benchmarks.video [--bytes 128 256 512] [--videos 64] [--steps 300] [--only NAME ...]

The first training videos of `moving_digits`, 8 frames of 16x16. Each codec has what is left open as large as the bytes
allow, and its own rates; what starts at its optimum is not fitted. Real files are of the best quality that fits,
headers not counted. Results of several calls merge into one file by (bytes, codec, steps, videos).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import record
from gsdd_jax import codecs, compressed, data, fitting
from gsdd_jax.codecs import (
    Codec,
    DownscaleSpec,
    FrequencySpec,
    Gaussian3DSpec,
    GaussianSpec,
    NeuralFieldSpec,
    PackedGaussian3DSpec,
    PackedGaussianSpec,
    PaletteSpec,
    StaticDynamicSpec,
)
from gsdd_jax.errors import InputError
from train.errors import exit_cleanly

SEED = 0
REPEATS = 10
# Of each codec the specs to try, from the largest on; a number of Gaussians that is left open is as large as fits.
WAYS: dict[str, Callable[[int], Iterator[Any]]] = {
    "packed_gaussian3d": lambda n: iter([PackedGaussian3DSpec(images_per_class=n)]),
    "gaussian3d": lambda n: iter([Gaussian3DSpec(images_per_class=n)]),
    "packed_gaussian, frame by frame": lambda n: iter([PackedGaussianSpec(images_per_class=n)]),
    "gaussian, frame by frame": lambda n: iter([GaussianSpec(images_per_class=n)]),
    "neural_field": lambda n: (
        NeuralFieldSpec(images_per_class=n, width=w, layers=2, dtype="bfloat16") for w in range(40, 1, -1)
    ),
    "frequency, frame by frame": lambda n: (
        FrequencySpec(images_per_class=n, coefficients=k, dtype="bfloat16") for k in range(256, 0, -1)
    ),
    "static_dynamic, uint8": lambda n: (
        StaticDynamicSpec(images_per_class=n, factor=f, dtype="uint8") for f in (2, 3, 4, 5, 8, 16, 0)
    ),
    "downscale, uint8": lambda n: (
        DownscaleSpec(images_per_class=n, factor=f, dtype="uint8") for f in (1, 2, 4, 8) if n % f**2 == 0
    ),
    "palette": lambda n: (PaletteSpec(images_per_class=n, bits=b, shared="set") for b in (4, 3, 2, 1)),
}


def codec_of(name: str, shape: tuple[int, ...], videos: int, nbytes: int) -> Codec | None:
    """Returns the codec of so many videos of a shape in so many bytes each, or None where nothing fits."""
    for spec in WAYS[name](videos):
        try:
            return codecs.make(spec, image_shape=shape, num_classes=1, bytes_per_class=videos * nbytes)
        except InputError:
            continue
    return None


def measure(codec: Codec, videos: jax.Array, steps: int) -> dict[str, Any]:
    """Fits the videos; returns the PSNR of the stored set, its bytes and the speed of decoding."""
    begin = jax.jit(lambda key, x: fitting.init_fit(key, x, codec=codec, steps=steps))
    advance = jax.jit(lambda state, x, n: fitting.fit_steps(state, x, codec=codec, steps=steps, count=n))
    state, began = begin(jax.random.key(SEED), videos), time.perf_counter()
    if not codec.fitted_by_init:
        state, _ = jax.block_until_ready(advance(state, videos, steps))
    seconds = time.perf_counter() - began
    params = codec.dequantize(codec.quantize(state.params))
    decode = jax.jit(codec.decode)
    drawn, times = jax.block_until_ready(decode(params)), []
    for _ in range(REPEATS):
        began = time.perf_counter()
        jax.block_until_ready(decode(params))
        times.append(time.perf_counter() - began)
    found = np.asarray(fitting.psnr(drawn, videos))
    return {
        "psnr": float(found.mean()),
        "psnr_std": float(found.std(ddof=1)),
        "bytes": codec.nbytes(params) / len(videos),
        "num_points": getattr(codec.spec, "num_points", None),
        "fit_s": seconds,
        "frames_per_s": drawn.shape[0] * drawn.shape[1] / min(times),
    }


def measure_files(format: str, videos: np.ndarray, nbytes: int) -> dict[str, Any] | None:
    """Returns the PSNR and the bytes of real videos as files, at the highest quality that fits, or None."""
    best = None
    for quality in range(0, 101, 5):
        read, sizes = zip(*(compressed.compress(video, format, quality) for video in videos), strict=True)
        if np.mean(sizes) > nbytes:
            break
        found = np.asarray(fitting.psnr(np.stack(read), videos))
        best = {"psnr": float(found.mean()), "psnr_std": float(found.std(ddof=1)), "bytes": float(np.mean(sizes))}
        best["quality"] = quality
    return best


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--bytes", type=int, nargs="+", default=[128, 256, 512], help="per video")
    parser.add_argument("--videos", type=int, default=64)
    parser.add_argument("--steps", type=int, default=300)
    names = [*WAYS, *compressed.OPTIONS]
    parser.add_argument("--only", nargs="+", default=names, choices=names, metavar="NAME")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "video.json")
    args = parser.parse_args()
    if args.videos < 2 or args.steps < 1 or min(args.bytes) < 1:
        parser.error("expected --videos of at least 2, --steps and --bytes of at least 1")
    videos = data.load(data.DataSpec(source="moving_digits")).train_images[: args.videos]
    known = json.loads(args.out.read_text())["results"] if args.out.exists() else []
    for nbytes in args.bytes:
        for name in args.only:
            if name in WAYS:
                codec = codec_of(name, videos.shape[1:], len(videos), nbytes)
                found = codec and measure(codec, jnp.asarray(videos, jnp.float32) / 255, args.steps)
            else:
                found = measure_files(name, videos, nbytes)
            if not found:
                continue
            row = {"budget": nbytes, "codec": name, "steps": args.steps, "videos": len(videos), **found}
            print(row, file=sys.stderr, flush=True)
            same = ("budget", "codec", "steps", "videos")
            known = [old for old in known if any(old[key] != row[key] for key in same)] + [row]
            known.sort(key=lambda row: (row["budget"], -row["psnr"]))
            record.write(args.out, known, seed=SEED, n=len(videos), size=list(videos.shape[1:]))


if __name__ == "__main__":
    exit_cleanly()(main)()
