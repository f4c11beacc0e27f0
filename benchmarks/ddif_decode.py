"""DDiF's decode: a Python loop over the images, as in the authors' code, against all images at once.

    python -m benchmarks.ddif_decode [--images 100] [--size 128] [--repeats 5] [--out FILE]

Networks of 963 floats (3 sine layers of 20). ``op_by_op`` runs a loop of uncompiled array operations, which is what the
authors' PyTorch code does; ``jitted_loop`` launches one compiled program per image, chosen by a traced index;
``batched`` is the codec's decode and ``remat`` its variant that keeps no layers. The repeats of all four alternate in
one process, so that a busy machine slows all alike.

Target: batched at least 50 times as fast as a Python loop. What batching saves is the time of launches, so that is for
a GPU to show; a CPU is busy with sines either way, and one image at a time stays in its cache.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import record
from gsdd_jax import codecs
from gsdd_jax.codecs import neural_field
from train.errors import exit_cleanly

SEED = 0
LAYERS, WIDTH, OMEGA = 3, 20, 40.0
TARGET = 50.0


def variants(images: int, size: int) -> dict[str, Callable[[], jax.Array]]:
    """Returns the ways to decode the same ``images`` networks to ``[images, size, size, 3]``."""
    spec = codecs.NeuralFieldSpec(
        images_per_class=images, layers=LAYERS, width=WIDTH, omega=OMEGA, start="uniform", dtype="float32"
    )
    shape = (size, size, 3)
    codec = codecs.make(spec, image_shape=shape, num_classes=1)
    params = jax.jit(codec.init)(jax.random.key(SEED), jnp.zeros((images, *shape)))
    # As the authors keep them: one network after the other, not arrays of all.
    own = [jax.tree.map(lambda x, i=i: x[i : i + 1], params) for i in range(images)]
    batched = jax.jit(codec.decode)
    remat = jax.jit(lambda params: neural_field.draw_again(params, (size, size), spec))
    one = jax.jit(lambda network: neural_field.draw(network, (size, size), spec))

    def loop(draw: Callable[[Any], jax.Array]) -> jax.Array:
        return jnp.concatenate([draw(network) for network in own])

    return {
        "op_by_op": lambda: loop(lambda network: neural_field.draw(network, (size, size), spec)),
        "jitted_loop": lambda: loop(one),
        "batched": lambda: batched(params),
        "remat": lambda: remat(params),
    }


def measure(images: int, size: int, repeats: int) -> dict[str, Any]:
    """Times all variants in turns.

    Returns:
        For each, ``min_ms`` and ``median_ms`` of the whole set; how many times as fast ``batched`` is as each by the
        minima; and the largest difference of any pixel.
    """
    ways = variants(images, size)
    # Also the warm-up.
    drawn = {name: np.asarray(way()) for name, way in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            began = time.perf_counter()
            jax.block_until_ready(way())
            times[name].append(1e3 * (time.perf_counter() - began))
    best = {name: min(values) for name, values in times.items()}
    return {
        name: {
            "min_ms": best[name],
            "median_ms": float(np.median(times[name])),
            "batched_is_faster_by": best[name] / best["batched"],
            "difference": float(np.abs(drawn[name] - drawn["batched"]).max()),
        }
        for name in ways
    }


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark and writes the JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ddif_decode", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=record.RESULTS / "ddif_decode.json", metavar="FILE")
    args = parser.parse_args(argv)
    results = measure(args.images, args.size, args.repeats)
    for name, row in results.items():
        print(f"{name}: {row['min_ms']:.1f} ms, batched is {row['batched_is_faster_by']:.2f} times as fast", flush=True)
    settings = {"images": args.images, "size": args.size, "layers": LAYERS, "width": WIDTH, "target": TARGET}
    print(f"wrote {record.write(args.out, results, seed=SEED, n=args.repeats, **settings)}")


if __name__ == "__main__":
    exit_cleanly()(main)()
