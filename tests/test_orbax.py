"""Sets as orbax checkpoints, and sets as pytrees."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import gsdd_jax
from gsdd_jax import MergedSet, SynSet, codecs, decode_numpy, labels, orbax_set, synset
from train import export

ROOT = Path(__file__).resolve().parent.parent
SHAPE, CLASSES, NAMES = (6, 8, 3), 2, ("cat", "naïve 犬")
SPECS = {
    "gaussian": codecs.GaussianSpec(images_per_class=4, num_points=3),
    "pixel": codecs.PixelSpec(dtype="uint8", images_per_class=3),
}


def masters_of(codec, seed: int = 0):
    images = np.random.default_rng(seed).uniform(0, 1, (codec.num_images, *codec.image_shape)).astype(np.float32)
    return jax.jit(codec.init)(jax.random.key(seed), images)


def make(name: str, *, soft: bool = False, names=NAMES, meta=None, shape=SHAPE) -> SynSet:
    """A set at stored precision, with bfloat16 labels and their indices if asked for."""
    codec = codecs.make(SPECS[name], image_shape=shape, num_classes=CLASSES, bytes_per_class=2000)
    rows = np.random.default_rng(1).dirichlet(np.ones(CLASSES), codec.num_images)
    kept = labels.pack(rows, labels.LabelSpec(kind="soft", dtype="bfloat16", top_k=1)) if soft else None
    params = jax.jit(lambda p: codec.dequantize(codec.quantize(p)))(masters_of(codec))
    return SynSet(codec, params, 2100, names, {"toy": [0.5, None]} if meta is None else meta, kept)


def same(a, b) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes() and x.dtype == y.dtype
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def write(folder, tree, metadata=None) -> None:
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(folder, args=ocp.args.StandardSave(tree), custom_metadata=metadata, force=True)


# The form


@pytest.mark.parametrize(("name", "soft"), [("gaussian", True), ("pixel", False)])
def test_checkpoint_and_file_are_the_same_set(tmp_path, name, soft):
    made = make(name, soft=soft)
    sizes = made.save(tmp_path / "file")
    assert made.save(tmp_path / "checkpoint", format="orbax") == sizes
    found = gsdd_jax.load(tmp_path / "checkpoint")
    assert found.codec is gsdd_jax.load(tmp_path / "file").codec
    assert same(found, dataclasses.replace(made, codec=found.codec))
    found.save(tmp_path / "again")
    for file in ("synset.safetensors", "manifest.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "file" / file).read_bytes()
    light = decode_numpy.load(tmp_path / "checkpoint")
    np.testing.assert_array_equal(light.images, decode_numpy.load(tmp_path / "file").images)


def test_merged_set_is_a_checkpoint_for_each_part(tmp_path):
    made = MergedSet((make("pixel"), make("pixel", soft=True, names=("a", "b"))), {"of": "two"})
    made.save(tmp_path / "set")
    assert export.main(["--run", str(tmp_path / "set"), "--to", "orbax", "--out", str(tmp_path / "out")]) == 0
    found = gsdd_jax.load(tmp_path / "out")
    assert type(found) is MergedSet and found.meta == made.meta
    assert same([part.params for part in found.parts], [part.params for part in made.parts])
    np.testing.assert_array_equal(found.soft_labels, made.soft_labels)
    assert all(orbax_set.METADATA in map(lambda x: x.name, part.iterdir()) for part in (tmp_path / "out").glob("part*"))


def test_documentation_reads_a_checkpoint_without_this_library_and_onto_eight_devices(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "exchange.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text.split("## Orbax")[1], re.DOTALL)
    made = make("gaussian", soft=True)
    made.save(tmp_path / "runs" / "digits" / "export")
    masters = masters_of(made.codec)
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        exec(compile(blocks[0], "exchange.md", "exec"), {})
    made.save(tmp_path / "both", format="orbax", state={"params": masters, "opt_state": [jnp.int32(3)]})
    (tmp_path / "both" / "state").rename(tmp_path / "digits_orbax" / "state")
    program = "\n".join(blocks[1:]) + textwrap.dedent(
        """
        import sys
        assert not {"gsdd_jax", "kernels", "train"} & set(sys.modules)
        assert manifest["images_per_class"] == 4 and len(jax.devices()) == 8
        assert {name: str(array.dtype) for name, array in arrays.items()} == {
            **dict.fromkeys(("mean", "cholesky", "color", "opacity", "labels"), "bfloat16"), "label_indices": "uint8"}
        for x in arrays.values():
            assert len(x.sharding.device_set) == 8 and x.addressable_shards[0].data.shape[0] == 1
        assert opt_state == [3] and params["mean"].dtype == "float32"
        import numpy as np
        print({name: np.asarray(array).tobytes().hex() for name, array in sorted(arrays.items())})
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    written = made.codec.pack(made.codec.quantize(made.params)) | made.soft.arrays
    expected = {name: np.asarray(array).tobytes().hex() for name, array in sorted(written.items())}
    assert done.stdout.splitlines()[-1] == str(expected)


