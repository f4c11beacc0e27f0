"""Sets of anyone: read without JAX, refused without harm; the export to other programs is in test_export."""

import ast
import dataclasses
import json
import pickle
import shutil
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

import gsdd_jax
from benchmarks import fuzz
from gsdd_jax import MergedSet, SynSet, codecs, decode_numpy, exchange, labels, synset

ROOT = Path(__file__).resolve().parent.parent
LIGHT = [place for place, (spec, _) in enumerate(fuzz.SETS) if spec.name in decode_numpy.DECODERS]
GAUSSIAN, PACKED, PIXEL, BYTES = 0, 1, 3, 14


def saved(place: int, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    fuzz.original(place)[0].write(folder)
    return folder


# Decoding without JAX


def test_sets_of_the_fuzzer_are_of_every_codec():
    assert {spec.name for spec, _ in fuzz.SETS} == set(codecs.SPECS)


@pytest.mark.parametrize("place", LIGHT)
@pytest.mark.parametrize("size", [None, (9, 5)])
def test_numpy_draws_what_jax_draws(place, size, tmp_path):
    made = fuzz.original(place)[1]
    if size and len(made.parts[0].codec.image_shape) == 4:
        size = (3, *size)
    found = decode_numpy.load(saved(place, tmp_path / "set"), size)
    assert found.images.dtype == np.float32 and found.class_names == made.class_names
    np.testing.assert_array_equal(found.labels, made.labels)
    assert found.images.std() > 0.05
    np.testing.assert_allclose(found.images, made.images(size), atol=1e-5)
    assert (found.soft_labels is None) == (made.soft is None)
    if made.soft is not None:
        assert found.soft_labels.dtype == np.float32
        np.testing.assert_array_equal(found.soft_labels, made.soft_labels)


@pytest.mark.parametrize("cutoff", [0.0, 0.1])
def test_numpy_cuts_gaussians_where_jax_does(cutoff, tmp_path):
    rng = np.random.default_rng(3)
    spec = codecs.GaussianSpec(images_per_class=1, num_points=6, dtype="float32", cutoff=cutoff, supersample=3)
    codec = codecs.make(spec, image_shape=(12, 7, 2), num_classes=2, bytes_per_class=600)
    leaves = {"mean": (2, 6, 2), "cholesky": (2, 6, 3), "color": (2, 6, 2), "opacity": (2, 6)}
    # Some centers lie outside, some shapes are needles or have a negative diagonal.
    params = codec.dequantize({name: rng.normal(0, 1.5, shape).astype(np.float32) for name, shape in leaves.items()})
    made = SynSet(codec, params, 600, ("a", "b"))
    made.save(tmp_path)
    np.testing.assert_allclose(decode_numpy.load(tmp_path).images, made.images(), atol=1e-5)


@pytest.mark.parametrize("size", [(6, 8), (9, 5)])
def test_every_byte_of_a_pixel_is_drawn_as_jax_draws_it(size, tmp_path):
    codec = codecs.make(codecs.PixelSpec(dtype="uint8"), image_shape=(6, 8, 3), num_classes=2, bytes_per_class=144)
    every = np.arange(288).astype(np.uint8).reshape(2, 6, 8, 3)
    made = SynSet(codec, codec.dequantize({"images": every}), 144, ("a", "b"))
    made.save(tmp_path)
    found = decode_numpy.load(tmp_path, size).images
    np.testing.assert_allclose(found, made.images(size), rtol=0, atol=0 if size == (6, 8) else 1e-6)
    assert size != (6, 8) or (found.min(), found.max()) == (-1, 2)


def test_nan_of_one_image_stays_there(tmp_path):
    made = fuzz.original(GAUSSIAN)[1]
    params = jax.tree.map(np.array, made.params)
    params.color[1, 0, 0] = np.nan
    SynSet(made.codec, params, made.bytes_per_class, made.class_names).save(tmp_path)
    broken = np.isnan(decode_numpy.load(tmp_path).images)
    assert broken[1].all() and not broken[[0, 2, 3]].any()


def test_codec_that_is_not_decoded_names_the_export(tmp_path):
    folder = saved(PIXEL, tmp_path / "set")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"codec": {"name": "latent"}}))
    with pytest.raises(ValueError, match="found 'latent', whose images python -m train.export writes where JAX is"):
        decode_numpy.load(folder)


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (GAUSSIAN, {"dtype": "uint8"}, "codec.dtype: expected one of float32, bfloat16, found 'uint8'"),
        (PIXEL, {"dtype": "int8"}, "codec.dtype: expected one of float32, bfloat16, uint8, found 'int8'"),
        (GAUSSIAN, {"cutoff": -1}, "codec.cutoff: expected a number >= 0 and < 1, found -1"),
        (GAUSSIAN, {"supersample": 65}, "codec.supersample: expected an integer >= 1 and <= 64, found 65"),
        (PACKED, {"order": "mixed"}, "codec.order: expected one of sorted, kept, found 'mixed'"),
        (PACKED, {"num_points": 4097}, "codec.num_points: expected an integer <= 4096, found 4097"),
    ],
)
def test_numpy_names_a_setting_that_no_set_has(place, change, message, tmp_path):
    folder = saved(place, tmp_path / "set")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["codec"].update(change)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=f"manifest.json: {message}"):
        decode_numpy.load(folder)


