import dataclasses
import functools
import hashlib
import json
import math
import os
import pickle
import shutil
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import load_file, save_file

import gsdd_jax
from gsdd_jax import SynSet, codecs, decode_numpy, synset
from gsdd_jax.codecs import GaussianSpec, PackedGaussianSpec, PixelSpec, SparseEpitomeSpec, sparse_epitome
from gsdd_jax.manifest import Manifest

SHAPE, CLASSES, BUDGET = (6, 8, 3), 2, 1152
NAMES = ("cat", "naïve 犬")
META = {"dataset": "toy", "channel_mean": [0.5, 0.25, 0.125]}
SPECS = {
    "gaussian": GaussianSpec(images_per_class=2, num_points=3),
    "packed": PackedGaussianSpec(images_per_class=2, num_points=5),
    "pixel": PixelSpec(images_per_class=1),
    "sparse epitome": SparseEpitomeSpec(
        patch=2, width=5, blocks=1, heads=1, tokens=3, nonzeros=9, images_per_class=2, dtype="bfloat16"
    ),
}


@functools.cache
def make(name: str) -> SynSet:
    codec = codecs.make(SPECS[name], image_shape=SHAPE, num_classes=CLASSES, bytes_per_class=BUDGET)
    images = np.random.default_rng(0).uniform(0, 1, (codec.num_images, *SHAPE)).astype(np.float32)
    params = jax.jit(codec.init)(jax.random.key(0), images)
    # Params of a set are at stored precision.
    params = codec.dequantize(codec.quantize(params))
    return SynSet(codec, params, BUDGET, NAMES, META)


@pytest.fixture
def folder(tmp_path):
    """A small good set, to be damaged."""
    make("gaussian").save(tmp_path)
    return tmp_path


def edit(folder, change) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


# Every codec of the registry is saved and loaded in test_codecs.py.
@pytest.mark.parametrize("name", ["gaussian", "packed"])
def test_loaded_set_is_the_saved_one_and_its_file_is_payload_plus_header(name, tmp_path):
    made, folder = make(name), tmp_path / "run" / "export"
    sizes = made.save(folder)
    for place in (folder, str(folder.parent)):
        loaded = gsdd_jax.load(place)
        assert loaded.codec is made.codec and loaded.nbytes == made.nbytes
        assert (loaded.bytes_per_class, loaded.class_names, loaded.meta) == (BUDGET, NAMES, META)
        assert loaded.labels.dtype == np.int32 and loaded.labels.tolist() == [0, 0, 1, 1]
        np.testing.assert_array_equal(loaded.images(), made.images())
    raw, manifest = ((folder / file).read_bytes() for file in ("synset.safetensors", "manifest.json"))
    header = 8 + struct.unpack("<Q", raw[:8])[0]
    assert sizes == {"payload": made.nbytes, "header": header, "file": len(raw), "manifest": len(manifest)}
    assert len(raw) == made.nbytes + header and json.loads(manifest)["sizes"]["payload"] == made.nbytes
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "synset.safetensors"]


def compilations(caplog, function) -> int:
    caplog.clear()
    with jax.log_compiles(), caplog.at_level("WARNING", logger="jax"):
        jax.block_until_ready(function())
    return sum("Finished XLA compilation" in record.getMessage() for record in caplog.records)


def test_images_are_compiled_once_for_each_size(folder, caplog):
    made = gsdd_jax.load(folder)
    # Another set of the same settings has the same codec.
    images = make("gaussian").images().shape, gsdd_jax.load(folder).images().shape
    assert images[0] == images[1]
    assert compilations(caplog, made.images) == 0
    assert compilations(caplog, lambda: made.images((7, 9))) == 1
    for again in (made, gsdd_jax.load(folder), dataclasses.replace(made, bytes_per_class=2000)):
        assert (
            compilations(caplog, lambda again=again: (again.images(), again.images((7, 9)), again.images([7, 9]))) == 0
        )


