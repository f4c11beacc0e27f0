"""Trajectory matching: memory and time of its gradient, TESLA's beside it, and how to train many experts.

    python -m benchmarks.trajectory [--data DIR] [--out FILE]

Three ways to the gradient, on the same batches and augmentations: `exact` recomputes each step of the student in the
backward pass, `held` keeps the activations of all steps, and `tesla` (Cui et al. 2023, in its code's form, with the
factor 2 that the code loses) treats the weights that each step starts from as constants. Memory is what the compiler
plans: temporaries beside arguments and results. Networks are narrower than the field's, so that CPUs can time them; the
memory of `PAPER`, whose size is that of the paper, is planned only.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import record
from gsdd_jax import data
from gsdd_jax.augment import DsaSpec, dsa
from gsdd_jax.experts import ExpertSpec, _Static, expert_keys, train_group
from gsdd_jax.match.trajectory import TrajectorySpec, flattener, student_batches, trajectory_loss
from gsdd_jax.nets import NetSpec, Network, build
from gsdd_jax.whiten import MEAN_STD, meanstd_of
from train.errors import exit_cleanly

SEED = 0
DATA = record.ROOT.parent / "shared" / "data" / "cifar10_jpeg" / "1.0.0"
SHAPE, CLASSES = (32, 32, 3), 10
STEPS = (10, 20, 40, 60)
RATES = (0.01, 0.03, 0.1)
REPEATS = 3
AUGMENT = DsaSpec()
REAL_PER_CLASS, SYN_PER_CLASS = 256, 10
EXPERTS, EXPERT_BATCH, EXPERT_LR, EXPERT_EPOCHS = 4, 256, 0.01, 4
START_EPOCH = 2


class Setting(NamedTuple):
    """Sizes: width of ConvNetD3, synthetic images, and those of them per step of the student."""

    width: int
    images: int
    batch: int

    def network(self) -> Network:
        """Builds the network."""
        return build(NetSpec(depth=3, width=self.width), SHAPE, CLASSES)


MEASURED = Setting(width=32, images=SYN_PER_CLASS * CLASSES, batch=50)
PAPER = Setting(width=128, images=1600, batch=380)  # GSDD, Table 7: CIFAR-10, ipc 10


def matched(setting: Setting, steps: int, *, checkpoint: bool) -> Callable[..., Any]:
    """Returns `(key, syn, labels, syn_lr, start, target, whitening) -> loss, (slope in syn, slope in syn_lr)`."""
    spec = TrajectorySpec(syn_steps=steps, batch_syn=setting.batch, checkpoint=checkpoint)

    def value(key, syn, labels, syn_lr, start, target, whitening):
        loss, _ = trajectory_loss(
            key,
            syn,
            labels,
            syn_lr,
            start,
            target,
            network=setting.network(),
            augment=AUGMENT,
            whitening=whitening,
            spec=spec,
        )
        return loss

    return jax.value_and_grad(value, argnums=(1, 3))


def tesla(setting: Setting, steps: int) -> Callable[..., Any]:
    """Returns TESLA's version of `matched`: two passes, the second over the steps one by one."""
    network = setting.network()
    unflatten = flattener(network)[1]
    spec = TrajectorySpec(syn_steps=steps, batch_syn=setting.batch)

    def loss_and_slopes(key, syn, labels, syn_lr, start, target, whitening):
        key_batches, key_augment = jax.random.split(key)
        batches = student_batches(key_batches, syn.shape[0], spec=spec)

        def gradient(theta, syn, t):
            x = dsa(jax.random.fold_in(key_augment, t), whitening(syn[batches[t]]), AUGMENT)
            y = labels[batches[t]]

            def cross_entropy(theta):
                logits = network.apply(unflatten(theta), x)[0]
                return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

            return jax.grad(cross_entropy)(theta)

        def forward(carry, t):
            theta, total = carry
            grads = gradient(theta, syn, t)
            return (theta - syn_lr * grads, total + grads), theta

        (_, total), thetas = jax.lax.scan(forward, (start, jnp.zeros_like(start)), jnp.arange(steps))
        apart = jnp.sum((start - target) ** 2)
        left = start - syn_lr * total - target
        direction = -2 * syn_lr * left / apart

        def backward(slope, step):
            theta, t = step
            _, pull = jax.vjp(lambda syn: gradient(theta, syn, t), syn)
            return slope + pull(direction)[0], None

        slope, _ = jax.lax.scan(backward, jnp.zeros_like(syn), (thetas, jnp.arange(steps)))
        return jnp.sum(left**2) / apart, (slope, -2 * jnp.sum(left * total) / apart)

    return loss_and_slopes