def alone(program: str, tmp_path: Path) -> subprocess.CompletedProcess:
    """Runs a program where this library is installed with what reading needs, and nothing else."""
    packages = tmp_path / "packages"
    packages.mkdir()
    home = Path(np.__file__).parent.parent
    pydantic = ("pydantic", "pydantic_core", "annotated_types", "typing_extensions.py", "typing_inspection")
    for name in ("numpy", "numpy.libs", "safetensors", *pydantic):
        if (home / name).exists():
            (packages / name).symlink_to(home / name)
    shutil.copytree(ROOT / "gsdd_jax", packages / "gsdd_jax", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(packages)!r})\n{program}"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_jax_is_not_needed_to_read_a_set(tmp_path):
    folder = saved(PACKED, tmp_path / "set")
    program = f"""
import gsdd_jax.decode_numpy
found = gsdd_jax.decode_numpy.load({str(folder)!r})
assert not {{"jax", "ml_dtypes"}} & set(sys.modules)
print(found.images.shape, found.labels.tolist(), repr(float(found.images.sum())))
import gsdd_jax.torch_dataset
"""
    done = alone(program, tmp_path)
    shape, labels, total = (4, 6, 8, 3), [0, 0, 1, 1], float(decode_numpy.load(folder).images.sum())
    assert done.stdout == f"{shape} {labels} {total!r}\n", done.stderr
    assert done.stderr.endswith("ImportError: gsdd_jax.torch_dataset needs PyTorch: pip install gsdd_jax[torch]\n")


@pytest.fixture
def stand_in(monkeypatch):
    """Stands for PyTorch, which the tests do not need: a base class, and arrays for tensors."""
    torch, data = types.ModuleType("torch"), types.ModuleType("torch.utils.data")
    torch.from_numpy = lambda array: types.SimpleNamespace(array=array)
    data.Dataset = type("Dataset", (), {})
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch.utils", types.ModuleType("torch.utils"))
    monkeypatch.setitem(sys.modules, "torch.utils.data", data)
    yield data.Dataset
    sys.modules.pop("gsdd_jax.torch_dataset", None)