def killed_at_every_write(folder, save, monkeypatch):
    """Kills ``save()`` before each of its changes of the disk in turn, with what it says; yields after every kill."""

    class KilledError(BaseException):
        pass

    before = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    changes = ("replace", "rename", "fsync", "unlink", "mkdir", "rmdir")
    for last in range(100):
        shutil.rmtree(folder)
        for path, content in before.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        calls = 0

        def counted(real):
            def wrapper(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls > last:  # noqa: B023
                    # A dead process does not clean up either.
                    raise KilledError
                return real(*args, **kwargs)

            return wrapper

        with monkeypatch.context() as patch:
            for name in changes:
                patch.setattr(os, name, counted(getattr(os, name)))
            try:
                save()
            except KilledError:
                pass
            else:
                return
        yield


def test_set_that_replaces_another_is_the_old_or_the_new_one_whenever_it_is_killed(tmp_path, monkeypatch):
    folder, alone, old, new = tmp_path / "set", tmp_path / "alone", make("gaussian"), make("pixel")
    merged = gsdd_jax.MergedSet((new,), {"of": "one"})
    for first, second in ((old, new), (new, old), (old, merged), (merged, old), (merged, gsdd_jax.MergedSet((old,)))):
        wanted, drawn = [synset.fingerprint(one.parts) for one in (first, second)], {}
        for one in (second, first):
            one.save(folder)
            if isinstance(one, SynSet):
                drawn[synset.fingerprint([one])] = decode_numpy.load(folder).images
        states = []
        for _ in killed_at_every_write(folder, lambda: second.save(folder), monkeypatch):  # noqa: B023
            found = gsdd_jax.load(folder)
            states.append(wanted.index(synset.fingerprint(found.parts)))
            assert (type(found), found.meta) == (type((first, second)[states[-1]]), (first, second)[states[-1]].meta)
            if isinstance(found, SynSet):
                np.testing.assert_array_equal(decode_numpy.load(folder).images, drawn[wanted[states[-1]]])
        # The manifest decides, once.
        assert states == sorted(states) and set(states) == {0, 1}
        # What a kill left is gone with the next set.
        second.save(folder)
        second.save(alone)
        left = {p.relative_to(folder) for p in folder.rglob("*") if p.suffix != ".tmp"}
        assert left == {p.relative_to(alone) for p in alone.rglob("*")}
        shutil.rmtree(alone)


def test_set_that_could_not_be_read_again_is_not_written(folder):
    made, before = make("gaussian"), (folder / "manifest.json").read_bytes()
    named = dataclasses.replace(made, class_names=("cat", "\ud800"))
    with pytest.raises(ValueError, match="manifest.json: unexpected end of hex escape at line"):
        named.save(folder)
    drawn = dataclasses.replace(
        made, codec=made.codec._replace(spec=dataclasses.replace(made.codec.spec, supersample=65))
    )
    with pytest.raises(ValueError, match="codec.supersample: expected an integer >= 1 and <= 64, found 65"):
        drawn.save(folder)
    with pytest.raises(ValueError, match="manifest.json: recursion limit exceeded at line"):
        dataclasses.replace(made, meta={"a": functools.reduce(lambda inner, _: [inner], range(200), [])}).save(folder)
    assert (folder / "manifest.json").read_bytes() == before
    assert gsdd_jax.load(folder).class_names == NAMES
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "synset.safetensors"]


def test_loading_never_unpickles(folder, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a distilled set must be read as data")

    # The first load evaluates the annotations of the codec's settings, which are ours.
    gsdd_jax.load(folder)

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr("builtins.eval", refuse)
    assert gsdd_jax.load(folder).nbytes == 2 * 2 * 3 * 9 * 2


def test_nothing_there_names_the_folder(tmp_path):
    message = f"{tmp_path}: no distilled set here .expected manifest.json, or export/manifest.json of a run"
    with pytest.raises(FileNotFoundError, match=message):
        gsdd_jax.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="absent: no distilled set here"):
        gsdd_jax.load(tmp_path / "absent")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", r"damaged manifest .EOF while parsing a value at line 1"),
        (b"\xff\xfe", r"damaged manifest .expected value at line 1"),
        (b"[1, 2]", r"expected a section with the keys format, .*, found \[1, 2\]"),
        (b"{}", "format: expected .*, found null; it is no distilled set"),
        (b"[" * 100_000, "damaged manifest .recursion limit exceeded"),
        (b" " * 1_100_000, r"damaged manifest \(expected at most 1048576 bytes of JSON, found more\)"),
    ],
    ids=range(6),
)
def test_damaged_manifest(folder, text, message):
    (folder / "manifest.json").write_bytes(text)
    with pytest.raises(ValueError, match=f"{folder / 'manifest.json'}: {message}"):
        gsdd_jax.load(folder)


