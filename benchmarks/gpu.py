"""Everything that only a GPU can show, in one command and under eight minutes.

    python -m benchmarks.gpu [--out DIR] [--seconds N] [--only PHASE ...] [--images FILE.npz] [--smoke]

The phases, each written to DIR/PHASE.json when it ends: ``environment`` (the device, and its floors measured),
``correctness`` (values, gradients and bits of the kernels), ``tune`` (their tile shapes and the like), ``headline``
(the claims, against the floors), ``table16`` and ``figure5``. Time that a phase does not need goes to those after it.
The exit code is 1 if a check failed; its numbers are in the file, and the phases after it still run.

``--smoke`` runs all of it at tiny sizes. Without a GPU the XLA path then stands in for the kernels; the files say so.

Beyond jax[cuda13], flax, optax and orbax-checkpoint it takes
``pip install jax-triton annotated-types safetensors pillow filelock``.
The images of Table 16 take tensorflow-datasets and array-record to read, or one file that was packed where these are:

    python -m benchmarks.table16 --pack images.npz
    python -m benchmarks.gpu --images images.npz
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import correctness, figure5, record, table16, timing
from benchmarks.correctness import SMOKE_SHAPE, Case, scene
from kernels import splat
from train.errors import exit_cleanly

SEED = 0
SECONDS = 460.0
# Shares of the time, in seconds of the default.
PHASES = {"environment": 15, "correctness": 100, "tune": 105, "headline": 50, "table16": 110, "figure5": 80}

# (images, Gaussians per image, pixels per edge). The first is the headline's: the unculled exponentials of its four
# samples per pixel take 1.7 ms at the 4.2 T/s of an H200, for which all targets are.
HEADLINE = (2000, 54, 128)
HEADLINE_TARGET_MS = 1.7
SHAPES = (HEADLINE, (1000, 170, 128), (1000, 2730, 128), (1000, 21, 128), (1000, 682, 128))
# So many of them also through XLA, which takes seconds on the larger ones.
SHAPES_XLA = 2
# Three large launches, one of large images, and three so small that the forward halves its tiles.
TUNED = (
    *((1000, 170, 128), (1000, 2730, 128), HEADLINE),
    *((32, 107, 512), (32, 107, 128), (300, 22, 32), (1, 107, 128)),
)
SPEEDUP_TARGET = 30.0
# Gaussians of a scene whose samples are counted, to tell how much of the image they reach.
COUNTED = 300
TUNE_SECONDS = 0.08
# So many calls to a launch of the host, where no more pixels than these are drawn: it takes longer than the kernel.
IN_A_ROW, IN_A_ROW_PIXELS = 16, 1 << 20
HEADLINE_SECONDS = 1.0

FORWARD_TUNINGS: list[dict[str, int]] = [
    *(
        # Else a small launch would halve the tile.
        {"tile_height": height, "tile_width": width, "tile_warps": warps, "tile_programs": 0}
        for height, width in ((4, 16), (8, 8), (8, 16), (16, 16), (16, 32))
        for warps in (1, 2, 4)
        # At least a pixel for each lane.
        if height * width >= 32 * warps
    ),
    *({"tile_programs": programs} for programs in (0, 1 << 11, 1 << 13, 1 << 14)),
]
BACKWARD_TUNINGS: list[dict[str, int]] = [
    *({"lanes": lanes} for lanes in (64, 128)),
    # The last leaves nothing to the second launch.
    *({"wide_area": area} for area in (1024, 8192, 1 << 30)),
    *({"wide_lanes": lanes, "wide_warps": warps} for lanes, warps in ((128, 4), (256, 4), (512, 8))),
    *({"programs": programs} for programs in (1 << 14, 1 << 18)),
]


class Setup(NamedTuple):
    """What all phases share.

    Attributes:
        smoke: Tiny sizes.
        images: File of packed images for Table 16, if any.
        data: TFDS directory for Table 16.
        commit: Commit of the code, if it was named.
    """

    smoke: bool
    images: Path | None = None
    data: Path = table16.DATA
    commit: str | None = None

    @property
    def stand_in(self) -> bool:
        """Whether the XLA path stands in for the kernels."""
        return jax.default_backend() != "gpu"

    @property
    def backend(self) -> str:
        """The backend under test."""
        return "xla" if self.stand_in else "triton"


# Returns the results, and a line for each check that failed.
Outcome = tuple[dict[str, Any], list[str]]
Save = Callable[[Any], Any]


def environment(setup: Setup, deadline: timing.Deadline, save: Save) -> Outcome:
    """Describes the device and measures its floors; clocks are read right after, while it is warm."""
    floors, state = timing.floors(setup.smoke), timing.device_state()
    copied, exp2 = floors["copy_bytes_per_second"], timing.exp2_floor(setup.smoke)
    print(f"{jax.devices()[0].device_kind}: copy {copied / 1e12:.3f} TB/s, exp2 {exp2 / 1e12:.3f} T/s")
    return {"floors": floors, "device_bytes": timing.device_bytes(), "nvidia_smi": state}, []


def tune(setup: Setup, deadline: timing.Deadline, save: Save) -> Outcome:
    """Times the kernels with other settings, at several shapes."""
    rows: list[dict[str, Any]] = []
    for shape in [SMOKE_SHAPE] if setup.smoke else TUNED:
        one = scene(*shape)
        for direction, tunings in (("forward", FORWARD_TUNINGS), ("backward", BACKWARD_TUNINGS)):
            row: dict[str, Any] = {"shape": list(shape), "direction": direction}
            rows.append(row)
            if deadline.left() <= 0:
                row["skipped"] = "out of time"
                continue
            tried: list[dict[str, int]] = [{}, *tunings[: 1 if setup.smoke else None]]
            row |= sweep(setup, one, direction, tried, deadline)
            if "best" in row:
                print(
                    f"{one.name} {direction}: default {row['default_ms']:.4f} ms, "
                    f"best {row['best_ms']:.4f} ms with {row['best']}"
                )
            save({"rows": rows})
    return {"rows": rows, "overall": overall(rows)}, []


def sweep(
    setup: Setup, one: Case, direction: str, tried: list[dict[str, int]], deadline: timing.Deadline
) -> dict[str, Any]:
    """Times one direction at one shape with each of the settings; the first is the default.

    Settings that come to the same launches, such as a least number of programs that any tile gives, are timed once.
    """
    arrays = [jnp.asarray(x) for x in (*one.operands, *([one.cotangent()] if direction == "backward" else []))]
    made = [tuned(setup, one, direction, fields) for fields in tried]
    times = IN_A_ROW if len(arrays[0]) * one.height * one.width <= IN_A_ROW_PIXELS else 1
    functions = {launches: timing.Timed(function, *arrays, in_a_row=times) for launches, function in made}
    found: dict[str, dict[str, Any]] = {}
    for launches, timed in timing.compile_all(functions).items():
        if isinstance(timed, Exception):
            found[launches] = {"error": f"{type(timed).__name__}: {str(timed)[:300]}"}
        elif deadline.left() <= 0:
            found[launches] = {"skipped": "out of time"}
        else:
            found[launches] = timed.measure(seconds=TUNE_SECONDS)
    rows = [{"tuning": fields} | found[launches] for fields, (launches, _) in zip(tried, made, strict=True)]
    if "median_ms" not in rows[0]:
        return {"tried": rows}
    best = min((row for row in rows if "median_ms" in row), key=lambda row: row["median_ms"])
    return {"default_ms": rows[0]["median_ms"], "best_ms": best["median_ms"], "best": best["tuning"], "tried": rows}


def tuned(setup: Setup, one: Case, direction: str, fields: dict[str, int]) -> tuple[str, Callable[..., Any]]:
    """Returns a direction with some settings other than the default, after the launches that they come to."""
    if setup.stand_in:
        draw = functools.partial(splat, height=one.height, width=one.width, backend="xla")
        return str(fields), draw if direction == "forward" else lambda *args: jax.vjp(draw, *args[:3])[1](args[3])
    from kernels import _splat_triton

    tuning, (n, m, c) = _splat_triton.TUNING._replace(**fields), one.operands[2].shape
    if direction == "forward":
        launches: Any = _splat_triton.forward_launch(one.spec, n, m, c, tuning)
        return str(launches), functools.partial(_splat_triton.forward, one.spec, tuning=tuning)
    centers, conics, colors = (x.dtype for x in one.operands)
    launches = _splat_triton.backward_launches(one.spec, n, m, c, (centers, conics, colors), tuning)
    return str(launches), functools.partial(_splat_triton.backward, one.spec, tuning=tuning)


def overall(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Returns the settings of each direction by their time relative to the default: geometric mean over the shapes."""
    ranked = {}
    for direction in ("forward", "backward"):
        ratios: dict[str, list[float]] = {}
        for row in rows:
            if row["direction"] == direction and "default_ms" in row:
                for one in row["tried"]:
                    if "median_ms" in one:
                        ratios.setdefault(str(one["tuning"]), []).append(one["median_ms"] / row["default_ms"])
        means = sorted((float(np.exp(np.mean(np.log(values)))), name, len(values)) for name, values in ratios.items())
        ranked[direction] = [{"tuning": name, "relative_time": mean, "shapes": shapes} for mean, name, shapes in means]
    return ranked


