"""Our side, by the functions that the command lines call.

    python -m benchmarks.peers.jax_side CASE [FILE]

With FILE it computes everything once, on small inputs that it writes there with the results.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from benchmarks.peers import worker
from benchmarks.peers.worker import CLASSES, SHAPE, Case
from benchmarks.timing import Timed
from gsdd_jax import augment, codecs, distillation, match, training
from gsdd_jax.augment import DsaSpec
from gsdd_jax.batches import Data, device_data
from gsdd_jax.match.trajectory import flattener
from gsdd_jax.nets import NetSpec, Network
from gsdd_jax.nets import build as build_network
from gsdd_jax.whiten import MeanStd

NO_DSA = DsaSpec(strategy="none")
MIRROR = DsaSpec(strategy="flip", flip=1.0)


def network_of(case: Case) -> Network:
    """Builds ConvNetD3."""
    return build_network(NetSpec(depth=3, width=case.width), SHAPE, CLASSES)


def program(case: Case, network: Network, start: Any, target: Any) -> Timed:
    """Returns what is timed, with its arguments; that of an outer step maps a state to the next.

    Args:
        case: Task and sizes.
        network: As it is trained; matching draws weights from it.
        start: Weights of the forward pass, and where the student starts.
        target: Weights that the student is held against.
    """
    inputs, key = worker.inputs(case), jax.random.key(worker.SEED)
    images, labels = jnp.asarray(inputs["images"]), jnp.arange(len(inputs["images"])) % CLASSES
    whitening = MeanStd(jnp.full(SHAPE[2], worker.MEAN), jnp.full(SHAPE[2], worker.STD))
    if case.task == "forward":
        return Timed(lambda params, x: network.outputs(params, x)[0], start, training.inputs(images, whitening))
    if case.task == "training step":
        spec = training.EvalSpec(
            steps=case.train_steps,
            batch=case.batch,
            lr=worker.LR,
            momentum=worker.MOMENTUM,
            weight_decay=worker.WEIGHT_DECAY,
        )

        def train(key: jax.Array, images: jax.Array, labels: jax.Array) -> Any:
            return training.train_network(
                key, images, labels, network=network, spec=spec, augment=NO_DSA, whitening=whitening
            )

        return Timed(train, key, images, labels)
    dsa = DsaSpec() if case.augment else MIRROR
    if case.task == "distribution matching":
        per_class, data = case.syn, device_data(inputs["images"], labels, whitening)
        matching: Any = match.DistributionSpec(batch_real=case.real)
    else:
        flatten = flattener(network)[0]
        segments = jnp.stack([flatten(start), flatten(target)])[None]
        per_class, data = case.student, Data(whitening, None, {"segments": segments})
        matching = match.TrajectorySpec(syn_steps=case.student_steps, syn_lr=worker.STUDENT_LR)
    codec = codecs.make(
        codecs.PixelSpec(images_per_class=per_class, lr=worker.PIXEL_LR[case.task]),
        image_shape=SHAPE,
        num_classes=CLASSES,
    )
    objective = match.make(matching, codec=codec, network=network, augment=dsa)
    state = distillation.init_state(objective, codec.init(key, jnp.asarray(inputs["syn"])))
    return Timed(distillation.make_step(objective), state, data, key, donate=(0,))


def build(case: Case) -> tuple[Callable[[], Any], dict[str, Any]]:
    """Compiles the call of a case."""
    network = network_of(case)
    start, target = (network.init(jax.random.key(worker.SEED + place)) for place in (0, 1))
    timed = program(case, network, start, target).compile()
    stateful = case.task in worker.OUTER_STEPS
    args = timed.args

    def call() -> None:
        nonlocal args
        out = jax.block_until_ready(timed(*args))
        if stateful:
            args = (out[0], *args[1:])

    return call, {"compile_seconds": timed.compile_seconds, "account": timed.memory()}


def reference(case: Case) -> dict[str, np.ndarray]:
    """Computes every task from one set of weights, and DSA's operations; returns results and what they came from."""
    network = network_of(case)
    start = network.init(jax.random.key(worker.SEED))
    fixed = network._replace(init=lambda key: start)
    found: dict[str, Any] = {}
    trained = start
    for task in worker.TASKS:
        timed = program(case._replace(task=task), fixed, start, trained).compile()
        if task not in worker.OUTER_STEPS:
            found[task] = timed()
            trained = found.pop(task) if task == "training step" else trained
            continue
        before = np.asarray(timed.args[0].params["images"])
        state, metrics = timed()
        found[task] = metrics["loss"]
        found[f"{task}, gradient"] = (before - np.asarray(state.params["images"])) / worker.PIXEL_LR[task]
    for name, params in (("start", start), ("trained", trained)):
        found |= {f"{name}/{key}": leaf for key, leaf in traverse_util.flatten_dict(params, sep="/").items()}
    return {name: np.asarray(value) for name, value in (found | _operations(case)).items()}


def _operations(case: Case) -> dict[str, Any]:
    """Applies each of DSA's operations, every image with parameters of its own."""
    rng, x = np.random.default_rng(worker.SEED), jnp.asarray(worker.inputs(case)["syn"])
    n, pad, size = len(x), SHAPE[0] // 8, SHAPE[0] // 2
    parameters: dict[str, Any] = {
        "color": rng.uniform(0.5, 1.5, (3, n)),
        "crop": rng.integers(-pad, pad + 1, (n, 2)),
        "cutout": rng.integers(0, SHAPE[0] + 1, (n, 2)),
        "flip": rng.random(n) < 0.5,
        "scale": rng.uniform(1 / 1.2, 1.2, (n, 2)),
        "rotate": rng.uniform(-0.25, 0.25, n),
    }
    parameters = {k: v.astype(np.float32) if v.dtype == np.float64 else v for k, v in parameters.items()}
    images = {
        "color": augment.color(x, *parameters["color"]),
        "crop": augment.crop(x, parameters["crop"], max_shift=(pad, pad)),
        "cutout": augment.cutout(x, parameters["cutout"], size=(size, size)),
        "flip": augment.flip(x, parameters["flip"]),
        "scale": augment.scale(x, parameters["scale"]),
        "rotate": augment.rotate(x, parameters["rotate"]),
    }
    return images | {f"parameters/{name}": value for name, value in parameters.items()}


if __name__ == "__main__":
    asked = Case(*json.loads(sys.argv[1]))
    if len(sys.argv) > 2:
        np.savez(sys.argv[2], **reference(asked))
    else:
        worker.serve(asked, build)
