"""train.export and train.import_gsdd: what other programs read, what is refused."""

import dataclasses
import io
import json
import pickle
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from command_line import ROOT, ends, refused
from PIL import Image

import gsdd_jax
from gsdd_jax import MergedSet, SynSet, codecs, data, labels, render, whiten
from train import config as configs
from train import experiment as experiments
from train import export, import_gsdd

NAMES = ("cat/../x", "naïve 犬", "con.")
META = {"dataset": "toy", "whiten": "meanstd", "channel_mean": [0.5, 0.25, 0.125], "channel_std": "broken"}


def pixel_set(shape=(5, 4, 3), names=NAMES, meta=META) -> SynSet:
    """Two images per class, a tenth of whose values lie beyond black or white."""
    bytes_per_class = 2 * 4 * int(np.prod(shape))
    codec = codecs.make(codecs.PixelSpec(), image_shape=shape, num_classes=len(names), bytes_per_class=bytes_per_class)
    images = np.random.default_rng(0).uniform(0, 1, (2 * len(names), *shape)).astype(np.float32)
    flat = images.reshape(-1)
    flat[::20], flat[1::20] = -0.3, 1.7
    return SynSet(codec, codec.init(None, jnp.asarray(images)), bytes_per_class, names, meta)


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    pixel_set().save(tmp_path / "run" / "export")
    return tmp_path / "run"


def eight_bits(images) -> np.ndarray:
    return np.rint(255 * np.clip(np.asarray(images, np.float64), 0, 1)).astype(np.uint8)


# What is written


def test_png_folders_hold_the_clipped_images_in_the_order_of_the_labels(run, tmp_path, capsys):
    assert ends(export, "--run", run, "--to", "png", "--out", tmp_path / "out" / ".." / "png") == 0
    said = capsys.readouterr().out
    first, second = said.splitlines()
    assert first.endswith("6 images of 5x4x3 in 3 classes; 10.00 % of all values were outside [0,1] and were clipped")
    assert second == (
        "left out, although the accuracies of the run needed it: the values as decoded (clipped to [0,1] and rounded "
        "to 8 bits; npz has them), the statistics of the channels (the set does not hold them), how test networks were "
        "trained (no config.yaml of a run beside the set)"
    )
    folders = sorted(path for path in (tmp_path / "png").iterdir() if path.is_dir())
    assert [path.name for path in folders] == ["0_cat_.._x", "1_naïve_犬", "2_con"]
    expected = eight_bits(pixel_set().params["images"])
    files = [file for folder in folders for file in sorted(folder.iterdir())]
    assert [file.name for file in files] == [f"{i}.png" for i in range(6)]
    for file, image in zip(files, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(file)), image)


def test_npz_holds_the_values_as_they_are_and_no_pickle(run, tmp_path, capsys):
    assert ends(export, "--run", run, "--to", "npz", "--out", tmp_path / "npz") == 0
    assert "10.00 % of all values were outside [0,1] and stay so" in capsys.readouterr().out
    with np.load(tmp_path / "npz" / "images.npz", allow_pickle=False) as found:
        assert sorted(found) == ["channel_mean", "class_names", "images", "labels", "whiten"]
        np.testing.assert_array_equal(found["images"], pixel_set().params["images"])
        assert found["images"].dtype == np.float32 and found["labels"].dtype == np.int32
        assert found["labels"].tolist() == [0, 0, 1, 1, 2, 2] and tuple(found["class_names"]) == NAMES
        assert found["channel_mean"].tolist() == META["channel_mean"] and str(found["whiten"]) == "meanstd"


def test_images_are_drawn_at_the_size_that_is_asked_for(run, tmp_path):
    for text, size in (("8", (8, 8)), ("3x6", (3, 6))):
        # An empty target is taken.
        (tmp_path / text).mkdir()
        assert ends(export, "--run", run, "--to", "npz", "--out", tmp_path / text, "--size", text) == 0
        with np.load(tmp_path / text / "images.npz", allow_pickle=False) as found:
            np.testing.assert_allclose(found["images"], pixel_set().images(size), atol=1e-6)