def headline(setup: Setup, deadline: timing.Deadline, save: Save) -> Outcome:
    """Times the operator at the shapes of the claims, and says which floor it meets."""
    rows: list[dict[str, Any]] = []
    shapes = [SMOKE_SHAPE] if setup.smoke else SHAPES
    todo = [(shape, (setup.backend, dtype)) for shape in shapes for dtype in (jnp.float32, jnp.bfloat16)]
    # Last, because it is slow: time that runs out then costs only the comparison.
    if not setup.stand_in:
        todo += [(shape, ("xla", jnp.float32)) for shape in shapes[:SHAPES_XLA]]
    for shape, (backend, dtype) in todo:
        row: dict[str, Any] = {"shape": list(shape), "backend": backend, "dtype": jnp.dtype(dtype).name}
        rows.append(row)
        if deadline.left() <= 0:
            row["skipped"] = "out of time"
            continue
        one = scene(*shape, dtype)
        row |= against_floors(setup, one, backend)
        save({"rows": rows})
        print(
            f"{one.name} {row['backend']} {row['dtype']}: forward {row['forward']['min_ms']:.4f} ms "
            f"({row['fraction_of_unculled_floor']:.2f} of the unculled floor, {row['fraction_of_floor']:.2f} of the "
            f"floor, {row['bound']}), with backward {row['forward+backward']['min_ms']:.4f} ms, "
            f"temporaries {row['forward+backward']['memory']['temp'] / 2**20:.1f} MiB"
        )
    kernel = next((row for row in rows if row["backend"] == setup.backend and "forward" in row), None)
    target: dict[str, Any] = {"device": timing.TARGET_DEVICE, "forward_ms": HEADLINE_TARGET_MS, "shape": list(HEADLINE)}
    if kernel and not setup.smoke:
        target["met"] = kernel["forward"]["median_ms"] <= HEADLINE_TARGET_MS
    over = [
        f"{row['shape']} {row['dtype']}: memory beyond inputs, outputs and one copy of the gradients"
        for row in rows
        if row["backend"] == "triton" and not row.get("memory_ok", True)
    ]
    return {"target": target, "rows": rows}, over


