"""What gradient descent makes of FreD's coefficients when it fits images, in the two scales that a DCT comes in.

    python -m benchmarks.frequency_gradient [--data DIR] [--per-class 100] [--coefficients 321] [--steps 1000]

GSDD's Table 5 gives FreD 15.69 dB at 963 floats per image, 321 in each channel. As the DCT is linear and its rows are
orthogonal, the best coefficients are those of the images themselves, and the error of any others is known without
drawing a pixel. So every optimizer and rate can be tried: from standard normal numbers, with one mask per class, in the
orthonormal basis and in the unnormalized one of the authors' code, whose coefficients are up to four times the image's
side larger, on images in [0, 1] and on those normalized to mean 0 of each channel and deviation 1 of all.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import record
from benchmarks.fit_psnr import DATA, SEED
from gsdd_jax import data
from gsdd_jax.codecs import frequency
from train.errors import exit_cleanly

PUBLISHED = 15.69
# Factors of ten, as in the paper, whose ends are not stated; the loss is the mean square error of each image.
RATES = {"adam": [10.0**i for i in range(-3, 5)], "sgd": [10.0**i for i in range(-1, 10)]}
MOMENTUM = 0.5


def unnormalized(places: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns how much larger coefficients at ``places`` are if the DCT-II is 2 * sum(x * cos) along each axis."""
    h, w = size
    y, x = np.divmod(places, w)
    return np.sqrt(np.where(y == 0, 4 * h, 2 * h) * np.where(x == 0, 4 * w, 2 * w)).astype(np.float32)


def errors(
    target: jax.Array, missing: jax.Array, scale: jax.Array, *, optimizer: str, rate: float, steps: int, pixels: int
) -> jax.Array:
    """Fits coefficients by gradient descent on the mean square error of each image.

    Args:
        target: Orthonormal coefficients of the images, ``[n, coefficients, c]``.
        missing: Squares of the coefficients that are not kept, summed for each image: ``[n]``.
        scale: Trained numbers per orthonormal coefficient, ``[n, coefficients]``.
        optimizer: ``adam``, or ``sgd`` with FreD's momentum.
        rate: Of learning.
        steps: Of the optimizer.
        pixels: Numbers of an image.

    Returns:
        The mean square errors ``[n]`` at the end.
    """
    method = optax.adam(rate) if optimizer == "adam" else optax.sgd(rate, momentum=MOMENTUM)
    start = jax.random.normal(jax.random.key(SEED), target.shape)

    def error(params: jax.Array) -> jax.Array:
        # Parseval: the sum of squares over pixels.
        return (jnp.sum((params / scale[..., None] - target) ** 2, axis=(1, 2)) + missing) / pixels

    def step(carry: Any, _: None) -> tuple[Any, None]:
        params, state = carry
        updates, state = method.update(jax.grad(lambda p: error(p).sum())(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (start, method.init(start)), length=steps)
    return error(params)


def rows(images: jax.Array, labels: np.ndarray, *, coefficients: int, steps: int) -> list[dict[str, Any]]:
    """Returns PSNR in dB, the mean over ``images`` ``[n, h, w, c]`` in [0, 1], for each way to fit them."""
    n, h, w, c = images.shape
    found = []
    for normalized in (False, True):
        mean = images.mean((0, 1, 2)) if normalized else jnp.zeros(c)
        deviation = images.std() if normalized else jnp.ones(())
        spectra = frequency.forward((images - mean) / deviation).reshape(n, h * w, c)
        groups = jnp.stack([spectra[labels == label] for label in np.unique(labels)])
        index = frequency.largest(groups, (h, w), coefficients, "variance")
        places = jnp.repeat(index, groups.shape[1], axis=0)
        spectra = groups.reshape(n, h * w, c)
        target = jnp.take_along_axis(spectra, places[..., None], axis=1)
        missing = jnp.sum(spectra**2, axis=(1, 2)) - jnp.sum(target**2, axis=(1, 2))

        def psnr(error: jax.Array, deviation: jax.Array = deviation) -> float:
            # Back in the scale of [0, 1].
            return float(jnp.mean(-10 * jnp.log10(error * deviation**2)))

        best = psnr(missing / (h * w * c))
        for basis in ("orthonormal", "unnormalized"):
            larger = unnormalized(np.asarray(places), (h, w)) if basis == "unnormalized" else np.ones(places.shape)
            for optimizer, rates in RATES.items():
                run = jax.jit(
                    lambda target, missing, scale, rate, optimizer=optimizer: errors(
                        target, missing, scale, optimizer=optimizer, rate=rate, steps=steps, pixels=h * w * c
                    )
                )
                scale = jnp.asarray(larger, jnp.float32)
                curve = {f"{rate:g}": psnr(run(target, missing, scale, rate)) for rate in rates}
                row = {"normalized": normalized, "basis": basis, "optimizer": optimizer}
                # JSON has no NaN; a rate that diverges has no PSNR.
                finite = {rate: value if np.isfinite(value) else None for rate, value in curve.items()}
                found.append(row | {"closed_form": best, "psnr": finite})
                print(row, curve, file=sys.stderr, flush=True)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.frequency_gradient", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--data", type=Path, default=DATA, help="prepared TFDS directory")
    parser.add_argument("--per-class", type=int, default=100)
    parser.add_argument("--coefficients", type=int, default=321)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=record.RESULTS / "compare" / "frequency_gradient.json")
    args = parser.parse_args(argv)
    images, labels, _ = data.records(data.DataSpec(source="tfds", path=str(args.data), per_class=args.per_class))
    stack = jnp.asarray(np.stack([images[i]["image"] for i in range(len(images))]), jnp.float32) / 255
    found = rows(stack, labels, coefficients=args.coefficients, steps=args.steps)
    settings = {"per_class": args.per_class, "coefficients": args.coefficients, "steps": args.steps}
    settings |= {"data": args.data.parent.name, "size": list(stack.shape[1:]), "published": PUBLISHED}
    print(f"wrote {record.write(args.out, found, seed=SEED, n=len(stack), **settings)}")


if __name__ == "__main__":
    exit_cleanly()(main)()
