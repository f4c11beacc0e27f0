"""Checkpoints: bit-exact round trips, survival of SIGKILL, and one clear line for every damage."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from train.checkpoint import Checkpoints
from train.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


class Pair(NamedTuple):
    mean: jax.Array
    count: jax.Array


def _bits(leaf):
    array = np.asarray(leaf)
    return array.dtype, array.shape, array.tobytes()


def _state():
    rng = np.random.default_rng(0)
    params = {"gaussian": {"mean": jnp.asarray(rng.normal(size=(6, 5, 2)), jnp.float32)}, "lr": jnp.float32(0.01)}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    _, opt = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params))
    odd = np.array([np.nan, -0.0, np.inf, 1e-45, 3.4e38], np.float32)  # a NaN, signed zero, subnormal
    return {
        "params": params,
        "opt": opt,
        "pair": Pair(
            jnp.asarray(rng.normal(size=(3, 3)), jnp.bfloat16), jnp.asarray([1, -(2**31), 2**31 - 1], jnp.int32)
        ),
        "bytes": jnp.arange(256, dtype=jnp.uint8),
        "mask": jnp.asarray([True, False]),
        "odd": odd,
        "host_bf16": odd.astype(ml_dtypes.bfloat16),
        "empty": jnp.zeros((0, 3), jnp.float32),
        "wide": np.array([1 / 3]),
        "none": None,
    }


def test_round_trip_keeps_bits_types_and_structure(tmp_path):
    state = _state()
    meta = {"phase": "distill", "seed": 3, "values": [0.1, None, "ü"]}
    checkpoints = Checkpoints(tmp_path / "c")
    assert checkpoints.latest() is None
    checkpoints.save(10, state, meta)
    checkpoints = Checkpoints(tmp_path / "c")
    assert checkpoints.latest() == 10
    restored, got = checkpoints.restore(10, state)
    assert got == meta
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        assert isinstance(after, jax.Array) if isinstance(before, jax.Array) else type(after) is type(before)
        assert _bits(after) == _bits(before)


def test_restored_arrays_are_as_weakly_typed_as_before(tmp_path):
    state = {"scalar": jnp.asarray(0.1), "vector": jnp.full((3,), 0.1), "count": jnp.asarray(3), "strong": jnp.ones(3)}
    assert [state[k].weak_type for k in state] == [True, True, True, False]
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {})
    restored, _ = checkpoints.restore(1, jax.tree.map(lambda x: x * 0, state))
    from_shapes, _ = checkpoints.restore(1, jax.eval_shape(lambda: state))
    for name, before in state.items():
        assert restored[name].weak_type == from_shapes[name].weak_type == before.weak_type
        assert _bits(from_shapes[name]) == _bits(before)
        assert _bits(restored[name]) == _bits(before)


def test_only_the_newest_steps_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 5, 9, 12):
        checkpoints.save(step, {"a": jnp.full(3, step)}, {"step": step})
    assert checkpoints.latest() == 12
    assert sorted(p.name for p in tmp_path.iterdir()) == ["12", "9"]
    restored, meta = checkpoints.restore(9, {"a": jnp.zeros(3, jnp.int32)})
    assert meta == {"step": 9}
    assert restored["a"].tolist() == [9, 9, 9]


def test_save_in_a_kill_loop_always_leaves_a_usable_checkpoint(tmp_path):
    child = textwrap.dedent("""
        import sys, numpy as np
        from train.checkpoint import Checkpoints
        checkpoints = Checkpoints(sys.argv[1], keep=2)
        step = checkpoints.latest() or 0
        while True:
            step += 1
            checkpoints.save(step, {"a": np.full((200, 300), step, np.float32), "b": [np.int32(step)]}, {"step": step})
            print(step, flush=True)
    """)
    path, last = tmp_path / "c", 0
    interrupted = 0
    for trial in range(3):
        command = [sys.executable, "-c", child, str(path)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            process.stdout.readline()
            process.stdout.readline()
            time.sleep(0.02 * trial)  # a save takes about 60 ms, so these fall into its different parts
            process.kill()
            reported = [int(line) for line in process.stdout.read().split()]
        assert process.returncode == -signal.SIGKILL
        interrupted += any("tmp" in p.name for p in path.iterdir())
        checkpoints = Checkpoints(path)
        step = checkpoints.latest()
        assert step >= max([last + 2, *reported])
        restored, meta = checkpoints.restore(step, {"a": np.zeros((200, 300), np.float32), "b": [np.int32(0)]})
        assert not any("tmp" in p.name for p in path.iterdir())
        assert meta == {"step": step}
        assert restored["b"] == [step]
        assert (restored["a"] == step).all()
        last = step
    assert interrupted, "no kill fell into a save: the test shows nothing"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    tree = _tree(0)
    checkpoints = Checkpoints(path)
    for step in (100, 200):
        checkpoints.save(step, _tree(step), {"step": step})
    return path, tree


def _tree(step):
    rng = np.random.default_rng(step)
    return {"params": {"mean": rng.normal(size=(40, 20, 2)).astype(np.float32)}, "count": np.int32(step)}


def _largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def _truncate(folder):
    file = _largest(folder)
    os.truncate(file, file.stat().st_size // 2)


def _flip(folder):
    file = _largest(folder)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)


def _alter_meta(folder):
    file = folder / "tree" / "_CHECKPOINT_METADATA"
    file.write_text(file.read_text().replace('"step": 200', '"step": 201'))


def _empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_truncate, "damaged checkpoint"),
        (_flip, "sha256: expected"),
        (_alter_meta, "sha256: expected"),
        (lambda f: (f / "tree" / "_CHECKPOINT_METADATA").unlink(), "No such file"),
        (lambda f: (f / "tree" / "_CHECKPOINT_METADATA").write_text("{"), "EOF while parsing an object"),
        (lambda f: (f / "tree" / "_METADATA").write_text("{"), "damaged checkpoint"),
        (lambda f: (f / "tree" / "manifest.ocdbt").unlink(), "damaged checkpoint"),
        (_empty, "No such file"),
    ],
)
def test_damage_is_named_and_the_older_step_is_used(saved, tmp_path, capfd, damage, reason):
    source, tree = saved
    path = tmp_path / "c"
    shutil.copytree(source, path)
    damage(path / "200")
    checkpoints = Checkpoints(path)
    with pytest.raises(UserError, match=reason) as caught:
        checkpoints.restore(200, tree)
    assert f"{path / '200'} is damaged" in str(caught.value) and "\n" not in str(caught.value)
    step, restored, meta = checkpoints.newest(tree)
    assert step == checkpoints.latest() == 100
    named, way = capfd.readouterr().err.splitlines()
    assert named.startswith(f"warning: {path / '200'} is damaged (") and named.endswith("was removed")
    assert reason in named and way == "warning: going on from step 100"
    assert meta == {"step": 100}
    assert restored["params"]["mean"].tobytes() == _tree(100)["params"]["mean"].tobytes()


def test_damage_of_every_step_removes_nothing(saved, tmp_path):
    source, tree = saved
    path = tmp_path / "c"
    shutil.copytree(source, path)
    _flip(path / "100")
    _truncate(path / "200")
    expected = rf"checkpoint {path / '200'} is damaged \(.*\): delete it and run the same command again"
    with pytest.raises(UserError, match=expected):
        Checkpoints(path).newest(tree)
    assert (path / "100").exists() and (path / "200").exists()


def test_checkpoints_of_before_are_read_and_compared_with_their_sums(tmp_path):
    import orbax.checkpoint as ocp

    values = np.arange(3, dtype=np.float32)
    leaves = {"a": [[3], "float32", zlib.crc32(values.tobytes())]}
    with ocp.CheckpointManager(tmp_path) as manager:
        for step, sums in ((1, leaves), (2, {"a": [[3], "float32", 0]})):
            meta = ocp.args.JsonSave({"meta": {"step": step}, "leaves": sums})
            manager.save(step, args=ocp.args.Composite(tree=ocp.args.StandardSave({"a": values}), meta=meta))
    step, restored, meta = Checkpoints(tmp_path).newest({"a": np.zeros(3, np.float32)})
    assert (step, restored["a"].tolist(), meta) == (1, [0, 1, 2], {"step": 1})


@pytest.mark.parametrize(
    ("like", "words"),
    [
        (
            {"params": {"mean": np.zeros((40, 22, 2), np.float32)}, "count": np.int32(0)},
            r"params.mean: expected float32\[40, 22, 2\], found float32\[40, 20, 2\]\. Continue with the code and",
        ),
        (
            {"params": {"mean": np.zeros((40, 20, 2), np.float32)}, "count": np.int64(0)},
            r"count: expected int64\[\], found int32\[\]",
        ),
        ({"params": {"mean": np.zeros((40, 20, 2), np.float32)}}, r"count: expected nothing, found int32\[\]"),
    ],
)
def test_another_structure_is_refused_by_leaf(saved, like, words):
    with pytest.raises(UserError, match=words):
        Checkpoints(saved[0]).newest(like)
    assert (saved[0] / "200").exists()


def test_a_full_disk_and_damage_of_many_leaves_say_nothing_but_the_error(tmp_path):
    # In a process of its own: pytest catches what orbax logs, and what threads of tensorstore print of abandoned reads.
    program = textwrap.dedent("""
        import os, pathlib, resource, sys, time, numpy as np
        from train.checkpoint import Checkpoints
        from train.errors import UserError
        path = pathlib.Path(sys.argv[1])
        tree = {str(i): np.random.default_rng(i).normal(size=(50, 50)) for i in range(40)}
        checkpoints = Checkpoints(path)
        checkpoints.save(1, tree, {})
        for file in (path / "1" / "tree" / "ocdbt.process_0" / "d").iterdir():
            os.truncate(file, file.stat().st_size // 2)
        try:
            checkpoints.restore(1, tree)
        except UserError as error:
            print(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
        try:
            checkpoints.save(2, tree, {})
        except ValueError as error:
            print("File too large" in str(error))
        print(*(folder.name for folder in path.iterdir()))
        time.sleep(0.3)
    """)
    command = [sys.executable, "-c", program, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stderr == ""
    damaged, full, left = result.stdout.splitlines()
    assert left == "1"
    assert damaged.startswith(f"checkpoint {tmp_path / '1'} is damaged (damaged checkpoint (")
    assert full == "True"
