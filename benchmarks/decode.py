"""Loading and decoding of packed sets against bfloat16 ones of as many Gaussians.

    python -m benchmarks.decode [--out FILE]

A set is written, loaded (which unpacks the bits, once) and decoded, jitted. The repeats of both codecs alternate in one
process, so that whatever else the machine does hits both alike.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import gsdd_jax
from benchmarks import record
from benchmarks.splat import SEED, scene
from gsdd_jax import SynSet, codecs
from gsdd_jax.codecs import GaussianSpec, PackedGaussianSpec, packed
from train.errors import exit_cleanly

# (images, Gaussians per image, pixels per edge): the packed CIFAR-10 set of 12,288 bytes per class, and a part of the
# one of 196,608 for Imagenette.
SETTINGS = ((860, 22, 32), (64, 54, 128))
REPEATS = 15
OUT = record.RESULTS / "decode.json"


def sets(n: int, m: int, pixels: int) -> dict[str, SynSet]:
    """Returns the same Gaussians in both codecs."""
    g, _ = scene(n, m, pixels)
    found = {}
    for spec in (GaussianSpec(images_per_class=n, num_points=m), PackedGaussianSpec(images_per_class=n, num_points=m)):
        codec = codecs.make(spec, image_shape=(pixels, pixels, 3), num_classes=1)
        params = packed.from_gaussians(g, codec.spec) if isinstance(spec, PackedGaussianSpec) else g
        found[spec.name] = SynSet(codec, params, 1 << 30, ("all",))
    return found


def measure(n: int, m: int, pixels: int) -> dict[str, Any]:
    """Writes, loads and decodes; seconds of loading, milliseconds of decoding."""
    row: dict[str, Any] = {"images": n, "gaussians": m, "pixels": pixels, "load_s": {}, "decode": {}}
    decoders, images = {}, {}
    for name, synset in sets(n, m, pixels).items():
        with tempfile.TemporaryDirectory() as folder:
            synset.save(folder)
            gsdd_jax.load(folder)  # compiles what loading compiles
            began = time.perf_counter()
            loaded = gsdd_jax.load(folder)
            jax.block_until_ready(loaded.params)
            row["load_s"][name] = time.perf_counter() - began
        decode = jax.jit(loaded.codec.decode)
        images[name] = jax.block_until_ready(decode(loaded.params))
        decoders[name] = (decode, loaded.params)
    # They show the same, up to what few bits lose.
    row["largest_difference"] = float(np.abs(images["gaussian"] - images["packed_gaussian"]).max())
    times: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(REPEATS):
        for name, (decode, params) in decoders.items():
            began = time.perf_counter()
            jax.block_until_ready(decode(params))
            times[name].append(1e3 * (time.perf_counter() - began))
    row["decode"] = {name: {"min_ms": min(one), "median_ms": float(np.median(one))} for name, one in times.items()}
    return row


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    rows = [measure(*setting) for setting in SETTINGS]
    for row in rows:
        print(row)
    record.write(args.out, rows, seed=SEED, n=REPEATS)


if __name__ == "__main__":
    exit_cleanly()(main)()