GONE, HUGE, KEYS = object(), 10**30, {field.name for field in dataclasses.fields(Manifest)}
FOREIGN = "'gsdd_jax/1' or 'gsdd_jax/2', found .*; it is no distilled set of this library"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        *((key, GONE, f"{key}: missing") for key in sorted(KEYS - {"format", "labels"})),
        ("format", "gsdd_jax/3", "found .*; it is of a newer version: update gsdd_jax"),
        *(("format", value, FOREIGN) for value in ("other", None, 1, [])),
        *(("codec.name", value, f"expected one of {', '.join(codecs.SPECS)}; found") for value in ("wavelet", {})),
        ("surprise", 1, "surprise: unknown key; allowed: format, codec"),
        ("codec", [], r"codec: expected a mapping, found \[\]"),
        ("meta", None, "meta: expected a mapping, found null"),
        ("codec.surprise", 1, "codec.surprise: unknown key; allowed: name, images_per_class"),
        ("codec.images_per_class", GONE, "codec.images_per_class: expected what the set was made with, found 0"),
        ("codec.gpc", 2, "codec.images_per_class: expected once, found as images_per_class and gpc"),
        ("codec.images_per_class", "many", "codec.images_per_class: expected an integer >= 0, found 'many'"),
        ("codec.images_per_class", True, "codec.images_per_class: expected an integer >= 0, found true"),
        ("codec.images_per_class", 0, "codec.images_per_class: expected what the set was made with, found 0"),
        ("codec.images_per_class", HUGE, "codec.images_per_class: expected at most 65536, found 1000"),
        ("codec.images_per_class", 60000, "codec: 216 bytes of arrays are no such set"),
        ("codec.num_points", 0, "codec.num_points: expected what the set was made with, found 0"),
        ("codec.supersample", 99, "codec.supersample: expected an integer >= 1 and <= 64, found 99"),
        ("codec.lr", math.nan, "codec.lr: expected a finite number > 0, found NaN"),
        ("codec.lr", 10**400, "codec.lr: expected a finite number > 0, found 1000"),
        ("codec.lr", 0, "codec.lr: expected a number > 0, found 0"),
        ("codec.dtype", "int4", "codec.dtype: expected one of bfloat16, float32, found 'int4'"),
        ("codec.dtype", [], r"codec.dtype: expected one of bfloat16, float32, found \[\]"),
        ("images_per_class", 3, "images_per_class: expected 2, found 3"),
        (
            "image_shape",
            [6, 8],
            "image_shape: expected a list of length >= 3 and of length <= 4, each an integer",
        ),
        ("image_shape", "large", "image_shape: expected a list of length >= 3 .*, found 'large'"),
        ("image_shape", [6, 8, HUGE], "image_shape.2: expected an integer >= 1 and <= 8192, found 1000"),
        ("image_shape", [8192, 8192, 3], "expected at most 16777216 values per image, found 8192 x"),
        ("num_classes", "two", "num_classes: expected an integer >= 1 and <= 65536, found 'two'"),
        ("num_classes", 3, "class_names: expected 3, one per class, found 2"),
        ("bytes_per_class", None, "bytes_per_class: expected an integer >= 1 and .*, found null"),
        ("bytes_per_class", 107, "bytes_per_class: expected at least 108, found 107"),
        ("class_names", None, "class_names: expected a list, each text of length <= 1024, found null"),
        ("class_names", ["cat", 1], "class_names.1: expected text of length <= 1024, found 1"),
        ("class_names", ["cat", "\ud800"], "damaged manifest .unexpected end of hex escape"),
        (
            "class_names",
            ["cat", "x" * 2000],
            r"class_names.1: .*'xxx.*x\.\.\. .String should have at most 1024 characters",
        ),
        ("sizes.file", GONE, "sizes.file: missing; expected an integer >= 0"),
        ("sizes.file", "1", "sizes.file: expected an integer >= 0 and .*, found '1'"),
        ("sha256", "0" * 63, "sha256: expected text, found '000.* .String should match pattern"),
    ],
)
def test_manifest_with_a_wrong_value_names_key_expected_and_found(folder, key, value, message):
    def change(manifest):
        *sections, name = key.split(".")
        for section in sections:
            manifest = manifest[section]
        if value is GONE:
            del manifest[name]
        else:
            manifest[name] = value

    edit(folder, change)
    with pytest.raises(ValueError, match=f"{folder / 'manifest.json'}: .*{message}"):
        gsdd_jax.load(folder)


def test_set_of_the_first_format_has_no_sum_and_loads(folder):
    edit(folder, lambda m: (m.update(format="gsdd_jax/1"), m.pop("sha256")))
    found = gsdd_jax.load(folder)
    for name in ("mean", "cholesky", "color", "opacity"):
        np.testing.assert_array_equal(getattr(found.params, name), getattr(make("gaussian").params, name))


def with_arrays(folder, change) -> None:
    stored = load_file(folder / "synset.safetensors")
    save_file(change(stored), folder / "synset.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"opacity": s["opacity"][:, :2]}, r"opacity: expected bfloat16\[4, 3\], found bfloat16\[4, 2\]"),
        (lambda s: {k: v.astype(jnp.float32) for k, v in s.items()}, r"expected bfloat16\[4, 3, 3\], found float32\[4"),
        (lambda s: {k: v for k, v in s.items() if k != "mean"}, r"mean: expected bfloat16\[4, 3, 2\], found nothing"),
        (lambda s: s | {"weights": jnp.ones(3)}, r"weights: expected nothing, found float32\[3\]"),
    ],
)
def test_arrays_that_the_manifest_does_not_describe_are_named(folder, change, message):
    with_arrays(folder, change)
    with pytest.raises(ValueError, match=message):
        gsdd_jax.load(folder)


