import functools
import json
import pickle
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import load_file, save_file

import gsdd_jax
from gsdd_jax import SynSet, codecs, synset
from gsdd_jax.codecs import (
    DownscaleSpec,
    FactorSpec,
    FrequencySpec,
    GaussianSpec,
    LatentSpec,
    MemorySpec,
    NeuralFieldSpec,
    PackedGaussianSpec,
    PixelSpec,
    SparseEpitomeSpec,
    SpectralSpec,
)
from gsdd_jax.gaussians import Gaussians

pytestmark = pytest.mark.usefixtures("lazy_compiler")

SHAPE, CLASSES, BUDGET = (6, 8, 3), 2, 1152
NAMES = ("cat", "naïve 犬")
META = {"dataset": "toy", "channel_mean": [0.5, 0.25, 0.125]}
SPECS = {
    "gaussian": GaussianSpec(gpc=2, num_points=3),
    "gaussian float32": GaussianSpec(gpc=1, dtype="float32", num_points=3),
    "packed": PackedGaussianSpec(gpc=2, num_points=5),
    "packed in order": PackedGaussianSpec(gpc=1, num_points=3, order="kept", bits_mean=7, ranges="fitted"),
    "pixel": PixelSpec(ipc=1),
    "pixel bfloat16": PixelSpec(dtype="bfloat16", ipc=2),
    "downscale": DownscaleSpec(factor=2),
    "frequency": FrequencySpec(coefficients=5, images_per_class=3),
    "frequency bits": FrequencySpec(coefficients=9, images_per_class=2),
    "neural field": NeuralFieldSpec(layers=2, width=3, images_per_class=2),
    "factor": FactorSpec(hallucinators=1, base_channels=1, images_per_class=1, dtype="bfloat16"),
    "memory": MemorySpec(bases=3, images_per_class=3),
    "sparse epitome": SparseEpitomeSpec(
        patch=2, width=5, blocks=1, heads=1, tokens=3, nonzeros=9, images_per_class=2, dtype="bfloat16"
    ),
    "spectral": SpectralSpec(matrices=1, rank_height=3, rank_width=4, images_per_class=2),
    "latent": LatentSpec(decoder="small", width=4, latent_dim=3, lpc=2),
}
# Codecs that cannot draw SHAPE.
SHAPES = {"latent": (8, 8, 3)}


@functools.cache
def make(name: str) -> SynSet:
    shape = SHAPES.get(SPECS[name].name, SHAPE)
    codec = codecs.make(SPECS[name], image_shape=shape, num_classes=CLASSES, bytes_per_class=BUDGET)
    images = np.random.default_rng(0).uniform(0, 1, (codec.num_images, *shape)).astype(np.float32)
    params = jax.jit(codec.init)(jax.random.key(0), images)
    # Params of a set are at stored precision.
    params = codec.loaded(codec.stored(params))
    return SynSet(codec, params, BUDGET, NAMES, META)


@pytest.fixture(scope="module", params=SPECS)
def saved(request, tmp_path_factory):
    """``(set, folder, sizes)``."""
    made, folder = make(request.param), tmp_path_factory.mktemp("synset")
    return made, folder, made.save(folder)


@pytest.fixture
def folder(tmp_path):
    """A small good set, to be damaged."""
    make("gaussian").save(tmp_path)
    return tmp_path


def edit(folder, change) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_contract_table_covers_the_registry():
    assert {spec.name for spec in SPECS.values()} == set(codecs.SPECS)


def test_loaded_set_is_the_saved_one(saved):
    made, folder, _ = saved
    loaded = gsdd_jax.load(folder)
    assert loaded.codec.spec == made.codec.spec and loaded.codec.name == made.codec.name
    assert loaded.codec.image_shape == made.codec.image_shape and loaded.codec.num_classes == CLASSES
    assert (loaded.bytes_per_class, loaded.class_names, loaded.meta) == (BUDGET, NAMES, META)
    assert loaded.nbytes == made.nbytes
    np.testing.assert_array_equal(loaded.labels, made.labels)
    np.testing.assert_array_equal(loaded.images(), made.images())


def test_save_of_a_loaded_set_writes_the_same_bytes(saved, tmp_path):
    _, folder, sizes = saved
    assert gsdd_jax.load(folder).save(tmp_path) == sizes
    for file in ("synset.safetensors", "manifest.json"):
        assert (tmp_path / file).read_bytes() == (folder / file).read_bytes()


def test_labels_are_class_major_int32(saved):
    made = saved[0]
    per_class = made.codec.images_per_class
    assert made.labels.dtype == np.int32
    assert made.labels.tolist() == [0] * per_class + [1] * per_class
    assert made.images().shape == (2 * per_class, *made.codec.image_shape)


def test_file_is_payload_plus_header(saved):
    made, folder, sizes = saved
    raw = (folder / "synset.safetensors").read_bytes()
    header = 8 + struct.unpack("<Q", raw[:8])[0]
    assert sizes == {
        "payload": made.nbytes,
        "header": header,
        "file": len(raw),
        "manifest": (folder / "manifest.json").stat().st_size,
    }
    assert len(raw) == made.nbytes + header
    assert json.loads((folder / "manifest.json").read_text())["sizes"]["payload"] == made.nbytes
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "synset.safetensors"]


def test_images_at_another_size_survive_the_file(saved):
    made, folder, _ = saved
    large = gsdd_jax.load(folder).images((12, 10))
    assert large.shape == (made.codec.num_images, 12, 10, 3)
    np.testing.assert_array_equal(large, made.images((12, 10)))


