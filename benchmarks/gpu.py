"""Everything that only a GPU can show, in one command and stages by their worth.

    python -m benchmarks.gpu --data DIR [--minutes N] [--out DIR] [--stage NAME] [--commit ID] [--smoke]

Seconds that each may take, written to NAME.json in a folder of the device: ``correctness`` 60 (values, gradients and
bits of the kernels), ``table16`` 120 (its fits, and the operator against the floors of the device), ``tune`` 120 (tile
shapes and the like), ``figure5`` 120, and ``distill`` what is left: accuracy against seconds. With fewer ``--minutes``
those at the end are left out. Each has a process of its own, which is killed if it overruns, so that it cannot take
others along, and says how far it came before it does; the same command again goes on with what is not complete. The
exit code is 1 if a check failed or a stage broke off.

``--smoke`` runs all of it at tiny sizes. Without a GPU the XLA path then stands in for the kernels; the files say so.

The images come from ``python -m benchmarks.offline DIR``, with the packages that machines without network may lack
beyond jax[cuda13], flax, optax, orbax-checkpoint and triton; it prints the command to run there.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import correctness, end_to_end, figure5, offline, record, table16, timing
from benchmarks.correctness import SMOKE_SHAPE, Case, scene
from kernels import splat
from train import rundir
from train.errors import UserError, exit_cleanly

SEED = 0
MINUTES = 9.5
# Those before the last take no more, and none is begun with less.
SECONDS = {"correctness": 60, "table16": 120, "tune": 120, "figure5": 120, "distill": 120}
# What a stage may take beyond its time, to start and to end what it has begun, before it is killed.
GRACE = 20

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
HEADLINE_SECONDS = 0.5

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
    """What all stages share.

    Attributes:
        smoke: Tiny sizes.
        data: Folder of packed images.
    """

    smoke: bool
    data: Path | None = None

    @property
    def stand_in(self) -> bool:
        """Whether the XLA path stands in for the kernels."""
        return jax.default_backend() != "gpu"

    @property
    def backend(self) -> str:
        """The backend under test."""
        return "xla" if self.stand_in else "triton"

    def images(self, name: str) -> offline.Encoded:
        """Returns packed images, such as ``cifar10_jpeg-train``."""
        assert self.data
        return offline.unpack(self.data / f"{name}.npz")


# Returns the results, and a line for each check that failed.
Outcome = tuple[dict[str, Any], list[str]]
Save = Callable[[Any], Any]


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
    """Times the operator at the shapes of the claims, and says which floor of the device, measured first, it meets."""
    floors = timing.floors(setup.smoke)
    print(
        f"copy {floors['copy_bytes_per_second'] / 1e12:.3f} TB/s, exp2 {timing.exp2_floor(setup.smoke) / 1e12:.3f} T/s"
    )
    rows: list[dict[str, Any]] = []
    shapes = [SMOKE_SHAPE] if setup.smoke else SHAPES
    dtypes = [jnp.float32, jnp.bfloat16][: 1 if setup.smoke else None]
    todo = [(shape, (setup.backend, dtype)) for shape in shapes for dtype in dtypes]
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
        save({"floors": floors, "rows": rows})
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
    return {"floors": floors, "target": target, "rows": rows}, over


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


def fits(setup: Setup, deadline: timing.Deadline, save: Save) -> Outcome:
    """Runs the rows of Table 16 that have a target, the headline, and the other rows."""
    if setup.smoke:
        images, sha256 = table16.synthetic(2, 16), None
    else:
        encoded = setup.images("imagenette128-train")
        images, sha256 = encoded.decode(), encoded.fingerprint()
    results: dict[str, Any] = {"sha256": sha256, "rows": []}
    failures: list[str] = []

    def rows(points: Sequence[int]) -> None:
        for row in table16.run(images, points, deadline, steps=3 if setup.smoke else table16.STEPS):
            results["rows"].append(row)
            print(table16.line(row))
            save(results)
            if "error" in row or row.get("repeats_bit_equal") is False:
                failures.append(f"{row['points']} Gaussians: {row.get('error', 'fits differ')}")

    targets = len(table16.TARGET_SECONDS)
    rows([4] if setup.smoke else table16.POINTS[:targets])
    results["headline"], over = headline(setup, deadline, lambda found: save(results | {"headline": found}))
    rows([] if setup.smoke else table16.POINTS[targets:])
    return results, failures + over


def figure(setup: Setup, deadline: timing.Deadline, save: Save) -> Outcome:
    """Runs Figure 5, the points that matter most first."""
    todo = [figure5.Point(283, figure5.BATCH, 8)] if setup.smoke else figure5.points()
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


def distill(setup: Setup, deadline: timing.Deadline, save: Save) -> Outcome:
    """Distills CIFAR-10 for as long as there is time, and tests what comes out."""
    if setup.smoke:
        sizes, sha256 = end_to_end.TINY, None
        train = test = table16.synthetic(4, 8), np.arange(4) % 2
    else:
        sizes, encoded = end_to_end.FULL, [setup.images(f"cifar10_jpeg-{split}") for split in ("train", "test")]
        train, test = ((one.decode(), one.labels) for one in encoded)
        sha256 = [one.fingerprint() for one in encoded]
    spec = {
        name: dataclasses.asdict(value) for name, value in sizes._asdict().items() if dataclasses.is_dataclass(value)
    }
    results: dict[str, Any] = {"sha256": sha256, "sizes": spec, "rows": []}
    for row in end_to_end.run(train, test, deadline, sizes):
        results["rows"].append(row)
        print(end_to_end.line(row), flush=True)
        save(results)
    return results, []


STAGES: dict[str, Callable[[Setup, timing.Deadline, Save], Outcome]] = {
    "correctness": checks,
    "table16": fits,
    "tune": tune,
    "figure5": figure,
    "distill": distill,
}


def run_stage(name: str, setup: Setup, seconds: float, folder: Path, commit: str | None = None) -> int:
    """Runs a stage in this process and writes its file; returns the exit code. One that breaks off has failed, too."""
    began, latest = time.monotonic(), None

    def save(results: Any, *, complete: bool = False, failures: Sequence[str] = ()) -> None:
        nonlocal latest
        latest = results
        record.write(
            folder / f"{name}.json",
            results,
            seed=SEED,
            n=timing.REPEATS,
            commit=commit,
            complete=complete,
            failures=list(failures),
            smoke=setup.smoke,
            stand_in=setup.stand_in,
            backend=setup.backend,
            stage_seconds=round(time.monotonic() - began, 1),
            device_bytes=timing.device_bytes(),
            device_peak_bytes=timing.device_peak(),
            # Clocks, while it is warm.
            nvidia_smi=timing.device_state() if complete else None,
        )

    complete = True
    try:
        results, failures = STAGES[name](setup, timing.Deadline(seconds), save)
    except Exception:
        complete, results, failures = False, latest, [traceback.format_exc()]
    save(results, complete=complete, failures=failures)
    for failure in failures:
        print(f"FAILED {name}: {failure}", file=sys.stderr, flush=True)
    return int(bool(failures))


def run_all(setup: Setup, minutes: float, folder: Path, commit: str | None) -> int:
    """Runs each stage in a process of its own; returns the exit code."""
    whole, code = timing.Deadline(60 * minutes), 0
    for name, seconds in SECONDS.items():
        if (known := done(folder / f"{name}.json", setup.smoke, commit)) is not None:
            print(f"== {name}: done before")
            code |= int(bool(known))
            continue
        if whole.left() < seconds:
            print(f"== {name} and what follows: left out, {whole.left():.0f} s left")
            break
        given = whole.left() - GRACE if name == "distill" else min(seconds, whole.left() - GRACE)
        print(f"== {name}: {given:.0f} s", flush=True)
        command = [sys.executable, "-m", "benchmarks.gpu", "--stage", name, "--minutes", f"{given / 60:.3f}"]
        command += ["--out", str(folder), *(["--smoke"] if setup.smoke else [])]
        command += [*(["--data", str(setup.data)] if setup.data else []), *(["--commit", commit] if commit else [])]
        try:
            ended = subprocess.run(command, timeout=given + GRACE).returncode
        except subprocess.TimeoutExpired:
            ended = 1
            print(f"FAILED {name}: killed after {given + GRACE:.0f} s", file=sys.stderr, flush=True)
        if ended == 2:
            return 2
        code |= int(ended != 0)
    print(f"wrote {folder}; {60 * minutes - whole.left():.0f} s")
    return code


def done(file: Path, smoke: bool, commit: str | None) -> list[str] | None:
    """Returns the failed checks of a stage that this code has completed, else None."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    own, changed = rundir.commit()
    settings = found["settings"]
    same = found["commit"] == (own or commit) and not changed and settings["smoke"] == smoke
    return list(settings["failures"]) if same and settings["complete"] else None


