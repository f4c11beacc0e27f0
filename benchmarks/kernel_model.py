"""What the GPU kernels should cost, without a GPU: instructions of the machine code times the work of fitted images.

    python -m benchmarks.kernel_model [--data DIR] [--out FILE]

The kernels are compiled and their loops disassembled. Real images are fitted, and the tiles that each Gaussian touches
and the pixels that its gather walks are counted. Instructions times counts, over the rate at which an H200 can issue
them, bound the time from below; so does the number of exponentials over the rate of the unit that computes them. The
bound ignores memory, latency and launches: it ranks the ways to cut the work, it does not foretell a timing.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import fit_psnr, machine_code, record
from gsdd_jax import fitting
from gsdd_jax.gaussians import to_pixels
from kernels import DEFAULT_CUTOFF, _splat_triton
from kernels.spec import SplatSpec
from train.errors import exit_cleanly

PIXELS = 128
SPEC = SplatSpec(height=PIXELS, width=PIXELS, supersample=2, cutoff=DEFAULT_CUTOFF)
# (Gaussians, images, steps): few steps, because the area that Gaussians cover settles early.
FITS = ((21, 8, 200), (54, 8, 200), (170, 8, 200), (682, 4, 80), (2730, 2, 40))
# Height, width and warps of a forward tile; lanes and warps of a gather.
TILES = ((4, 8, 1), (8, 8, 1), (8, 16, 1), (16, 16, 1), (8, 32, 1), (16, 16, 2), (16, 32, 2), (16, 16, 4))
GATHERS = ((32, 1), (64, 1), (128, 1), (128, 4), (256, 8), (512, 8))
# An H200: multiprocessors x schedulers, instructions of a warp per second and scheduler (1,980 MHz), cycles that 32
# exponentials keep the unit of a scheduler busy.
CAPABILITY, SCHEDULERS, CLOCK, EXP2_CYCLES = 90, 132 * 4, 1.98e9, 8
SEED = 0
OUT = record.RESULTS / "kernel_model.json"


def fitted(path: Path, points: int, count: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Fits ``count`` images and returns their centers and conics in pixels."""
    images, _ = fit_psnr.sample(path, count)
    codec = fit_psnr.codec_of(images, points, "clusters")
    state = fitting.init_fit(jax.random.key(SEED), images, codec=codec, steps=steps)
    run = jax.jit(lambda s, x: fitting.fit_steps(s, x, codec=codec, steps=steps, count=steps))
    centers, conics, _ = to_pixels(run(state, images)[0].params)
    return np.asarray(centers, np.float64), np.asarray(conics, np.float64)


def touched(centers: np.ndarray, conics: np.ndarray, height: int, width: int, slanted: bool) -> float:
    """Returns how many tiles a Gaussian touches, by its upright box alone or by its slanted lines as well."""
    reach = _splat_triton._reach(SPEC)
    x = np.arange(0, PIXELS, width) + width / 2
    y = np.arange(0, PIXELS, height)[:, None] + height / 2
    cx, cy = (centers[..., i, None, None] for i in range(2))
    p, r, s = (conics[..., i, None, None] for i in range(3))
    dx, dy, half_w, half_h = x - cx, y - cy, width / 2 - 0.25, height / 2 - 0.25
    touches = (abs(dx) <= reach * np.sqrt(1 + (r / s) ** 2) / p + half_w) & (abs(dy) <= reach / s + half_h)
    if slanted:
        touches &= abs(p * dx + r * dy) <= reach + p * half_w + abs(r) * half_h
    return float(touches.sum((-1, -2)).mean())