def header_of(folder) -> tuple[dict, bytes]:
    raw = (folder / "synset.safetensors").read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def with_header(folder, header: dict, payload: bytes) -> None:
    text = json.dumps(header).encode()
    (folder / "synset.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + payload)


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h["mean"].pop("dtype"),
        lambda h: h["mean"].update(dtype="F8"),
        lambda h: h["mean"].update(shape=[-1]),
        lambda h: h["mean"].update(shape=[1 << 40] * 32),
        lambda h: h.update(more={"dtype": "U8", "shape": [0], "data_offsets": [5, 5]}),
    ],
    ids=range(5),
)
def test_damaged_header_is_one_line_that_names_the_file(folder, change):
    header, payload = header_of(folder)
    change(header)
    with_header(folder, header, payload)
    with pytest.raises(ValueError, match=f"{folder / 'synset.safetensors'}: damaged file"):
        gsdd_jax.load(folder)


def test_truncated_file_and_header_of_gigabytes_are_one_line_that_names_the_file(folder):
    file, raw = folder / "synset.safetensors", (folder / "synset.safetensors").read_bytes()
    for damaged in (b"", raw[:4], raw[:40], raw[:-1], struct.pack("<Q", 1 << 33) + bytes(100_000)):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{file}: damaged file .(Error while|expected a header of)"):
            gsdd_jax.load(folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="synset.safetensors: missing, although manifest.json is there"):
        gsdd_jax.load(folder)


def test_one_flipped_bit_in_any_byte_of_the_arrays_is_found(folder):
    file = folder / "synset.safetensors"
    raw = bytearray(file.read_bytes())
    for place in range(len(raw) - 216, len(raw), 12):
        flipped = raw.copy()
        flipped[place] ^= 1
        file.write_bytes(flipped)
        with pytest.raises(
            ValueError, match="sha256: the manifest expects [0-9a-f]{64}, found [0-9a-f]{64}: not its file"
        ):
            gsdd_jax.load(folder)


def test_set_that_is_no_regular_file_is_not_opened(folder):
    (folder / "synset.safetensors").unlink()
    os.mkfifo(folder / "synset.safetensors")
    with pytest.raises(ValueError, match="synset.safetensors: expected a regular file"):
        gsdd_jax.load(folder)


def test_places_beyond_the_coefficients_are_refused(tmp_path):
    make("sparse epitome").save(tmp_path)
    stored = load_file(tmp_path / "synset.safetensors")
    for indices in (
        stored["indices"].at[0, 0, -1].set(60_000),
        stored["indices"].at[0, 0, 0].set(stored["indices"][0, 0, 1]),
    ):
        save_file(stored | {"indices": indices}, tmp_path / "synset.safetensors")
        edit(tmp_path, lambda m: m.update(sha256=sha256(tmp_path)))
        with pytest.raises(ValueError, match="synset.safetensors: indices: expected places below 36 in rising order"):
            gsdd_jax.load(tmp_path)


def test_few_numbers_that_stand_for_gigabytes_of_zeros_are_refused(tmp_path, monkeypatch):
    make("sparse epitome").save(tmp_path)
    # 4 images, 36 places of 4 bytes each, in a file of less than 600 bytes of arrays.
    monkeypatch.setattr(sparse_epitome, "UNPACKED", 575)
    monkeypatch.setattr(sparse_epitome, "UNPACKED_PER_BYTE", 0)
    with pytest.raises(
        ValueError, match="values: expected at most 575 bytes of coefficients, zeros included, found 576"
    ):
        gsdd_jax.load(tmp_path)
    monkeypatch.setattr(sparse_epitome, "UNPACKED", 576)
    assert gsdd_jax.load(tmp_path).codec.name == "sparse_epitome"


def sha256(folder) -> str:
    return hashlib.sha256((folder / "synset.safetensors").read_bytes()).hexdigest()


def test_numbers_of_numpy_make_the_same_set(folder):
    spec = GaussianSpec(images_per_class=np.int64(2), num_points=np.int32(3))
    kind = np.int64
    codec = codecs.make(spec, image_shape=np.array(SHAPE), num_classes=kind(CLASSES), bytes_per_class=kind(BUDGET))
    SynSet(codec, make("gaussian").params, kind(BUDGET), NAMES, META).save(folder / "numpy")
    assert (folder / "numpy" / synset.MANIFEST).read_bytes() == (folder / synset.MANIFEST).read_bytes()
    assert gsdd_jax.load(folder / "numpy").images((np.int64(3), np.int32(4))).shape == (4, 3, 4, 3)