def methods(setting: Setting, steps: int) -> dict[str, Callable[..., Any]]:
    """Returns the three ways to the gradient."""
    return {
        "exact": matched(setting, steps, checkpoint=True),
        "held": matched(setting, steps, checkpoint=False),
        "tesla": tesla(setting, steps),
    }


def compiled(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, int]:
    """Compiles for arguments or their shapes; returns the executable and the bytes of its temporaries."""
    executable = jax.jit(function).lower(*arguments).compile()
    return executable, executable.memory_analysis().temp_size_in_bytes


def planned(setting: Setting) -> dict[str, Any]:
    """Plans the memory of the exact gradient and of that with activations held, without running them."""
    p = setting.network().num_params
    array = jax.ShapeDtypeStruct
    arguments = (
        jax.eval_shape(lambda: jax.random.key(0)),
        array((setting.images, *SHAPE), jnp.float32),
        array((setting.images,), jnp.int32),
        array((), jnp.float32),
        array((p,), jnp.float32),
        array((p,), jnp.float32),
        whitening(),
    )
    temporary: dict[str, dict[str, int]] = {"exact": {}, "held": {}}
    for steps in STEPS:
        for name, checkpoint in (("exact", True), ("held", False)):
            _, temporary[name][str(steps)] = compiled(matched(setting, steps, checkpoint=checkpoint), arguments)
            print(f"{setting}, {steps} steps, {name}: {temporary[name][str(steps)] / 2**20:.0f} MiB", flush=True)
    return {"flat_weights_bytes": 4 * p, "temp_bytes": temporary, "bytes_per_step": per_step(temporary)}


def per_step(temporary: dict[str, dict[str, int]]) -> dict[str, float]:
    """Returns by how much memory grows per step of the student, between the fewest and the most steps."""
    low, high = min(STEPS), max(STEPS)
    return {name: (row[str(high)] - row[str(low)]) / (high - low) for name, row in temporary.items()}


def whitening() -> Any:
    """Returns the field's normalization of CIFAR-10."""
    return meanstd_of(MEAN_STD["cifar10"].mean, MEAN_STD["cifar10"].std)


def cosine(a: jax.Array, b: jax.Array) -> float:
    """Returns the cosine between two arrays."""
    return float(jnp.vdot(a, b) / (jnp.linalg.norm(a) * jnp.linalg.norm(b)))


def compare(syn: jax.Array, labels: jax.Array, start: jax.Array, target: jax.Array) -> dict[str, Any]:
    """Times the three gradients for each number of steps, and measures how far TESLA's is from the exact one."""
    key = jax.random.key(SEED)

    def arguments(rate: float) -> tuple[Any, ...]:
        return key, syn, labels, jnp.float32(rate), start, target, whitening()

    exact, approximate = (
        jax.jit(function)(*arguments(RATES[0]))[1][0]
        for function in (matched(MEASURED, 1, checkpoint=True), tesla(MEASURED, 1))
    )
    if not cosine(exact, approximate) > 1 - 1e-5:
        raise AssertionError("after one step TESLA's gradient is exact, but the two differ")

    temporary: dict[str, dict[str, int]] = {"exact": {}, "held": {}, "tesla": {}}
    rows = []
    for steps in STEPS:
        executables = {}
        for name, function in methods(MEASURED, steps).items():
            executables[name], temporary[name][str(steps)] = compiled(function, arguments(RATES[0]))
        seconds: dict[str, list[float]] = {name: [] for name in executables}
        for repeat in range(-1, REPEATS):
            for name, executable in executables.items():
                began = time.perf_counter()
                jax.block_until_ready(executable(*arguments(RATES[0])))
                if repeat >= 0:
                    seconds[name].append(time.perf_counter() - began)
        tesla_beside = []
        for rate in RATES:
            results = {name: executable(*arguments(rate)) for name, executable in executables.items()}
            (loss, (slope, slope_lr)), (same, (held, _)), (also, (other, other_lr)) = results.values()
            if not np.allclose([same, also], loss, rtol=1e-3) or not cosine(slope, held) > 1 - 1e-4:
                raise AssertionError(f"{steps} steps at {rate}: the students differ")
            tesla_beside.append(
                {
                    "syn_lr": rate,
                    "loss": float(loss),
                    "cosine": cosine(slope, other),
                    "norm_ratio": float(jnp.linalg.norm(other) / jnp.linalg.norm(slope)),
                    "syn_lr_slope_ratio": float(other_lr / slope_lr),
                }
            )
        best = {name: round(min(times), 3) for name, times in seconds.items()}
        rows.append({"steps": steps, "min_s": best, "tesla": tesla_beside})
        print(rows[-1], flush=True)
    return {
        "flat_weights_bytes": 4 * MEASURED.network().num_params,
        "temp_bytes": temporary,
        "bytes_per_step": per_step(temporary),
        "by_steps": rows,
    }