def against_floors(setup: Setup, one: Case, backend: str) -> dict[str, Any]:
    """Times both directions of a case and puts the forward beside its floors.

    The *unculled* floor is one power of two for each Gaussian at each sample of the image, at the measured rate. The
    *floor* is the larger of those that are above the cutoff and of writing the images.
    """
    arrays = [jnp.asarray(x) for x in one.operands]
    draw = functools.partial(splat, height=one.height, width=one.width, backend=backend)

    def both(centers: jax.Array, conics: jax.Array, colors: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
        images, pull = jax.vjp(draw, centers, conics, colors)
        return images, pull(v)

    functions = {
        "forward": timing.Timed(draw, *arrays),
        "forward+backward": timing.Timed(both, *arrays, jnp.asarray(one.cotangent())),
    }
    row: dict[str, Any] = {}
    for direction, timed in functions.items():
        row[direction] = timed.compile().measure(seconds=0.1 if setup.smoke else HEADLINE_SECONDS)
    row["memory_ok"] = row["forward+backward"]["memory"]["temp"] <= sum(x.nbytes for x in one.operands)

    n, m = one.operands[0].shape[:2]
    samples = n * m * one.height * one.width * one.supersample**2
    shares = reached(one, tile(setup, one))
    rate, bandwidth = timing.exp2_floor(setup.smoke), timing.floors(setup.smoke)["copy_bytes_per_second"]
    unculled = 1e3 * samples / rate
    parts = {
        "exponentials above the cutoff": unculled * shares["above_cutoff"],
        "writing the images": 1e3 * row["forward"]["memory"]["output"] / bandwidth,
    }
    took = row["forward"]["median_ms"]
    bound = max(parts, key=lambda name: parts[name])
    return row | {
        "unculled_floor_ms": unculled,
        "floors_ms": parts,
        "bound": bound,
        "shares_of_samples": shares,
        "fraction_of_unculled_floor": unculled / took,
        "fraction_of_floor": parts[bound] / took,
        # Of the hardware's rate, by the samples of the tiles that the kernel does draw.
        "fraction_of_exp2_rate": unculled * shares["drawn"] / took,
    }


def tile(setup: Setup, one: Case) -> tuple[int, int]:
    """Returns rows and columns of the forward kernel's tiles; the stand-in has none, so all of the image counts."""
    if setup.stand_in:
        return one.height, one.width
    from kernels import _splat_triton

    constants = _splat_triton.forward_launch(one.spec, *one.operands[2].shape).constants
    return constants["TILE_H"], constants["TILE_W"]


def reached(one: Case, tile: tuple[int, int]) -> dict[str, float]:
    """Returns which share of (Gaussian, sample) pairs is above the cutoff, and which lies in tiles that have some.

    Counted on a few Gaussians. A kernel that bounds tiles conservatively draws somewhat more than the second.
    """
    centers, conics = (np.asarray(x, np.float32).reshape(-1, x.shape[-1]) for x in one.operands[:2])
    chosen = np.random.default_rng(SEED).choice(len(centers), min(COUNTED, len(centers)), replace=False)
    s = one.supersample
    x = (np.arange(one.width * s, dtype=np.float32) + 0.5) / s
    y = (np.arange(one.height * s, dtype=np.float32)[:, None] + 0.5) / s
    above, drawn = 0, 0
    for (cx, cy), (p, r, q) in zip(centers[chosen], conics[chosen], strict=True):
        w = np.exp(-0.5 * ((p * (x - cx) + r * (y - cy)) ** 2 + (q * (y - cy)) ** 2))
        row, column = np.nonzero(w >= one.cutoff)
        above += len(row)
        tiles = np.unique(np.stack([row // (s * tile[0]), column // (s * tile[1])]), axis=1).shape[1]
        drawn += tiles * tile[0] * tile[1] * s * s
    pairs = len(chosen) * x.size * y.size
    return {"above_cutoff": above / pairs, "drawn": drawn / pairs}


def checks(setup: Setup, deadline: timing.Deadline, save: Save) -> Outcome:
    """Compares the kernels with XLA, and with themselves."""
    return correctness.run(deadline, backend=setup.backend, smoke=setup.smoke, save=save)


def fitting(setup: Setup, deadline: timing.Deadline, save: Save) -> Outcome:
    """Runs Table 16; on synthetic images where there are no others."""
    if setup.smoke or setup.images or setup.data.is_dir():
        images, source = table16.load(setup.images, setup.data, smoke=setup.smoke)
    else:
        images, source = table16.synthetic(1000, 128), {"source": "synthetic"}

    def save_rows(rows: list[dict[str, Any]]) -> None:
        print(table16.line(rows[-1]))
        save({"images": source, "rows": rows})

    rows = table16.run(
        images,
        [4] if setup.smoke else table16.POINTS,
        deadline,
        steps=3 if setup.smoke else table16.STEPS,
        repeats=2,
        save=save_rows,
    )
    failures = [f"{row['points']} Gaussians: {row['error']}" for row in rows if "error" in row]
    failures += [f"{row['points']} Gaussians: fits differ" for row in rows if row.get("repeats_bit_equal") is False]
    return {"images": source, "rows": rows}, failures


def figure(setup: Setup, deadline: timing.Deadline, save: Save) -> Outcome:
    """Runs Figure 5 with what time is left."""
    todo = [figure5.Point(283, 2, 16)] if setup.smoke else figure5.points()
    results = figure5.run(todo, deadline, series=figure5.curves(), save=save)
    print("\n".join(figure5.line(row) for row in results["rows"]))
    where: dict[str, Any] = {"floats": 963, "pixels": figure5.PIXELS}
    at = [row for row in results["speedups"] if where.items() <= row.items()]
    target = where | {"device": timing.TARGET_DEVICE, "forward+backward": SPEEDUP_TARGET}
    # What did not fit into the time has no ratio.
    if ratios := [row["forward+backward"] for row in at[:2] if "forward+backward" in row]:
        target["met"] = min(ratios) >= SPEEDUP_TARGET
    print(f"speed-up over SIREN: {at or results['speedups']}")
    return results | {"target": target}, []


RUNNERS: dict[str, Callable[[Setup, timing.Deadline, Save], Outcome]] = {
    "environment": environment,
    "correctness": checks,
    "tune": tune,
    "headline": headline,
    "table16": fitting,
    "figure5": figure,
}


def run_phase(name: str, setup: Setup, deadline: timing.Deadline, folder: Path) -> list[str]:
    """Runs a phase and writes its file; returns its failures. A phase that breaks off is a failure, too."""
    print(f"== {name}, at most {deadline.left():.0f} s", flush=True)
    began = time.monotonic()

    def save(results: Any, **more: Any) -> None:
        record.write(
            folder / f"{name}.json",
            results,
            seed=SEED,
            n=timing.REPEATS,
            phase=name,
            smoke=setup.smoke,
            stand_in=setup.stand_in,
            backend=setup.backend,
            commit=setup.commit,
            phase_seconds=round(time.monotonic() - began, 1),
            device_peak_bytes=timing.device_peak(),
            **more,
        )

    latest: list[Any] = [None]

    def keep(results: Any) -> None:
        latest[0] = results
        save(results, complete=False)

    complete = True
    try:
        results, failures = RUNNERS[name](setup, deadline, keep)
    except Exception:
        complete, results, failures = False, latest[0], [traceback.format_exc()]
    save(results, complete=complete, failures=failures)
    for failure in failures:
        print(f"FAILED {name}: {failure}", file=sys.stderr, flush=True)
    return failures


def refusal(setup: Setup, folder: Path) -> str | None:
    """Returns what is wrong with the arguments, if anything, so that no time of a GPU is lost on it."""
    if setup.stand_in and not setup.smoke:
        platform = jax.default_backend()
        return f"needs a CUDA device; JAX runs on {platform}; --smoke runs everything at tiny sizes on the XLA path"
    if not setup.stand_in and importlib.util.find_spec("jax_triton") is None:
        return "needs jax-triton, without which XLA would be timed in place of the kernels: pip install jax-triton"
    if setup.smoke and record.RESULTS in [folder.resolve(), *folder.resolve().parents]:
        return f"--out: smoke results do not belong in {record.RESULTS}; name another folder"
    if setup.images and not setup.images.is_file():
        return f"--images: no such file: {setup.images}; python -m benchmarks.table16 --pack FILE.npz makes one"
    if not setup.smoke and not setup.commit and record.environment()["commit"] is None:
        return "--commit: git cannot tell the commit of this code; name it, results are kept with theirs"
    return None


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(PHASES), metavar="PHASE", help=f"of {', '.join(PHASES)}")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time limit (default: %(default)s)")
    parser.add_argument("--images", type=Path, metavar="FILE", help="packed images of benchmarks.table16")
    parser.add_argument("--data", type=Path, default=table16.DATA, metavar="DIR", help="TFDS directory of the images")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes; without a GPU the XLA path stands in")
    parser.add_argument("--commit", metavar="ID", help="commit of this code, where git cannot tell")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: a folder of the device, in $OUT if it is set")
    args = parser.parse_args(argv)
    whole = timing.Deadline(args.seconds)
    parent = os.environ.get("OUT") or (record.ROOT / "runs" / "smoke" if args.smoke else record.RESULTS)
    folder = args.out or Path(parent, timing.device_label())
    setup = Setup(smoke=args.smoke, images=args.images, data=args.data, commit=args.commit)
    if why := refusal(setup, folder):
        print(why, file=sys.stderr)
        return 2
    names = [name for name in PHASES if not args.only or name in args.only]
    failures: list[str] = []
    for i, name in enumerate(names):
        share = PHASES[name] / sum(PHASES[later] for later in names[i:])
        failures += run_phase(name, setup, timing.Deadline(share * whole.left()), folder)
    print(f"wrote {folder}; {len(failures)} failed checks; {args.seconds - whole.left():.0f} s")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(exit_cleanly()(main)())