def test_run_directory_is_read_by_its_export(tmp_path):
    make("pixel").save(tmp_path / "export")
    np.testing.assert_array_equal(gsdd_jax.load(tmp_path).images(), make("pixel").images())
    np.testing.assert_array_equal(gsdd_jax.load(str(tmp_path)).images(), make("pixel").images())


def test_saving_again_replaces_the_set(folder):
    other = make("pixel")
    other.save(folder)
    assert gsdd_jax.load(folder).codec.name == "pixel"


def test_crash_while_saving_leaves_the_old_set(folder, monkeypatch):
    before = {file: (folder / file).read_bytes() for file in ("synset.safetensors", "manifest.json")}

    def crash(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(synset, "save_file", crash)
    with pytest.raises(OSError, match="No space left"):
        make("pixel").save(folder)
    monkeypatch.undo()
    assert {file: (folder / file).read_bytes() for file in before} == before
    assert isinstance(gsdd_jax.load(folder).params, Gaussians)


def test_loading_never_unpickles(folder, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a distilled set must be read as data")

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


def test_arrays_missing(folder):
    (folder / "synset.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="synset.safetensors: missing, although manifest.json is there"):
        gsdd_jax.load(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", r"damaged manifest \(JSONDecodeError"),
        (b'{"format": "gsdd_jax/1",', r"damaged manifest \(JSONDecodeError"),
        (b"\xff\xfe", r"damaged manifest \(UnicodeDecodeError"),
        (b"[1, 2]", r"damaged manifest \(TypeError"),
        (b"7", r"damaged manifest \(TypeError"),
        (b"{}", r"damaged manifest \(KeyError: 'format'"),
    ],
)
def test_damaged_manifest(folder, text, message):
    (folder / "manifest.json").write_bytes(text)
    with pytest.raises(ValueError, match=f"{folder / 'manifest.json'}: {message}"):
        gsdd_jax.load(folder)


@pytest.mark.parametrize("found", ["gsdd_jax/2", "other", None, 1])
def test_other_format_names_both(folder, found):
    edit(folder, lambda m: m.update(format=found))
    with pytest.raises(ValueError, match=f"manifest.json: format: expected 'gsdd_jax/1', found {found!r}"):
        gsdd_jax.load(folder)


@pytest.mark.parametrize("name", ["wavelet", None])
def test_unknown_codec_lists_the_known_ones(folder, name):
    edit(folder, lambda m: m["codec"].update(name=name))
    with pytest.raises(
        ValueError, match=f"manifest.json: codec.name: expected one of {', '.join(codecs.SPECS)}; found {name!r}"
    ):
        gsdd_jax.load(folder)


@pytest.mark.parametrize("key", ["codec", "image_shape", "num_classes", "bytes_per_class", "class_names", "meta"])
def test_manifest_without_a_key_names_it(folder, key):
    edit(folder, lambda m: m.pop(key))
    with pytest.raises(ValueError, match=f"damaged manifest .*{key}"):
        gsdd_jax.load(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["codec"].update(surprise=1),
        lambda m: m["codec"].update(gpc="many"),
        lambda m: m.update(image_shape=[6, 8]),
        lambda m: m.update(image_shape="large"),
        lambda m: m.update(num_classes="two"),
        lambda m: m.update(bytes_per_class=None),
        lambda m: m.update(bytes_per_class=-1),
        lambda m: m.update(class_names=None),
        lambda m: m.update(class_names=["cat"]),
        lambda m: m.update(num_classes=3),
    ],
)
def test_manifest_with_a_wrong_value_is_damaged(folder, change):
    edit(folder, change)
    with pytest.raises(ValueError, match=f"{folder / 'manifest.json'}: damaged manifest"):
        gsdd_jax.load(folder)


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_truncated_arrays(folder, keep):
    file = folder / "synset.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"{file}: damaged file"):
        gsdd_jax.load(folder)


def test_arrays_of_another_shape_name_the_leaf(folder):
    stored = load_file(folder / "synset.safetensors")
    save_file(stored | {"opacity": stored["opacity"][:, :2]}, folder / "synset.safetensors")
    with pytest.raises(ValueError, match=r"opacity: expected bfloat16\[4, 3\], found bfloat16\[4, 2\]"):
        gsdd_jax.load(folder)


def test_arrays_of_another_precision_name_the_leaf(folder):
    stored = load_file(folder / "synset.safetensors")
    save_file({k: v.astype(jnp.float32) for k, v in stored.items()}, folder / "synset.safetensors")
    with pytest.raises(ValueError, match=r"cholesky: expected bfloat16\[4, 3, 3\], found float32\[4, 3, 3\]"):
        gsdd_jax.load(folder)


def test_missing_and_surplus_arrays_are_named(folder):
    stored = load_file(folder / "synset.safetensors")
    save_file({k: v for k, v in stored.items() if k != "mean"}, folder / "synset.safetensors")
    with pytest.raises(ValueError, match=r"mean: expected bfloat16\[4, 3, 2\], found nothing"):
        gsdd_jax.load(folder)
    save_file(stored | {"weights": jnp.ones(3)}, folder / "synset.safetensors")
    with pytest.raises(ValueError, match=r"weights: expected nothing, found float32\[3\]"):
        gsdd_jax.load(folder)


def test_files_of_two_sets_do_not_pass_for_one(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    make("pixel").save(other)
    (folder / "manifest.json").write_bytes((other / "manifest.json").read_bytes())
    with pytest.raises(ValueError, match=r"synset.safetensors: cholesky: expected nothing"):
        gsdd_jax.load(folder)
