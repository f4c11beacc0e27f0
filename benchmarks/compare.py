"""Every codec at equal bytes, in one table: how well it fits images, and what networks learn from what it distills.

    python -m benchmarks.compare fit [--data DIR] [--images 100] [--only NAME ...] [--start uniform]
    python -m benchmarks.compare accuracy [--only NAME ...] [--out FILE] [key=value ...]

``fit`` is Table 5 of GSDD: 963 floats per image in float32, and 1,926 bytes in whatever precision suits a codec. What
all images share is counted, so that fewer images than the paper's 1,000 weigh on codecs with shared parts. Where a
codec has several ways to spend its bytes, and for its learning rates, the best is chosen by a short fit; a start that
no step can better is reported as it is. All start from the images, as well as they can; ``--start uniform`` makes rows
of those that can also start as their authors' code does, which looks at no image.

``accuracy`` distills CIFAR-10 at 12,288 bytes per class by distribution matching, each codec in float32 and in smaller
precisions, from the same kind of fit to real images. Rates are chosen by the loss of short runs on the training set;
what is compared is the same run for all, in sizes for two CPU cores. Run directories are kept, so that an interrupted
comparison goes on where it was.

Rows of several calls, also of calls that run side by side with other codecs, merge into one file; those that are there
are not made again, and other settings need another file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import jax
import numpy as np
import optax

from benchmarks import record
from benchmarks.fit_psnr import SEED, sample
from benchmarks.packed_psnr import DATA
from gsdd_jax import codecs, data, fitting
from gsdd_jax.codecs import (
    Codec,
    CodecSpec,
    DownscaleSpec,
    FactorSpec,
    FrequencySpec,
    GaussianSpec,
    LatentSpec,
    MemorySpec,
    NeuralFieldSpec,
    PackedFrequencySpec,
    PackedGaussianSpec,
    SparseEpitomeSpec,
    SpectralSpec,
)
from train import config as configs
from train import distill, tune
from train import experiment as experiments
from train.errors import ConfigError, exit_cleanly
from train.progress import Progress

# GSDD, Table 5: floats of an image, those of DDiF with three layers of 20; bytes in float32, and in half of that.
FLOATS = 963
BUDGETS = {"float32": 4 * FLOATS, "bfloat16": 2 * FLOATS}
REPORTED = (100, 300, 1000)
# Choices are made after so many steps, with rates around a codec's own.
SHORT = 100
FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
SEEDS = 3
OUT = record.RESULTS / "compare"

# Accuracy: the rates of distillation around those that stand with each codec, compared after so many iterations, and
# those that follow while the best is at an end.
RATES = (0.3, 1.0, 3.0)
WIDER = (0.03, 0.1, 10.0, 30.0)
SHORT_ITERATIONS = 30
# Settings of a codec that are rates; the others that begin with lr are factors of lr.
RATE_FIELDS = ("lr", "lr_decoder")
CONFIG = "configs/cifar10_dm_ipc1_cpu.yaml"
# A quarter of the width and a fifth of the training set, for hours instead of days on two cores.
SIZES = [
    "network.width=32",
    "data.per_class=1000",
    "fit.steps=150",
    "objective.batch_real=128",
    "distill.iterations=150",
    "distill.schedule=cosine",
    "evaluate.steps=450",
]


class Way(NamedTuple):
    """A way to spend the bytes: a spec with one number open, as large as fits."""

    codec: str
    spec: Callable[[int], CodecSpec]
    most: int = 1


def ways(dtype: str, n: int, side: int) -> Iterator[Way]:
    """Yields the ways to store ``n`` images; ``dtype`` is the precision of those that have the choice."""
    one: dict[str, Any] = {"images_per_class": n, "dtype": dtype}
    yield Way("gaussian", lambda m: GaussianSpec(images_per_class=n, num_points=m, dtype=dtype), 2000)  # type: ignore[arg-type]
    if dtype != "float32":
        # A quarter of a pixel for positions; more Gaussians need finer shapes and colors.
        mean = 8 if side <= 32 else 10
        for rest in ((7, 6), (8, 7)):
            widths = {"bits_mean": mean, "bits_cholesky": rest[0], "bits_color": rest[1]}
            yield Way(
                "packed_gaussian",
                lambda m, widths=widths: PackedGaussianSpec(images_per_class=n, num_points=m, **widths),
                4000,  # type: ignore[misc]
            )
    for layers in (2, 3):
        for omega in (10.0, 40.0):
            shape: dict[str, Any] = {"layers": layers, "omega": omega, **one}
            yield Way("neural_field", lambda m, shape=shape: NeuralFieldSpec(width=m, **shape), 256)  # type: ignore[misc]
    yield Way("frequency", lambda m: FrequencySpec(coefficients=m, **one), side**2)
    if dtype != "float32":
        for bits in range(4, 9):
            coded: dict[str, Any] = {"images_per_class": n, "bits": bits}
            yield Way(
                "packed_frequency",
                lambda m, coded=coded: PackedFrequencySpec(coefficients=m, **coded),
                side**2,  # type: ignore[misc]
            )
    for factor in range(1, 33):
        if n % factor**2 == 0:
            for precision in (dtype,) if dtype == "float32" else (dtype, "uint8"):
                own: dict[str, Any] = one | {"factor": factor, "dtype": precision}
                yield Way("downscale", lambda m, own=own: DownscaleSpec(**own))  # type: ignore[misc]
    for factor in (1, 2, 4, 8):
        yield Way("memory", lambda m, factor=factor: MemorySpec(bases=m, factor=factor, **one), n)  # type: ignore[misc]
    for sets in (1, 2, 5, 10):
        for channels in (2, 3):
            if n % sets == 0:
                shape = {"matrices": sets, "rank_channels": channels, **one}
                yield Way(
                    "spectral",
                    lambda m, shape=shape: SpectralSpec(rank_height=m, rank_width=m, **shape),
                    side,  # type: ignore[misc]
                )
    for width, blocks, heads, tokens in ((32, 1, 2, 16), (96, 1, 3, 64), (32, 2, 4, 64)):
        net = {"patch": 4 if side <= 32 else 8, "width": width, "blocks": blocks, "heads": heads, "tokens": tokens}
        most = (side // net["patch"]) ** 2 * tokens
        yield Way("sparse_epitome", lambda m, net=net: SparseEpitomeSpec(nonzeros=m, **net, **one), most)  # type: ignore[misc]
    for styles in (2, 5):
        for channels in (1, 3):
            if n % styles == 0:
                shape = {"hallucinators": styles, "base_channels": channels, **one}
                yield Way("factor", lambda m, shape=shape: FactorSpec(**shape))  # type: ignore[misc]
    for width in (16, 32, 64):
        net = {"decoder": "small", "width": width, "sample": False, "images_per_class": n, "dtype": dtype}
        yield Way("latent", lambda m, net=net: LatentSpec(latent_dim=m, **net), 4096)  # type: ignore[misc]


def filled(way: Way, make: Callable[[CodecSpec], Codec]) -> tuple[Codec | None, str]:
    """Returns the codec with the largest number that fits, or None and why there is none."""
    refusal = ""

    def attempt(number: int) -> Codec | None:
        nonlocal refusal
        try:
            return make(way.spec(number))
        except ValueError as error:
            refusal = refusal or str(error)
            return None

    found, low, high = attempt(1), 1, way.most + 1
    if found is None:
        return None, refusal
    while high - low > 1:
        middle = (low + high) // 2
        codec = attempt(middle)
        low, high, found = (low, middle, found) if codec is None else (middle, high, codec)
    return found, refusal


def psnr_of(codec: Codec, images: jax.Array, *, seed: int, steps: int, factor: float) -> dict[str, Any]:
    """Fits and returns the PSNR as stored against steps, the seconds of all steps, and the memory of one."""
    tuned = codec._replace(fitter=lambda steps: optax.chain(codec.fitter(steps), optax.scale(factor)))
    begin = jax.jit(lambda key, x: fitting.init_fit(key, x, codec=tuned, steps=steps))
    measure = jax.jit(lambda p, x: fitting.psnr(codec.decode(codec.dequantize(codec.quantize(p))), x).mean())
    state = jax.block_until_ready(begin(jax.random.key(seed), images))
    began = time.perf_counter()
    state = jax.block_until_ready(begin(jax.random.key(seed), images))
    row: dict[str, Any] = {"start_seconds": time.perf_counter() - began, "psnr": {}}
    row["psnr"]["0"] = float(measure(state.params, images))
    if codec.fitted_by_init:
        return row
    advance = jax.jit(lambda s, x, count: fitting.fit_steps(s, x, codec=tuned, steps=steps, count=count))
    compiled = advance.lower(state, images, 1).compile()
    memory = compiled.memory_analysis()
    row["temporary_bytes"] = None if memory is None else int(memory.temp_size_in_bytes)
    done, seconds = 0, 0.0
    for until in [*(s for s in REPORTED if s < steps), steps]:
        began = time.perf_counter()
        state, _ = jax.block_until_ready(compiled(state, images, until - done))
        seconds += time.perf_counter() - began
        done = until
        row["psnr"][str(done)] = float(measure(state.params, images))
    return row | {"seconds": seconds}


def fit_row(codec: str, dtype: str, images: jax.Array, start: str | None = None) -> dict[str, Any]:
    """Chooses the settings of a codec, fits the images with three seeds, and returns the row of the table."""
    n, shape = len(images), images.shape[1:]
    other = {} if start is None else {"start": start}

    def make(spec: CodecSpec) -> Codec:
        spec = dataclasses.replace(spec, **other)
        return codecs.make(spec, image_shape=shape, num_classes=1, bytes_per_class=n * BUDGETS[dtype])

    row: dict[str, Any] = {"codec": codec, "precision": dtype, "images": n, "budget": BUDGETS[dtype]} | other
    tried: list[dict[str, Any]] = []
    best: tuple[float, Codec, float] | None = None

    def attempt(candidate: Codec, factor: float) -> None:
        nonlocal best
        # Both ends of a codec without steps are its start.
        last = list(psnr_of(candidate, images, seed=SEED, steps=SHORT, factor=factor)["psnr"].values())[-1]
        tried.append({"spec": dataclasses.asdict(candidate.spec), "factor": factor, "psnr": last})
        print(f"{codec} {dtype}, rates x {factor:g}: {last:.2f} dB, {candidate.spec}", file=sys.stderr, flush=True)
        if np.isfinite(last) and (best is None or last > best[0]):
            best = (last, candidate, factor)

    refusals = []
    for way in ways(dtype, n, shape[0]):
        if way.codec == codec:
            candidate, refusal = filled(way, make)
            if candidate is None:
                refusals.append(refusal)
            else:
                attempt(candidate, 1.0)
    if best is None:
        return row | {"refused": refusals[0] if refusals else "no finite fit"}
    chosen = best[1]
    if not chosen.fitted_by_init:
        for factor in FACTORS:
            if factor != 1.0:
                attempt(chosen, factor)
    factor = best[2]
    runs = [psnr_of(chosen, images, seed=SEED + i, steps=max(REPORTED), factor=factor) for i in range(SEEDS)]
    written = chosen.nbytes(jax.eval_shape(chosen.init, KEY, images))
    return row | {
        "spec": dataclasses.asdict(chosen.spec),
        "factor": factor,
        "bytes_per_image": written / n,
        "tried": tried,
        "runs": runs,
    }


KEY = jax.eval_shape(lambda: jax.random.key(0))


def known_rows(out: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the rows that a file holds, none if there is no file.

    Raises:
        ConfigError: It holds something else, or rows of other settings.
    """
    if not out.exists():
        return []
    try:
        found = json.loads(out.read_text())
        rows, before = found["results"], found["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--out: {out} holds no rows of benchmarks.compare ({error!r}); name another file") from None
    if before != settings:
        raise ConfigError(f"--out: {out} holds rows of {before}, expected {settings}; name another file")
    return rows


