"""Exports as other programs read them; each test needs the package of its reader: ``make readers``."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

import gsdd_jax
from gsdd_jax import MergedSet, SynSet, codecs, labels
from gsdd_jax.data.decode import Converter
from gsdd_jax.data.tfds import open_tfds
from train import export

pytestmark = [
    # Of the readers' own making.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

# More than ten, for the order of 0, 1, 10, 2; what file systems, YAML, JSON and lists of lines do not take.
NAMES = ("a/b", "cat 😀", "naïve 犬", "\"q' \\", ".dot", "con.", "x" * 200, "a:b", "- 1", "null", "two\nlines", "b")


def made(soft: bool, channels: int = 3, names=NAMES) -> SynSet:
    shape, k = (5, 4, channels), len(names)
    each = 2 * 4 * int(np.prod(shape)) + (2 * 4 * k if soft else 0)
    codec = codecs.make(codecs.PixelSpec(images_per_class=2), image_shape=shape, num_classes=k, bytes_per_class=each)
    rng = np.random.default_rng(k)
    images = rng.uniform(-0.1, 1.1, (2 * k, *shape)).astype(np.float32)
    rows = labels.pack(rng.dirichlet(np.ones(k), 2 * k), labels.LabelSpec(kind="soft")) if soft else None
    return SynSet(codec, codec.dequantize({"images": images}), each, names, {"channel_mean": [0.5] * channels}, rows)


@pytest.fixture(scope="module", params=["soft", "hard", "gray", "merged"])
def exported(request, tmp_path_factory):
    """``(set, folder, export)``, where ``export(form)`` is the folder of a form."""
    folder = tmp_path_factory.mktemp("set")
    if request.param == "merged":
        # One part with soft labels and one without, of one budget.
        first, second = made(True, names=NAMES[:6]), made(False, names=NAMES[6:])
        found = MergedSet((first, dataclasses.replace(second, bytes_per_class=first.bytes_per_class)))
    else:
        found = made(request.param == "soft", 1 if request.param == "gray" else 3)
    found.save(folder / "set")

    def write(form):
        target = folder / form
        if not target.exists():
            assert export.main(["--run", str(folder / "set"), "--to", form, "--out", str(target)]) == 0
        return target

    return gsdd_jax.load(folder / "set"), folder / "set", write


def eight_bits(found) -> np.ndarray:
    return np.rint(255 * np.clip(np.asarray(found.images()), 0, 1)).astype(np.uint8)


def assert_images(pictures, found) -> None:
    channels = found.parts[0].codec.image_shape[-1]
    shown = np.stack([np.asarray(each) for each in pictures]).reshape(-1, 5, 4, channels)
    np.testing.assert_array_equal(shown, eight_bits(found))


def test_datasets_reads_images_names_and_soft_labels(exported, tmp_path):
    library = pytest.importorskip("datasets")
    found, _, write = exported
    read = library.load_dataset(str(write("huggingface")), cache_dir=str(tmp_path))["train"]
    assert type(read.features["label"]) is library.ClassLabel and tuple(read.features["label"].names) == NAMES
    assert read["label"][:] == found.labels.tolist()
    assert_images(read["image"], found)
    assert ("soft_label" in read.features) == (found.soft_labels is not None)
    if found.soft_labels is not None:
        np.testing.assert_array_equal(np.float32(read["soft_label"][:]), found.soft_labels)


def test_datasets_reads_a_folder_per_class_in_the_order_of_the_labels(exported, tmp_path):
    library = pytest.importorskip("datasets")
    found, _, write = exported
    read = library.load_dataset(str(write("png")), cache_dir=str(tmp_path))["train"]
    assert read.features["label"].names == export.folder_names(NAMES)
    assert read["label"][:] == found.labels.tolist()
    assert_images(read["image"], found)


def test_image_folder_reads_a_folder_per_class_whose_order_the_soft_labels_have(exported):
    library = pytest.importorskip("torchvision.datasets")
    found, _, write = exported
    read = library.ImageFolder(str(write("png")), loader=Image.open)
    assert read.targets == found.labels.tolist() and read.classes == export.folder_names(NAMES)
    assert_images([image for image, _ in read], found)
    assert [int(path.split("/")[-1].split(".")[0]) for path, _ in read.samples] == list(range(len(read)))
    if found.soft_labels is not None:
        np.testing.assert_array_equal(np.load(write("png") / "soft_labels.npy", allow_pickle=False), found.soft_labels)


def test_tfds_and_our_own_reader_read_images_and_tfds_soft_labels(exported):
    library = pytest.importorskip("tensorflow_datasets")
    found, _, write = exported
    builder = library.builder_from_directory(str(write("tfds")))
    records = list(builder.as_data_source(split="train"))
    assert [record["label"] for record in records] == found.labels.tolist()
    assert_images([record["image"] for record in records], found)
    assert builder.info.features["label"].names == [" ".join(name.split()) for name in NAMES]
    assert tuple(builder.info.metadata["class_names"]) == NAMES
    assert ("soft_label" in builder.info.features) == (found.soft_labels is not None)
    if found.soft_labels is not None:
        np.testing.assert_array_equal([record["soft_label"] for record in records], found.soft_labels)
    source = open_tfds(path=write("tfds"), test_split="train")
    assert (source.train.size, source.class_names) == (len(records), tuple(builder.info.features["label"].names))
    convert = Converter(resolution=0, resize="crop", channels=source.channels)
    assert_images([pixels for _, pixels in source.train.read(np.arange(len(records)), convert)], found)


def normalized(image):
    return image.sub_(0.5).div_(0.25)


def test_data_loader_gives_batches_and_in_place_changes_stay_in_them(exported):
    torch = pytest.importorskip("torch")
    from gsdd_jax.torch_dataset import DistilledSet

    found, folder, _ = exported
    dataset, merged = DistilledSet(folder, transform=normalized), isinstance(found, MergedSet)
    expected = (np.asarray(found.images()).transpose(0, 3, 1, 2) - 0.5) / 0.25
    soft = found.soft_labels
    # A process with JAX must not be forked; one of the sets is enough, since workers start slowly.
    workers = {"num_workers": 2, "multiprocessing_context": "spawn"} if merged else {}
    for _ in range(1 if merged else 2):
        loader = torch.utils.data.DataLoader(dataset, batch_size=5, **workers)
        images, targets = (torch.cat(parts) for parts in zip(*loader, strict=True))
        np.testing.assert_allclose(images.numpy(), expected, atol=1e-5)
        np.testing.assert_array_equal(targets.numpy(), found.labels if soft is None else soft)
        assert torch.isfinite(torch.nn.CrossEntropyLoss()(torch.zeros(len(images), len(NAMES)), targets))
    if soft is not None:
        dataset[0][1].zero_()
        np.testing.assert_array_equal(dataset[0][1].numpy(), soft[0])
    assert len(list(dataset)) == len(dataset) and dataset[-1][0].shape == dataset[np.int64(0)][0].shape
    assert dataset.mean == (None if merged else (0.5,) * len(dataset[0][0])) and dataset.std is None