def experts(images: jax.Array, labels: jax.Array) -> tuple[dict[str, Any], list[jax.Array]]:
    """Times an epoch of several experts by `lax.map` and by `vmap`; returns expert 0 epoch by epoch, too."""
    network = MEASURED.network()
    key_init, keys = expert_keys(SEED, range(EXPERTS))
    theta = jax.vmap(lambda key: flattener(network)[0](network.init(key)))(key_init)
    specs = {method: ExpertSpec(batch=EXPERT_BATCH, method=method) for method in ("map", "vmap")}
    state = specs["map"].optimizer().init(theta)
    seconds: dict[str, list[float]] = {method: [] for method in specs}
    rows = [theta[0]]
    for epoch in range(EXPERT_EPOCHS):
        after = {}
        for method, times in seconds.items():
            began = time.perf_counter()
            static = _Static(network, AUGMENT, specs[method])
            # Without momentum nothing but weights is carried over.
            after[method], _, _ = jax.block_until_ready(
                train_group(theta, state, keys, jnp.int32(epoch), images, labels, EXPERT_LR, whitening(), static=static)
            )
            if epoch:  # the first call compiles
                times.append(time.perf_counter() - began)
        if not np.allclose(after["map"], after["vmap"], atol=1e-4):
            raise AssertionError("map and vmap train different experts")
        theta = after["map"]
        rows.append(theta[0])
    result: dict[str, Any] = {
        method: {
            "images_per_s": round(EXPERTS * len(images) / min(times), 1),
            "min_s": round(min(times), 3),
        }
        for method, times in seconds.items()
    }
    print(result, flush=True)
    return result, rows


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark and writes the JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.trajectory", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--data", type=Path, default=DATA, metavar="DIR", help="CIFAR-10 as a prepared TFDS set")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "trajectory.json", metavar="FILE")
    arguments = parser.parse_args(argv)
    dataset = data.load(
        data.DataSpec(source="tfds", path=str(arguments.data), per_class=REAL_PER_CLASS, test_limit=CLASSES)
    )
    images, labels = jnp.asarray(dataset.train_images), jnp.asarray(dataset.train_labels)
    trained, rows = experts(images, labels)
    chosen = np.concatenate([np.flatnonzero(dataset.train_labels == k)[:SYN_PER_CLASS] for k in range(CLASSES)])
    gradients = compare(
        images[chosen].astype(jnp.float32) / 255, labels[chosen], rows[START_EPOCH], rows[START_EPOCH + 2]
    )
    results = {"gradient": gradients, "planned": planned(PAPER), "experts": trained}
    path = record.write(
        arguments.out,
        results,
        seed=SEED,
        n=REPEATS,
        data=dataset.name,
        measured=MEASURED._asdict(),
        planned=PAPER._asdict(),
        steps=list(STEPS),
        experts={
            "count": EXPERTS,
            "batch": EXPERT_BATCH,
            "lr": EXPERT_LR,
            "epochs": EXPERT_EPOCHS,
            "images": len(images),
            "segment": [START_EPOCH, START_EPOCH + 2],
        },
    )
    print(f"wrote {path}")


if __name__ == "__main__":
    exit_cleanly()(main)()
