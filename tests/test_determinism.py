"""The same settings and seed give the same bits: every codec, every objective, in two processes.

The second process has another PYTHONHASHSEED and another number of threads, and takes the cases in reverse order: what
depends on the order of a set, on addresses, on threads or on what ran before differs. They trace the start and the use
of every codec, and the step of every objective, which must be the same programs; two cases run, one of them compiled as
outside of the tests.
"""

import functools
import hashlib
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
from jax.experimental.compilation_cache import compilation_cache
from objectives import data_of
from test_codecs import CLASSES, SPECS, make

from gsdd_jax import codecs, distillation, match, whiten
from gsdd_jax.augment import DsaSpec
from gsdd_jax.codecs import CodecSpec
from gsdd_jax.match import DistributionSpec, GradientSpec, KernelRidgeSpec, MmdSpec, TrajectorySpec
from gsdd_jax.nets import NetSpec, build

ROOT = Path(__file__).resolve().parent.parent
SEED, STEPS = 3, 3


class Case(NamedTuple):
    codec: CodecSpec
    # Without one, the codec alone is traced.
    objective: Any = None
    mmd: MmdSpec | None = None
    strategy: str = "crop"
    # Compiled as outside of the tests, and by both processes, whatever is in the cache.
    default: bool = False


DISTRIBUTION = DistributionSpec(batch_real=4, batch_syn=2)
# A network that is trained after the first of its two iterations.
GRADIENT = GradientSpec(batch_real=4, outer_loop=2, inner_loop=1)
KERNEL_RIDGE = KernelRidgeSpec(batch_real=4, learn_labels=True, pool=2, net_updates=2)
TRAJECTORY = TrajectorySpec(syn_steps=2, batch_syn=3, expert_epochs=1, max_start_epoch=1)
# The first way to store of each codec.
FIRST = {spec.name: spec for spec in reversed(SPECS.values())}
GAUSSIAN, PACKED = FIRST["gaussian"], FIRST["packed_gaussian"]
CASES = {name: Case(spec) for name, spec in FIRST.items()} | {
    "gaussian": Case(GAUSSIAN, DISTRIBUTION, default=True),
    "packed_gaussian, gradient": Case(PACKED, GRADIENT, strategy="flip"),
    "packed_gaussian, kernel ridge": Case(PACKED, KERNEL_RIDGE),
    "packed_gaussian, trajectory and MMD": Case(PACKED, TRAJECTORY, MmdSpec(weight=1.0, samples=2), "flip"),
}

# The renderer, and a system that LAPACK solves.
RUN = "gaussian", "packed_gaussian, kernel ridge"


class Run(NamedTuple):
    start: Any  # parameters before the first step
    state: distillation.State
    metrics: list[dict[str, np.ndarray]]  # of every step


@functools.cache
def codec_of(spec: CodecSpec) -> tuple[codecs.Codec, Any]:
    """Returns a codec and its jitted start."""
    codec = make(spec)
    return codec, jax.jit(codec.init)


@functools.cache
def programs(name: str, options: str) -> tuple[Any, Any, Any]:
    """Returns what makes the state of parameters, the jitted step of a case, and the data that it sees."""
    case = CASES[name]
    codec, _ = codec_of(case.codec)
    network = build(NetSpec(depth=1, width=4), codec.image_shape, CLASSES)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (16, *codec.image_shape), np.uint8), np.arange(16) % CLASSES
    objective = match.make(
        case.objective, codec=codec, network=network, augment=DsaSpec(strategy=case.strategy), mmd=case.mmd
    )
    given = data_of(objective, images, labels, whiten.fit("meanstd", images), move=0.2)
    step = distillation.make_step(objective)
    return (
        jax.jit(lambda params: distillation.init_state(objective, params)),
        jax.jit(step, donate_argnums=0, compiler_options=json.loads(options) if case.default else None),
        given,
    )


def run(name: str, options: str, seed: int = SEED) -> Run:
    begin, step, given = programs(name, options)
    codec, start = codec_of(CASES[name].codec)
    images = np.random.default_rng(1).uniform(0, 1, (codec.num_images, *codec.image_shape)).astype(np.float32)
    key_start, key = jax.random.split(jax.random.key(seed))
    params = start(key_start, images)
    state, metrics = begin(params), []
    for _ in range(STEPS):
        state, values = step(state, given, key)
        metrics.append(jax.device_get(values))
    return Run(jax.device_get(params), jax.device_get(state), metrics)