def test_huggingface_folder_is_a_table_that_says_what_its_columns_are(run, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    assert ends(export, "--run", run, "--to", "huggingface", "--out", tmp_path / "hub") == 0
    table = parquet.read_table(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["label"] == {"_type": "ClassLabel", "names": list(NAMES)} and features["image"]["_type"] == "Image"
    rows = table.to_pylist()
    assert [row["label"] for row in rows] == [0, 0, 1, 1, 2, 2] and set(rows[0]) == {"image", "label"}
    for row, image in zip(rows, eight_bits(pixel_set().params["images"]), strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))), image)
    head, text = (tmp_path / "hub" / "README.md").read_text(encoding="utf-8").split("---\n")[1:]
    assert "tags: [dataset-distillation]" in head
    assert 'Distilled from "toy" by gsdd_jax into 480 bytes per class (codec pixel).' in text


def soft_set(kind: str) -> MergedSet:
    """A set whose soft labels are those of the whole, or of one part of two."""
    first, second = pixel_set(names=("a", "b")), pixel_set(names=("c", "d", "e"))
    rng, spec = np.random.default_rng(1), labels.LabelSpec(kind="soft")
    if kind == "merged":
        return MergedSet((first, second), META, labels.pack(rng.dirichlet(np.ones(5), 10), spec))
    size = first.bytes_per_class + 16
    first = dataclasses.replace(first, bytes_per_class=size, soft=labels.pack(rng.dirichlet(np.ones(2), 4), spec))
    return MergedSet((first, dataclasses.replace(second, bytes_per_class=size)), META)


@pytest.mark.parametrize("kind", ["merged", "part"])
def test_every_form_has_the_soft_labels(kind, tmp_path, monkeypatch):
    made = soft_set(kind)
    made.save(tmp_path / "made")
    expected = np.asarray(made.soft_labels)
    assert expected.shape == (10, 5) and (kind != "part" or not expected[:4, 2:].any())
    monkeypatch.chdir(tmp_path)
    for form in export.FORMS:
        assert ends(export, "--run", "made", "--to", form, "--out", form) == 0
        assert json.loads((tmp_path / form / "metadata.json").read_text(encoding="utf-8"))["soft_labels"] is True
    with np.load("npz/images.npz", allow_pickle=False) as found:
        assert found["soft_labels"].dtype == np.float32
        np.testing.assert_array_equal(found["soft_labels"], expected)
    np.testing.assert_array_equal(np.load("png/soft_labels.npy", allow_pickle=False), expected)
    table = pytest.importorskip("pyarrow.parquet").read_table("huggingface/data/train-00000-of-00001.parquet")
    np.testing.assert_array_equal(np.float32(table["soft_label"].to_pylist()), expected)
    records = pytest.importorskip("tensorflow_datasets").builder_from_directory("tfds").as_data_source(split="train")
    np.testing.assert_array_equal([record["soft_label"] for record in records], expected)


@pytest.fixture
def zca_run(tmp_path):
    """A run directory with whiten: zca, as far as an export looks at it, and its data."""
    rng = np.random.default_rng(2)
    for split in ("train", "test"):
        for name in "ab":
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(4):
                pixels = rng.integers(0, 256, (5, 4, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{i}.png")
    source = f"data={{source: folder, path: {tmp_path / 'data'}}}"
    config = configs.load(ROOT / "configs" / "digits.yaml", [source, "whiten=zca"])
    dataset = data.load(config.data)
    config = experiments.known_data(config, dataset)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(configs.to_yaml(config))
    meta = META | {"whiten": "zca", "syn_lr": 0.125}
    pixel_set(names=("a", "b"), meta=meta).save(tmp_path / "run" / "export")
    return tmp_path / "run", dataset


def test_npz_of_a_whitened_run_maps_images_into_its_space(zca_run, tmp_path, capsys):
    run, dataset = zca_run
    assert ends(export, "--run", run, "--to", "npz", "--out", tmp_path / "npz") == 0
    assert "left out" not in capsys.readouterr().out
    with np.load(tmp_path / "npz" / "images.npz", allow_pickle=False) as found:
        own = (found["images"] - found["zca_mean"]).reshape(4, -1) @ found["zca_matrix"]
        assert float(found["syn_lr"]) == 0.125
        expected = whiten.fit("zca", dataset.train_images)(jnp.asarray(found["images"]))
    np.testing.assert_allclose(own.reshape(expected.shape), expected, atol=1e-5)
    metadata = json.loads((tmp_path / "npz" / "metadata.json").read_text(encoding="utf-8"))
    assert metadata["training"]["network"]["name"] == "convnet" and metadata["set"]["whiten"] == "zca"


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "npz", "--size", "big"], "--size: expected a side from 1 to 8192 or HEIGHTxWIDTH, found 'big'"),
        (["--to", "npz", "--size", "9000x2"], "--size: expected a side from 1 to 8192 or HEIGHTxWIDTH"),
        (["--to", "set", "--size", "8"], "--size: a set is drawn at any size later; leave it out, found '8'"),
        (["--to", "npz", "--run", "absent"], "absent: no distilled set here"),
        (["--to", "npz", "--out", "absent/out"], "--out: no such directory: absent"),
    ],
)
def test_bad_argument_is_one_line(run, tmp_path, capsys, arguments, message):
    code = ends(export, "--run", run, "--out", tmp_path / "out", *arguments)
    assert message in refused(capsys, code)
    assert not (tmp_path / "out").exists()