def starts(codec: str) -> tuple[str, ...]:
    """Returns the starts of a fit that a codec has beside its own."""
    spec = codecs.SPECS[codec]
    return tuple(one for one in get_args(get_type_hints(spec).get("start")) if one != spec.start)


def fits(args: argparse.Namespace) -> None:
    """Runs ``compare fit``.

    Raises:
        ConfigError: A codec that was asked for does not have the start, or the file holds other settings.
    """
    if args.start:
        others = {codec: starts(codec) for codec in args.only or codecs.SPECS}
        lacking = [codec for codec, found in others.items() if args.start not in found]
        # Without --only, those that have the start.
        if lacking and (args.only or len(lacking) == len(others)):
            allowed = "; ".join(f"{codec}: {', '.join(others[codec]) or 'none'}" for codec in lacking)
            raise ConfigError(f"--start: found {args.start!r}, expected one beside the codec's own ({allowed})")
    images, name = sample(args.data, args.images)
    out = args.out or OUT / f"fit_{name}.json"
    settings = {"data": name, "size": list(images.shape[1:]), "short": SHORT}
    rows = known_rows(out, settings)
    for dtype in BUDGETS:
        for codec in dict.fromkeys(way.codec for way in ways(dtype, len(images), images.shape[1])):
            if (args.only and codec not in args.only) or (args.start and args.start not in starts(codec)):
                continue
            this = (codec, dtype, len(images), args.start)
            if any((r["codec"], r["precision"], r["images"], r.get("start")) == this for r in rows):
                continue
            row = record.environment() | fit_row(codec, dtype, images, args.start)
            # Read again: another call may have added rows, of other codecs, meanwhile.
            record.write(out, [*known_rows(out, settings), row], seed=SEED, n=SEEDS, **settings)