def test_directory_with_something_in_it_is_left_alone(tmp_path):
    make("pixel").save(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match=f"{tmp_path}: expected an absent or empty directory"):
        make("pixel").save(tmp_path, format="orbax")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    with pytest.raises(ValueError, match="format: expected safetensors or orbax, found 'npz'"):
        make("pixel").save(tmp_path / "other", format="npz")
    with pytest.raises(ValueError, match="state: only format='orbax' keeps it"):
        make("pixel").save(tmp_path / "other", state={})


@pytest.mark.parametrize("change", ["rename", "replace", "fsync"])
def test_set_is_whole_or_absent_whenever_its_writer_is_killed(tmp_path, monkeypatch, change):
    class KilledError(BaseException):
        pass

    def die(*_, **__):
        raise KilledError

    monkeypatch.setattr(os, change, die)
    with pytest.raises(KilledError):
        make("pixel").save(tmp_path / "set", format="orbax", state={"params": np.ones(2)})
    assert not (tmp_path / "set").exists()


# Damaged, foreign and newer ones


# Orbax describes arrays one after the other, and forgets the others where the file that names them is damaged.
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
def test_every_damage_of_every_file_is_one_line_or_harmless(tmp_path):
    # Of arrays below 1 KiB orbax has a checksum.
    made, folder = make("pixel", soft=True, shape=(12, 16, 3)), tmp_path / "set"
    made.save(folder, format="orbax")
    refused = []
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        raw = file.read_bytes()
        flips = [raw[:i] + bytes([raw[i] ^ 4]) + raw[i + 1 :] for i in range(0, len(raw), 1 + len(raw) // 6)]
        for damaged in (None, b"", raw[: len(raw) // 2], *flips):
            file.unlink() if damaged is None else file.write_bytes(damaged)
            try:
                assert same(gsdd_jax.load(folder).params, made.params), file
            except (ValueError, FileNotFoundError) as error:
                message = str(error)
                assert message.startswith(str(folder)) and "\n" not in message and len(message) < 500, message
                refused.append(message)
            file.write_bytes(raw)
    assert len(refused) > 20
    # What orbax itself does not find.
    assert any(": sha256: the manifest expects" in message for message in refused)
    assert any("damaged checkpoint (" in message for message in refused)
    (folder / "_METADATA").unlink()
    os.mkfifo(folder / "_METADATA")
    with pytest.raises(ValueError, match="_METADATA: expected a regular file"):
        gsdd_jax.load(folder)


@pytest.mark.parametrize(
    ("metadata", "advice"),
    [
        (None, "found null; it is no distilled set of this library"),
        ({"epoch": 3}, "found null; it is no distilled set of this library"),
        ({"format": "gsdd_jax/9"}, "found 'gsdd_jax/9'; it is of a newer version: update gsdd_jax"),
    ],
)
def test_checkpoints_of_others_and_of_later_versions_say_so(tmp_path, metadata, advice):
    write(tmp_path / "other", {"params": {"kernel": np.ones((2, 2))}, "opt_state": [np.ones(2)]}, metadata)
    with pytest.raises(ValueError, match=f"_CHECKPOINT_METADATA: format: expected 'gsdd_jax/1' or .*, {advice}"):
        gsdd_jax.load(tmp_path / "other")


def test_arrays_are_compared_and_bounded_before_one_is_read(tmp_path, monkeypatch):
    made = make("pixel")
    made.save(tmp_path / "set", format="orbax")
    text = (tmp_path / "set" / orbax_set.METADATA).read_text()
    manifest = json.loads(text)["custom_metadata"]
    monkeypatch.setattr(ocp.StandardCheckpointHandler, "restore", None)
    for arrays, message in (
        ({"images": np.zeros((6, 6, 8, 2), np.uint8)}, r"expected uint8\[6, 6, 8, 3\], found uint8\[6, 6, 8, 2\]"),
        ({"images": np.zeros((6, 6, 8, 3), np.uint8), "more": np.ones(1)}, "more: expected nothing, found float64"),
        ({"images": {"deep": np.zeros((6, 6, 8, 3), np.uint8)}}, r"images: expected uint8\[.*, found nothing"),
        ({"images": np.zeros((6, 6, 8, 3), jnp.float8_e5m2)}, "images: expected one of U64|uint64, .*float8_e5m2"),
    ):
        write(tmp_path / "other", arrays, manifest)
        with pytest.raises(ValueError, match=f"{tmp_path / 'other'}: .*{message}|{message}"):
            gsdd_jax.load(tmp_path / "other")
    monkeypatch.setattr(orbax_set, "UNPACKED", 0)
    monkeypatch.setattr(orbax_set, "UNPACKED_PER_BYTE", 0)
    with pytest.raises(ValueError, match="set: expected at most 0 bytes of arrays in [0-9]+ bytes of files, found 864"):
        gsdd_jax.load(tmp_path / "set")


# Masters and state


def test_masters_come_back_to_the_bit_and_the_optimizer_state_onto_its_structure(tmp_path):
    made, folder = make("pixel"), tmp_path / "set"
    codec = made.codec
    masters = masters_of(codec)
    optimizer = codec.optimizer()
    _, opt_state = optimizer.update(masters, optimizer.init(masters), masters)
    state = {"params": masters, "opt_state": opt_state, "step": 7}
    made.save(folder, format="orbax", state=state)
    found = gsdd_jax.load(folder)
    assert same(found.params, made.params) and not same(found.params, masters)
    assert same(orbax_set.with_masters(folder, found).params, masters)
    with ocp.StandardCheckpointer() as checkpointer:
        like = jax.eval_shape(lambda: {"params": masters, "opt_state": optimizer.init(masters), "step": jnp.int32(0)})
        assert same(checkpointer.restore(folder / "state", like), state | {"step": np.int32(7)})

    other = make("gaussian")
    with pytest.raises(ValueError, match=r"state: params.cholesky: expected float32\[8, 3, 3\], found nothing"):
        orbax_set.with_masters(folder, other)
    for file in (folder / "state").rglob("d/*"):
        raw = file.read_bytes()
        file.write_bytes(raw[:-20] + bytes(20))
    with pytest.raises(ValueError, match=f"^{folder / 'state'}: (sha256: expected|damaged checkpoint)"):
        orbax_set.with_masters(folder, found)
    other.save(tmp_path / "plain", format="orbax")
    assert orbax_set.with_masters(tmp_path / "plain", other) is other


def test_export_refuses_what_no_checkpoint_holds(tmp_path, capsys):
    make("pixel").save(tmp_path / "set")
    for arguments, message in (
        (("--to", "set", "--masters"), "--masters: only --to orbax holds them, found --to set"),
        (("--to", "orbax", "--masters"), "is no run directory: there is no config.yaml"),
    ):
        with pytest.raises(SystemExit, match="2"):
            export.main(["--run", str(tmp_path / "set"), "--out", str(tmp_path / "out"), *arguments])
        assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


# A set is a pytree


def test_set_goes_through_jit_grad_vmap_and_onto_devices():
    made = make("pixel", soft=True)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(made)} == {"float32", "bfloat16", "uint8"}
    np.testing.assert_allclose(jax.jit(lambda s: s.images().mean())(made), np.asarray(made.images()).mean(), rtol=1e-6)
    np.testing.assert_array_equal(jax.jit(lambda s: s.soft_labels)(made), made.soft_labels)

    plain = dataclasses.replace(made, soft=None)
    gradient = jax.jit(jax.grad(lambda s: (s.images() ** 2).mean()))(plain)
    direct = jax.jit(jax.grad(lambda p: (made.codec.decode(p) ** 2).mean()))(made.params)
    assert type(gradient) is SynSet and gradient.codec is made.codec
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), gradient.params, direct)
    assert any(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(direct))

    other = jax.tree.map(lambda x: x / 2, plain)
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), plain, other)
    both = jax.vmap(lambda s: s.images())(stack)
    np.testing.assert_allclose(both, np.stack([plain.images(), other.images()]), atol=1e-6)

    placed = jax.device_put(made, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    assert same(placed, made) and all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(placed))
    assert [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(plain)][
        0
    ] == ".params['images']"


def test_what_is_compiled_for_one_set_serves_its_equals_and_no_set_gets_the_meta_of_another():
    traced = []

    @jax.jit
    def halved(s):
        traced.append(s.meta)
        return jax.tree.map(lambda x: x / 2, s)

    made = make("pixel", meta={"seed": [1]})
    equal = dataclasses.replace(made, meta={"seed": [1]}, params=jax.tree.map(lambda x: x + 1, made.params))
    other = dataclasses.replace(made, meta={"seed": [2]})
    assert [halved(s).meta for s in (made, equal, other)] == [{"seed": [1]}, {"seed": [1]}, {"seed": [2]}]
    assert traced == [{"seed": [1]}, {"seed": [2]}]
    assert synset.fingerprint([halved(other)]) == synset.fingerprint([halved(made)])