def refusal(setup: Setup, folder: Path, commit: str | None) -> str | None:
    """Returns what is wrong with the arguments, if anything, so that no time of a GPU is lost on it."""
    if setup.smoke and record.RESULTS in [folder.resolve(), *folder.resolve().parents]:
        return f"--out: smoke results do not belong in {record.RESULTS}; name another folder"
    if not setup.smoke:
        for file in offline.packed(setup.data or Path("DIR")):
            if not file.is_file():
                return f"--data: no such file: {file}; python -m benchmarks.offline DIR makes it"
        if not commit and rundir.commit()[0] is None:
            return "--commit: git cannot tell the commit of this code; name it, results are kept with theirs"
    return None


def no_device(setup: Setup) -> str | None:
    """Returns what this process lacks to run a stage; asking for it takes memory of the device."""
    if setup.stand_in and not setup.smoke:
        platform = jax.default_backend()
        return f"needs a CUDA device; JAX runs on {platform}; --smoke runs everything at tiny sizes on the XLA path"
    if not setup.stand_in and importlib.util.find_spec("jax_triton") is None:
        return "needs jax-triton, without which XLA would be timed in place of the kernels: pip install jax-triton"
    return None


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of all of it (default: %(default)s)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="images packed by benchmarks.offline")
    parser.add_argument("--stage", choices=list(STAGES), help="this one alone, in this process")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes; without a GPU the XLA path stands in")
    parser.add_argument("--commit", metavar="ID", help="commit of this code, where git cannot tell")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: a folder of the device in the results")
    args = parser.parse_args(argv)
    if not args.minutes > 0:
        raise UserError(f"--minutes: expected more than 0, found {args.minutes:g}")
    setup = Setup(args.smoke, args.data)
    parent = record.ROOT / "runs" / "smoke" if args.smoke else record.RESULTS
    folder = args.out or parent / timing.device_label()
    if why := (no_device(setup) if args.stage else None) or refusal(setup, folder, args.commit):
        print(why, file=sys.stderr)
        return 2
    if args.stage:
        return run_stage(args.stage, setup, 60 * args.minutes, folder, args.commit)
    return run_all(setup, args.minutes, folder, args.commit)


if __name__ == "__main__":
    sys.exit(exit_cleanly()(main)())