# The codecs of the comparison of accuracies: float32 as published where that fits, then smaller precisions. Numbers
# that are left open are filled by the budget.
ACCURACY = {
    "pixel, float32": "{name: pixel, optimizer: adam, lr: 0.01}",
    "pixel, bfloat16": "{name: pixel, dtype: bfloat16, optimizer: adam, lr: 0.01}",
    "pixel, uint8": "{name: pixel, dtype: uint8, optimizer: adam, lr: 0.01}",
    "palette": "{name: palette, bits: 2}",
    "downscale, float32": "{name: downscale, factor: 2, optimizer: adam, lr: 0.01}",
    "downscale, bfloat16": "{name: downscale, factor: 2, dtype: bfloat16, optimizer: adam, lr: 0.01}",
    "downscale, uint8": "{name: downscale, factor: 2, dtype: uint8, optimizer: adam, lr: 0.01}",
    "frequency, float32": "{name: frequency, coefficients: 63}",
    "frequency, bfloat16": "{name: frequency, coefficients: 63, dtype: bfloat16}",
    "packed_frequency": "{name: packed_frequency, coefficients: 63, bits: 6}",
    "neural_field, float32": "{name: neural_field, layers: 2, width: 6, lr: 0.001}",
    "neural_field, bfloat16": "{name: neural_field, layers: 2, width: 6, dtype: bfloat16, lr: 0.001}",
    "factor, float32": "{name: factor, hallucinators: 3, base_channels: 1}",
    "factor, bfloat16": "{name: factor, hallucinators: 5, base_channels: 1, dtype: bfloat16}",
    "memory, float32": "{name: memory, bases: 16, factor: 2, lr: 0.03}",
    "memory, bfloat16": "{name: memory, bases: 16, factor: 2, dtype: bfloat16, lr: 0.03}",
    "memory, bfloat16, 32 bases": "{name: memory, bases: 32, factor: 2, dtype: bfloat16, lr: 0.03}",
    "sparse_epitome, float32": (
        "{name: sparse_epitome, patch: 4, width: 32, blocks: 1, heads: 2, tokens: 16, nonzeros: 48}"
    ),
    "sparse_epitome, bfloat16": (
        "{name: sparse_epitome, patch: 4, width: 32, blocks: 1, heads: 2, tokens: 16, nonzeros: 48, dtype: bfloat16}"
    ),
    "spectral, float32": "{name: spectral, matrices: 5, rank_height: 10, rank_width: 10, rank_channels: 2}",
    "spectral, bfloat16": (
        "{name: spectral, matrices: 5, rank_height: 10, rank_width: 10, rank_channels: 2, dtype: bfloat16}"
    ),
    "latent, float32": (
        "{name: latent, decoder: small, width: 32, latent_dim: 16, optimizer: adam, lr: 0.01, lr_decoder: 0.001}"
    ),
    "latent, bfloat16": (
        "{name: latent, decoder: small, width: 32, latent_dim: 16, dtype: bfloat16, optimizer: adam, lr: 0.01, "
        "lr_decoder: 0.001}"
    ),
    "gaussian, float32": "{name: gaussian, images_per_class: 15, num_points: 22, dtype: float32, lr: 0.003}",
    "gaussian, bfloat16": "{name: gaussian, images_per_class: 30, num_points: 22, lr: 0.003}",
    "packed_gaussian": "{name: packed_gaussian, images_per_class: 86, num_points: 22, bits_cholesky: 7, lr: 0.003}",
}


