"""Time and memory of the renderer against plain autodiff of the dense formula.

    python -m benchmarks.splat [--out FILE]

Both draw the same Gaussians in one process; the repeats alternate, so that whatever else the machine does hits both
alike. The renderer runs as users run it, with its default cutoff; that both compute the same function is checked with
the cutoff off.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import record
from gsdd_jax.gaussians import Gaussians, to_pixels
from gsdd_jax.render import render
from gsdd_jax.starts import on_edges
from train.errors import exit_cleanly

# (images, Gaussians per image, pixels per edge): the paper's CIFAR-10 set at ipc 1, and a part of its 128-pixel ones.
SETTINGS = ((300, 22, 32), (16, 170, 128))
CHANNELS = 3
SUPERSAMPLE = 2
WARM_UP = 2
REPEATS = 15
SEED = 0
# Share of the larger of 1 and the largest value; both run in float32, in different orders of summation.
TOLERANCES = {"forward": 1e-5, "backward": 1e-4, "forward+backward": 1e-4}
# One gray level of an 8-bit display is 1/255: the default cutoff must stay below half of it.
CUTOFF_TOLERANCE = 1 / 512
OUT = record.RESULTS / "splat.json"


def dense(g: Gaussians) -> jax.Array:
    """Draws Gaussians ``[n, m]``, each on every sample, by Eq. 2 and 4 of the paper; derivatives are JAX's own."""
    height, width = g.size
    centers, conics, colors = to_pixels(g)
    y = (jnp.arange(height * SUPERSAMPLE) + 0.5) / SUPERSAMPLE
    x = (jnp.arange(width * SUPERSAMPLE) + 0.5) / SUPERSAMPLE
    dx = x - centers[..., 0, None, None]
    dy = y[:, None] - centers[..., 1, None, None]
    p, r, s = (conics[..., i, None, None] for i in range(3))
    weights = jnp.exp(-0.5 * (p * p * dx * dx + 2 * p * r * dx * dy + (r * r + s * s) * dy * dy))
    shape = (*weights.shape[:2], height, SUPERSAMPLE, width, SUPERSAMPLE)
    return jnp.einsum("nmyx,nmc->nyxc", weights.reshape(shape).mean((3, 5)), colors)


def factored(g: Gaussians) -> jax.Array:
    """Does the same with the quadratic form as a sum of squares, as the splat operator has it: fewer operations."""
    height, width = g.size
    centers, conics, colors = to_pixels(g)
    y = (jnp.arange(height * SUPERSAMPLE) + 0.5) / SUPERSAMPLE
    x = (jnp.arange(width * SUPERSAMPLE) + 0.5) / SUPERSAMPLE
    dx = x - centers[..., 0, None]
    dy = y - centers[..., 1, None]
    p, r, s = (conics[..., i, None] for i in range(3))
    weights = jnp.exp(-0.5 * (((p * dx)[..., None, :] + (r * dy)[..., :, None]) ** 2 + ((s * dy) ** 2)[..., :, None]))
    shape = (*weights.shape[:2], height, SUPERSAMPLE, width, SUPERSAMPLE)
    return jnp.einsum("nmyx,nmc->nyxc", weights.reshape(shape).mean((3, 5)), colors)


def scene(n: int, m: int, pixels: int) -> tuple[Gaussians, jax.Array]:
    """Makes Gaussians as wide as those of a fit, stretched and turned by noise, and a cotangent of their images."""
    key_image, key_start, key_noise, key_v = jax.random.split(jax.random.key(SEED), 4)
    images = jax.random.uniform(key_image, (n, pixels, pixels, CHANNELS))
    g = on_edges(key_start, images, m)
    spread = 0.6 * np.sqrt(pixels**2 / (np.pi * m))
    noise = 0.3 * spread * jax.random.normal(key_noise, g.cholesky.shape)
    g = Gaussians(g.mean, g.cholesky + noise, g.color, g.opacity, size=g.size)
    return g, jax.random.normal(key_v, images.shape)


class Counted:
    """A jitted function that counts its traces."""

    def __init__(self, function: Callable[[Gaussians, jax.Array], Any]):
        self.traces = 0

        def traced(g: Gaussians, v: jax.Array) -> Any:
            self.traces += 1
            return function(g, v)

        self.jitted = jax.jit(traced)

    def __call__(self, g: Gaussians, v: jax.Array) -> Any:
        """Runs and waits for the result."""
        return jax.block_until_ready(self.jitted(g, v))