def test_target_that_holds_something_is_left_alone(run, tmp_path, capsys):
    code = ends(export, "--run", run, "--to", "png", "--out", run)
    assert f"--out: {run} is not empty; expected an absent or empty directory" in refused(capsys, code)
    assert [path.name for path in run.iterdir()] == ["export"]
    (tmp_path / "file").write_text("")
    code = ends(export, "--run", run, "--to", "png", "--out", tmp_path / "file")
    assert f"--out: {tmp_path / 'file'} is a file; expected an absent or empty directory" in refused(capsys, code)


def with_nan() -> SynSet:
    made = pixel_set()
    return dataclasses.replace(made, params={"images": made.params["images"].at[1, 0, 0, 0].set(jnp.nan)})


@pytest.mark.parametrize(
    ("to", "made", "message"),
    [
        ("png", with_nan(), "1 of 6 images hold NaN, which a PNG cannot; expected npz"),
        ("png", pixel_set(shape=(5, 4, 2)), "a PNG has 1 or 3 channels, the images have 2; expected npz"),
        ("tfds", pixel_set(names=("a b", "a  b")), "tfds needs classes of different names, and two of the set's are"),
        ("huggingface", pixel_set(names=("a", "a")), "huggingface needs classes of different names, and two of"),
    ],
)
def test_set_that_a_form_cannot_hold_is_refused(tmp_path, capsys, to, made, message):
    made.save(tmp_path / "set")
    assert message in refused(capsys, ends(export, "--run", tmp_path / "set", "--to", to, "--out", tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]


@pytest.mark.parametrize(
    ("module", "call", "message"),
    [
        (
            "array_record.python.array_record_module",
            lambda run: ends(export, "--run", run, "--to", "tfds", "--out", run.parent / "out"),
            "--to: tfds needs tensorflow_datasets and array_record: pip install gsdd_jax[data]",
        ),
        (
            "torch",
            lambda run: bring_in(run / "model.pth", run.parent / "set"),
            "--file: reading it needs PyTorch: pip install gsdd_jax[torch]",
        ),
    ],
)
def test_a_missing_package_says_what_to_install(run, capsys, monkeypatch, module, call, message):
    monkeypatch.setitem(sys.modules, module, None)
    assert message in refused(capsys, call(run))


# The authors' files


class Tensor:
    """Stands for one of PyTorch: what the importer asks of it."""

    def __init__(self, array):
        self.array = np.asarray(array)

    def detach(self):
        return self

    def float(self):
        return Tensor(self.array.astype(np.float32))

    cpu = detach

    def numpy(self):
        return self.array

    def __float__(self):
        return float(self.array)


def state(n=4, m=3, **changes) -> dict[str, Tensor]:
    """A state dict as the authors' code writes it: images one behind the other."""
    rng = np.random.default_rng(1)
    arrays = {
        "params.xy": rng.uniform(-1, 1, (n * m, 2)),
        "params.cholesky": rng.uniform(0, 1, (n * m, 3)),
        "params.features": rng.uniform(0, 1, (n * m, 3)),
        "_opacity": np.ones((n * m, 1)),
        "num_points_per_image": np.full(n, m, np.int64),
        "background": np.ones((n, 3)),
        "cholesky_bound": np.array([[0.5, 0, 0.5]]),
    }
    return {name: Tensor(array) for name, array in (arrays | changes).items() if array is not None}


@pytest.fixture
def load_as(monkeypatch, tmp_path):
    """Stands for PyTorch, which the tests do not need: what its ``load`` will return or raise."""

    def install(content):
        def load(file, *, map_location, weights_only):
            assert map_location == "cpu" and weights_only is True
            if isinstance(content, Exception):
                raise content
            return content

        torch = types.ModuleType("torch")
        torch.load = load
        monkeypatch.setitem(sys.modules, "torch", torch)
        (tmp_path / "model.pth").write_bytes(b"")
        return tmp_path / "model.pth"

    return install


def bring_in(file, out, *arguments) -> int:
    return ends(import_gsdd, "--file", file, "--out", out, "--size", 8, "--classes", "a", "b", *arguments)


@pytest.mark.parametrize("as_checkpoint", [False, True])
def test_gaussians_of_the_authors_keep_their_numbers_and_their_order(load_as, tmp_path, capsys, as_checkpoint):
    tensors = state()
    file = load_as({"model": tensors, "syn_lr": Tensor(0.125)} if as_checkpoint else tensors)
    assert bring_in(file, tmp_path / "set", "--dtype", "float32") == 0
    assert "4 images of 3 Gaussians, 432 bytes" in capsys.readouterr().out
    found = gsdd_jax.load(tmp_path / "set")
    assert (found.codec.images_per_class, found.class_names, found.bytes_per_class) == (2, ("a", "b"), 216)
    assert found.meta == {"source": "released GSDD code"} | ({"syn_lr": 0.125} if as_checkpoint else {})
    for leaf, name in (("mean", "params.xy"), ("cholesky", "params.cholesky"), ("color", "params.features")):
        theirs = np.float32(tensors[name].array).reshape(4, 3, -1)
        np.testing.assert_array_equal(getattr(found.params, leaf), theirs)
    assert found.params.size == (8, 8) and float(found.params.opacity.min()) == 1


def test_imported_image_is_the_sum_that_the_authors_code_draws(load_as, tmp_path):
    # One Gaussian per image, at whose center a sample of 1 x 1 lies: xy 0 at 9 px is the center of pixel 4.
    tensors = state(n=2, m=1, **{"params.xy": np.zeros((2, 2)), "params.opacity": np.array([[0.5], [1.0]])})
    file = load_as(tensors)
    assert ends(import_gsdd, "--file", file, "--out", tmp_path / "set", "--size", 9, "--classes", "a", "b") == 0
    found = gsdd_jax.load(tmp_path / "set").params
    images = render(found, supersample=1)
    theirs = np.float32(tensors["params.features"].array) * np.array([[0.5], [1.0]])
    np.testing.assert_allclose(images[:, 4, 4], theirs, atol=4e-3)
    # One pixel to the right: exp(-1/2 v) with v the xx entry of (L L^T + 1/12)^-1, L as stored in bfloat16.
    l11, l21, l22 = (np.asarray(found.cholesky, np.float64)[:, 0] + [0.5, 0, 0.5]).T
    xx, xy, yy = l11**2 + 1 / 12, l11 * l21, l21**2 + l22**2 + 1 / 12
    drop = np.exp(-0.5 * yy / (xx * yy - xy**2))
    np.testing.assert_allclose(images[:, 4, 5], np.asarray(images[:, 4, 4]) * drop[:, None], atol=1e-5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.UnpicklingError("Weights only load failed"), "is no file of tensors alone (UnpicklingError); a check"),
        ([], "--file: expected a dict of tensors, found list"),
        ({"images": Tensor(0.0)}, "--file: expected Gaussians, found images, whose whitening the file does not hold"),
        ({}, "--file: params.xy is missing; found no tensors"),
        (state(num_points_per_image=None), "num_points_per_image is missing; found _opacity, background, cholesky_b"),
        (state(num_points_per_image=[3, 3, 3, 4]), "num_points_per_image: expected equally many Gaussians for each"),
        (state(cholesky_bound=[0.5, 0, 1]), "cholesky_bound: expected (0.5, 0.0, 0.5), found [0.5, 0.0, 1.0]"),
        (state(**{"params.xy": np.zeros((12, 3))}), "params.xy: expected shape [12, 2], found [12, 3]"),
        (state(_opacity=np.ones(3)), "opacity: expected 12 numbers, found 3"),
        (state(**{"params.xy": np.full((12, 2), np.nan)}), "expected finite numbers, found NaN or infinity"),
        (state(n=3), "--classes: 3 images are not equally many for each of 2 classes"),
    ],
)
def test_file_that_does_not_match_is_refused(load_as, tmp_path, capsys, content, message):
    file = load_as(content)
    assert message in refused(capsys, bring_in(file, tmp_path / "set"))
    assert not (tmp_path / "set").exists()
    assert "--size: expected a side from 1 to 8192 pixels" in refused(capsys, bring_in(file, tmp_path, "--size", "0"))
