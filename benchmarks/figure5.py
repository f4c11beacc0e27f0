"""Time and memory of Gaussians and of SIREN decoders with equally many floats (GSDD, Figure 5); for `benchmarks.gpu`.

Both sweeps of the figure: resolutions at batch 32, and batches at 128 pixels. The Gaussians are drawn by the GPU
kernels where there is a GPU and by XLA as well; the SIRENs of DDiF run batched, with and without ``jax.checkpoint``.
"Forward+backward" takes the cotangent of the images as given and returns the images and the gradient of every
parameter. The SIRENs multiply at JAX's default precision, TF32 on recent GPUs: the fast choice, to their advantage.

Points that do not fit into the time or the memory are recorded as skipped; those that matter most come first.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import siren, timing
from gsdd_jax.gaussians import CHOLESKY_SHIFT, Gaussians
from gsdd_jax.render import render
from gsdd_jax.starts import EDGE_SPREAD

SEED = 0
CHANNELS = 3
# Numbers of one Gaussian: 2 of the mean, 3 of the shape, 3 of the color, opacity.
NUMBERS = 9
# Widths of the SIRENs by their floats per image; the Gaussians are as many as these floats hold. The most important
# budget first: it is Table 5's.
WIDTHS = {963: 20, 283: 10, 3523: 40, 2043: 30}
RESOLUTIONS = (32, 64, 128, 256, 512)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
BATCH = 32
PIXELS = 128
SERIES = ("gsdd", "siren", "gsdd_xla", "siren_checkpoint")
DIRECTIONS = ("forward", "forward+backward")
# Per function; with a dozen of them to a point, a sweep fits into minutes.
MEASURE_SECONDS = 0.2
# Standard deviation of the noise on the shapes of the Gaussians, relative to their size.
NOISE = 0.3


class Point(NamedTuple):
    """One abscissa of one curve of the figure."""

    floats: int
    batch: int
    pixels: int


def curves() -> list[str]:
    """Returns the series that differ on this platform: without a GPU, the kernels' is XLA's."""
    return [name for name in SERIES if jax.default_backend() == "gpu" or name != "gsdd_xla"]


def points(
    floats: Sequence[int] = tuple(WIDTHS),
    resolutions: Sequence[int] = RESOLUTIONS,
    batches: Sequence[int] = BATCHES,
    batch: int = BATCH,
    pixels: int = PIXELS,
) -> list[Point]:
    """Lists both sweeps, each point once: the first budget's two headline points, the rest of it, other budgets."""
    found = [Point(floats[0], batch, pixels), Point(floats[0], max(batches), pixels)]
    for budget in floats:
        found += [Point(budget, batch, r) for r in resolutions] + [Point(budget, b, pixels) for b in batches]
    return list(dict.fromkeys(found))


def gaussians(n: int, m: int, pixels: int, seed: int = SEED) -> Gaussians:
    """Makes Gaussians like those of fitted images, as `benchmarks.splat.scene` does, on the host: nothing compiles."""
    rng = np.random.default_rng(seed)
    spread = EDGE_SPREAD * np.sqrt(pixels**2 / (np.pi * m))
    shape = np.array([spread, 0, spread]) - np.array(CHOLESKY_SHIFT)
    return Gaussians(
        jnp.asarray(rng.uniform(-1, 1, (n, m, 2)), jnp.float32),
        jnp.asarray(shape + NOISE * spread * rng.standard_normal((n, m, 3)), jnp.float32),
        jnp.asarray(rng.uniform(0, 0.5, (n, m, CHANNELS)), jnp.float32),
        jnp.ones((n, m)),
        size=(pixels, pixels),
    )