def directions(draw: Callable[[Gaussians], jax.Array]) -> dict[str, Counted]:
    """Returns what is timed.

    These are the images; the gradient of their sum weighted with ``v`` for every leaf, which does without the images;
    and both the sum and its gradient, as every loss that is not linear in the images needs them.
    """

    def loss(g: Gaussians, v: jax.Array) -> jax.Array:
        return jnp.sum(draw(g) * v)

    return {
        "forward": Counted(lambda g, v: draw(g)),
        "backward": Counted(jax.grad(loss)),
        "forward+backward": Counted(jax.value_and_grad(loss)),
    }


def largest_difference(ours: Any, theirs: Any) -> float:
    """Returns the largest difference of two pytrees, relative to the larger of 1 and the leaf's largest value."""

    def one(a: jax.Array, b: jax.Array) -> float:
        return float(jnp.max(jnp.abs(a - b)) / jnp.maximum(1.0, jnp.max(jnp.abs(b))))

    return max(jax.tree.leaves(jax.tree.map(one, ours, theirs)))


def compare(n: int, m: int, pixels: int) -> dict:
    """Checks that both agree, then times both directions of both, interleaved."""
    g, v = scene(n, m, pixels)
    functions = {"render": directions(render), "dense": directions(dense), "factored": directions(factored)}
    exact = directions(functools.partial(render, cutoff=0.0))
    difference = {}
    for direction, limit in TOLERANCES.items():
        difference[direction] = largest_difference(exact[direction](g, v), functions["factored"][direction](g, v))
        if not difference[direction] <= limit:
            raise AssertionError(f"{direction}: render and the dense formula differ by {difference[direction]}")
    moved = float(jnp.max(jnp.abs(functions["render"]["forward"](g, v) - exact["forward"](g, v))))
    if not moved <= CUTOFF_TOLERANCE:
        raise AssertionError(f"the default cutoff moves a pixel by {moved}")

    seconds: dict[tuple[str, str], list[float]] = {
        (name, direction): [] for direction in TOLERANCES for name in functions
    }
    for repeat in range(-WARM_UP, REPEATS):
        for (name, direction), times in seconds.items():
            start = time.perf_counter()
            functions[name][direction](g, v)
            if repeat >= 0:
                times.append(time.perf_counter() - start)

    rows = {}
    for direction in TOLERANCES:
        measured: dict[str, dict[str, Any]] = {}
        for name in functions:
            function, times = functions[name][direction], seconds[name, direction]
            if function.traces != 1:
                raise AssertionError(f"{name} {direction}: traced {function.traces} times, expected once")
            memory = function.jitted.lower(g, v).compile().memory_analysis()
            measured[name] = {
                "median_ms": round(1e3 * float(np.median(times)), 3),
                "min_ms": round(1e3 * min(times), 3),
                "temp_bytes": memory.temp_size_in_bytes if memory else None,
            }
        ratios = {
            f"speedup_{kind}{suffix}": round(measured[name][f"{kind}_ms"] / measured["render"][f"{kind}_ms"], 2)
            for kind in ("median", "min")
            for name, suffix in (("dense", ""), ("factored", "_over_factored"))
        }
        rows[direction] = measured | ratios | {"difference_without_cutoff": difference[direction]}
    return {"images": n, "gaussians": m, "pixels": pixels, "moved_by_default_cutoff": moved, "directions": rows}


def table(results: list[dict]) -> str:
    """Formats the results for a terminal."""
    heads = ("render ms", "dense ms", "ratio"), ("median / min",) * 3, ("render MiB", "dense MiB"), ("temporary",) * 2
    lines = [
        f"{'images x Gaussians, size':44}" + "".join(f"{head:>18}" for head in (*heads[0], *heads[2])),
        f"{'':44}" + "".join(f"{head:>18}" for head in (*heads[1], *heads[3])),
    ]
    for result in results:
        label = f"{result['images']} x {result['gaussians']}, {result['pixels']} px"
        for direction, row in result["directions"].items():
            times = [f"{row[name]['median_ms']:.1f} / {row[name]['min_ms']:.1f}" for name in ("render", "dense")]
            ratio = f"{row['speedup_median']:.1f} / {row['speedup_min']:.1f}"
            memory = [
                "-" if row[name]["temp_bytes"] is None else f"{row[name]['temp_bytes'] / 2**20:.0f}"
                for name in ("render", "dense")
            ]
            lines.append(f"{label:26}{direction:18}" + "".join(f"{cell:>18}" for cell in (*times, ratio, *memory)))
            label = ""
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.splat", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=OUT, metavar="FILE", help="JSON file to write (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    results = [compare(*setting) for setting in SETTINGS]
    print(table(results))
    path = record.write(
        arguments.out, results, seed=SEED, n=REPEATS, supersample=SUPERSAMPLE, channels=CHANNELS, warm_up=WARM_UP
    )
    print(f"wrote {path}")


if __name__ == "__main__":
    exit_cleanly()(main)()