def accuracies(args: argparse.Namespace) -> None:
    """Runs ``compare accuracy``."""
    out: Path = args.out or OUT / "accuracy_cifar10.json"
    runs: Path = args.runs
    sizes = [*SIZES, *args.overrides]
    runs.mkdir(parents=True, exist_ok=True)
    # The networks of all runs are the same programs.
    jax.config.update("jax_compilation_cache_dir", str(runs / "compiled"))
    settings = {"config": CONFIG, "overrides": sizes}
    rows = known_rows(out, settings)
    dataset = None
    for name, codec in ACCURACY.items():
        if (args.only and name.split(",")[0] not in args.only) or any(row["name"] == name for row in rows):
            continue
        base: configs.RunConfig = configs.load(CONFIG, [f"codec={codec}", *sizes])
        dataset = dataset or data.load(base.data)
        folder = runs / name.replace(", ", "_")
        # Losses are of training images, and no test image has a say: networks of one step test held-out ones.
        unseen = dataset._replace(test_images=dataset.train_images[:100], test_labels=dataset.train_labels[:100])
        tried, found = tuned(base, [f"codec={codec}", *sizes], unseen, folder / "tune")
        chosen = min((row for row in found if row["loss"] is not None), key=lambda row: row["loss"])["overrides"]
        config = configs.load(CONFIG, [f"codec={codec}", *sizes, *chosen])
        config = dataclasses.replace(config, baselines=config.baselines.off(), name=name)
        fitted = folder / "tune" / ",".join(tried[0])
        experiment = experiments.prepare(config, dataset)
        result = distill.run(experiment, folder / "run", Progress(quiet=True), fitted=[fitted])
        row = {"name": name, "rates": [(r["overrides"], r["loss"]) for r in found], "chosen": chosen}
        row = record.environment() | row | {"result": result}
        record.write(out, [*known_rows(out, settings), row], seed=base.seed, n=base.evaluate.seeds, **settings)
        print(f"{name}: {100 * result['accuracy']['mean']:.1f} %, {chosen}", file=sys.stderr, flush=True)