def traced(name: str, options: str) -> dict[str, str]:
    """Returns digests of the programs of a case, and of the data that they see."""
    codec, start = codec_of(CASES[name].codec)
    images = np.random.default_rng(1).uniform(0, 1, (codec.num_images, *codec.image_shape)).astype(np.float32)
    key = jax.random.key(SEED)
    params = jax.eval_shape(start, key, images)

    @jax.jit
    def used(params):
        images, pull = jax.vjp(codec.decode, params)
        optimizer = codec.optimizer()
        updates, _ = optimizer.update(pull(images)[0], optimizer.init(params), params)
        return codec.regularize(params), codec.project(optax.apply_updates(params, updates))

    if CASES[name].objective is None:
        lowered, drawn = [start.lower(key, images), used.lower(params)], {}
    else:
        begin, step, given = programs(name, options)
        lowered, drawn = [step.lower(jax.eval_shape(begin, params), given, key)], given.drawn
    texts = {str(number): one.as_text().encode() for number, one in enumerate(lowered)}
    return digests(drawn) | {number: hashlib.sha256(text).hexdigest() for number, text in texts.items()}


def digests(tree: Any) -> dict[str, str]:
    """Returns the name, dtype and shape of every array of a tree with a digest of its bits."""
    return {
        f"{jax.tree_util.keystr(path)} {leaf.dtype}{list(leaf.shape)}": hashlib.sha256(leaf.tobytes()).hexdigest()
        for path, leaf in jax.tree_util.tree_leaves_with_path(jax.tree.map(np.asarray, tree))
    }


@pytest.fixture(scope="module")
def options(default_code) -> str:
    return json.dumps(default_code)


@pytest.fixture(scope="module")
def elsewhere(options) -> dict[str, dict[str, str]]:
    """The digests of all codecs and cases, from another process."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PYTHONHASHSEED": "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2",
        # Threads of XLA on the CPU: by default as many as there are cores.
        "NPROC": "1" if os.cpu_count() != 1 else "2",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    command = [sys.executable, __file__, options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_cases_cover_every_codec_and_every_objective():
    assert {case.codec.name for case in CASES.values()} == set(codecs.SPECS)
    kinds = {type(case.objective) for case in CASES.values() if case.objective is not None}
    assert kinds == {DistributionSpec, GradientSpec, KernelRidgeSpec, TrajectorySpec}


@pytest.mark.parametrize("name", [name for name in CASES if name not in RUN])
def test_another_process_traces_the_same_programs(name, elsewhere, options):
    assert traced(name, options) == elsewhere[name]


@pytest.mark.parametrize("name", RUN)
def test_another_process_repeats_every_bit_of_state_and_metrics(name, elsewhere, options):
    found = run(name, options)
    assert digests(found) == elsewhere[name]
    # Not because nothing happens.
    assert all(np.isfinite(value).all() for values in found.metrics for value in values.values())
    assert len({float(values["loss"]) for values in found.metrics}) == STEPS
    before, after = digests(found.start), digests(found.state.params)
    assert before.keys() == after.keys()
    same = {place for place in before if before[place] == after[place]}
    assert {place.partition(" ")[0] for place in same} <= {"['index']"}


def test_another_seed_changes_what_is_drawn_and_what_follows(options):
    ours, other = (digests(run("gaussian", options, seed)) for seed in (SEED, SEED + 1))
    assert ours.keys() == other.keys()
    # The start is where the images ask for it, whatever the seed, and as many steps were taken.
    same = {place.split(" ")[0] for place in ours if ours[place] == other[place]}
    started = {f".start.{leaf}" for leaf in ("mean", "cholesky", "color", "opacity")} | {".metrics[0]['regularizer']"}
    assert same == started | {".state.step", ".state.opt_state[0][0].count"}


if __name__ == "__main__":
    found = {name: traced(name, sys.argv[1]) for name in reversed(CASES) if name not in RUN}
    for name in reversed(RUN):
        jax.config.update("jax_enable_compilation_cache", not CASES[name].default)
        compilation_cache.reset_cache()
        found[name] = digests(run(name, sys.argv[1]))
    json.dump(found, sys.stdout)
