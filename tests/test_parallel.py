"""The outer step on several devices is the one on a single device.

Run as a script, this file takes the steps in a process with eight virtual devices and writes down all that they give.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh

from gsdd_jax import codecs, distillation, match, nets, parallel, whiten
from gsdd_jax.augment import DsaSpec
from gsdd_jax.batches import Data, batches, hold
from gsdd_jax.codecs import GaussianSpec, LatentSpec
from gsdd_jax.data.sampling import class_index
from gsdd_jax.match import DistributionSpec, GradientSpec, KernelRidgeSpec, MmdSpec, TrajectorySpec
from kernels import compute_capability

ROOT = Path(__file__).resolve().parent.parent

DEVICES, SHAPE = 8, (8, 8, 3)
# Fewer classes than devices, so that some devices have none, and one class smaller than a batch.
COUNTS = (4, 13, 9, 30, 17)
CLASSES, SYN, REAL = len(COUNTS), 3, 8
# For the placement of data alone: several classes on each device, and again devices without any.
MANY = (4, 1, 9, 3, 7, 2, 2, 5, 1, 6)
AUGMENT = DsaSpec(strategy="crop")
NETWORK = nets.build(nets.NetSpec(depth=1, width=8), SHAPE, CLASSES)
STEPS = 2
# The order of float32 sums differs: up to 5e-7 in the first gradients, and 1.1e-6 in some small leaf of either step.
GRADIENT_BOUND, LEAF_BOUND = 1e-6, 1e-5


class Case(NamedTuple):
    codec: Any
    objective: Any
    mmd: MmdSpec | None = None
    devices: int = DEVICES
    host: bool = False


# In float32, for bfloat16 rounds the last bits of parameters to other images in the second step.
GAUSSIANS = GaussianSpec(images_per_class=SYN, num_points=6, dtype="float32")
LATENTS = LatentSpec(decoder="small", width=8, latent_dim=4, images_per_class=SYN)
CASES = {
    # The second step matches gradients of a network that the first has trained.
    "gradient": Case(GAUSSIANS, GradientSpec(batch_real=REAL, class_chunk=2, outer_loop=2, inner_loop=1)),
    # Regularized, for the solution of a system makes more of the rounding, by its condition; and with a network that
    # takes small steps, for the bias before a norm has no gradient but its rounding, of which Adam takes the sign.
    "kernel ridge": Case(
        GAUSSIANS,
        KernelRidgeSpec(
            batch_real=REAL, learn_labels=True, flip=True, regularization=10, pool=1, net_updates=2, net_lr=1e-7
        ),
        devices=3,
    ),
    "trajectory": Case(
        GAUSSIANS,
        TrajectorySpec(segments=DEVICES, syn_steps=2, batch_syn=5, lr_lr=0.1),
        MmdSpec(weight=0.5, samples=4, features="expert", steps="separate"),
    ),
    # Decoded at random, from a decoder that all classes share; several classes to a device, where above some have none.
    "latents": Case(
        LATENTS,
        DistributionSpec(batch_real=REAL, batch_syn=2, class_chunk=1),
        MmdSpec(weight=1.0, samples=6),
        devices=3,
        host=True,
    ),
}


def make_images(counts) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    return rng.integers(1, 256, (len(labels), *SHAPE), np.uint8), labels


def make_codec(spec) -> codecs.Codec:
    """Adam hides the size of a gradient; a trace of the gradients does not."""
    codec = codecs.make(spec, image_shape=SHAPE, num_classes=CLASSES, bytes_per_class=10**6)
    return codec._replace(optimizer=lambda: optax.chain(optax.trace(decay=0.5), optax.scale(-0.01)))


# In the process with several devices


@functools.cache
def data_of_steps(case: Case, mesh) -> list[Data]:
    """The data of each step, with random weights in place of those of experts."""
    images, labels = make_images(COUNTS)
    needs = make_objective(case).needs
    source = match.Source(images, labels, CLASSES, whiten.fit("meanstd", images), 1)
    ours = {name: need for name, need in needs.items() if isinstance(need, match.RealImages)}
    stream = batches(ours, source, last=STEPS, mesh=mesh, on_host=case.host)
    found = []
    for step, data in enumerate(stream):
        rng = np.random.default_rng(step)
        first = 0.1 * rng.standard_normal(NETWORK.num_params)
        start = first + 0.01 * rng.standard_normal((DEVICES, len(first)))
        segments = np.stack([start, start + 0.05 * rng.standard_normal(start.shape)], 1)
        weights = {"segments": segments, "mmd_weights": first}
        others = {name: need.put(np.float32(weights[name]), mesh) for name, need in needs.items() if name not in ours}
        found.append(data._replace(drawn={**data.drawn, **others}))
    return found


def make_objective(case: Case) -> match.Objective:
    return match.make(case.objective, codec=make_codec(case.codec), network=NETWORK, augment=AUGMENT, mmd=case.mmd)


def make_step(case: Case, mesh):
    return jax.jit(distillation.make_step(make_objective(case), mesh=mesh))


@functools.cache
def make_start(case: Case, mesh):
    codec = make_codec(case.codec)
    targets = np.random.default_rng(1).random((codec.num_images, *SHAPE)).astype(np.float32)
    params = jax.jit(codec.init)(jax.random.key(0), targets)
    start = distillation.init_state(make_objective(case), params), jax.random.key(7)
    return start if mesh is None else parallel.replicated(start, mesh)


def named(tree, prefix: str) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {f"{prefix}/{jax.tree_util.keystr(path, simple=True, separator='/')}": np.asarray(x) for path, x in leaves}


def take_steps(case: Case, step, mesh, prefix: str) -> dict[str, np.ndarray]:
    state, key = make_start(case, mesh)
    found = {}
    for number, data in enumerate(data_of_steps(case, mesh)):
        state, metrics = step(state, data, key)
        found |= named((state, metrics) if mesh is None else parallel.local((state, metrics)), f"{prefix}/{number}")
    return found


def place(devices: int) -> dict[str, np.ndarray]:
    """What each device holds of a training set, device by device."""
    mesh = parallel.mesh_of(devices)
    images, labels = make_images(MANY)
    data = hold(images, labels, len(MANY), mesh)
    found = {}
    for name, array in {"images": data.images, "index": data.table.index, "count": data.table.count}.items():
        by_device = {shard.device: np.asarray(shard.data) for shard in array.addressable_shards}
        found[f"placed/{devices}/{name}"] = np.stack([by_device[device] for device in mesh.devices.flat])
    return found


def lowered_calls() -> dict[str, int] | str:
    """Calls of the GPU kernels in the outer step on one device and on all, or why there are none to be had."""
    try:
        import jax_triton  # noqa: F401
    except ImportError as error:
        return str(error)
    case, found = Case(GAUSSIANS, DistributionSpec(batch_real=REAL, batch_syn=2)), {}
    for mesh in (None, parallel.mesh_of(DEVICES)):
        state, key = make_start(case, mesh)
        with compute_capability(90):
            lowered = (
                make_step(case, mesh)
                .trace(state, data_of_steps(case, mesh)[0], key)
                .lower(lowering_platforms=("cuda",))
            )
        found["one" if mesh is None else "all"] = lowered.as_text().count("custom_call @triton_kernel_call")
    return found


def write_down(folder: Path) -> None:
    assert len(jax.devices()) == DEVICES
    jax.config.update("jax_disable_most_optimizations", True)
    arrays = {}
    for name, case in CASES.items():
        arrays |= take_steps(case, make_step(case, None), None, f"{name}/one")
        mesh = parallel.mesh_of(case.devices)
        step = make_step(case, mesh)
        for prefix in ("several", "again"):
            arrays |= take_steps(case, step, mesh, f"{name}/{prefix}")
    for devices in (3, DEVICES):
        arrays |= place(devices)
    np.savez(folder / "arrays.npz", **arrays)
    (folder / "calls.json").write_text(json.dumps(lowered_calls()))


# In the process of the tests


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("devices")
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip(), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def arrays(folder) -> dict[str, np.ndarray]:
    with np.load(folder / "arrays.npz") as file:
        return dict(file)


def of_run(arrays, case: str, which: str, step: int) -> dict[str, np.ndarray]:
    prefix = f"{case}/{which}/{step}/"
    return {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    found, expected = np.float64(found), np.float64(expected)
    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), np.finfo(np.float64).tiny))


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_that_of_one_device(arrays, case):
    found, expected = of_run(arrays, case, "several", 0), of_run(arrays, case, "one", 0)
    leaves = [name for name in expected if name.startswith("0/opt_state/0/0/trace/")]
    assert leaves and all(np.linalg.norm(expected[name]) > 0 for name in leaves)
    found, expected = (np.concatenate([run[name].reshape(-1) for name in leaves]) for run in (found, expected))
    assert relative(found, expected) <= GRADIENT_BOUND


@pytest.mark.parametrize("step", range(STEPS))
@pytest.mark.parametrize("case", CASES)
def test_every_leaf_of_the_state_and_every_metric_is_that_of_one_device(arrays, case, step):
    found, expected = of_run(arrays, case, "several", step), of_run(arrays, case, "one", step)
    assert found.keys() == expected.keys()
    assert {name: d for name in expected if not (d := relative(found[name], expected[name])) <= LEAF_BOUND} == {}


@pytest.mark.parametrize("case", CASES)
def test_the_same_program_gives_the_same_bits_again(arrays, case):
    once, again = (of_run(arrays, case, which, STEPS - 1) for which in ("several", "again"))
    assert once and {name: x.tobytes() for name, x in once.items()} == {name: x.tobytes() for name, x in again.items()}


@pytest.mark.parametrize("devices", [3, DEVICES])
def test_each_device_holds_the_images_of_its_classes_and_no_others(arrays, devices):
    images, labels = make_images(MANY)
    index, count = class_index(labels, len(MANY))
    held, rows, counts = (arrays[f"placed/{devices}/{name}"] for name in ("images", "index", "count"))
    own = parallel.per_device(len(MANY), devices)
    assert rows.shape == (devices, own, max(MANY)) and counts.shape == (devices, own)
    for device in range(devices):
        classes = range(device * own, min((device + 1) * own, len(MANY)))
        for row, label in enumerate(classes):
            # Entry by entry, the repeated ones too: so the draws are those from the whole table.
            np.testing.assert_array_equal(held[device][rows[device, row]], images[index[label]])
            assert counts[device, row] == count[label] == MANY[label]
        used = sum(MANY[label] for label in classes)
        assert held[device][:used].all() and not held[device][used:].any()
        # Rows that fill up can be drawn from.
        assert np.all(counts[device, len(classes) :] == 1) and not rows[device, len(classes) :].any()


def test_the_step_of_several_devices_lowers_for_cuda_with_the_kernels(folder):
    calls = json.loads((folder / "calls.json").read_text())
    if isinstance(calls, str):
        pytest.skip(f"needs Triton, jax-triton and JAX's CUDA plugin: {calls}")
    # One forward and one backward launch: at 8 px no Gaussian reaches enough pixels for a second one.
    assert calls == {"one": 2, "all": 2}


# Parts that need one device


def test_more_devices_than_there_are_are_refused():
    count = len(jax.devices())
    with pytest.raises(ValueError, match=f"distill.devices: expected at most {count}, .*found {count + 8}"):
        parallel.mesh_of(count + 8)


def test_segments_that_cannot_be_shared_out_evenly_are_refused():
    case = CASES["trajectory"]._replace(objective=TrajectorySpec(segments=12), mmd=None)
    with pytest.raises(ValueError, match="objective.segments: 8 devices .*a multiple of 8, found 12 .*distill.devices"):
        make_step(case, AbstractMesh((DEVICES,), (parallel.AXIS,)))


if __name__ == "__main__":
    write_down(Path(sys.argv[1]))
