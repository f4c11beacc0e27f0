"""What an outer step costs: seconds and memory of distribution, gradient and trajectory matching; experts and tests.

    python -m benchmarks.objectives [--sizes cpu paper] [--time-paper] [--out FILE]

Each objective is timed for Gaussians and for pixels at equal bytes. Sizes ``cpu`` are those of the configs that two
cores can run; ``paper`` is CIFAR-10 ipc 1 of the paper's Table 7, for objectives that it does not use there with DM's
and DC's own batch of 256 real images per class. Without a GPU the paper's sizes are compiled and not run, unless
``--time-paper`` is given: then each runs once, which takes minutes. Images are noise: speed does not depend on them.

Memory is the compiler's account of one step: arguments (with the training set and the state) and temporaries.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import record
from benchmarks.timing import Timed
from gsdd_jax import codecs, distillation, evaluation, match, storage, whiten
from gsdd_jax.augment import DsaSpec
from gsdd_jax.batches import Data, device_data
from gsdd_jax.experts import ExpertSpec, _Static, expert_keys, train_group
from gsdd_jax.match import DistributionSpec, GradientSpec, TrajectorySpec
from gsdd_jax.match.trajectory import flattener
from gsdd_jax.nets import NetSpec, Network, build
from train.errors import exit_cleanly

SEED = 0
SHAPE, CLASSES = (32, 32, 3), 10
GPC, POINTS = 30, 22  # GSDD, Table 7, CIFAR-10 ipc 1
AUGMENT = DsaSpec()
TEST_IMAGES = 10_000
# Of an expert's epoch and of an evaluation, so many steps are timed.
TIMED_STEPS = 20


class Size(NamedTuple):
    """Sizes of an experiment: network width, training images, objectives, epochs of an expert, evaluation."""

    width: int
    images: int
    objectives: tuple[Any, ...]
    experts: ExpertSpec
    evaluate: evaluation.EvalSpec


SIZES = {
    # configs/cifar10_*_ipc1_cpu.yaml
    "cpu": Size(
        64,
        10_000,
        (
            DistributionSpec(batch_real=64),
            GradientSpec(batch_real=64).for_ipc(1),
            TrajectorySpec(syn_steps=10, batch_syn=60, expert_epochs=2, max_start_epoch=4),
        ),
        ExpertSpec(batch=64),
        evaluation.EvalSpec(steps=900, batch=64),
    ),
    "paper": Size(
        128,
        50_000,
        (DistributionSpec(), GradientSpec().for_ipc(1), TrajectorySpec(batch_syn=300)),
        ExpertSpec(),
        evaluation.EvalSpec(),
    ),
}


def whitening() -> whiten.MeanStd:
    """Returns some normalization."""
    return whiten.MeanStd(jnp.full(SHAPE[-1], 0.5), jnp.full(SHAPE[-1], 0.25))


def training_set(size: Size) -> tuple[np.ndarray, np.ndarray]:
    """Returns noise as uint8 images, and their labels."""
    rng = np.random.default_rng(SEED)
    return rng.integers(0, 256, (size.images, *SHAPE), np.uint8), np.arange(size.images) % CLASSES


def outer_step(size: Size, spec: Any, codec_spec: codecs.CodecSpec) -> Timed:
    """Returns one outer step with its arguments, of an experiment that has just begun."""
    network = build(NetSpec(depth=3, width=size.width), SHAPE, CLASSES)
    codec = codecs.make(
        codec_spec, image_shape=SHAPE, num_classes=CLASSES, bytes_per_class=storage.budget_bytes(1, SHAPE)
    )
    start = jax.random.uniform(jax.random.key(SEED), (codec.num_images, *SHAPE))
    objective = match.make(spec, codec=codec, network=network, augment=AUGMENT)
    state = distillation.init_state(objective, codec.init(jax.random.key(SEED), start))
    if match.expert_window(objective.needs) is None:
        data = device_data(*training_set(size), whitening())
    else:
        weights = flattener(network)[0](network.init(jax.random.key(SEED)))
        data = Data(whitening(), None, {"segments": jnp.stack([weights, weights + 0.01])[None]})
    return Timed(distillation.make_step(objective), state, data, jax.random.key(SEED))


def expert_epoch(size: Size, network: Network) -> dict[str, Any]:
    """Times part of an epoch of one expert; scales it up to experts per minute."""
    spec = size.experts
    images, labels = (jnp.asarray(x) for x in training_set(size))
    count = min(TIMED_STEPS * spec.batch, size.images)
    key_init, keys = expert_keys(SEED, range(1))
    theta = flattener(network)[0](network.init(key_init[0]))[None]
    state, static = spec.optimizer().init(theta), _Static(network, AUGMENT, spec.resolved("cpu"))

    def epoch(theta: jax.Array, keys: jax.Array, images: jax.Array, labels: jax.Array) -> jax.Array:
        return train_group(theta, state, keys, 0, images, labels, spec.lr, whitening(), static=static)[0]

    timed = Timed(epoch, theta, keys, images[:count], labels[:count]).compile().measure(seconds=10, repeats=3)
    epochs = next(one for one in size.objectives if isinstance(one, TrajectorySpec)).last_epoch
    rate = count / (1e-3 * timed["min_ms"])
    return {
        "images_per_second": rate,
        "epochs": epochs,
        "experts_per_minute": 60 * rate / (epochs * size.images),
        "timed_images": count,
    }


def evaluation_rate(size: Size, network: Network) -> dict[str, Any]:
    """Times the start of an evaluation and its test; scales them up to networks per minute."""
    n = CLASSES * GPC
    syn = jax.random.uniform(jax.random.key(SEED), (n, *SHAPE))
    labels = jnp.arange(n) // GPC
    spec = dataclasses.replace(size.evaluate, steps=TIMED_STEPS)
    common: dict[str, Any] = {"network": network, "whitening": whitening()}

    def train(key: jax.Array, syn: jax.Array, labels: jax.Array) -> Any:
        return evaluation.train_network(key, syn, labels, spec=spec, augment=AUGMENT, **common)

    def test(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        return evaluation.accuracy(params, images, labels, **common)

    trained = Timed(train, jax.random.key(SEED), syn, labels).compile().measure(seconds=10, repeats=3)
    images = jax.random.randint(jax.random.key(SEED), (TEST_IMAGES, *SHAPE), 0, 256).astype(jnp.uint8)
    params = network.init(jax.random.key(SEED))
    tested = Timed(test, params, images, jnp.zeros(TEST_IMAGES, jnp.int32)).compile().measure(seconds=10, repeats=2)
    steps = size.evaluate.num_steps(n)
    seconds = 1e-3 * (trained["min_ms"] * steps / TIMED_STEPS + tested["min_ms"])
    return {"steps": steps, "networks_per_minute": 60 / seconds, "test_seconds": 1e-3 * tested["min_ms"]}


def measure(name: str, *, run: bool) -> dict[str, Any]:
    """Measures one of the sizes; without ``run`` only the memory of its steps."""
    size = SIZES[name]
    network = build(NetSpec(depth=3, width=size.width), SHAPE, CLASSES)
    pixel = codecs.PixelSpec(optimizer="adam", lr=0.01)
    steps = []
    for spec in size.objectives:
        for codec_spec in (codecs.GaussianSpec(images_per_class=GPC, num_points=POINTS), pixel):
            timed = outer_step(size, spec, codec_spec).compile()
            row = {"objective": spec.name, "codec": codec_spec.name, "compile_seconds": round(timed.compile_seconds, 1)}
            row |= timed.measure(seconds=20, repeats=5) if run else {"memory": timed.memory()}
            steps.append(row)
            took = f"{row['min_ms'] / 1e3:.3f} s, " if run else ""
            print(f"{name} {spec.name} {codec_spec.name}: {took}{row['memory']['temp'] / 2**20:.0f} MiB", flush=True)
    found: dict[str, Any] = {"width": size.width, "images": size.images, "steps": steps}
    if run:
        found |= {"experts": expert_epoch(size, network), "evaluation": evaluation_rate(size, network)}
        print(found["experts"], found["evaluation"], flush=True)
    return found


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark and writes the JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.objectives", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--time-paper", action="store_true", help="run the paper's sizes without a GPU, too")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "objectives.json", metavar="FILE")
    args = parser.parse_args(argv)
    run = {"cpu": True, "paper": args.time_paper or jax.default_backend() == "gpu"}
    results = {name: measure(name, run=run[name]) for name in args.sizes}
    print(f"wrote {record.write(args.out, results, seed=SEED, n=5, gpc=GPC, points=POINTS)}")


if __name__ == "__main__":
    exit_cleanly()(main)()