def tuned(
    base: configs.RunConfig, overrides: list[str], dataset: data.Dataset, out: Path
) -> tuple[list[list[str]], list[dict[str, Any]]]:
    """Distills shortly at each rate, and further out while the best is at an end.

    Returns:
        The overrides of the rates in the order of trial, the first of which made the fit, and the rows of `tune`.
    """
    rates = {field: getattr(base.codec, field) for field in RATE_FIELDS if hasattr(base.codec, field)}
    short = [f"distill.iterations={SHORT_ITERATIONS}", "evaluate.seeds=1", "evaluate.steps=1", "evaluate.overlap=allow"]
    factors = list(RATES)
    while True:
        scaled = [[f"codec.{field}={rate * factor:.6g}" for field, rate in rates.items()] for factor in factors]
        tried: list[tuple[list[str], configs.RunConfig]] = [
            (one, configs.load(CONFIG, [*overrides, *short, *one])) for one in scaled
        ]
        rows = tune.search(tried, dataset, out=out, progress=Progress(quiet=True))["rows"]
        losses = [np.inf if row["loss"] is None else row["loss"] for row in rows]
        best = factors[int(np.argmin(losses))]
        further = [factor for factor in WIDER if factor > best] if best == max(factors) else []
        nearer = [factor for factor in WIDER if factor < best] if best == min(factors) else []
        if not further and not nearer:
            return scaled, rows
        factors.append(min(further) if further else max(nearer))


def positive(text: str) -> int:
    """Reads a number of images."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, found {text!r}")
    return int(text)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=(__doc__ or "").split("\n")[0])
    kinds = parser.add_subparsers(required=True, metavar="fit|accuracy")
    one = kinds.add_parser("fit", help="PSNR of fitted images at 3,852 and 1,926 bytes each")
    one.add_argument("--data", type=Path, default=DATA, help="prepared TFDS directory")
    one.add_argument("--images", type=positive, default=100)
    one.add_argument("--start", metavar="START", help="where a fit starts; default: the codec's own")
    one.set_defaults(run=fits)
    two = kinds.add_parser("accuracy", help="accuracy after distillation at 12,288 bytes per class of CIFAR-10")
    two.add_argument("--runs", type=Path, default=Path("runs/compare"), help="where the run directories are kept")
    two.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help=f"settings other than those of {CONFIG} and SIZES"
    )
    two.set_defaults(run=accuracies)
    # Pixels are what is fitted.
    for kind, names in (one, set(codecs.SPECS) - {"pixel"}), (two, {name.split(",")[0] for name in ACCURACY}):
        kind.add_argument("--only", nargs="+", choices=sorted(names), metavar="CODEC", help="default: all")
        kind.add_argument("--out", type=Path, metavar="FILE", help=f"default: in {OUT.relative_to(record.ROOT)}")
    args = parser.parse_args(argv)
    with exit_cleanly():
        args.run(args)


if __name__ == "__main__":
    main()