def walked(centers: np.ndarray, conics: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the pixels that each gather walks, those of the upright box instead, and those within reach."""
    reach = _splat_triton._reach(SPEC)
    (cx, cy), (p, r, s) = np.moveaxis(centers, -1, 0), np.moveaxis(conics, -1, 0)
    edge = 0.25

    def inside(center: np.ndarray, half: np.ndarray) -> np.ndarray:
        first, last = np.ceil(center - half + edge - 1), np.floor(center + half - edge)
        return np.maximum(np.minimum(last, PIXELS - 1) - np.maximum(first, 0) + 1, 0)

    rows, box = inside(cy, reach / s), inside(cx, reach * np.sqrt(1 + (r / s) ** 2) / p)
    strip = np.floor(2 * (reach / p + abs(r / p) * (0.5 - edge)) + 1 - 2 * edge) + 1
    y, x = np.mgrid[:PIXELS, :PIXELS] + 0.5
    within = [
        ((a * (x - u) + b * (y - v)) ** 2 + (c * (y - v)) ** 2 <= reach**2).sum()
        for (u, v), (a, b, c) in zip(centers[0], conics[0], strict=True)
    ]
    return {"walk": rows * np.minimum(strip, box), "box": rows * box, "ellipse": np.asarray(within, float)}


def bound_ms(issued: float, exponentials: float, gaussians: int) -> float:
    """Returns the least time for 1,000 images, given warp instructions and warp exponentials of a Gaussian."""
    return 1e6 * gaussians * max(issued, exponentials * EXP2_CYCLES) / (SCHEDULERS * CLOCK)


def forward_code() -> list[dict]:
    """Compiles a forward for each shape of tile."""
    rows = []
    for height, width, warps in TILES:
        tuning = _splat_triton.TUNING._replace(tile_height=height, tile_width=width, tile_warps=warps)
        launch = _splat_triton.forward_launch(SPEC, 1000, 170, 3, tuning)
        code = machine_code.compile(launch, ["float32"] * 4, CAPABILITY)
        hit, test = machine_code.loops(code)
        rows.append(
            {
                "tile": [height, width],
                "warps": warps,
                "registers": code.registers,
                "per_hit": hit.length,
                "per_list": test.length - hit.length,
                "exp2_per_hit": hit.operations["MUFU.EX2"],
            }
        )
    return rows


def backward_code() -> list[dict]:
    """Compiles a gather for each number of lanes and warps."""
    dtypes = (jnp.float32,) * 3
    launches = []
    for lanes, warps in GATHERS:
        tuning = _splat_triton.TUNING._replace(lanes=lanes, wide_lanes=lanes, wide_warps=warps)
        launches.append(_splat_triton.backward_launches(SPEC, 1000, 170, 3, dtypes, tuning)[warps > 1])
    rows = []
    for launch in launches:
        code = machine_code.compile(launch, ["float32"] * 5, CAPABILITY)
        step, gaussian = machine_code.loops(code)[:2]
        rows.append(
            {
                "lanes": launch.constants["LANES"],
                "warps": launch.warps,
                "registers": code.registers,
                "per_step": step.length,
                "per_gaussian": gaussian.length - step.length,
                "exp2_per_step": step.operations["MUFU.EX2"],
            }
        )
    return rows


def predict(points: int, sets: tuple[np.ndarray, np.ndarray], forward: list[dict], backward: list[dict]) -> dict:
    """Combines the counts of one setting with the code."""
    drawn = []
    for code in forward:
        (height, width), warps = code["tile"], code["warps"]
        hits = touched(*sets, height, width, slanted=True)
        lists = (PIXELS // height) * (PIXELS // width) * math.ceil(points / _splat_triton.LIST) / points
        issued = warps * (hits * code["per_hit"] + lists * code["per_list"])
        drawn.append(
            {
                "tile": code["tile"],
                "warps": warps,
                "tiles_touched": round(hits, 2),
                "tiles_touched_by_box": round(touched(*sets, height, width, slanted=False), 2),
                "exp2_share": round(hits * code["exp2_per_hit"] * warps * EXP2_CYCLES / issued, 2),
                "bound_ms": round(bound_ms(issued, hits * code["exp2_per_hit"] * warps, points), 3),
            }
        )
    pixels = walked(*sets)
    gathered = []
    for code in backward:
        steps = float(np.ceil(pixels["walk"] / code["lanes"]).mean())
        issued = code["warps"] * (steps * code["per_step"] + code["per_gaussian"])
        gathered.append(
            {
                "lanes": code["lanes"],
                "warps": code["warps"],
                "bound_ms": round(bound_ms(issued, steps * code["exp2_per_step"] * code["warps"], points), 3),
            }
        )
    wide = float((pixels["walk"] >= _splat_triton.TUNING.wide_area).mean())
    means = {f"pixels_{name}": round(float(value.mean()), 1) for name, value in pixels.items()}
    return {"gaussians": points, **means, "share_wide": round(wide, 3), "forward": drawn, "backward": gathered}


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernel_model", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--data", type=Path, default=fit_psnr.DATA, help="prepared TFDS directory (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE", help="JSON file to write")
    arguments = parser.parse_args(argv)
    forward, backward = forward_code(), backward_code()
    results = []
    for points, count, steps in FITS:
        results.append(predict(points, fitted(arguments.data, points, count, steps), forward, backward))
        print(results[-1], flush=True)
    path = record.write(
        arguments.out,
        {"forward_code": forward, "backward_code": backward, "per_1000_images": results},
        seed=SEED,
        n=max(count for _, count, _ in FITS),
        fits=FITS,
        pixels=PIXELS,
        capability=CAPABILITY,
        schedulers=SCHEDULERS,
        clock=CLOCK,
        exp2_cycles=EXP2_CYCLES,
    )
    print(f"wrote {path}")


if __name__ == "__main__":
    exit_cleanly()(main)()
