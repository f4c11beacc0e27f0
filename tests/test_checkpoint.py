"""Checkpoints: bit-exact round trips, survival of SIGKILL, and one clear line for every damage."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
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
        "scalars": (7, 0.1, True, np.float64(1 / 3)),
        "none": None,
    }


def test_round_trip_keeps_bits_types_and_structure(tmp_path):
    state = _state()
    meta = {"phase": "distill", "seed": 3, "values": [0.1, None, "ü"]}
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.latest() is None
        checkpoints.save(10, state, meta)
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.latest() == 10
        restored, got = checkpoints.restore(10, state)
    assert got == meta
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        assert isinstance(after, jax.Array) if isinstance(before, jax.Array) else type(after) is type(before)
        assert _bits(after) == _bits(before)


@pytest.mark.parametrize("tree", [jnp.arange(3), np.float32(2.5), {"a/b c": {"ä": jnp.ones(2)}}, [1, (2, [3])]])
def test_bare_and_oddly_named_trees_round_trip(tmp_path, tree):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, tree, {})
        restored, _ = checkpoints.restore(0, tree)
    assert jax.tree.map(_bits, restored) == jax.tree.map(_bits, tree)


def test_restored_arrays_are_as_weakly_typed_as_before(tmp_path):
    state = {"scalar": jnp.asarray(0.1), "vector": jnp.full((3,), 0.1), "count": jnp.asarray(3), "strong": jnp.ones(3)}
    assert [state[k].weak_type for k in state] == [True, True, True, False]
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        restored, _ = checkpoints.restore(1, jax.tree.map(lambda x: x * 0, state))
        from_shapes, _ = checkpoints.restore(1, jax.eval_shape(lambda: state))
    for name, before in state.items():
        assert restored[name].weak_type == from_shapes[name].weak_type == before.weak_type
        assert _bits(from_shapes[name]) == _bits(before)
        assert _bits(restored[name]) == _bits(before)


def test_resumed_step_does_not_compile_again(tmp_path):
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 2, s), donate_argnums=0)
    state = step({"a": jnp.ones(4), "b": jnp.asarray(0.5)})
    state = step(state)
    compiled = step._cache_size()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        restored, _ = checkpoints.restore(1, state)
    step(restored)
    assert step._cache_size() == compiled


def test_only_the_newest_steps_stay(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
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
    for trial in range(5):
        command = [sys.executable, "-c", child, str(path)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            process.stdout.readline()
            process.stdout.readline()
            time.sleep(0.011 * trial)  # a save takes about 35 ms, so these fall into its different parts
            process.kill()
            reported = [int(line) for line in process.stdout.read().split()]
        assert process.returncode == -signal.SIGKILL
        interrupted += any("tmp" in p.name for p in path.iterdir())
        with Checkpoints(path) as checkpoints:
            step = checkpoints.latest()
            # The last one reported may not have reached the disk, the one before has.
            assert step >= max([last + 2, *reported]) - 1
            restored, meta = checkpoints.restore(step, {"a": np.zeros((200, 300), np.float32), "b": [np.int32(0)]})
        assert meta == {"step": step}
        assert restored["b"] == [step]
        assert (restored["a"] == step).all()
        last = step
    assert interrupted, "no kill fell into a save: the test shows nothing"


def test_leftovers_of_a_killed_save_are_removed(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"a": 1}, {})
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 1
        checkpoints.save(2, {"a": 2}, {})
        assert checkpoints.restore(2, {"a": 0})[0] == {"a": 2}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    tree = _tree(0)
    with Checkpoints(path) as checkpoints:
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
    file = folder / "meta" / "metadata"
    file.write_text(file.read_text().replace('"step": 200', '"step": 201'))


def _empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_truncate, "its arrays cannot be read"),
        (_flip, "leaf params.mean was altered"),
        (_alter_meta, "its meta file was altered"),
        (lambda f: (f / "meta" / "metadata").unlink(), "its meta file cannot be read"),
        (lambda f: (f / "meta" / "metadata").write_text("{"), "its meta file cannot be read"),
        (lambda f: (f / "tree" / "_METADATA").write_text("{"), "its arrays cannot be read"),
        (lambda f: (f / "tree" / "manifest.ocdbt").unlink(), "its arrays cannot be read"),
        (lambda f: shutil.rmtree(f / "tree"), "its arrays cannot be read"),
        (_empty, "its meta file cannot be read"),
    ],
)
def test_damage_is_told_in_one_line_with_the_way_on(saved, tmp_path, capfd, caplog, damage, reason):
    source, tree = saved
    path = tmp_path / "c"
    shutil.copytree(source, path)
    damage(path / "200")
    with Checkpoints(path) as checkpoints:
        step = checkpoints.latest()
        assert step == 200
        with pytest.raises(UserError, match=reason) as caught:
            checkpoints.restore(step, tree)
    message = str(caught.value)
    assert "\n" not in message
    assert f"{path / '200'} is damaged" in message
    assert (
        f"step 100 is intact: delete {path / '200'} and run the same command again to continue from step 100" in message
    )
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    assert caplog.records == []
    with Checkpoints(path) as checkpoints:
        step, restored, meta = checkpoints.newest(tree)
        assert step == checkpoints.latest() == 100
    named, way = capfd.readouterr().err.splitlines()
    assert named.startswith(f"warning: {path / '200'} is damaged ({reason}") and named.endswith("was removed")
    assert way == "warning: going on from step 100"
    assert meta == {"step": 100}
    assert restored["params"]["mean"].tobytes() == _tree(100)["params"]["mean"].tobytes()


def test_damage_of_every_step_says_to_delete_all(saved, tmp_path):
    source, tree = saved
    path = tmp_path / "c"
    shutil.copytree(source, path)
    _flip(path / "100")
    _truncate(path / "200")
    with Checkpoints(path) as checkpoints:
        expected = f"no older step is intact: delete {path / '200'} and {path / '100'} and run"
        with pytest.raises(UserError, match=expected):
            checkpoints.restore(200, tree)
        with pytest.raises(UserError, match=expected):
            checkpoints.newest(tree)
    assert (path / "100").exists() and (path / "200").exists()


def test_orbax_alone_would_miss_a_flipped_bit(saved, tmp_path):
    import orbax.checkpoint as ocp

    source, tree = saved
    shutil.copytree(source / "200", tmp_path / "200")
    _flip(tmp_path / "200")
    like = {"params.mean": np.zeros((40, 20, 2), np.float32), "count": np.zeros((), np.int32)}
    with ocp.CheckpointManager(tmp_path) as manager:
        got = manager.restore(200, args=ocp.args.Composite(tree=ocp.args.StandardRestore(like))).tree
    assert (got["params.mean"] != _tree(200)["params"]["mean"]).any()


@pytest.mark.parametrize(
    ("like", "words"),
    [
        (
            {"params": {"mean": np.zeros((40, 22, 2), np.float32)}, "count": np.int32(0)},
            r"leaf params.mean is float32\[40,20,2\] in the checkpoint and float32\[40,22,2\] in this program\.",
        ),
        (
            {"params": {"mean": np.zeros((40, 20, 2), np.float32)}, "count": np.int64(0)},
            r"leaf count is int32\[\] in the checkpoint and int64\[\] in this program",
        ),
        ({"params": {"mean": np.zeros((40, 20, 2), np.float32)}}, "leaf count is int32.* and absent in this program"),
        (
            {"params": {"color": np.zeros(3, np.float32)}, "count": np.int32(0)},
            r"leaf params.mean is .* and absent in this program \(and 1 more\)",
        ),
    ],
)
def test_another_structure_is_refused_by_leaf(saved, like, words):
    with Checkpoints(saved[0]) as checkpoints, pytest.raises(UserError, match=words):
        checkpoints.restore(200, like)


def test_absent_step_is_refused_with_the_steps_there(saved):
    with (
        Checkpoints(saved[0]) as checkpoints,
        pytest.raises(UserError, match=r"no checkpoint of step 7 \(steps there: 100, 200\)"),
    ):
        checkpoints.restore(7, saved[1])


def test_steps_must_grow(saved):
    with (
        Checkpoints(saved[0]) as checkpoints,
        pytest.raises(ValueError, match="step is 200, .* already holds step 200"),
    ):
        checkpoints.save(200, saved[1], {})


@pytest.mark.parametrize(
    ("tree", "meta", "kind", "words"),
    [
        ({"key": jax.random.key(0)}, {}, TypeError, "leaf key is a random key: keep its seed and step"),
        ({"name": "adam"}, {}, TypeError, "leaf name is a str: only numbers and arrays"),
        ({"a": np.array(["x"])}, {}, TypeError, "leaf a has dtype <U1"),
        ({"a": 1}, {"x": np.zeros(2)}, TypeError, "meta is not JSON-able"),
        ({}, {}, ValueError, "tree has no leaves"),
        ({"a.b": 1, "a": {"b": 2}}, {}, ValueError, "two leaves with the path a.b"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path, tree, meta, kind, words):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(kind, match=words):
            checkpoints.save(1, tree, meta)
        assert checkpoints.latest() is None
    assert list(tmp_path.iterdir()) == []


def test_keep_below_one_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep is 0"):
        Checkpoints(tmp_path, keep=0)


def test_full_disk_is_an_os_error_and_keeps_the_older_step(tmp_path):
    rng = np.random.default_rng(0)
    big = {"a": rng.integers(0, 2**31, size=(400, 400), dtype=np.int32)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, big, {})
        checkpoints.wait()
        # A file-size limit stands in for a full disk: both come back from write() through the same code.
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        try:
            with pytest.raises(OSError, match="File too large") as caught:
                checkpoints.save(2, big, {})
                checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == str(tmp_path / "2")
    assert [p.name for p in tmp_path.iterdir()] == ["1"]
    with Checkpoints(tmp_path) as checkpoints:
        restored, _ = checkpoints.restore(checkpoints.latest(), big)
    assert (restored["a"] == big["a"]).all()


def test_saving_says_nothing(tmp_path):
    program = textwrap.dedent("""
        import sys, jax.numpy as jnp
        from train.checkpoint import Checkpoints
        checkpoints = Checkpoints(sys.argv[1])
        for step in range(4):
            checkpoints.save(step, {"a": jnp.ones(3)}, {})
        checkpoints.restore(3, {"a": jnp.ones(3)})
    """)
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout + result.stderr == ""


def test_damage_of_many_leaves_says_nothing_but_the_error(tmp_path):
    # In a process of its own: pytest catches what threads of tensorstore print about reads that were given up.
    program = textwrap.dedent("""
        import os, pathlib, sys, time, numpy as np
        from train.checkpoint import Checkpoints
        from train.errors import UserError
        path = pathlib.Path(sys.argv[1])
        tree = {str(i): np.random.default_rng(i).normal(size=(50, 50)) for i in range(40)}
        with Checkpoints(path) as checkpoints:
            checkpoints.save(1, tree, {})
        for file in (path / "1" / "tree" / "ocdbt.process_0" / "d").iterdir():
            os.truncate(file, file.stat().st_size // 2)
        with Checkpoints(path) as checkpoints:
            try:
                checkpoints.restore(1, tree)
            except UserError as error:
                print(error)
        time.sleep(0.3)
    """)
    command = [sys.executable, "-c", program, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stderr == ""
    assert result.stdout.startswith(f"checkpoint {tmp_path / '1'} is damaged (its arrays cannot be read: ")
    assert result.stdout.count("\n") == 1
