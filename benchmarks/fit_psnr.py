"""PSNR against steps when real images are fitted (GSDD, Tables 5 and 16), and what the cutoff costs.

    python -m benchmarks.fit_psnr [--data DIR] [--points 21 107 170 682] [--starts growth] [--images 64]

The images are a fixed, seeded sample of the training split; the same for every setting. Results of several calls merge
into one file by (points, start, steps).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import record
from gsdd_jax import codecs, data, fitting, starts
from gsdd_jax.codecs import Codec, GaussianSpec
from train.errors import exit_cleanly

SEED = 0
DATA = record.ROOT.parent / "shared" / "data" / "imagenette128" / "1.0.0"
REPORTED = (1, 50, 100, 200, 300, 500, 700, 1000, 2000, 3000, 5000)
# Candidates for kernels.DEFAULT_CUTOFF; it must move no pixel of a fitted image by more than 1/512.
CUTOFFS = (1 / 255, 1 / 512, 1e-3, 5e-4, 2e-4, 1e-4, 5e-5, 1e-5)


def sample(path: Path, count: int) -> tuple[jax.Array, str]:
    """Returns ``count`` images of the training split in [0,1], chosen by ``SEED``, and the set's name."""
    records, _, _ = data.records(data.DataSpec(source="tfds", path=str(path)))
    if not 0 < count <= len(records):
        raise ValueError(f"--images: expected 1 to {len(records)}, those of the training split, found {count}")
    chosen = np.sort(np.random.default_rng(SEED).choice(len(records), count, replace=False))
    return jnp.asarray(np.stack([records[int(i)]["image"] for i in chosen]), jnp.float32) / 255, path.parent.name


def codec_of(images: jax.Array, points: int, start: str) -> Codec:
    """Returns a Gaussian codec whose set is exactly these images."""
    spec = GaussianSpec(images_per_class=images.shape[0], num_points=points, start=start)  # type: ignore[arg-type]
    return codecs.make(spec, image_shape=images.shape[1:], num_classes=1)


def curve(images: jax.Array, points: int, start: str, steps: int) -> dict:
    """Fits the images and returns PSNR of the stored set against steps."""
    codec = codec_of(images, points, start)
    begin = jax.jit(lambda key, x: fitting.init_fit(key, x, codec=codec, steps=steps))
    advance = jax.jit(lambda s, x, n: fitting.fit_steps(s, x, codec=codec, steps=steps, count=n), donate_argnums=0)

    @jax.jit
    def measure(state: fitting.FitState, x: jax.Array) -> jax.Array:
        """Of what the last step drew: not all Gaussians are there from the start."""
        if codec.draft is None:
            return fitting.psnr(codec.decode(state.params), x)
        return fitting.psnr(codec.draft.decode(state.params, (state.step - 1) / steps), x)

    state = jax.block_until_ready(begin(jax.random.key(SEED), images))
    done, seconds, rows = 0, 0.0, []
    for until in [s for s in REPORTED if s <= steps]:
        began = time.perf_counter()
        state, _ = jax.block_until_ready(advance(state, images, until - done))
        seconds += time.perf_counter() - began
        done = until
        psnr = np.asarray(measure(state, images))
        rows.append({"step": done, "psnr": float(psnr.mean()), "psnr_std": float(psnr.std(ddof=1))})
        print(
            f"{points} points, {start}: step {done}, {psnr.mean():.2f} dB, {seconds:.0f} s", file=sys.stderr, flush=True
        )
    return {
        "points": points,
        "start": start,
        "steps": steps,
        "curve": rows,
        "seconds": seconds,
        "cutoff": cutoff_costs(state.params, images, points, start),
    }


def cutoff_costs(params: object, images: jax.Array, points: int, start: str) -> dict[str, float]:
    """Returns the largest change of any pixel of the fitted images, in units of 1/512, for each candidate cutoff."""

    def draw(cutoff: float) -> np.ndarray:
        spec = dataclasses.replace(codec_of(images, points, start).spec, cutoff=cutoff)
        codec = codecs.make(spec, image_shape=images.shape[1:], num_classes=1)
        return np.asarray(jax.jit(codec.decode)(params))

    # 1e-7 stands for no cutoff: below float32's resolution of 1, and still allows tiles to be skipped.
    exact = draw(1e-7)
    return {f"{cutoff:.2g}": float(np.abs(draw(cutoff) - exact).max() * 512) for cutoff in CUTOFFS}


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=DATA, help="prepared TFDS directory")
    parser.add_argument("--points", type=int, nargs="+", default=[21, 107, 170, 682])
    parser.add_argument("--starts", nargs="+", default=["growth"], choices=list(starts.START))
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=record.RESULTS / "fit_psnr.json")
    args = parser.parse_args()
    images, name = sample(args.data, args.images)
    known = json.loads(args.out.read_text())["results"] if args.out.exists() else []
    for points in args.points:
        for start in args.starts:
            result = record.environment() | curve(images, points, start, args.steps) | {"images": len(images)}
            same = ("points", "start", "steps", "images")
            known = [old for old in known if any(old[key] != result[key] for key in same)] + [result]
            known.sort(key=lambda r: [r[key] for key in same])
            record.write(args.out, known, seed=SEED, n=args.images, data=name, size=list(images.shape[1:]))


if __name__ == "__main__":
    exit_cleanly()(main)()