def test_torch_dataset_gives_channels_first_and_labels_and_decodes_once(stand_in, tmp_path, monkeypatch):
    from gsdd_jax.torch_dataset import DistilledSet

    folder = saved(GAUSSIAN, tmp_path / "set")
    images = decode_numpy.load(folder, (9, 5)).images
    loads = []
    load = decode_numpy.load
    monkeypatch.setattr(decode_numpy, "load", lambda *arguments: loads.append(arguments) or load(*arguments))
    damaged = saved(GAUSSIAN, tmp_path / "damaged")
    (damaged / "synset.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="synset.safetensors: damaged file"):
        DistilledSet(damaged)
    found = DistilledSet(folder, (9, 5))
    assert isinstance(found, stand_in) and len(found) == 4 and found.class_names == ("cat", "naïve 犬") and not loads
    assert found.mean == (0.5, 0.25, 0.125) and found.std is None
    again = pickle.loads(pickle.dumps(found))
    for dataset in (found, again):
        for i in (0, 3, -1):
            image, label = dataset[i]
            assert image.array.dtype == np.float32 and image.array.flags.c_contiguous and type(label) is int
            np.testing.assert_array_equal(image.array, images[i].transpose(2, 0, 1))
            assert label == [0, 0, 1, 1][i]
    assert len(loads) == 2
    for beyond in (4, -5):
        with pytest.raises(IndexError):
            found[beyond]
    assert len(list(found)) == 4 and found[np.int64(3)][1] == 1
    with pytest.raises(TypeError):
        found[0:2]


@pytest.mark.parametrize("place", [GAUSSIAN, PIXEL])
def test_torch_dataset_hands_out_copies(stand_in, place, tmp_path):
    from gsdd_jax.torch_dataset import DistilledSet

    expected = decode_numpy.load(saved(place, tmp_path / "set"))
    found, seen, soft = DistilledSet(tmp_path / "set"), [], expected.soft_labels

    def spoil(tensor):
        if not isinstance(tensor, int):
            seen.append(tensor.array.copy())
            tensor.array[...] = 7
        return tensor

    for _ in range(3):
        found.transform = found.target_transform = spoil
        found[1]
        found.labels[...] = 1
        if soft is not None:
            found.soft_labels[...] = 0
    np.testing.assert_array_equal(found.labels, expected.labels)
    handed = [expected.images[1].transpose(2, 0, 1)] + ([] if soft is None else [soft[1]])
    for array, want in zip(seen, handed * 3, strict=True):
        np.testing.assert_array_equal(array, want)


def merged_set(kind: str, folder: Path) -> MergedSet:
    """Parts of different codecs, with soft labels of the whole, of a part, or without any."""
    first, second = fuzz.original(GAUSSIAN)[1], dataclasses.replace(fuzz.original(BYTES)[1], class_names=("x", "y"))
    soft = None
    if kind == "whole":
        rows = np.random.default_rng(3).dirichlet(np.ones(4), len(first.labels) + len(second.labels))
        soft = labels.pack(rows, labels.LabelSpec(kind="soft", dtype="bfloat16", top_k=2))
    elif kind == "part":
        rows = labels.pack(np.random.default_rng(3).dirichlet(np.ones(2), len(first.labels)), labels.LabelSpec())
        first = dataclasses.replace(first, soft=rows)
    made = MergedSet((first, second), {"channel_mean": [0.5, 0.25, 1], "channel_std": [1.0, 2.0, 0.5]}, soft)
    made.save(folder)
    return made


@pytest.mark.parametrize("kind", ["none", "whole", "part"])
@pytest.mark.parametrize("size", [None, (9, 5)])
def test_merged_set_is_read_without_jax_as_with_it(stand_in, kind, size, tmp_path):
    from gsdd_jax.torch_dataset import DistilledSet

    made = merged_set(kind, tmp_path)
    found, dataset = decode_numpy.load(tmp_path, size), DistilledSet(tmp_path, size)
    np.testing.assert_allclose(found.images, made.images(size), atol=1e-5)
    assert found.labels.tolist() == made.labels.tolist() == [0, 0, 1, 1, 2, 2, 2, 3, 3, 3]
    assert found.class_names == dataset.class_names == made.class_names
    assert (dataset.mean, dataset.std) == ((0.5, 0.25, 1.0), (1.0, 2.0, 0.5)) and len(dataset) == 10
    image, label = dataset[7]
    np.testing.assert_array_equal(image.array, found.images[7].transpose(2, 0, 1))
    if kind == "none":
        assert found.soft_labels is made.soft_labels is None and label == 3
    else:
        np.testing.assert_array_equal(found.soft_labels, gsdd_jax.load(tmp_path).soft_labels)
        np.testing.assert_array_equal(label.array, found.soft_labels[7])


@pytest.mark.parametrize("load", [gsdd_jax.load, decode_numpy.load])
def test_damaged_merged_set_is_refused_with_and_without_jax(load, tmp_path):
    merged_set("whole", tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    part = manifest["parts"][0]
    for change, message in (
        ({"class_names": ["a", "b", "x", "y"]}, "manifest.json: class_names: expected those of the parts"),
        ({"meta": 5}, "manifest.json: meta: expected a mapping, found 5"),
        ({"parts": []}, "manifest.json: parts: expected a list of length >= 1"),
        ({"parts": [part, part]}, "(parts: class 'cat' is there twice|label_indices: expected)"),
        ({"parts": ["../x"]}, "manifest.json: parts.0: expected text, found '../x'"),
        ({"labels_sha256": "0" * 64}, "sha256: the manifest expects 000"),
        ({"format": "gsdd_jax merged/1"}, "manifest.json: labels: expected labels, labels_file and labels_sha256 in"),
    ):
        (tmp_path / "manifest.json").write_text(json.dumps(manifest | change))
        with pytest.raises(ValueError, match=message):
            load(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"parts": [part, "absent"]}))
    with pytest.raises(FileNotFoundError, match="absent: missing, although manifest.json names it"):
        load(tmp_path)