def decoder(series: str, point: Point) -> tuple[Callable[[Any], jax.Array], Any]:
    """Returns the function that draws the images of a point, and its parameters."""
    if series.startswith("gsdd"):
        # Fitted at PIXELS and drawn at another resolution: L grows with it, the prefilter does not.
        g = gaussians(point.batch, point.floats // NUMBERS, PIXELS)
        backend = "xla" if series == "gsdd_xla" else "auto"
        return functools.partial(render, size=(point.pixels, point.pixels), backend=backend), g
    decode = siren.decode_checkpointed if series == "siren_checkpoint" else siren.decode
    params = siren.init(jax.random.key(SEED), point.batch, WIDTHS[point.floats])
    return functools.partial(decode, size=point.pixels), params


def directions(decode: Callable[[Any], jax.Array], params: Any, v: jax.Array) -> dict[str, timing.Timed]:
    """Returns what is timed: the images, and the images with the gradient for their cotangent ``v``."""

    def both(params: Any, v: jax.Array) -> tuple[jax.Array, Any]:
        images, pull = jax.vjp(decode, params)
        return images, pull(v)[0]

    return {"forward": timing.Timed(decode, params), "forward+backward": timing.Timed(both, params, v)}


def measure(point: Point, series: Sequence[str], deadline: timing.Deadline) -> list[dict[str, Any]]:
    """Times all series at one point; what fails or does not fit says why instead."""
    rng = np.random.default_rng(SEED)
    v = jnp.asarray(rng.standard_normal((point.batch, point.pixels, point.pixels, CHANNELS), np.float32))
    functions = {
        (name, direction): timed for name in series for direction, timed in directions(*decoder(name, point), v).items()
    }
    rows = {name: point._asdict() | {"series": name} for name in series}
    found: dict[str, Any]
    for (name, direction), timed in timing.compile_all(functions).items():
        if isinstance(timed, Exception):
            found = {"skipped": f"{type(timed).__name__}: {str(timed)[:300]}"}
        elif deadline.left() <= 0:
            found = {"skipped": "out of time", "memory": timed.memory()}
        elif not timing.fits(timed):
            found = {"skipped": "out of memory", "memory": timed.memory()}
        else:
            found = timed.measure(seconds=MEASURE_SECONDS)
        rows[name][direction] = found
    return list(rows.values())


def run(
    todo: Sequence[Point],
    deadline: timing.Deadline,
    *,
    series: Sequence[str],
    save: Callable[[dict[str, Any]], Any] = lambda results: None,
) -> dict[str, Any]:
    """Measures points until the time is over.

    Args:
        todo: The points, the most important first.
        deadline: When to stop; a point is not begun if one that takes the median so far would not fit.
        series: The curves.
        save: Called with the results so far after each point.

    Returns:
        ``rows``, one per point and series; ``speedups`` of ``gsdd`` over ``siren``; the ``skipped`` points.
    """
    results: dict[str, Any] = {"rows": [], "speedups": [], "skipped": []}
    took: list[float] = []
    for point in todo:
        if deadline.left() <= (statistics.median(took) if took else 0):
            results["skipped"].append(point._asdict())
            continue
        began = time.monotonic()
        rows = measure(point, series, deadline)
        took.append(time.monotonic() - began)
        results["rows"] += rows
        results["speedups"] += speedup(rows)
        save(results)
    save(results)
    return results


def speedup(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns how many times faster ``gsdd`` is than ``siren`` at one point, by their medians, if both were timed."""
    named = {row["series"]: row for row in rows}
    ratios = {
        direction: round(named["siren"][direction]["median_ms"] / named["gsdd"][direction]["median_ms"], 2)
        for direction in DIRECTIONS
        if all("median_ms" in named.get(name, {}).get(direction, {}) for name in ("siren", "gsdd"))
    }
    return [{key: rows[0][key] for key in Point._fields} | ratios] if ratios else []


def line(row: dict[str, Any]) -> str:
    """Formats a row for a terminal."""
    cells = [f"{row['floats']:5} floats, batch {row['batch']:4}, {row['pixels']:3} px  {row['series']:17}"]
    for direction in DIRECTIONS:
        found = row[direction]
        if "skipped" in found:
            cells.append(f"{found['skipped']:>30.30}")
        else:
            cells.append(f"{found['median_ms']:12.4f} ms {found['memory']['total'] / 2**20:9.1f} MiB")
    return "".join(cells)