SETS = [*ROOT.glob("benchmarks/results/*/export"), *ROOT.glob("sets/*/export"), ROOT / "notebooks" / "digits_set"]


@pytest.mark.parametrize("folder", [folder for folder in SETS if (folder / synset.ARRAYS).exists()], ids=str)
def test_sets_of_before_are_read_and_written_bit_for_bit(folder):
    raw, manifest = (folder / synset.ARRAYS).read_bytes(), json.loads((folder / synset.MANIFEST).read_text())
    file = exchange.read(raw)
    arrays = exchange.narrowed(file.values(manifest["sizes"], manifest.get("sha256", "")), file.arrays)
    assert exchange.serialize(arrays) == raw


# No code in data


class Bomb:
    """Makes a directory where it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.mkdir, (self.path,)


@pytest.mark.parametrize("load", [gsdd_jax.load, decode_numpy.load])
def test_pickle_in_place_of_a_set_or_of_a_file_is_refused_unread(load, tmp_path):
    exploded = tmp_path / "exploded"
    for name in ("manifest.json", "synset.safetensors"):
        for protocol in (0, 5):
            folder = saved(PIXEL, tmp_path / "set")
            (folder / name).write_bytes(pickle.dumps(Bomb(exploded), protocol))
            with pytest.raises(ValueError, match=rf"{name}: damaged (manifest|file) \("):
                load(folder)
            with pytest.raises(FileNotFoundError, match=f"{name}: no distilled set here"):
                load(folder / name)
            assert not exploded.exists()
    pickle.loads((folder / name).read_bytes())
    assert exploded.exists()


PICKLING = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}


def running_data(source: str) -> list[str]:
    """Lists what a source does that may run what a file names."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [f"{node.lineno}: {alias.name}" for alias in node.names if alias.name.split(".")[0] in PICKLING]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PICKLING:
            found.append(f"{node.lineno}: {node.module}")
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            settings = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            wanted = {"torch.load": "weights_only", "np.load": "allow_pickle", "numpy.load": "allow_pickle"}.get(name)
            allowed = {"weights_only": "True", "allow_pickle": "False"}
            safe = wanted is None or settings.get(wanted) == allowed[wanted]
            if name in ("eval", "exec") or settings.get("allow_pickle") == "True" or not safe:
                found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def test_no_source_runs_what_data_name():
    files = [file for name in ("gsdd_jax", "kernels", "train", "benchmarks") for file in (ROOT / name).rglob("*.py")]
    assert len(files) > 60
    found = [f"{file}:{line}" for file in files for line in running_data(file.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


def test_checker_finds_what_runs_data_and_accepts_reading():
    wrong = """import pickle
from joblib import load
np.load('a')
numpy.load('a', allow_pickle=True)
read('a', allow_pickle=True)
torch.load('a')
torch.load('a', weights_only=False)
eval('1')
exec('1')"""
    assert len(running_data(wrong)) == 9
    assert not running_data("np.load('a', allow_pickle=False)\ntorch.load('a', weights_only=True)\nmodel.eval()")


# The fuzzer, in short


def test_mutants_are_read_or_refused_and_nothing_else(tmp_path, monkeypatch):
    # Those that were made above.
    monkeypatch.setattr(fuzz, "PLACES", tuple(LIGHT))
    found = [fuzz.judge(index, 1, tmp_path) for index in range(130)]
    assert not [verdict for verdict in found if verdict["outcome"] == "failure"]
    kinds = {verdict["kind"].split(" ")[0] for verdict in found}
    assert kinds == set(fuzz.KINDS)
    outcomes = [verdict["outcome"] for verdict in found]
    assert outcomes.count("refused") > 80 and outcomes.count("other") > 0


def test_fuzzer_tells_a_failure_from_a_refusal(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "PLACES", (PIXEL,))

    def fail(*_):
        raise KeyError("codec")

    fuzz.original(PIXEL)  # is read once, while reading works
    monkeypatch.setattr(synset, "read", fail)
    verdict = fuzz.judge(0, 0, tmp_path)
    assert (verdict["outcome"], verdict["message"]) == ("failure", "by NumPy KeyError: 'codec'")
    assert fuzz.summary([verdict])["failures"] == [verdict]


def test_mutants_are_drawn_anew_from_their_number(monkeypatch):
    monkeypatch.setattr(fuzz, "PLACES", (PIXEL, GAUSSIAN))
    first, second, other = (fuzz.mutate(np.random.default_rng([5, i])) for i in (9, 9, 10))
    assert first == second != other
